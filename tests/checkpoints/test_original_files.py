"""Checkpoint files of the original code, as `torch.save` writes them: loaded, refused, converted one by one and by folder.

The files are made of the golden files: their weights and options in the published format, under names as published. Their
networks are tinier than any that has such a name, so each says its number of heads.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor

from clca import CLCAViTForImageClassification
from ufgir.checkpoints import from_original as original_files
from ufgir.checkpoints.convert_original import REPORT, convert_file, convert_folder, read_class_names
from ufgir.checkpoints.from_original import MARKER, load_original, load_original_file, split_model_name
from ufgir.checkpoints.resample import resample_position_embeddings
from ufgir.cli import entry as cli


GOLDENS = Path(__file__).parents[1] / "goldens"
ARCHITECTURE = "deit_base_patch16_224.fb_in1k"
PRETRAININGS = (
    "vit_base_patch16_224.orig_in21k",
    "deit_base_patch16_224.fb_in1k",
    "vit_base_patch16_224_miil.in21k",
    "vit_base_patch16_224.in1k_mocov3",
    "vit_base_patch16_224.dino",
    "vit_base_patch16_224.mae",
    "deit3_base_patch16_224.fb_in22k_ft_in1k",
    "deit3_base_patch16_224.fb_in1k",
    "vit_base_patch16_clip_224.laion2b",
)
EVIT_NAME = f"cotton_evit_{ARCHITECTURE}_0.5_cla_clc_1_30.pth"


class Golden:
    """A golden file: its weights, what they are, and what the original computes with them."""

    def __init__(self, name: str) -> None:
        with safe_open(GOLDENS / f"{name}.safetensors", "pt") as file:
            self.spec = json.loads(file.metadata()["config"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
        self.images, self.logits = tensors["input"].double(), tensors["logits"]
        self.method = self.spec["method"].removesuffix("_old")

    def model_name(self, architecture: str = ARCHITECTURE) -> str:
        """As published: no method for a plain ViT, and no underscore after h2t and vqt."""
        return {"vit": "", "h2t": "h2t", "vqt": "vqt"}.get(self.method, f"{self.method}_") + architecture

    def options(self, **changes: Any) -> dict[str, Any]:
        """The options of the run, with others that say nothing about the model; `...` leaves one out."""
        options = {"model": self.model_name(), "num_heads": 2, "input_size": 32, **self.spec["options"]}
        options |= {"dataset_name": "soygene", "epochs": 45, "lr": 1e-4, "opt_betas": None, "seed": 10, **changes}
        return {name: value for name, value in options.items() if value is not ...}

    def payload(self, **changes: Any) -> dict[str, Any]:
        """The dictionary in a file, with its options in a Namespace."""
        scheduler = {"base_values": [1e-4], "warmup_t": 2}
        options = argparse.Namespace(**self.options(**changes))
        return {"model": self.state, "lr_scheduler": scheduler, "epoch": 49, "args": options}


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def difference(model: CLCAViTForImageClassification, golden: Golden) -> float:
    with torch.no_grad():
        return (model.double()(golden.images).logits - golden.logits).abs().max().item()


@pytest.fixture(scope="module")
def evit() -> Golden:
    return Golden("evit_clca")


@pytest.fixture
def evit_file(tmp_path: Path, evit: Golden) -> Path:
    return save(tmp_path / EVIT_NAME, evit.payload())


class Code:
    """Code in a pickle: whoever unpickles it without care makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.trace}",)


class Place:
    """A class like any."""


# Reading


@pytest.mark.parametrize("entry", ["args", "config"])
def test_every_method(tmp_path: Path, golden_file: Path, entry: str) -> None:
    """Everything but the number of heads is found in the file."""
    golden = Golden(golden_file.stem)
    payload = golden.payload()
    if entry == "config":
        payload = {"config": vars(payload["args"]), "model": golden.state, "accuracy": 77.1, "epoch": 49}
    model = load_original_file(save(tmp_path / "x.pth", payload))
    if golden.spec.get("mode") == "train":  # its logits are those of training
        expected = load_original(golden.state, golden.spec).state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
    else:
        assert difference(model, golden) <= 1e-9
    assert not model.training and model.config.num_labels == 7


