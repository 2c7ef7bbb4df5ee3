"""The page of a HuggingFace Space: `ufgir app` with the model that the variable MODEL_ID of the Space names."""

import os

from ufgir.app import launch_page, make_page


# Visitors may load other public models of the Hub, but no folders of this machine, nor what only its token may read.
page = make_page(os.environ.get("MODEL_ID") or None, os.environ.get("EXAMPLES") or None, folders=False)

if __name__ == "__main__":
    launch_page(page)
