"""Weights of timm: equal results, folders, other sizes, and errors."""

import json
import logging

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from clca import CLCAViTForImageClassification
from tests.checkpoints.timm_sources import FILES, read, write_folder
from ufgir import checkpoints
from ufgir.checkpoints import from_timm
from ufgir.checkpoints.from_timm import load_timm, read_architecture, timm_image_processor, to_timm_names
from ufgir.checkpoints.timm_architectures import ARCHITECTURES


VIT = "vit_base_patch16_224.augreg_in21k_ft_in1k"


def load(name: str, dtype: torch.dtype = torch.float32, **config) -> CLCAViTForImageClassification:
    """Load the model of a golden file."""
    state, _, spec = read(name, dtype)
    return load_timm(state, spec["architecture"], **spec["config"] | config)


@torch.no_grad()
def differences(model: CLCAViTForImageClassification, expected: dict) -> tuple[float, float]:
    """Return the largest differences of the last hidden state and of the logits."""
    hidden = model.vit(expected["pixel_values"]).last_hidden_state
    features = expected["features"]
    if model.config.pooling == "mean":  # there, timm normalises after the mean alone
        features = model.vit.layernorm(features)
    logits = model(expected["pixel_values"]).logits
    return (hidden - features).abs().max().item(), (logits - expected["logits"]).abs().max().item()


@pytest.mark.parametrize("name", FILES)
def test_computes_what_timm_does(name):
    assert max(differences(load(name), read(name)[1])) <= 2e-5


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("resample_")])
def test_computes_what_timm_does_in_float64(name):
    """Networks at another size are excluded, because timm resamples in float32."""
    model = load(name, torch.float64)
    assert model.dtype == torch.float64
    assert max(differences(model, read(name, torch.float64)[1])) <= 1e-9


def test_all_families_have_a_golden():
    described = {json.loads(safe_open(file, "pt").metadata()["config"])["architecture"] for file in FILES.values()}
    tested = {frozenset(ARCHITECTURES[name].own_fields) for name in described}
    assert {frozenset(architecture.own_fields) for architecture in ARCHITECTURES.values()} <= tested
    assert sum(file.stat().st_size for file in FILES.values()) < 1_500_000


@pytest.mark.parametrize(
    ("outer", "prefix"),
    [
        ((), "module."),
        ((), "visual.trunk."),
        ((), "module.visual.trunk."),
        (("state_dict",), "module.base_encoder."),  # MoCo v3
        (("model",), ""),  # DeiT, MAE
        (("encoder",), "module."),  # I-JEPA
        (("teacher",), "module.backbone."),  # DINO
    ],
)
def test_wrapped_weights(outer, prefix):
    state, expected, spec = read("vit")
    wrapped = {f"{prefix}{key}": tensor for key, tensor in state.items()}
    if prefix:
        wrapped |= {"logit_scale": torch.ones(())}
        wrapped |= {f"{prefix}decoder_blocks.0.norm1.weight": torch.ones(4), f"{prefix}mask_token": torch.ones(4)}
    if prefix == "module.base_encoder.":
        wrapped |= {key.replace("base", "momentum"): tensor for key, tensor in wrapped.items()}
    for key in outer:
        wrapped = {key: wrapped, "epoch": 3}
    if prefix == "visual.trunk.":  # OpenCLIP keeps the projection outside
        wrapped |= {"visual.head.proj.weight": wrapped.pop(f"{prefix}head.weight")}
        bias = wrapped.pop(f"{prefix}head.bias")
        expected["logits"] = expected["logits"] - bias
    model = load_timm(wrapped, spec["architecture"], **spec["config"])
    assert max(differences(model, expected)) <= 2e-5


def test_projection_head_of_moco_is_left_out(caplog):
    state, expected, spec = read("vit_no_head")
    state |= {"head.0.weight": torch.ones(4, 16), "head.1.running_mean": torch.ones(4)}
    with caplog.at_level(logging.INFO, logger="ufgir"):
        model = load_timm(state, "vit_base_patch16_224.in1k_mocov3", **spec["config"])
    assert max(differences(model, expected)) <= 2e-5
    assert "`head.0.weight`" in caplog.text


