"""The table of timm's pretrained models, and the command that prints it."""

import json

import pytest
import torch
from PIL import Image

from clca import CLCAViTForImageClassification
from ufgir.checkpoints.from_timm import timm_image_processor
from ufgir.checkpoints.timm_architectures import ARCHITECTURES, FAMILIES, find_architecture, select_architectures
from ufgir.cli import entry as cli


# The pretrainings of the paper, and what is special about them.
PAPER = {
    "vit_base_patch16_224.orig_in21k": {"image_mean": [0.5, 0.5, 0.5]},
    "deit_base_patch16_224.fb_in1k": {"image_mean": [0.485, 0.456, 0.406]},
    "vit_base_patch16_224_miil.in21k": {"image_mean": [0.0, 0.0, 0.0], "resample": Image.Resampling.BILINEAR},
    "vit_base_patch16_224.in1k_mocov3": {"image_std": [0.229, 0.224, 0.225]},
    "vit_base_patch16_224.dino": {"image_std": [0.229, 0.224, 0.225]},
    "vit_base_patch16_224.mae": {"image_std": [0.229, 0.224, 0.225]},
    "deit3_base_patch16_224.fb_in22k_ft_in1k": {"size": 224},
    "deit3_base_patch16_224.fb_in1k": {"size": 248},
    "vit_base_patch16_clip_224.laion2b": {"image_mean": [0.48145466, 0.4578275, 0.40821073]},
    "deit_tiny_patch16_224.fb_in1k": {"size": 248},
}


# The table.


def test_names_are_unique():
    names = [
        f"{network}.{tag.partition('@')[0]}"
        for f in FAMILIES
        for network, tags in f.members.items()
        for tag in tags.split()
    ]
    assert len(names) == len(set(names))
    assert set(names) <= set(ARCHITECTURES)
    assert all(name == architecture.name for name, architecture in ARCHITECTURES.items())


def test_a_network_has_one_shape():
    """The name without a tag determines the shape."""
    for name, architecture in ARCHITECTURES.items():
        assert find_architecture(name.partition(".")[0]).fields == architecture.fields


def test_entries_are_valid():
    built = set()
    for architecture in ARCHITECTURES.values():
        config = architecture.config(num_labels=3)
        assert 0.5 <= architecture.crop_pct <= 1 and architecture.licence and architecture.description
        assert all(len(numbers) == 3 for numbers in (architecture.mean, architecture.std))
        key = str(dict(architecture.fields) | {"num_hidden_layers": 0})
        if key not in built:
            config.num_hidden_layers, config.reduction_layers = 1, []
            with torch.device("meta"):
                CLCAViTForImageClassification(config)
            built.add(key)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("deit_tiny_patch16_224", 5.7),
        ("vit_base_patch16_224", 86.6),
        ("deit3_base_patch16_224", 86.6),
        ("vit_small_patch14_reg4_dinov2", 22.1),
        ("vit_so400m_patch14_siglip_384", 428.2),
        ("vit_giant_patch14_dinov2", 1136.5),
    ],
)
def test_known_numbers_of_parameters(name, millions):
    architecture = find_architecture(name)
    classes = 1000 if architecture.image_size == 224 else 0
    with torch.device("meta"):
        model = CLCAViTForImageClassification(architecture.config(num_labels=classes))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("vit_base_patch16_gap_224", {"num_attention_heads": 16, "use_class_token": False, "pooling": "normed_mean"}),
        ("vit_base_patch16_reg8_gap_256", {"num_register_tokens": 8, "use_class_token": False, "pooling": "mean"}),
        ("vit_large_patch14_224", {"hidden_size": 1024, "patch_size": 14}),
        ("vit_medium_patch16_reg4_256", {"num_register_tokens": 4, "image_size": 256, "num_attention_heads": 8}),
    ],
)
def test_networks_without_weights(name, fields):
    """Models of the later CLCA code that checkpoint files may contain."""
    architecture = find_architecture(name)
    assert architecture.licence == "no weights" and fields.items() <= architecture.fields.items()
    assert architecture.fields.get("use_class_token", True) == ("gap" not in name)


@pytest.mark.parametrize("name", PAPER)
def test_pretrainings_of_the_paper(name):
    processor = timm_image_processor(name)
    for key, value in PAPER[name].items():
        found = processor.resize_size[0] if key == "size" else getattr(processor, key)
        assert (list(found) if isinstance(value, list) else found) == value
    assert processor(Image.new("RGB", (50, 30)), return_tensors="pt")["pixel_values"].shape == (1, 3, 224, 224)


def test_image_processor_of_another_size():
    processor = timm_image_processor("deit3_base_patch16_224.fb_in1k", 448)
    assert (processor.resize_size, processor.size["height"]) == ((497, 497), 448)
    processor = timm_image_processor("deit3_base_patch16_224.fb_in1k", [224, 448])
    assert processor(Image.new("RGB", (50, 30)), return_tensors="pt")["pixel_values"].shape == (1, 3, 224, 448)


def test_command(capsys):
    assert cli.main(["pretrained"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ARCHITECTURES) + 1
    assert cli.main(["pretrained", "deit3_base*.fb_in1k"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 3
    for text in ("deit3_base_patch16_384.fb_in1k", "0.485 0.456 0.406", "apache-2.0", "layerscale_value=1e-06"):
        assert text in out


def test_command_json(capsys):
    assert cli.main(["pretrained", "mae", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {entry["name"] for entry in found} == {a.name for a in select_architectures("mae")}
    assert {entry["licence"] for entry in found} == {"cc-by-nc-4.0"}
    assert found[0]["fields"]["hidden_size"] == 768 and found[0]["mean"] == [0.485, 0.456, 0.406]


def test_command_with_a_name_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["pretrained", "deit5_base_patch16_224"])
    assert stopped.value.code == 2
    assert "Did you mean deit" in capsys.readouterr().err
