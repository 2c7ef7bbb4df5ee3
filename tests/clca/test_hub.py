"""Saving, loading and sharing: files, remote code in a clean process, stock checkpoints, Trainer, pipeline."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

import clca
from clca import REDUCTIONS, CLCAViTConfig, CLCAViTForImageClassification, CLCAViTModel
from tests.helpers import METHODS, TINY, Case, images, labels, tiny_config, tiny_model


PACKAGE = Path(clca.__file__).parent
REPOSITORY = PACKAGE.parent
CODE = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.h5")
NAMES = {0: "wild", 1: "bred", 2: "crossed"}


def on_disk(folder: Path) -> set[str]:
    return set(load_file(folder / "model.safetensors"))


def logits_of(model: torch.nn.Module, pixels: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images().float() if pixels is None else pixels).logits


# Files.


def test_what_is_saved(tmp_path: Path) -> None:
    """Weights as safetensors under the names of the memory, the configuration, and the flat code: nothing else."""
    model = tiny_model(reduction="evit", cross_layer_cache=True, num_clr_tokens=1, head="cla")
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.rglob("*")} == {"config.json", "model.safetensors"} | CODE
    assert on_disk(tmp_path) == set(model.state_dict())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoConfig"] == "configuration_clca.CLCAViTConfig"
    classifier = "modeling_clca.CLCAViTForImageClassification"
    assert config["auto_map"]["AutoModelForImageClassification"] == classifier
    assert config["architectures"] == ["CLCAViTForImageClassification"]
    for path in PACKAGE.glob("*_clca.py"):
        assert (tmp_path / path.name).read_text() == path.read_text()


def test_what_is_saved_of_the_backbone(tmp_path: Path) -> None:
    CLCAViTModel(tiny_config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_clca.CLCAViTModel"
    assert {p.name for p in tmp_path.rglob("*")} == {"config.json", "model.safetensors"} | CODE


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("tokens", ["registers", "no_cls"])
def test_saved_and_loaded(method: str | None, tokens: str, tmp_path: Path) -> None:
    """Nothing missing, nothing unexpected, the same tensors and logits; through the class and the Auto class."""
    model = Case(method, "clca" if tokens == "registers" else "cache", tokens).model().float()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.01)  # so that no initialisation gives the same
    model.save_pretrained(tmp_path)
    for loader in (CLCAViTForImageClassification, AutoModelForImageClassification):
        loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        assert type(loaded) is CLCAViTForImageClassification
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
        assert torch.equal(logits_of(loaded), logits_of(model))


def test_the_backbone_of_a_saved_classifier(tmp_path: Path) -> None:
    model = tiny_model(reduction="evit", keep_rate=0.5).float()
    model.save_pretrained(tmp_path)
    backbone, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(backbone) is CLCAViTModel
    assert not info["missing_keys"]
    with torch.no_grad():
        expected = model.vit(images().float()).last_hidden_state
        assert torch.equal(backbone.eval()(images().float()).last_hidden_state, expected)


def test_the_auto_classes_know_the_model() -> None:
    config = AutoConfig.for_model("clca_vit", **TINY)
    assert type(config) is CLCAViTConfig
    assert type(AutoModel.from_config(config)) is CLCAViTModel
    assert type(AutoModelForImageClassification.from_config(config)) is CLCAViTForImageClassification


# The rules of code on the Hub.


def modules() -> list[Path]:
    return sorted(PACKAGE.glob("*.py"))


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, module) of every import of a file, at any depth."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


def test_the_package_is_flat() -> None:
    assert not [p for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"]


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.stem)
def test_imports_are_few_and_flat(path: Path) -> None:
    """torch, transformers, huggingface_hub and the standard library; siblings by `from .name import x` alone."""
    for level, module in imports(path):
        if level == 0:
            assert module.partition(".")[0] in {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
        else:
            assert level == 1
            assert (PACKAGE / f"{module}.py").is_file(), module
    # transformers finds siblings line by line, in docstrings, too.
    for sibling in re.findall(r"^\s*from\s+\.(\S+)\s+import", path.read_text(), flags=re.MULTILINE):
        assert (PACKAGE / f"{sibling}.py").is_file(), sibling
    assert not re.search(r"^\s*import\s+\.", path.read_text(), flags=re.MULTILINE)


def test_the_index_names_every_file() -> None:
    """A file that nobody imports would stay behind when a model is saved."""
    files = {p.stem.removeprefix("reduction_") for p in PACKAGE.glob("reduction_*.py")} - {"base"}
    assert files == set(REDUCTIONS)
    for name, method in REDUCTIONS.items():
        assert method.name == name
        assert method.__module__ == f"clca.reduction_{name}"


@pytest.mark.parametrize("name", sorted(REDUCTIONS))
def test_methods_do_not_know_each_other(name: str) -> None:
    others = {f"reduction_{other}" for other in REDUCTIONS}
    siblings = {module for level, module in imports(PACKAGE / f"reduction_{name}.py") if level}
    assert not siblings & {*others, "reductions_clca", "modeling_clca"}
    assert "reduction_base" in siblings


def test_the_top_level_modules_export_the_same() -> None:
    import configuration_clca
    import modeling_clca

    assert modeling_clca.CLCAViTForImageClassification is CLCAViTForImageClassification
    assert modeling_clca.CLCAViTModel is CLCAViTModel
    assert configuration_clca.CLCAViTConfig is CLCAViTConfig


# A clean process.


class Remote(NamedTuple):
    """What the clean process found, and the models it was given."""

    results: dict[str, dict[str, Any]]
    logits: dict[str, torch.Tensor]
    models: dict[str, CLCAViTForImageClassification]
    folder: Path

    def step(self, name: str) -> dict[str, Any]:
        result = self.results[name]
        assert "error" not in result, result["error"]
        return result


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Remote:
    """Two saved models, the second one's code marked, used by a process without the package, in another folder."""
    folder = tmp_path_factory.mktemp("remote")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    models = {
        "one": tiny_model(
            reduction="evit", keep_rate=0.5, cross_layer_cache=True, num_clr_tokens=1, head="cla", id2label=NAMES
        ).float(),
        "two": tiny_model(reduction="tome" if "tome" in REDUCTIONS else "topk", keep_rate=0.5).float(),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    with (folder / "two" / "modeling_clca.py").open("a") as file:
        file.write('\nMARK = "two"\n')
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "one")
    Image.effect_noise((40, 50), 90).convert("RGB").save(folder / "image.png")
    save_file({"pixels": images().float()}, folder / "pixels.safetensors")

    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(elsewhere / "home"),
        "HF_MODULES_CACHE": str(elsewhere / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).with_name("remote_process.py")
    process = subprocess.run(
        [sys.executable, "-P", str(script), str(folder), str(REPOSITORY)],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    results = json.loads((folder / "results.json").read_text())
    return Remote(results, load_file(folder / "logits.safetensors"), models, folder)


def test_remote_load(remote: Remote) -> None:
    """By AutoModelForImageClassification, with equal logits and class names, and no trace of the package."""
    result = remote.step("load_first")
    assert result["module"].startswith("transformers_modules.")
    assert result["labels"] == list(NAMES.values())
    assert torch.equal(remote.logits["one"], logits_of(remote.models["one"]))
    assert remote.step("package_was_absent")["imported"] == []


def test_remote_auto_classes(remote: Remote) -> None:
    assert remote.step("auto_classes") == {
        "config": "CLCAViTConfig",
        "fresh": "CLCAViTForImageClassification",
        "keep_rate": [0.5],
    }


def test_remote_backbone(remote: Remote) -> None:
    """AutoModel takes the backbone out of a saved classifier."""
    assert remote.step("load_backbone") == {"class": "CLCAViTModel"}
    with torch.no_grad():
        expected = remote.models["one"].vit(images().float()).last_hidden_state
    assert torch.equal(remote.logits["backbone"], expected)


def test_two_remote_models_with_different_code(remote: Remote) -> None:
    """Both load in one process, each with its own code, and the first one goes on working."""
    assert remote.step("load_second")["marks"] == [None, "two"]
    assert torch.equal(remote.logits["two"], logits_of(remote.models["two"]))
    assert torch.equal(remote.logits["one_again"], remote.logits["one"])


def test_remote_models_can_be_saved_again(remote: Remote) -> None:
    """Twice over, code and all."""
    result = remote.step("save_again")
    assert result["module"].startswith("transformers_modules.")
    assert set(result["files"]) == {"config.json", "model.safetensors"} | CODE
    for name in ("three", "four"):
        assert torch.equal(remote.logits[name], remote.logits["one"])


def test_remote_overrides(remote: Remote) -> None:
    """Valid ones act, others are refused: the checks travel with the code."""
    result = remote.step("overrides")
    assert "`keep_rate`" in result["refused"]
    assert result["counts"][:3] == [18, 18, 20]  # nothing reduced, and two rows recalled


def test_pipeline(remote: Remote) -> None:
    """Image classification from a folder with a stock image processor: class names and probabilities."""
    predictions = remote.step("classify")["predictions"]
    processor = ViTImageProcessorPil.from_pretrained(remote.folder / "one")
    with Image.open(remote.folder / "image.png") as image:
        pixels = processor(image, return_tensors="pt")["pixel_values"]
    probabilities = logits_of(remote.models["one"], pixels).softmax(dim=-1)[0]
    best = probabilities.topk(2)
    assert [p["label"] for p in predictions] == [NAMES[int(i)] for i in best.indices]
    assert [p["score"] for p in predictions] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_the_package_after_a_remote_load(remote: Remote) -> None:
    """It registers again without a conflict."""
    result = remote.step("import_package")
    assert result["module"] == "clca.modeling_clca"
    assert torch.equal(remote.logits["package"], remote.logits["one"])


# Checkpoints of stock ViTs.


STOCK = {k: v for k, v in TINY.items() if k != "reduction_layers"}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ViTForImageClassification]:
    """A stock ViT with random weights, and the folder that transformers saved it to."""
    folder = tmp_path_factory.mktemp("stock")
    torch.manual_seed(3)
    model = ViTForImageClassification(ViTConfig(**STOCK, id2label=NAMES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder, model


def test_a_stock_vit_loads_completely(stock: tuple[Path, ViTForImageClassification]) -> None:
    """From the old key names of its file: all keys, its logits, its class names."""
    folder, model = stock
    assert "vit.encoder.layer.0.attention.attention.query.weight" in on_disk(folder)
    ours, info = CLCAViTForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert (logits_of(ours) - logits_of(model)).abs().max() <= 1e-5
    assert ours.config.id2label == NAMES


def test_a_stock_vit_in_a_clca_model(stock: tuple[Path, ViTForImageClassification]) -> None:
    """Only the new parts are missing, only the linear classifier is left over; CLR start as the loaded CLS."""
    folder, model = stock
    ours, info = CLCAViTForImageClassification.from_pretrained(
        folder,
        output_loading_info=True,
        reduction="evit",
        keep_rate=0.5,
        reduction_layers=[1, 2],
        cross_layer_cache=True,
        num_clr_tokens=2,
        head="cla",
    )
    classifier = {f"classifier.{name}" for name in ours.classifier.state_dict()}
    clr = {"vit.embeddings.clr_tokens", "vit.embeddings.clr_position_embeddings"}
    missing = set(info["missing_keys"])
    assert missing >= clr
    assert missing - clr == {name for name in classifier if name in missing} != set()
    assert set(info["unexpected_keys"]) <= {"classifier.weight", "classifier.bias"}
    assert not info["mismatched_keys"]
    cls_token = model.vit.embeddings.cls_token
    assert torch.equal(ours.vit.embeddings.cls_token, cls_token)
    assert torch.equal(ours.vit.embeddings.clr_tokens, cls_token.expand(-1, 2, -1))
    assert ours.vit.embeddings.clr_position_embeddings.std() > 0
    assert torch.equal(ours.vit.layers[4].mlp.fc1.weight, model.vit.layers[4].mlp.fc1.weight)
    assert logits_of(ours).isfinite().all()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_stock_vit_with_every_method(method: str | None, stock: tuple[Path, ViTForImageClassification]) -> None:
    """What is missing belongs to the method; its parameters are initialised."""
    folder, model = stock
    ours, info = CLCAViTForImageClassification.from_pretrained(
        folder, output_loading_info=True, reduction=method, keep_rate=0.5, reduction_layers=[1, 2]
    )
    own = {name for name, _ in ours.named_parameters() if ".reduction." in name}
    assert set(info["missing_keys"]) == own
    assert not info["unexpected_keys"]
    assert all(parameter.isfinite().all() and parameter.abs().max() < 10 for parameter in ours.parameters())
    assert torch.equal(ours.classifier.weight, model.classifier.weight)


def test_a_stock_backbone_loads(tmp_path: Path) -> None:
    """A ViTModel without classifier, whose pooler has no place here: only the classifier is missing."""
    torch.manual_seed(3)
    model = ViTModel(ViTConfig(**STOCK)).eval()
    model.save_pretrained(tmp_path)
    ours, info = CLCAViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"]
    backbone, info = CLCAViTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        expected = model(images().float()).last_hidden_state
        assert (ours.eval().vit(images().float()).last_hidden_state - expected).abs().max() <= 1e-5
        assert (backbone.eval()(images().float()).last_hidden_state - expected).abs().max() <= 1e-5


def test_a_stock_vit_saved_as_ours_loads_without_conversion(
    stock: tuple[Path, ViTForImageClassification], tmp_path: Path
) -> None:
    """Loading changes the names once and for all: saved, loaded, saved and loaded again it is the same model."""
    model = CLCAViTForImageClassification.from_pretrained(stock[0])
    expected = logits_of(stock[1])
    for turn in ("first", "second"):
        model.save_pretrained(tmp_path / turn)
        assert on_disk(tmp_path / turn) == set(model.state_dict())
        model, info = CLCAViTForImageClassification.from_pretrained(tmp_path / turn, output_loading_info=True)
        assert not any(info.values()), info
        assert (logits_of(model) - expected).abs().max() <= 1e-5


def test_the_stock_vit_itself_still_works(stock: tuple[Path, ViTForImageClassification], tmp_path: Path) -> None:
    """Our key mapping does not reach transformers' own classes."""
    folder, model = stock
    reloaded, info = ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    reloaded.save_pretrained(tmp_path)
    assert on_disk(tmp_path) == on_disk(folder)
    assert torch.equal(logits_of(reloaded), logits_of(model))


def test_another_number_of_classes(stock: tuple[Path, ViTForImageClassification]) -> None:
    """Refused unless `ignore_mismatched_sizes`, and then a new classifier on the loaded backbone."""
    folder, model = stock
    with pytest.raises(RuntimeError, match=r"classifier|mismatch"):
        CLCAViTForImageClassification.from_pretrained(folder, num_labels=7)
    ours, info = CLCAViTForImageClassification.from_pretrained(
        folder, num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {key[0] for key in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert logits_of(ours).shape == (3, 7)
    assert len(ours.config.id2label) == 7
    assert torch.equal(ours.vit.layernorm.weight, model.vit.layernorm.weight)
    named = CLCAViTForImageClassification.from_pretrained(
        folder, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}, ignore_mismatched_sizes=True
    )
    assert named.num_labels == named.config.num_labels == 2
    assert named.classifier.out_features == 2
    assert named.config.id2label == {0: "a", 1: "b"}


def test_weights_in_half_precision(stock: tuple[Path, ViTForImageClassification]) -> None:
    model = CLCAViTForImageClassification.from_pretrained(stock[0], dtype=torch.bfloat16, num_clr_tokens=1)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.vit.embeddings.clr_tokens, model.vit.embeddings.cls_token)
    assert logits_of(model).isfinite().all()


# Trainer.


class Pictures(torch.utils.data.Dataset):
    """24 random images in three classes that a mean tells apart."""

    def __init__(self) -> None:
        self.labels = labels(24)
        self.pixels = images(24).float() + self.labels[:, None, None, None]

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[index], "labels": int(self.labels[index])}


def trainer(folder: Path, model: CLCAViTForImageClassification | None = None, **options: Any) -> Trainer:
    arguments = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": 5,
        "dataloader_pin_memory": False,
    }
    if model is None:
        torch.manual_seed(0)
        model = CLCAViTForImageClassification(
            tiny_config(
                reduction="evit",
                keep_rate=0.5,
                cross_layer_cache=True,
                num_clr_tokens=1,
                head="cla",
                hidden_dropout_prob=0.1,
                drop_path_rate=0.1,
                output_hidden_states=True,  # of other lengths than in other batches: Trainer must leave them
            )
        )
    return Trainer(
        model=model,
        args=TrainingArguments(**(arguments | options)),
        train_dataset=Pictures(),
        eval_dataset=Pictures(),
        compute_metrics=falling_score,
    )


