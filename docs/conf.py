"""The documentation site: `make docs`, or `sphinx-build -W --keep-going docs docs/_build/html`."""

import gc
import os
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_extensions")]
os.environ["COLUMNS"] = "90"  # line width of argparse
os.environ["HF_HUB_OFFLINE"] = "1"  # imports must not access the network

from clca import __version__  # noqa: E402


gc.freeze()  # otherwise a third of the build is spent on garbage collection of torch's objects


project = "CLCA for transformers"
author = "the CLCA for transformers authors"
copyright = f"2026, {author}"
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "docstrings",
    "from_code",
    "search_numbers",
]
exclude_patterns = ["_build", "_extensions", "**.ipynb_checkpoints"]
nitpicky = True
# Types of this project in signatures must be found. Types of other packages are not checked: their inventories would be downloaded.
nitpick_ignore_regex = [
    ("py:obj", ".*"),  # `words` of docstrings, which are not always names
    ("py:.*", r"(?!(clca|ufgir|dataset_scripts|run_ufgir)\b).*"),
    ("py:.*", r".*\._\w+"),
]

html_theme = "furo"
_CODE = {"code-font-size": "var(--font-size--small--2)"}
html_theme_options = {"light_css_variables": _CODE, "dark_css_variables": _CODE}
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_search_scorer = str(ROOT / "docs" / "_extensions" / "search.js")
html_copy_source = False
html_show_sphinx = False

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks contain their outputs; tests/project/test_notebooks.py runs them

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True, "ignore-module-all": True}
autodoc_inherit_docstrings = False  # an override without docstring behaves as documented in the base class
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