def test_half_precision_becomes_float32():
    assert load("vit", torch.float16).dtype == torch.float32


# What is new.


@pytest.mark.parametrize(
    "config", [{"num_labels": 7}, {"num_labels": 3, "head": "cla", "reduction_layers": [0]}], ids=str
)
def test_other_classes_or_head_start_anew(config):
    model, source = load("vit", **config), load("vit")
    assert model.config.num_labels == config["num_labels"]
    pixels = read("vit")[1]["pixel_values"]
    with torch.no_grad():
        assert torch.equal(model.vit(pixels).last_hidden_state, source.vit(pixels).last_hidden_state)
        assert model(pixels).logits.shape == (2, config["num_labels"])


def test_clca_starts_from_the_source(caplog):
    config = {"reduction": "patchmerger", "reduction_layers": [1], "keep_rate": 0.5, "num_labels": 5, "head": "cla"}
    with caplog.at_level(logging.INFO, logger="ufgir"):
        model = load("vit", **config, cross_layer_cache=True, num_clr_tokens=2)
    embeddings = model.vit.embeddings
    assert torch.equal(embeddings.clr_tokens, embeddings.cls_token.expand(1, 2, -1))
    new = caplog.text.partition("not in the source: ")[2].split(".\n")[0].split(", ")
    kinds = ("vit.embeddings.clr_", "classifier.", "vit.layers.1.reduction.")
    assert new and all(key.startswith(kinds) for key in new)
    assert {key.split(".")[0] for key in new} == {"vit", "classifier"}


def test_reduction_and_its_off_state():
    reduced = load("deit3", reduction="evit", reduction_layers=[1], keep_rate=0.5)
    assert reduced(read("deit3")[1]["pixel_values"]).token_counts == (17, 17, 10)


def test_distilled_head_is_left_out_by_name(caplog):
    with caplog.at_level(logging.INFO, logger="ufgir"):
        load("deit_distilled")
    assert "`head_dist.weight`" in caplog.text


def test_other_pooling():
    model = load("siglip", pooling="mean", num_labels=4)
    assert model.vit.attention_pooling is None and model.classifier.out_features == 4
    assert load("siglip_mean", pooling="map").vit.attention_pooling is not None


def test_no_classifier_in_the_source():
    assert load("dino").config.num_labels == 0
    assert load("dino", num_labels=4).classifier.out_features == 4
    with pytest.raises(ValueError, match="`num_labels`"):
        load("dino", head="cla", reduction_layers=[0])


# Folders and repositories of timm.


@pytest.mark.parametrize("file", from_timm.WEIGHT_FILES)
@pytest.mark.parametrize("name", ["vit", "deit3", "siglip_head", "timm_registers", "dinov2_giant"])
def test_folder(tmp_path, name, file):
    model = load_timm(write_folder(tmp_path / "timm", name, file))
    assert max(differences(model, read(name)[1])) <= 2e-5
    if name == "vit":
        assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    model.save_pretrained(tmp_path / "ours")
    loaded = CLCAViTForImageClassification.from_pretrained(tmp_path / "ours").eval()
    assert max(differences(loaded, read(name)[1])) <= 2e-5


def test_folder_has_its_own_image_processor(tmp_path):
    processor = timm_image_processor(read_architecture(write_folder(tmp_path)))
    assert [*processor.image_mean, *processor.image_std] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert (processor.resize_size, processor.size["width"]) == ((20, 20), 16)
    assert processor.resample == Image.Resampling.BILINEAR


def test_folder_with_another_pooling(tmp_path):
    """After fine-tuning with the mean of the tokens, the name of the norm shows its position."""
    state, expected, _ = read("eva")
    folder = write_folder(tmp_path, "vit", global_pool="avg")
    save_file(state, folder / "model.safetensors")
    assert max(differences(load_timm(folder), expected)) <= 2e-5


