"""transformers' own common tests, run on the models of `clca`: `python -m hf_tests`, or `make hf-tests`.

Their code is not part of this repository. It is fetched from the source distribution of the installed version.
"""
