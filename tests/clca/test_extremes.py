"""Images with extreme values give finite results, and an empty batch is refused."""

from itertools import product
from typing import Any

import pytest
import torch

from clca.heads_clca import HEADS
from tests.helpers import METHODS, OPTIONS, images, slow_unless, tiny_model, variant_model


# The largest pixels whose patch embeddings the dtype still holds: float16 ends at 65504.
SIZES = {torch.float32: 1e4, torch.bfloat16: 1e4, torch.float16: 1e3}


# Gradients in float32, and activations in the dtype that overflows first, are in every test.
MODES = slow_unless([(torch.float32, True), (torch.float16, False)].__contains__, product(SIZES, [False, True]))


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_huge_pixels(method: str | None, mode: tuple[torch.dtype, bool]) -> None:
    """Logits, hidden states and assignments are finite. Gradients are finite, too, except in float16, which needs a
    scaler."""
    dtype, training = mode
    model = variant_model(str(method)).to(dtype).train(training).requires_grad_(training)
    for pixels in (SIZES[dtype] * images(3), torch.full((3, 3, 32, 32), -SIZES[dtype]), torch.zeros(3, 3, 32, 32)):
        output = model(pixels.to(dtype), output_assignments=True, output_hidden_states=True)
        for tensor in (output.logits, *output.hidden_states, *output.assignments):
            assert tensor.isfinite().all()
        if training and dtype != torch.float16:
            model.zero_grad()
            output.logits.float().square().mean().backward()
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


PAIRS = [(method, head) for method in METHODS for head in HEADS]


@pytest.mark.parametrize("training", slow_unless([False].__contains__, [False, True]))
@pytest.mark.parametrize(("method", "head"), PAIRS)
def test_no_images(method: str | None, head: str, training: bool) -> None:
    """The classifier and the backbone refuse an empty batch with one clear error."""
    options: dict[str, Any] = {"head": head, "cross_layer_cache": True, "num_clr_tokens": 1}
    if method is not None:
        options |= {"reduction": method, "keep_rate": 0.5, "reduction_kwargs": OPTIONS.get(method)}
    model = tiny_model(**options).train(training)
    for part in (model, model.vit):
        with pytest.raises(ValueError, match="`pixel_values` must hold at least one image"):
            part(torch.zeros(0, 3, 32, 32))
