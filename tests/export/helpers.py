"""Small models to export: an export takes seconds, most of them per layer."""

from tests.helpers import CACHES, TINY, build, tiny_config


SHORT = TINY | {"num_hidden_layers": 3, "reduction_layers": [1]}
# ATS keeps as many tokens as the image asks for; padded to its bound its shapes are static, too. ToFu would only drop tokens.
OPTIONS = {"ats": {"pad_to_bound": True}, "tofu": {"merge_from": 0}}


def small_model(method, **changes):
    """Return a model with the cache and the CLA head, in float32."""
    options = SHORT | CACHES["clca"]
    if method is not None:
        options |= {"reduction": method, "keep_rate": 0.5}
    options |= {"reduction_kwargs": OPTIONS.get(method)}
    return build(tiny_config(**options | changes)).float()
