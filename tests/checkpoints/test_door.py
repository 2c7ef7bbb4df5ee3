"""Load every kind of source in the same way: configuration, weights and image processor, in Python and by every command."""

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import ViTImageProcessorPil

from clca import CLCAViTConfig, CLCAViTForImageClassification, CLCAViTModel
from tests.checkpoints.original_checkpoints import EVIT_NAME, Golden
from tests.checkpoints.original_checkpoints import save as save_file
from tests.checkpoints.timm_sources import write_folder
from tests.checkpoints.transformers_sources import FIRST, make_source, save
from tests.helpers import TINY, images
from ufgir.checkpoints import load, load_image_processor, load_original_file, load_timm, load_transformers
from ufgir.checkpoints.loading import HEAD, load_config, load_model
from ufgir.checkpoints.sources import KINDS, find_source
from ufgir.cli.entry import main


# What each source is: kind, and the model without the door.
OTHERS = ("clca", "timm", "original", "siglip-classifier", "deit-classifier")
SOURCES = (*FIRST, *OTHERS)


def make(name: str, folder: Path) -> Path:
    """Write a source of a kind, with an image processor if the kind stores it in a file."""
    if name == "original":
        return save_file(folder / EVIT_NAME, Golden("evit_clca").payload())
    if name == "timm":
        return write_folder(folder / "timm")
    if name == "clca":
        torch.manual_seed(0)
        CLCAViTForImageClassification(CLCAViTConfig(**TINY)).save_pretrained(folder)
    else:
        save(make_source(name, torch.float32), folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.1] * 3, image_std=[0.4] * 3).save_pretrained(
        folder
    )
    return folder


def without_the_door(name: str, source: Path) -> CLCAViTForImageClassification:
    if name == "original":
        return load_original_file(source)
    if name == "timm":
        return load_timm(source)
    return CLCAViTForImageClassification.from_pretrained(source) if name == "clca" else load_transformers(source)


def test_every_kind_has_a_source_here(tmp_path: Path) -> None:
    kinds = {find_source(make(name, tmp_path / name))[0].name for name in ("vit_mae", *OTHERS)}
    assert kinds == set(KINDS)


@pytest.mark.parametrize("name", SOURCES)
def test_any_source_is_loaded_as_its_own_loader_does_it(name: str, tmp_path: Path) -> None:
    source = make(name, tmp_path)
    model, expected = load(source), without_the_door(name, source).float()
    assert not model.training and model.dtype == torch.float32
    ours, theirs = model.state_dict(), expected.state_dict()
    untrained = load_model(str(source), load_config(str(source), {}), unused=HEAD).untrained
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if key not in untrained)
    assert model.config.id2label == expected.config.id2label


@pytest.mark.parametrize("name", SOURCES)
def test_any_source_takes_size_classes_and_method(name: str, tmp_path: Path) -> None:
    source = make(name, tmp_path)
    plain = load(source)
    size = 2 * plain.config.image_size
    head = {} if name == "original" else {"reduction": "evit", "keep_rate": 0.5, "reduction_layers": [1]}
    model = load(source, image_size=size, num_labels=7, **head)
    assert (model.config.image_size, model.config.num_labels, model.config.reduction) == (size, 7, "evit")
    with torch.no_grad():
        output = model(images(2, size, size).float())
    assert output.logits.shape == (2, 7) and output.logits.isfinite().all()
    ours, theirs = model.state_dict(), plain.state_dict()
    backbone = [key for key in theirs if key.startswith("vit.layers.") and ".reduction." not in key]
    assert backbone and all(torch.equal(ours[key], theirs[key]) for key in backbone)
    positions = "vit.embeddings.position_embeddings"
    prefix = model.config.num_prefix_tokens * model.config.prefix_position_embeddings
    assert ours[positions].shape[1] == prefix + model.config.num_patches
    assert torch.equal(ours[positions][:, :prefix], theirs[positions][:, :prefix])


@pytest.mark.parametrize("name", SOURCES)
def test_the_image_processor_of_any_source(name: str, tmp_path: Path) -> None:
    source = make(name, tmp_path)
    own = load_config(str(source), {}).image_size
    for options, size in (({}, own), ({"image_size": 2 * own}, 2 * own), ({"image_size": 64, "resize_size": 80}, 64)):
        processor = load_image_processor(source, **options)
        pixels = processor(Image.new("RGB", (90, 70)), return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, size, size)
        if name not in ("original", "timm"):
            assert list(processor.image_mean) == [0.1] * 3 and list(processor.image_std) == [0.4] * 3
    assert list(load_image_processor(source, 64, image_mean=[0.2] * 3).image_mean) == [0.2] * 3