evaluations: list[int] = []


def falling_score(prediction: Any) -> dict[str, float]:
    """A score that falls from evaluation to evaluation, so that the first model is the best."""
    assert prediction.predictions.shape == (24, 3)  # logits alone: ragged outputs are not gathered
    evaluations.append(1)
    return {"score": -float(len(evaluations))}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    """Four steps without a break, checkpoints at two and four."""
    folder = tmp_path_factory.mktemp("trained")
    run = trainer(folder)
    run.train()
    return folder, run


def test_training_changes_every_trainable_parameter(trained: tuple[Path, Trainer]) -> None:
    """And leaves the frozen norm; the loss that Trainer logs is finite."""
    torch.manual_seed(0)
    start = CLCAViTForImageClassification(trained[1].model.config).state_dict()
    for name, parameter in trained[1].model.named_parameters():
        assert torch.equal(parameter, start[name]) != parameter.requires_grad, name
    assert all(torch.isfinite(torch.tensor(entry.get("train_loss", 0.0))) for entry in trained[1].state.log_history)


def test_a_checkpoint_holds_everything(trained: tuple[Path, Trainer]) -> None:
    """Weights as safetensors under the names of the memory, code, configuration."""
    folder, run = trained
    checkpoint = folder / "checkpoint-4"
    assert on_disk(checkpoint) == set(run.model.state_dict())
    assert {p.name for p in checkpoint.iterdir()} >= CODE | {"config.json"}
    loaded, info = CLCAViTForImageClassification.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits_of(loaded), logits_of(run.model))


