"""int8 weights: close to the original, a third of its size, saved and loaded like any model; unsupported cases raise errors."""

import copy
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from clca import CLCAViTForImageClassification
from tests.helpers import CACHES, METHODS, images, tiny_model
from ufgir.quantization import quantize_model
from ufgir.utils.extras import install_command


torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None,
    reason="torchao is not installed: pip install -c constraints.txt -e .[quantization]",
)
WIDE = {"hidden_size": 64, "intermediate_size": 256}  # wide enough for the layers to outweigh what is not quantised


def make(method: str | None, **changes: object) -> CLCAViTForImageClassification:
    reduction = {"reduction": method, "keep_rate": 0.5} if method else {}
    return tiny_model(**CACHES["clca"] | reduction | WIDE | changes).float()


def logits_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images().to(dtype)).logits


def choices_of(model: nn.Module) -> list[torch.Tensor]:
    """Return per stage which input tokens contribute to which output tokens, (B, M, N)."""
    with torch.no_grad():
        return [a > 0 for a in model.eval()(images().float(), output_assignments=True).assignments]


def quantized_names(model: nn.Module) -> set[str]:
    """Return the modules whose weight is not a plain tensor."""
    plain = (torch.Tensor, nn.Parameter)
    return {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and type(m.weight) not in plain}


@torchao
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_logits_are_near_and_survive_saving(method: str | None, tmp_path: Path) -> None:
    """After quantizing, saving and loading, the file is much smaller, and the logits are those of the rounded weights and close to the
    original's. If tokens have similar scores, rounding may select others; only images with the same selection must be close."""
    model = make(method)
    expected, chosen = logits_of(model), choices_of(model)
    rounded = copy.deepcopy(model)
    model.save_pretrained(tmp_path / "float")
    assert quantize_model(model) is model
    logits = logits_of(model)
    difference = (logits - expected).abs().amax(dim=1) / expected.abs().amax(dim=1)
    assert difference.max() > 0
    same = (
        torch.stack([(a == b).flatten(1).all(1) for a, b in zip(choices_of(model), chosen, strict=True)]).all(0)
        if chosen
        else None
    )
    assert difference.max() <= 0.05 if method is None else (difference[same] <= 0.1).all() and difference.min() <= 0.1

    for name in quantized_names(model):
        weight, old = model.get_submodule(name).weight.dequantize(), rounded.get_submodule(name).weight
        step = old.abs().amax(dim=1, keepdim=True) / 127
        assert ((weight - old).abs() <= 0.51 * step).all()
        old.data.copy_(weight)
    torch.testing.assert_close(logits_of(rounded), logits, atol=1e-4, rtol=0)

    model.save_pretrained(tmp_path / "int8")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("float", "int8")]
    assert sizes[1] < 0.5 * sizes[0]
    loaded, info = CLCAViTForImageClassification.from_pretrained(tmp_path / "int8", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits_of(loaded), logits, atol=1e-4, rtol=0)
    assert quantized_names(loaded) == quantized_names(model)


@torchao
@pytest.mark.parametrize("head", ["linear", "ifa"])
@pytest.mark.parametrize("method", ["dyvit", "sit", "dpcknn"])
def test_what_is_quantized(method: str, head: str) -> None:
    """Attention and MLP of every layer, and nothing else."""
    model = quantize_model(make(method, head=head))
    assert quantized_names(model) == {
        f"vit.layers.{index}.{name}"
        for index in range(5)
        for name in (*(f"attention.{part}_proj" for part in "qkvo"), "mlp.fc1", "mlp.fc2")
    }


@torchao
def test_transformers_quantizes_while_loading(tmp_path: Path) -> None:
    """`quantization_config=TorchAoConfig(...)` works with our class and quantizes the same layers in the same way."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = make("evit")
    model.save_pretrained(tmp_path)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    loaded = CLCAViTForImageClassification.from_pretrained(tmp_path, quantization_config=config)
    assert torch.equal(logits_of(loaded), logits_of(quantize_model(model)))


@torchao
def test_the_configuration_says_so(tmp_path: Path) -> None:
    """config.json contains method and type, and the modules that are not quantized."""
    quantize_model(make("evit")).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert saved["quant_method"] == "torchao" and "Int8WeightOnly" in json.dumps(saved)
    assert "classifier" in saved["modules_to_not_convert"]


@torchao
def test_bfloat16_model(tmp_path: Path) -> None:
    """A model in half precision can be quantized as well."""
    model = make("evit").bfloat16()
    expected = logits_of(model, torch.bfloat16).float()
    quantize_model(model).save_pretrained(tmp_path)
    logits = logits_of(model, torch.bfloat16)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().max() <= 0.15 * expected.abs().max()
    loaded = CLCAViTForImageClassification.from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(logits_of(loaded, torch.bfloat16), logits)


@torchao
def test_twice_is_refused() -> None:
    """A quantized model cannot be quantized again."""
    model = quantize_model(make(None))
    with pytest.raises(ValueError, match="already"):
        quantize_model(model)


def test_int4_is_refused_with_the_reason() -> None:
    """The error is raised before anything is changed, with or without torchao."""
    model = make("evit")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"'int8', got 'int4': .* fail on a CPU"):
        quantize_model(model, "int4")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("scheme", ["int3", "fp8", "", None])
def test_unknown_schemes_are_refused(scheme: str | None) -> None:
    """The error contains the name and the allowed names."""
    with pytest.raises(ValueError, match="`scheme` must be 'int8'"):
        quantize_model(make(None), scheme)


def test_a_missing_torchao_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error contains the extra that installs it."""
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=re.escape(install_command("quantization"))):
        quantize_model(make(None))
