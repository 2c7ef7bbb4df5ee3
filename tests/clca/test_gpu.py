"""What a GPU could compute differently: torch's flash attention, and training with deterministic algorithms.

On a GPU both tests use it. On a CPU they use torch's flash attention for CPUs, and algorithms that are deterministic anyway.
"""

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from clca import REDUCTIONS
from tests.helpers import CACHES, images, labels, slow_unless, tiny_model


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLCA = CACHES["clca"]
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}[DEVICE.type]  # on a GPU flash attention has no float32


@pytest.mark.parametrize("method", ["evit", "topk"])  # without a mask, which flash attention on a GPU refuses
def test_flash_attention_alone(method: str) -> None:
    """The forward pass needs no other kernel of torch than flash attention, and agrees with plain attention."""
    model = tiny_model(reduction=method, keep_rate=0.5, **CLCA).to(DEVICE, DTYPE)
    pixels = images(4).to(DEVICE, DTYPE)
    with torch.no_grad():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            output = model(pixels)
        model.set_attn_implementation("eager")
        expected = model(pixels)
    assert output.token_counts == expected.token_counts
    assert (output.logits - expected.logits).abs().max() <= (0.1 if DTYPE is torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("method", slow_unless({"evit", "ats", "tome"}.__contains__, sorted(REDUCTIONS)))
def test_deterministic_training(method: str) -> None:
    """Two training steps from the same state have the same gradients, and no operator is refused."""
    model = tiny_model(reduction=method, keep_rate=0.5, **CLCA).to(DEVICE, torch.float32).train()
    pixels, targets = images(4).to(DEVICE, torch.float32), labels(4).to(DEVICE)
    gradients = []
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for one in (model, copy.deepcopy(model)):
            torch.manual_seed(0)
            one.zero_grad()
            one(pixels, labels=targets).loss.backward()
            gradients.append([p.grad for p in one.parameters() if p.grad is not None])
    finally:
        torch.use_deterministic_algorithms(before)
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(map(torch.equal, *gradients))