def test_resumed_is_uninterrupted(trained: tuple[Path, Trainer], tmp_path: Path) -> None:
    """Bit by bit, BatchNorm's statistics included, with dropout and drop path acting."""
    folder, run = trained
    torch.manual_seed(99)
    fresh = CLCAViTForImageClassification(run.model.config)  # other weights, all to be replaced
    resumed = trainer(tmp_path, fresh)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert resumed.state.global_step == 4
    expected = run.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    """The weights of the first checkpoint, all of them, after three more were trained."""
    evaluations.clear()
    run = trainer(
        tmp_path,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-1")
    best = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    last = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, best[name]), name
    assert not torch.equal(best["classifier.out_proj.weight"], last["classifier.out_proj.weight"])


def test_no_pickled_weights(trained: tuple[Path, Trainer], tmp_path: Path) -> None:
    """`save_model` of Trainer writes safetensors, and what it wrote loads."""
    trained[1].save_model(str(tmp_path))
    # training_args.bin is Trainer's own record of its arguments and holds no weights
    assert not {p.name for pattern in WEIGHTS for p in tmp_path.glob(pattern)} - {"training_args.bin"}
    assert torch.equal(logits_of(CLCAViTForImageClassification.from_pretrained(tmp_path)), logits_of(trained[1].model))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_trainer_with_every_method(method: str | None, tmp_path: Path) -> None:
    """Two steps with activation checkpointing, and a prediction of logits alone."""
    evaluations.clear()
    torch.manual_seed(0)
    model = CLCAViTForImageClassification(Case(method, "clca", "cls").config())
    run = trainer(tmp_path, model, max_steps=2, save_strategy="no", activation_checkpointing=True)
    result = run.train()
    assert 0 < result.training_loss < 20
    assert run.predict(Pictures()).predictions.shape == (24, 3)
