"""transformers' common tests that are skipped, with reasons. Any other skip fails the run."""

import re
from typing import NamedTuple


class Skip(NamedTuple):
    """Skipped tests: explanation, and patterns of their names and of transformers' reason."""

    why: str
    reason: str
    test: str = ""


# Tests of our own tasks are not listed: a skip would mean that the model could not be loaded.
_OTHER_PIPELINES = r"^test_pipeline_(?!image_classification|image_feature_extraction)"

SKIPS = [
    Skip("pipelines of other tasks", "", _OTHER_PIPELINES),
    Skip("needs an accelerator (GPU)", r"requires (multiple )?accelerator|requires MPS|requires CUDA|requires .*GPU"),
    Skip("needs an accelerator and flash-attn", r"requires Flash Attention"),
    Skip("needs an accelerator and the kernels library", r"requires the kernels library"),
    Skip("needs an accelerator; its inputs are words", r"test is slow", r"^test_torch_compile_for_training$"),
    Skip("needs deepspeed; for models with a vocabulary", r"requires deepspeed"),
    Skip("for models with a vocabulary", r"test_resize_embeddings is set|use `inputs_embeds`|language modeling head"),
    Skip("for models with a resizable table of word positions", r"^Model does not have position embeddings"),
    Skip("for rotary position embeddings", r"RoPE"),
    Skip("for attention in a sliding window", r"sliding window"),
    Skip("for mixtures of experts", r"grouped_mm|sparse experts|output_router_logits"),
    Skip("for models composed of several", "", r"(?<!non_)composite|subconfig"),
    Skip("for models with a plan for tensor parallelism; ViT has none", r"does not have a TP plan"),
    Skip("for models that keep parts in float32", r"_keep_in_fp32_modules"),
    Skip(
        "needs a linear layer, but the CLA head ends in a convolution; `..._of_any_head` replaces it",
        r"Could not locate the classification Linear layer",
    ),
]


def explain(test: str, reason: str) -> str | None:
    """Return why `test` is skipped with `reason`; None if it is not in `SKIPS`."""
    for skip in SKIPS:
        if re.search(skip.test, test) and re.search(skip.reason, reason):
            return skip.why
    return None