def test_what_is_not_trained_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backbone, classifier = make("dinov2", tmp_path / "backbone"), make("siglip-classifier", tmp_path / "classifier")
    with caplog.at_level(logging.WARNING, logger="ufgir"):
        load(classifier)
        assert "not trained" not in caplog.text
        load(backbone)
    assert "classifier.bias, classifier.weight" in caplog.text


def test_another_number_of_classes_needs_no_flag_where_it_is_asked_for(tmp_path: Path) -> None:
    source = make("clca", tmp_path)
    assert load(source, num_labels=9).classifier.out_features == 9
    with pytest.raises(ValueError, match="classifier"):
        load_model(source, load_config(str(source), {"num_labels": 9}))


@pytest.mark.parametrize("name", ["vit", "dinov2", "timm", "siglip"])
def test_a_converted_backbone_is_known_to_be_untrained(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file does not contain the random head, so that it is not mistaken for a trained one."""
    source, output, leaf = make(name, tmp_path / "source"), tmp_path / "out", tmp_path / "leaf.png"
    Image.new("RGB", (32, 32)).save(leaf)
    assert main(["convert", str(source), "--output", str(output), "--num-labels", "7"]) == 0
    with safe_open(output / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if key.startswith("classifier.")]  # noqa: SIM118
    _, report = CLCAViTForImageClassification.from_pretrained(output, output_loading_info=True)
    assert {key.partition(".")[0] for key in report["missing_keys"]} == {"classifier"}
    assert "classifier.weight" in (output / "README.md").read_text()
    with pytest.raises(SystemExit):
        main(["predict", str(output), str(leaf)])
    assert "does not contain classifier" in capsys.readouterr().err
    assert load_model(output, load_config(str(output), {}), unused=HEAD).untrained == [
        "classifier.bias",
        "classifier.weight",
    ]


def test_convert_takes_the_options_of_a_method(tmp_path: Path) -> None:
    source, output = make("vit", tmp_path / "source"), tmp_path / "out"
    reduced = ["--reduction", "evit", "--reduction-layers", "1", "--reduction-kwargs", '{"score_by": "received"}']
    assert main(["convert", str(source), "--output", str(output), *reduced]) == 0
    assert CLCAViTConfig.from_pretrained(output).reduction_kwargs == {"score_by": "received"}


def test_names_of_timm_stand_for_their_repositories(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def get_config_dict(path, revision=None):
        asked.append(path)
        return {"architecture": "deit3_base_patch16_224"}, {}

    monkeypatch.setattr("ufgir.checkpoints.sources.PreTrainedConfig.get_config_dict", get_config_dict)
    for name in ("deit3_base_patch16_224.fb_in1k", "vit_base_patch16_384", "timm/deit3_base_patch16_224.fb_in1k"):
        kind, source = find_source(name)
        assert kind.name == "timm" and source.path == asked[-1]
    assert asked == [
        "timm/deit3_base_patch16_224.fb_in1k",
        "timm/vit_base_patch16_384.orig_in21k_ft_in1k",
        "timm/deit3_base_patch16_224.fb_in1k",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "nothing"),
        ("empty", "config.json"),
        ("resnet", "`model_type` 'resnet'"),
        ("weights.safetensors", "`architecture`"),
        ("leaf.png", "leaf.png"),
    ],
)
def test_what_is_no_source_is_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "resnet").mkdir()
    (tmp_path / "resnet" / "config.json").write_text('{"model_type": "resnet"}')
    for file in ("weights.safetensors", "leaf.png"):
        (tmp_path / file).write_bytes(b"")
    for door in (load, load_image_processor, lambda source: load_config(str(source), {})):
        with pytest.raises((ValueError, OSError), match=message):
            door(tmp_path / name)


@pytest.mark.parametrize("name", ["deit-classifier", "deit-teacher", "vit-classifier"])
def test_the_backbone_of_a_classifier_is_loaded_alone(name: str, tmp_path: Path) -> None:
    source = make(name, tmp_path)
    backbone, report = CLCAViTModel.from_pretrained(source, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    theirs = load(source).vit.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in backbone.state_dict().items())
