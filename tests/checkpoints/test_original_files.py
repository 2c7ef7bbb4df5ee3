"""Checkpoint files of the original code: loading and errors. The files are created from the golden files: see `original_checkpoints.py`.

The files are made of the golden files: see `original_checkpoints.py`.
"""

import argparse
from pathlib import Path

import pytest
import torch

from clca.resample_clca import resample_position_embeddings
from tests.checkpoints.original_checkpoints import ARCHITECTURE, Code, Golden, difference, save
from ufgir.checkpoints.from_original import (
    _options_of_file_name,
    load_original,
    load_original_file,
    split_model_name,
)


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


class Place:
    """An arbitrary class."""


# Reading


@pytest.mark.parametrize("entry", ["args", "config"])
def test_every_method(tmp_path: Path, golden_file: Path, entry: str) -> None:
    """Everything except the number of heads is determined from the file."""
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


@pytest.mark.parametrize("name", ["edar_base", "maws_fusion_clca_kr025", "dmaws_fusion_norm", "glsf_clca_kr025"])
def test_options_as_text(tmp_path: Path, name: str) -> None:
    """The published format `{config, model, accuracy, epoch}` with lists and booleans as text."""
    golden = Golden(name)
    config = {key: str(value) if isinstance(value, list | bool) else value for key, value in golden.options().items()}
    assert config["reduction_loc"] == "[1, 3]" and config["dropped_token_fusion"] in ("True", "False")
    payload = {"config": config, "model": golden.state, "accuracy": 77.1, "epoch": 49}
    assert "head.weight" not in golden.state or not golden.spec["options"]["ifa_head"]  # no stale one in later files
    model = load_original_file(save(tmp_path / "x.pth", payload))
    assert difference(model, golden) <= 1e-9
    assert model.config.to_dict() == load_original(golden.state, golden.spec).config.to_dict()


def test_edar_that_does_not_tell_whether_it_fuses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fusion is assumed, with a warning that names the option; the other methods do not fuse and do not warn."""
    edar, maws = Golden("edar_base"), Golden("maws_clca")
    path = save(tmp_path / "x.pth", edar.payload(dropped_token_fusion=...))
    assert load_original_file(path).config.reduction_kwargs == {"fuse_rest": True}
    assert "`dropped_token_fusion`" in caplog.text and "`reduction_kwargs`" in caplog.text
    caplog.clear()
    assert difference(load_original_file(path, reduction_kwargs={"fuse_rest": False}), edar) <= 1e-9
    told = save(tmp_path / "told.pth", edar.payload(dropped_token_fusion=False))
    assert load_original_file(told).config.reduction_kwargs is None
    other = save(tmp_path / "maws.pth", maws.payload(dropped_token_fusion=...))
    assert load_original_file(other).config.reduction_kwargs is None
    assert not caplog.text


@pytest.mark.parametrize("name", ["evit_clca", "tome_ifa", "dpcknn_base", "vit_base", "sit_base", "vqt_loc13"])
def test_weights_without_a_dictionary(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    """The file name gives what the weights do not determine; the layers are assumed to be those of the paper."""
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
    assert "assuming [3, 6, 9]" in caplog.text


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
    options = _options_of_file_name(Path(f"soygene_{prefix}{pretraining}{tags}_30.pth"))
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
    """One layer of a network of realistic width."""
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
    with pytest.raises(ValueError, match=r"768.* 16\. Set `num_attention_heads`"):
        load_original_file(path)
    with pytest.raises(ValueError, match=r"`keep_rate` of .*: set `keep_rate`"):
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
    """CLS, registers and CLR keep their position embeddings; those of patches are resampled."""
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
    with pytest.raises(ValueError, match=r"contains posix\.system, which is not executed"):
        load_original_file(tmp_path / "x.pth")
    assert not trace.exists()
    torch.load(tmp_path / "x.pth", weights_only=False)
    assert trace.exists()  # the code was there


def test_harmless_classes_are_named_too(tmp_path: Path, evit: Golden) -> None:
    """Even classes that other code in the process has allowed are rejected, and remain allowed for that code."""
    path = save(tmp_path / "x.pth", evit.payload(place=Place()))
    with torch.serialization.safe_globals([Place]):
        allowed = set(torch.serialization.get_safe_globals())
        with pytest.raises(ValueError, match=r"contains .*\.Place, which is not executed"):
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
    with pytest.raises(ValueError, match="does not name its model"):
        load_original_file(save(tmp_path / "x.pth", {"model": evit.state}))
    with pytest.raises(ValueError, match=r"`args` in .* must be a Namespace or a dictionary, got str"):
        load_original_file(save(tmp_path / "x.pth", {"model": evit.state, "args": "evit"}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "evit_resnet50.a1_in1k"}, "unknown `architecture` 'resnet50.a1_in1k'"),
        ({"model": "evot_deit_base_patch16_224"}, "unknown `architecture`"),
        *(
            ({"model": f"{method}_{ARCHITECTURE}"}, f"{method} of the later CLCA code is not supported")
            for method in ("amaws", "multiselect", "mcrit", "asea")
        ),
        ({"num_classes": 1110}, "`num_classes` of .* is 1110, .* 7"),
        ({"num_clr": 2}, "`num_clr` of .* is 2, .* 1"),
        ({"ifa_head": False}, "`ifa_head`"),
        ({"ifa_dws_conv_groups": 3}, "`ifa_dws_conv_groups` of .* is 3, .* 2"),
        ({"input_size": 224}, "`input_size` of .* is 224, .* 32"),
        ({"reduction_loc": [1, 2, 3]}, r"`reduction_loc` of .* is \[1, 2, 3\], .* 2 such layers"),
        ({"reduction_loc": [1, 7]}, "`reduction_layers` must lie in 0 .. 5"),
        ({"keep_rate": "[0.5"}, "`keep_rate` of the checkpoint must be numbers"),
        ({"reduction_loc": "[1, 3.5]"}, "`reduction_loc` of the checkpoint must be integers"),
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
    with pytest.raises(ValueError, match=r"`keep_rate` .* gives \[16, 4\] tokens, but the weights have \[32, 16\]"):
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
    with pytest.raises(ValueError, match=r"`pos_embed` .* has 61 "):
        load_original_file(save(tmp_path / "x.pth", payload))
