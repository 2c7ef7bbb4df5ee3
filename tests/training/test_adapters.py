"""peft: adapters on attention and MLP are trained, saved, loaded and merged, together with the new parts of the model."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from clca import CLCAViTForImageClassification
from tests.helpers import CACHES, FIRST_OF_FAMILIES, METHODS, images, labels, slow_unless, tiny_model


peft = pytest.importorskip("peft", reason="peft is not installed: pip install -c constraints.txt -e .[peft]")

from ufgir.training.adapters import ATTENTION, MLP, SWIGLU_MLP, adapt, merge, new_modules  # noqa: E402


# peft 0.21 still asks for an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


TARGETS = [*ATTENTION, *MLP]
ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=TARGETS),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["fc2"]),
    "oft": lambda: peft.OFTConfig(r=4, oft_block_size=0, target_modules=TARGETS),
}
CLCA = CACHES["clca"]
MODELS: dict[str, dict[str, Any]] = {
    str(method): CLCA | ({"reduction": method, "keep_rate": 0.5} if method else {}) for method in METHODS
} | {
    "linear": {"reduction": "evit", "keep_rate": 0.5},
    "vqt": {"reduction": "evit", "keep_rate": 0.5, "head": "vqt"},
    "vqt_slicing": {"head": "vqt", "vqt_original_slicing": True},
}
# Every method with LoRA, and every adapter with a method that does and one that does not have parameters.
CASES = [(model, "lora") for model in MODELS]
CASES += [(model, name) for model in ("evit", "dyvit") for name in ADAPTERS if name != "lora"]
FAST = [model for model in MODELS if model not in METHODS or model in FIRST_OF_FAMILIES]
NEW = (".reduction.", ".probe.", "classifier.", ".clr_tokens", ".clr_position_embeddings")


def make(name: str) -> CLCAViTForImageClassification:
    return tiny_model(**MODELS[name]).float()


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images().float()).logits


def train(model: nn.Module, steps: int = 3) -> list[float]:
    """Train for a few steps, and return the losses."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
    model.train()
    for _ in range(steps):
        loss = model(images().float(), labels=labels()).loss
        loss.backward()
        assert all(p.grad is not None for p in parameters), "trained parameters that take no part"
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_new_modules() -> None:
    """The head always, stages and probes with parameters, and the embeddings if they contain CLR."""
    assert new_modules(make("linear")) == ["classifier"]
    assert new_modules(make("evit")) == ["vit.embeddings", "classifier"]
    stages = ["vit.layers.1.reduction", "vit.layers.2.reduction"]
    assert new_modules(make("dyvit")) == ["vit.embeddings", *stages, "classifier"]
    assert new_modules(make("vqt")) == ["vit.layers.1.probe", "vit.layers.2.probe", "classifier"]


def test_own_modules_to_save_are_kept() -> None:
    """Given module names are not extended."""
    config = peft.LoraConfig(target_modules=list(ATTENTION), modules_to_save=["classifier"])
    adapted = adapt(make("dyvit"), config)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "classifier" in name for name in trained)


@pytest.mark.parametrize("case", slow_unless(lambda case: case[0] in FAST, CASES), ids="-".join)
def test_trained_saved_loaded_merged(case: tuple[str, str], tmp_path: Path) -> None:
    """The loss falls and the pretrained weights do not change. Loaded on the base, merged, and saved as a model, the logits are those of
    the trained model."""
    model, adapter = case
    base = make(model)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    adapted = adapt(copy.deepcopy(base), ADAPTERS[adapter]())
    losses = train(adapted)
    if model != "dyvit":  # whose loss is a draw
        assert losses[-1] < losses[0]
    expected = logits_of(adapted)
    assert (expected - logits_of(base)).abs().max() > 1e-2

    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(loaded), expected, atol=2e-6, rtol=0)
    merged = merge(loaded)
    assert type(merged) is CLCAViTForImageClassification
    torch.testing.assert_close(logits_of(merged), expected, atol=2e-6, rtol=0)
    assert set(merged.state_dict()) == set(before)
    changed = (*(f"{t}.weight" for t in TARGETS), *(f"{t}.bias" for t in TARGETS if adapter in ("ia3", "oft")))
    for name, value in merged.state_dict().items():
        if not name.endswith(changed) and not any(part in f".{name}" for part in NEW):
            assert torch.equal(value, before[name]), name

    merged.save_pretrained(tmp_path / "merged")
    again = CLCAViTForImageClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(again), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("model", MODELS)