def test_folders_of_timm_are_recognised(tmp_path):
    assert from_timm.is_timm_source(write_folder(tmp_path / "timm"))
    load("vit").save_pretrained(tmp_path / "ours")
    assert not from_timm.is_timm_source(tmp_path / "ours")
    assert not from_timm.is_timm_source(tmp_path)
    assert not from_timm.is_timm_source("somebody/a-model")


def test_file(tmp_path):
    file = write_folder(tmp_path) / "model.safetensors"
    _, expected, spec = read("vit")
    assert max(differences(checkpoints.load_timm(file, spec["architecture"], **spec["config"]), expected)) <= 2e-5


def test_repository(tmp_path, monkeypatch):
    write_folder(tmp_path)
    asked = []

    def download(repo_id, filename, revision=None):
        asked.append((repo_id, filename, revision))
        return str(tmp_path / filename)

    monkeypatch.setattr(from_timm, "hf_hub_download", download)
    model = load_timm("hf_hub:somebody/a-timm-model", revision="v1")
    assert max(differences(model, read("vit")[1])) <= 2e-5
    assert asked == [("somebody/a-timm-model", name, "v1") for name in ("config.json", "model.safetensors")]


def test_repository_that_is_not_there(monkeypatch):
    def download(*args, **kwargs):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(from_timm, "hf_hub_download", download)
    with pytest.raises(ValueError, match="`source` nobody/nothing is not a folder or Hub repository"):
        load_timm("nobody/nothing")
    with pytest.raises(ValueError, match="is neither a file, nor a folder, nor a Hub repository"):
        monkeypatch.undo()
        load_timm("no such/folder/anywhere")
    with pytest.raises(ValueError, match="is not a folder or Hub repository"):  # offline
        load_timm("nobody/nothing")
    monkeypatch.setattr(from_timm, "hf_hub_download", download)
    with pytest.raises(ValueError, match="has no weights"):
        load_timm("nobody/nothing", VIT)


# Other sizes.


def test_own_size_is_found_by_the_weights():
    """The name has 224 pixels, but the weights are for 16: they are resampled for 224 and not for 16."""
    state, _, spec = read("vit")
    config = {key: value for key, value in spec["config"].items() if key not in ("image_size", "patch_size")}
    model = load_timm(state, spec["architecture"], **config)
    assert (model.config.image_size, model.config.patch_size) == (224, 16)
    assert model.vit.embeddings.position_embeddings.shape == (1, 197, 8)
    kept = load("vit").vit.embeddings
    assert torch.equal(kept.position_embeddings, state["pos_embed"])
    assert torch.equal(kept.patch_embeddings.projection.weight, state["patch_embed.proj.weight"])


def test_image_that_the_patch_does_not_divide():
    with pytest.raises(ValueError, match="`image_size` must be a multiple of `patch_size`"):
        load("vit", image_size=18)


# Mistakes.


def test_unknown_architecture():
    with pytest.raises(ValueError, match=r"unknown `architecture` 'deit3_bas_patch16_224'.*deit3_base_patch16_224"):
        load_timm({}, "deit3_bas_patch16_224")
    with pytest.raises(ValueError, match=r"Did you mean .*deit3_base_patch16_224\.fb_in1k"):
        load_timm({}, "deit3_base_patch16_224.fb_in1")
    with pytest.raises(ValueError, match="`ufgir pretrained` lists"):
        load_timm({}, "convnext")


