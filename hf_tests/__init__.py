"""transformers' common tests on the models of `clca`: `python -m hf_tests`, or `make hf-tests`.

Their code is not part of this repository; it is downloaded from the source distribution of the installed version.
"""