@pytest.mark.parametrize("name", ["evit_clca", "tome_ifa", "dpcknn_base", "vit_base", "sit_base", "vqt_loc13"])
def test_weights_without_a_dictionary(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    """The file's name then says what the weights do not, but for the layers: those of the paper are assumed."""
    golden = Golden(name)
    options = golden.spec["options"]
    tags = f"_0.5{'_' + ('cla' if options['ifa_dws_conv_groups'] else 'ifa') if options['ifa_head'] else ''}"
    tags += f"{'_clc' * options['clc']}{'_1' * bool(options['num_clr'])}"
    path = save(tmp_path / f"soygene_{golden.model_name()}{tags}_30.pth", golden.state)
    layers = {} if name == "vit_base" else {"reduction_layers": [1, 3]}
    assert difference(load_original_file(path, num_attention_heads=2, **layers), golden) <= 1e-9
    if layers:
        with pytest.raises(ValueError, match="reduction_layers"):
            load_original_file(path, num_attention_heads=2)


def test_layers_of_the_paper_are_assumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    golden = Golden("vit_ifa")  # 12 layers
    path = save(tmp_path / f"cotton_evit_{ARCHITECTURE}_0.25_ifa_1.pth", golden.state)
    config = load_original_file(path, num_attention_heads=2).config
    assert (config.reduction, config.reduction_layers, config.keep_rate) == ("evit", [3, 6, 9], [0.25])
    assert "[3, 6, 9] are assumed" in caplog.text


def test_slots_tell_the_keep_rate(tmp_path: Path) -> None:
    golden = Golden("patchmerger_base")
    path = save(tmp_path / "x.pth", golden.payload(keep_rate=...))
    model = load_original_file(path)
    assert model.config.keep_tokens == [32, 16] and difference(model, golden) <= 1e-9


def test_data_parallel_and_stale_weights(tmp_path: Path, evit: Golden) -> None:
    payload = evit.payload()
    payload["model"] = {f"module.{key}": tensor for key, tensor in evit.state.items()}
    assert payload["model"]["module.head.weight"].shape[0] == 10  # beside the 7 classes of the head in use
    payload |= {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "scaler": {}, "max_accuracy": 1.0}
    payload["model_ema"] = payload["model"]
    assert difference(load_original_file(save(tmp_path / "x.pth", payload)), evit) <= 1e-9


def test_older_format_of_torch(tmp_path: Path, evit: Golden) -> None:
    torch.save(evit.payload(), tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert difference(load_original_file(tmp_path / "x.pth"), evit) <= 1e-9


@pytest.mark.parametrize("pretraining", PRETRAININGS)
@pytest.mark.parametrize("prefix", ["", "evit_", "dpcknn_", "h2t", "vqt", "h2t_"])
def test_model_names(pretraining: str, prefix: str) -> None:
    method, architecture = split_model_name(prefix + pretraining)
    assert method == (prefix.strip("_") or "vit") and architecture.name == pretraining
    tags = "_0.1_cla_clc_1" if prefix == "evit_" else ""
    options = original_files._options_of_file_name(Path(f"soygene_{prefix}{pretraining}{tags}_30.pth"))
    assert options["model"] == prefix + pretraining and options["num_clr"] == int(bool(tags))
    assert options.get("keep_rate") == ([0.1] if tags else None)


@pytest.mark.parametrize(
    ("architecture", "width", "heads", "eps", "activation"),
    [
        ("deit_tiny_patch16_224.fb_in1k", 192, 3, 1e-6, "gelu"),
        ("vit_small_patch16_224.augreg_in21k", 384, 6, 1e-6, "gelu"),
        ("deit3_base_patch16_224.fb_in1k", 768, 12, 1e-6, "gelu"),
        ("vit_base_patch16_clip_224.laion2b", 768, 12, 1e-5, "gelu"),
        ("vit_base_patch16_clip_quickgelu_224", 768, 12, 1e-5, "quick_gelu"),
    ],
)
def test_what_the_name_alone_tells(
    tmp_path: Path, architecture: str, width: int, heads: int, eps: float, activation: str
) -> None:
    """Of one layer of a network of real width."""
    shapes = {"patch_embed.proj.weight": (width, 3, 8, 8), "pos_embed": (1, 4 + 1, width), "cls_token": (1, 1, width)}
    shapes |= {"blocks.0.attn.qkv.weight": (3 * width, width), "blocks.0.attn.proj.weight": (width, width)}
    shapes |= {"blocks.0.mlp.fc1.weight": (16, width), "blocks.0.mlp.fc2.weight": (width, 16)}
    shapes |= {"blocks.0.norm1.weight": (width,), "blocks.0.norm2.weight": (width,), "norm.weight": (width,)}
    shapes["head.weight"] = (3, width)
    shapes |= {key.replace("weight", "bias"): shape[:1] for key, shape in shapes.items() if "weight" in key}
    state = {key: torch.zeros(shape) for key, shape in shapes.items()}
    path = save(tmp_path / "x.pth", {"model": state, "args": argparse.Namespace(model=architecture)})
    config = load_original_file(path).config
    assert (config.num_attention_heads, config.layer_norm_eps, config.hidden_act) == (heads, eps, activation)
    assert (config.image_size, config.patch_size, config.intermediate_size, config.num_labels) == (16, 8, 16, 3)


def test_overrides(tmp_path: Path, evit: Golden, evit_file: Path) -> None:
    path = save(tmp_path / "x.pth", evit.payload(num_heads=..., keep_rate=...))
    with pytest.raises(ValueError, match=r"has the width 768, and the weights have 16. Set `num_attention_heads`"):
        load_original_file(path)
    with pytest.raises(ValueError, match=r"`keep_rate` of .* is told nowhere"):
        load_original_file(path, num_attention_heads=2)
    assert load_original_file(path, num_attention_heads=4, keep_rate=0.25).config.keep_rate == [0.25]
    assert load_original_file(path, num_attention_heads=4, keep_tokens=[9, 3]).config.keep_tokens == [9, 3]

    config = load_original_file(evit_file, keep_tokens=[9, 3], layer_norm_eps=1e-5, num_labels=7).config
    assert (config.keep_tokens, config.keep_rate, config.layer_norm_eps) == ([9, 3], [1.0], 1e-5)
    assert load_original_file(evit_file, reduction="dpcknn", reduction_kwargs={"equal_weight": True}).config.reduction
    with pytest.raises(ValueError, match="no argument `keep_rat`"):
        load_original_file(evit_file, keep_rat=0.5)
    with pytest.raises(ValueError, match=r"`keep_rate` must be in \(0, 1\]"):
        load_original_file(evit_file, keep_rate=3)


@pytest.mark.parametrize("name", ["evit_clca", "evit_bb_reg4_clca", "sit_base"])
def test_another_image_size(tmp_path: Path, name: str) -> None:
    """CLS, registers and CLR keep their position embeddings, those of patches are resampled."""
    golden = Golden(name)
    path = save(tmp_path / "x.pth", golden.payload())
    model = load_original_file(path, image_size=48)
    assert model.config.image_size == 48
    old, embeddings = golden.state["pos_embed"], model.vit.embeddings
    clr = 1 if name == "evit_clca" else 0
    prefix = old.shape[1] - 64 - clr
    expected = resample_position_embeddings(old, prefix, (8, 8), (12, 12), clr)
    assert torch.equal(embeddings.position_embeddings, expected[:, : expected.shape[1] - clr])
    assert model(torch.zeros(1, 3, 48, 48)).logits.shape == (1, 7)


# Refusing


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_pickle_is_not_executed(tmp_path: Path, evit: Golden, new_format: bool) -> None:
    trace = tmp_path / "executed"
    payload = evit.payload() | {"hook": Code(trace)}
    torch.save(payload, tmp_path / "x.pth", _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match=r"asks for posix\.system, which is not executed"):
        load_original_file(tmp_path / "x.pth")
    assert not trace.exists()
    torch.load(tmp_path / "x.pth", weights_only=False)
    assert trace.exists()  # the code was there


def test_harmless_classes_are_named_too(tmp_path: Path, evit: Golden) -> None:
    """Even one that something else in the process has allowed; what it allowed stays so."""
    path = save(tmp_path / "x.pth", evit.payload(place=Place()))
    with torch.serialization.safe_globals([Place]):
        allowed = set(torch.serialization.get_safe_globals())
        with pytest.raises(ValueError, match=r"asks for .*\.Place, which is not executed"):
            load_original_file(path)
        assert set(torch.serialization.get_safe_globals()) == allowed and argparse.Namespace not in allowed


def test_files_that_are_no_checkpoints(tmp_path: Path, evit_file: Path, evit: Golden) -> None:
    whole = evit_file.read_bytes()
    for number, content in enumerate((whole[: len(whole) // 2], whole[:100], b"", b"hello", b"\x80\x02}q\x00.")):
        path = tmp_path / f"{number}.pth"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{number}\.pth"):
            load_original_file(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_original_file(tmp_path)
    contents = ([1], {"args": argparse.Namespace(model=ARCHITECTURE)}, {"model": {}}, {"model": [1]}, {"a": 1})
    for content in contents:
        with pytest.raises(ValueError, match=r"no weights|not a dictionary"):
            load_original_file(save(tmp_path / "x.pth", content))
    with pytest.raises(ValueError, match="does not tell which model"):
        load_original_file(save(tmp_path / "x.pth", {"model": evit.state}))
    with pytest.raises(ValueError, match=r"`args` in .* must be a Namespace or a dictionary, got str"):
        load_original_file(save(tmp_path / "x.pth", {"model": evit.state, "args": "evit"}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "evit_resnet50.a1_in1k"}, "unknown `architecture` 'resnet50.a1_in1k'"),
        ({"model": "evot_deit_base_patch16_224"}, "unknown `architecture`"),
        *(
            ({"model": f"{method}_{ARCHITECTURE}"}, f"method {method} is not one")
            for method in ("maws", "dmaws", "edar", "nfedar", "glsf")
        ),
        ({"num_classes": 1110}, "`num_classes` of .* is 1110, .* 7"),
        ({"num_clr": 2}, "`num_clr` of .* is 2, .* 1"),
        ({"ifa_head": False}, "`ifa_head`"),
        ({"ifa_dws_conv_groups": 3}, "`ifa_dws_conv_groups` of .* is 3, .* 2"),
        ({"input_size": 224}, "`input_size` of .* is 224, .* 32"),
        ({"reduction_loc": [1, 2, 3]}, r"`reduction_loc` of .* is \[1, 2, 3\], .* 2 such layers"),
        ({"reduction_loc": [1, 7]}, "`reduction_layers` must lie in 0 .. 5"),
        ({"keep_rate": "much"}, "`keep_rate` of the checkpoint must be numbers"),
        ({"keep_rate": [7.0]}, r"`keep_rate` must be in \(0, 1\]"),
        ({"num_clr": "one"}, "`num_clr` of the checkpoint must be an integer"),
        ({"num_heads": 3}, "must be a multiple of `num_attention_heads`"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, evit: Golden, changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_original_file(save(tmp_path / "x.pth", evit.payload(**changes)))


def test_weights_that_contradict(tmp_path: Path, evit_file: Path) -> None:
    for name, value in (("num_labels", 8), ("hidden_size", 32), ("head", "linear"), ("num_clr_tokens", 0)):
        with pytest.raises(ValueError, match=f"`{name}`={value!r} contradicts the weights"):
            load_original_file(evit_file, **{name: value})
    with pytest.raises(ValueError, match="multiple of `patch_size`"):
        load_original_file(evit_file, image_size=33)

    golden = Golden("sit_base")
    with pytest.raises(ValueError, match=r"cluster_layers\.0\.scale`, a part of sit"):
        load_original_file(save(tmp_path / "x.pth", golden.payload(model=f"dpcknn_{ARCHITECTURE}")))
    with pytest.raises(ValueError, match=r"`keep_rate` .* makes \[16, 4\] tokens, and the weights make \[32, 16\]"):
        load_original_file(save(tmp_path / "x.pth", golden.payload(keep_rate=[0.25])))
    with pytest.raises(ValueError, match="`equal_weight`"):
        load_original_file(save(tmp_path / "x.pth", Golden("dpcknn_base").payload(equal_weight=True)))

    golden = Golden("evit_base")
    for key, tensor in (("dist_token", torch.zeros(1, 1, 16)), ("blocks.0.mlp.fc3.bias", torch.zeros(3))):
        payload = golden.payload() | {"model": golden.state | {key: tensor}}
        with pytest.raises(ValueError, match=key):
            load_original_file(save(tmp_path / "x.pth", payload))
    for key in ("pos_embed", "blocks.0.mlp.fc2.weight", "blocks.3.norm1.bias", "head.weight", "norm.weight"):
        payload = golden.payload() | {"model": {k: v for k, v in golden.state.items() if k != key}}
        with pytest.raises(ValueError, match=key.removeprefix("blocks.3.norm1.")):
            load_original_file(save(tmp_path / "x.pth", payload))
    payload = golden.payload() | {"model": golden.state | {"pos_embed": torch.zeros(1, 61, 16)}}
    with pytest.raises(ValueError, match=r"`pos_embed` .* has 61 rows"):
        load_original_file(save(tmp_path / "x.pth", payload))


# Converting


def test_converted_folder(tmp_path: Path, evit_file: Path, evit: Golden) -> None:
    names = [f"cultivar {index}" for index in range(7)]
    output = tmp_path / "out" / "soygene"
    assert convert_file(evit_file, output, class_names=names)
    files = {file.name for file in output.iterdir()}
    assert files >= {"config.json", "model.safetensors", "modeling_clca.py", "preprocessor_config.json", "README.md"}
    assert [file.name for file in output.parent.iterdir()] == ["soygene"]
    assert output.stat().st_mode & 0o777 == tmp_path.joinpath("out").stat().st_mode & 0o777

    model = CLCAViTForImageClassification.from_pretrained(output)
    assert difference(model, evit) <= 1e-9
    assert list(model.config.id2label.values()) == names and model.config.label2id["cultivar 3"] == 3
    processor = AutoImageProcessor.from_pretrained(output)
    assert (processor.size["height"], processor.size["width"]) == (36, 36) and processor.crop_size["height"] == 32
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    card = (output / "README.md").read_text()
    for words in (f"`{EVIT_NAME}`", "`evit`, keep rate 0.5", "epoch, as reported by the file | 49", "| soygene |"):
        assert words in card
    assert "accuracy" not in card.partition("## How to load")[0].partition("---\n\n")[2]


def test_other_pictures(tmp_path: Path, evit: Golden) -> None:
    payload = evit.payload(custom_mean_std=True, resize_size=40) | {"accuracy": torch.tensor(77.125)}
    path = save(tmp_path / "x.pth", payload)
    convert_file(path, tmp_path / "own size")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "own size")
    assert list(processor.image_mean) == list(processor.image_std) == [0.5] * 3 and processor.size["height"] == 40
    assert "| accuracy, as reported by the file | 77.125 |" in (tmp_path / "own size" / "README.md").read_text()
    convert_file(path, tmp_path / "larger", image_size=48)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "larger")
    assert (processor.size["height"], processor.crop_size["height"]) == (int(48 / 0.875), 48)


def test_a_folder_is_written_once(tmp_path: Path, evit_file: Path, evit: Golden) -> None:
    output = tmp_path / "out"
    output.mkdir()  # empty: it may be there
    assert convert_file(evit_file, output)
    assert not convert_file(evit_file, output)
    written = (output / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match="with other options: set `overwrite`"):
        convert_file(evit_file, output, image_size=48)
    assert (output / "model.safetensors").stat().st_mtime_ns == written
    assert convert_file(evit_file, output, image_size=48, overwrite=True)
    assert json.loads((output / "config.json").read_text())["image_size"] == 48
    with pytest.raises(ValueError, match=r"`class_names` holds 2 names, and .* has 7 classes"):
        convert_file(evit_file, output, class_names=["a", "b"], overwrite=True)
    assert (output / MARKER).is_file()

    foreign = tmp_path / "foreign"
    save(foreign / "thesis.txt", 1)
    for overwrite in (False, True):  # never deleted
        with pytest.raises(ValueError, match="was not made by a conversion"):
            convert_file(evit_file, foreign, overwrite=overwrite)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["foreign", "out", EVIT_NAME])


def make_folder(folder: Path, evit: Golden) -> None:
    """Three good files, one of which is deeper, three bad ones, and one of another kind."""
    save(folder / EVIT_NAME, evit.payload())
    save(folder / "serial_1" / "deeper" / "cotton_topk.v2.pth", Golden("topk_base").payload())
    save(folder / "serial_9" / "late.pth", Golden("vit_base").payload())
    save(folder / "serial_1" / "maws.pth", evit.payload(model=f"maws_{ARCHITECTURE}"))
    save(folder / "code.pth", evit.payload(hook=Code(folder / "executed")))
    (folder / "half.pth").write_bytes((folder / EVIT_NAME).read_bytes()[:20_000])
    (folder / "notes.txt").write_text("not a checkpoint")


GOOD = sorted([EVIT_NAME, "serial_1/deeper/cotton_topk.v2.pth", "serial_9/late.pth"])
BAD = ["code.pth", "half.pth", "serial_1/maws.pth"]


def visible(folder: Path) -> set[str]:
    """Folders that hold files, hidden ones included, relative to `folder`."""
    return {str(path.parent.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_folder_of_files(
    tmp_path: Path, evit: Golden, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    make_folder(source, evit)
    write_card = original_files._card

    def failing(error: BaseException) -> None:
        def card(file: original_files.OriginalFile, *args: Any) -> str:
            if file.path.name == "late.pth":
                raise error
            return write_card(file, *args)

        monkeypatch.setattr(original_files, "_card", card)

    # Interrupted in the middle of the last file: the others are there, of it there is nothing.
    failing(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        convert_folder(source, output)
    complete = {".", EVIT_NAME.removesuffix(".pth"), "serial_1/deeper/cotton_topk.v2"}
    assert visible(output) == complete
    report = json.loads((output / REPORT).read_text())
    assert report["converted"] == [name for name in GOOD if "late" not in name] and report["skipped"] == []

    # The disk fails: the file counts as failed.
    failing(OSError("no space left on device"))
    outcome = convert_folder(source, output)
    assert outcome.converted == [] and outcome.failed["serial_9/late.pth"] == "no space left on device"
    assert visible(output) == complete

    # It goes on where it was interrupted.
    monkeypatch.undo()
    before = (output / EVIT_NAME.removesuffix(".pth") / "model.safetensors").stat().st_mtime_ns
    assert cli.main(["convert", str(source), "--output", str(output)]) == 1
    text = capsys.readouterr().out
    assert "converted 1, skipped 2, failed 3" in text and "method maws is not one" in text
    assert (output / EVIT_NAME.removesuffix(".pth") / "model.safetensors").stat().st_mtime_ns == before
    report = json.loads((output / REPORT).read_text())
    assert report["converted"] == ["serial_9/late.pth"] and sorted(report["failed"]) == BAD
    assert "posix.system" in report["failed"]["code.pth"] and not (source / "executed").exists()
    assert visible(output) == complete | {"serial_9/late"}

    for name in BAD:
        (source / name).unlink()
    assert cli.main(["convert", str(source), "--output", str(output)]) == 0
    assert "converted 0, skipped 3, failed 0" in capsys.readouterr().out


def test_two_files_for_one_folder(tmp_path: Path, evit: Golden) -> None:
    save(tmp_path / "in" / "a.pt", evit.payload())
    save(tmp_path / "in" / "a.pth", Golden("topk_base").payload())
    outcome = convert_folder(tmp_path / "in", tmp_path / "out")
    assert outcome.converted == ["a.pt"] and "made of another file" in outcome.failed["a.pth"]


def test_class_names(tmp_path: Path, evit: Golden) -> None:
    names = tmp_path / "names"
    names.mkdir()
    (names / "soygene.csv").write_text('class_id,class_name\n1,"b, c"\n0,a\n')
    (names / "cotton.txt").write_text("\n".join("tuvwxyz") + "\n")
    assert read_class_names(names / "soygene.csv") == ["a", "b, c"]
    assert read_class_names(names) == {"soygene": ["a", "b, c"], "cotton": list("tuvwxyz")}
    (tmp_path / "from one.csv").write_text("class_name,class_id\na,1\nb,2\n")
    assert read_class_names(tmp_path / "from one.csv") == ["a", "b"]
    for rows in ("0,a\n2,b", "0,a\n0,b", "x,a", "0"):
        (tmp_path / "bad.csv").write_text(f"class_id,class_name\n{rows}\n")
        with pytest.raises(ValueError, match="`class_names`"):
            read_class_names(tmp_path / "bad.csv")

    save(tmp_path / "in" / "cotton_x.pth", evit.payload())
    save(tmp_path / "in" / "soyageing_x.pth", evit.payload())
    save(tmp_path / "in" / "soygene_x.pth", evit.payload())
    outcome = convert_folder(tmp_path / "in", tmp_path / "out", read_class_names(names))
    assert outcome.converted == ["cotton_x.pth", "soyageing_x.pth"]
    assert "holds 2 names" in outcome.failed["soygene_x.pth"]
    labels = json.loads((tmp_path / "out" / "cotton_x" / "config.json").read_text())["id2label"]
    assert labels["6"] == "z"


def test_the_command(tmp_path: Path, evit_file: Path, evit: Golden, capsys: pytest.CaptureFixture) -> None:
    """One file; mistakes end with one sentence and status 2, and nothing is written."""
    output = tmp_path / "out"
    argv = ["convert", str(evit_file), "--output", str(output)]
    assert cli.main(argv) == 0 and capsys.readouterr().out == f"wrote {output}\n"
    assert cli.main(argv) == 0 and "already there" in capsys.readouterr().out
    assert cli.main([*argv, "--overwrite", "--image-size", "48"]) == 0
    capsys.readouterr()

    half, empty = tmp_path / "half.pth", tmp_path / "empty"
    half.write_bytes(evit_file.read_bytes()[:20_000])
    empty.mkdir()
    (empty / "notes.txt").write_text("none")
    code = save(tmp_path / "code.pth", {"model": Code(tmp_path / "executed")})
    other = save(tmp_path / "other.pth", evit.payload(num_classes=5))
    unknown = save(tmp_path / "unknown.pth", evit.payload(model="evit_swin_base_patch4_window7_224"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    new = ["--output", str(tmp_path / "new")]
    for argv, words in (
        (["nowhere.pth", *new], "there is no file or folder nowhere.pth"),
        ([str(empty), *new], "there is no .pth or .pt file"),
        ([str(empty / "notes.txt"), *new], "(UnpicklingError: Weights only load failed."),
        ([str(half), *new], "is not complete"),
        ([str(code), *new], "posix.system"),
        ([str(other), *new], "`num_classes`"),
        ([str(unknown), *new], "unknown `architecture`"),
        ([str(evit_file), *new, "--image-size", "33"], "multiple of `patch_size`"),
        ([str(evit_file), *new, "--class-names", "nowhere.txt"], "nowhere.txt"),
        ([str(evit_file), *new, "--class-names", str(empty)], "`--class-names` must be a file"),
        ([str(evit_file)], "--output"),
        ([str(evit_file), "--output", str(output)], "set `overwrite`"),
        ([str(evit_file), "--output", str(empty)], "was not made by a conversion"),
        ([str(evit_file), "--output", str(half)], "`--output` must be a folder, got the file"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["convert", *argv])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error and error.count("\n") == 1, error
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


REMOTE = """
import sys
class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("clca", "ufgir", "modeling_clca", "configuration_clca"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoPackage())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, pipeline
torch.set_num_threads(1)
model, info = AutoModelForImageClassification.from_pretrained("model", trust_remote_code=True, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
with torch.no_grad():
    save_file({"logits": model.double()(load_file("pixels.safetensors")["pixels"]).logits}, "logits.safetensors")
predictions = pipeline("image-classification", model="model", trust_remote_code=True)("image.png", top_k=2)
assert len(predictions) == 2 and all(p["label"].startswith("cultivar") for p in predictions), predictions
assert "transformers_modules" in type(model).__module__
"""


def test_a_converted_folder_loads_without_this_package(tmp_path: Path, evit_file: Path, evit: Golden) -> None:
    convert_file(evit_file, tmp_path / "model", class_names=[f"cultivar {index}" for index in range(7)])
    Image.new("RGB", (50, 40), "green").save(tmp_path / "image.png")
    save_file({"pixels": evit.images}, tmp_path / "pixels.safetensors")
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", REMOTE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (load_file(tmp_path / "logits.safetensors")["logits"] - evit.logits).abs().max() <= 1e-9
