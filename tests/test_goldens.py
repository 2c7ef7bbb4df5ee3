"""Parity with the original: every golden file is one tiny model that it really ran, with weights and results.

`pytest tests/test_goldens.py --goldens DIR` runs any folder of such files.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from clca import REDUCTIONS, token_schedule
from ufgir.checkpoints import convert_original_state, load_original


class Golden:
    """One file: `spec`, `state` under the original's keys, everything else by name."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.spec = json.loads(file.metadata()["config"])
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.state = self.group("state")

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(f"{prefix}."): v for k, v in self.tensors.items() if k.startswith(f"{prefix}.")}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors


@pytest.fixture
def golden(golden_file: Path) -> Golden:
    golden = Golden(golden_file)
    if golden.spec["method"] not in ("vit", *REDUCTIONS):
        pytest.skip(f"{golden.spec['method']} is not available yet")
    return golden


def test_float64(golden: Golden) -> None:
    """Logits, loss, gradients, CLS after each layer, token counts, kept rows."""
    model = load_original(golden.state, golden.spec).double()
    output = model(
        golden["input"].double(), labels=golden["targets"], output_assignments=True, output_hidden_states=True
    )
    assert (output.logits - golden["logits"]).abs().max() <= 1e-9
    assert (output.loss - golden["loss"]).abs() <= 1e-9

    for index, expected in golden.group("cls").items():
        assert (output.hidden_states[int(index) + 1][:, 0] - expected).abs().max() <= 1e-9, f"CLS after layer {index}"

    counts = golden.group("tokens")
    final = counts.pop("final")
    assert {i: h.shape[1] for i, h in enumerate(output.hidden_states[1:])} == {
        int(i): int(n) for i, n in counts.items()
    }
    assert output.token_counts[-1] == int(final)
    schedule = token_schedule(model.config)
    assert list(output.token_counts) == schedule.before
    assert [h.shape[1] for h in output.hidden_states[1:]] == schedule.after

    kept = golden.group("kept")
    assert len(kept) in (0, len(output.assignments))
    for (_, expected), assignment in zip(
        sorted(kept.items(), key=lambda i: int(i[0])), output.assignments, strict=False
    ):
        expected = expected[:, :-1]  # the original appends a -1 for the fused row, to top-k's as well
        rows = assignment.argmax(dim=-1)[:, 1 : 1 + expected.shape[1]] - 1
        assert torch.equal(rows, expected)

    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = convert_original_state(golden.group("grad"), model.config)
    assert expected
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-8 * gradient.abs().max(), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_float32(golden: Golden, attention: str) -> None:
    model = load_original(golden.state, golden.spec)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        logits = model(golden["input"]).logits
    assert logits.dtype == torch.float32
    assert (logits - golden["logits"]).abs().max() <= 2e-5