def test_architecture_is_needed(tmp_path):
    with pytest.raises(ValueError, match="`architecture`"):
        load_timm(read("vit")[0])
    with pytest.raises(ValueError, match="not a folder or Hub repository with a config"):
        load_timm(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="is not timm's"):
        load_timm(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_timm(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blocks.1.mlp.fc2.bias"), "vit.layers.1.mlp.fc2.bias is missing"),
        (
            lambda state: state.update({"blocks.0.attn.gate": torch.ones(1)}),
            "`source` .*: blocks.0.attn.gate",
        ),
        (
            lambda state: state.update({f"other.{i:02}": torch.ones(1) for i in range(60)}),
            r"`source` .*: other\.00; .*other\.11; and 48 more\.$",
        ),
        (
            lambda state: state.update({"blocks.2.norm1.weight": torch.ones(8)}),
            "layernorm_before.weight is unexpected",
        ),
        (lambda state: state.update({"norm.weight": torch.ones(9)}), r"vit.layernorm.weight has the shape \(9,\)"),
        (lambda state: state.update({"pos_embed": torch.ones(1, 15, 8)}), "`pos_embed` of the `source` has 15"),
        (lambda state: state.pop("pos_embed"), "position_embeddings is missing"),
        (lambda state: state.clear(), "`state_dict` .*no tensors"),
    ],
)
def test_weights_that_do_not_fit(change, message):
    state, _, spec = read("vit")
    change(state)
    with pytest.raises(ValueError, match=message):
        load_timm(state, spec["architecture"], **spec["config"])


def test_another_architecture_does_not_fit():
    state, _, spec = read("vit")
    with pytest.raises(ValueError, match=r"layer_scale1\.lambda1 is missing"):
        load_timm(state, "vit_base_patch14_dinov2.lvd142m", **spec["config"])
    with pytest.raises(ValueError, match="Check `architecture`"):
        load_timm(state, "vit_base_patch16_siglip_224.webli", **spec["config"])


def test_damaged_files(tmp_path):
    folder = write_folder(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_timm(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights"):
        load_timm(folder)
    torch.save({"model": read("vit")[0], "hook": print}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="other objects than tensors"):
        load_timm(folder)


def test_model_args_that_are_not_known(tmp_path):
    with pytest.raises(ValueError, match="`model_args`: block_fn"):
        load_timm(write_folder(tmp_path, model_args={"block_fn": "parallel", "drop_path_rate": 0.1}))


@pytest.mark.parametrize("weights", [[1], torch.zeros(2), {0: torch.zeros(2)}, {"a": 1}])
def test_weights_that_are_none(weights):
    with pytest.raises(ValueError, match=r"`state_dict`|`source`"):
        load_timm(weights, VIT) if isinstance(weights, dict) else to_timm_names(weights)


def test_weights_outside_of_a_prefix_are_named():
    state, _, spec = read("vit")
    wrapped = {f"backbone.{key}": tensor for key, tensor in state.items()}
    load_timm(wrapped | {"momentum_encoder.norm.weight": torch.zeros(1)}, spec["architecture"], **spec["config"])
    with pytest.raises(ValueError, match=r"adapter\.weight"):
        load_timm(wrapped | {"adapter.weight": torch.zeros(1)}, spec["architecture"], **spec["config"])


def test_a_square_table_is_not_taken_for_another_grid_of_as_many_patches():
    """4 x 4 positions are resampled for 2 x 8 patches, instead of being read in another order."""
    state, _, spec = read("vit")
    square = load_timm(state, spec["architecture"], **spec["config"])
    size, patch = square.config.image_size, square.config.patch_size
    if square.config.image_grid[0] != 4:
        pytest.skip("the golden file has another grid")
    wide = load_timm(
        state, spec["architecture"], **spec["config"] | {"image_size": [size // 2, size * 2], "patch_size": patch}
    )
    tables = [m.vit.embeddings.position_embeddings for m in (square, wide)]
    assert tables[0].shape == tables[1].shape and not torch.allclose(*tables)


@pytest.mark.parametrize(
    "contents", ["3", "[]", '{"architecture": 5}', '{"architecture": "vit_tiny_patch16_224", "model_args": 3}']
)
def test_a_config_that_is_none(contents, tmp_path):
    (tmp_path / "config.json").write_text(contents)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_timm(tmp_path)
