"""HuggingFace Space that runs the page of `ufgir app` with the model in the variable MODEL_ID of the Space."""

import os

from ufgir.app import launch_page, make_page


# Visitors may load other public models of the Hub, but no folders of this machine and no private models.
page = make_page(os.environ.get("MODEL_ID") or None, os.environ.get("EXAMPLES") or None, folders=False)

if __name__ == "__main__":
    launch_page(page)