def test_only_the_right_parameters_are_trained(model: str) -> None:
    """The adapter and all new parts are trained, but no pretrained weight."""
    base = make(model)
    new = {name for name, _ in base.named_parameters() if any(part in f".{name}" for part in NEW)}
    adapted = adapt(base, ADAPTERS["lora"]())
    trained = {name.removeprefix("base_model.model.") for name, p in adapted.named_parameters() if p.requires_grad}
    adapters = {name for name in trained if ".lora_" in name}
    assert {name.replace("modules_to_save.default.", "") for name in trained - adapters} == new
    layers = len(adapted.base_model.model.vit.layers)
    assert len(adapters) == layers * len(TARGETS) * 2
    share = sum(p.numel() for p in adapted.parameters() if p.requires_grad) / sum(
        p.numel() for p in adapted.parameters()
    )
    assert share < 0.5


def test_the_saved_adapter_is_small(tmp_path: Path) -> None:
    """The file contains no weight of the backbone except the embeddings with the CLR tokens."""
    adapted = adapt(make("evit"), ADAPTERS["lora"]())
    adapted.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".lora_" in name or ".classifier." in name or ".embeddings." in name for name in names)
    assert any("running_mean" in name for name in names)  # of the CLA head's BatchNorm


def test_lora_merges_with_peft_alone(tmp_path: Path) -> None:
    """LoRA does not need our `merge`."""
    adapted = adapt(make("dyvit"), ADAPTERS["lora"]())
    train(adapted)
    expected = logits_of(adapted)
    merged = adapted.merge_and_unload()
    assert type(merged) is CLCAViTForImageClassification
    torch.testing.assert_close(logits_of(merged), expected, atol=2e-6, rtol=0)


def test_adapter_can_be_switched_off() -> None:
    """The logits are then those of the base model, including new parts."""
    base = make("evit")
    expected = logits_of(base)
    adapted = adapt(base, ADAPTERS["lora"]())
    train(adapted)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits_of(adapted), expected, atol=1e-6, rtol=0)
    assert not torch.allclose(logits_of(adapted), expected, atol=1e-3)


def test_swiglu() -> None:
    """The layers of a gated MLP are targets as well."""
    model = tiny_model(reduction="evit", keep_rate=0.5, use_swiglu_ffn=True, **CLCA).float()
    adapted = adapt(model, peft.LoraConfig(r=2, target_modules=[*ATTENTION, *SWIGLU_MLP]))
    losses = train(adapted)
    assert losses[-1] < losses[0]
    expected = logits_of(adapted)
    torch.testing.assert_close(logits_of(merge(adapted)), expected, atol=2e-6, rtol=0)


def test_trainer(tmp_path: Path) -> None:
    """Trainer trains, evaluates and saves an adapted model, and `from_pretrained` finds the base of the adapter's folder."""
    from transformers import Trainer, TrainingArguments

    make("evit").save_pretrained(tmp_path / "base")
    adapted = adapt(CLCAViTForImageClassification.from_pretrained(tmp_path / "base"), ADAPTERS["lora"]())
    data = [
        {"pixel_values": pixels, "labels": int(label)}
        for pixels, label in zip(images().float(), labels(), strict=True)
    ]
    options = {
        "label_names": ["labels"],
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
    }
    args = TrainingArguments(
        tmp_path / "out", max_steps=2, per_device_train_batch_size=3, learning_rate=1e-2, **options
    )
    trainer = Trainer(adapted, args, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model(tmp_path / "adapter")
    expected = logits_of(adapted)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    base = CLCAViTForImageClassification.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(
        logits_of(peft.PeftModel.from_pretrained(base, tmp_path / "adapter")), expected, atol=2e-6, rtol=0
    )
    found = CLCAViTForImageClassification.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits_of(found), expected, atol=2e-6, rtol=0)


def test_group_lasso_of_a_saved_head() -> None:
    """The penalty uses the head's weight inside the wrapper of peft."""
    model = tiny_model(reduction="evit", keep_rate=0.5, head="h2t", group_lasso_weight=0.1).float()
    train(adapt(model, ADAPTERS["lora"]()))
