"""Position embeddings and patch projections for other sizes, compared with values of the original code."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from clca import CLCAViTConfig, CLCAViTForImageClassification
from clca.resample_clca import resample_patch_weights, resample_position_embeddings, resample_weights
from tests.helpers import TINY
from ufgir.training.trainer import load_pretrained


GOLDENS = load_file(Path(__file__).parents[1] / "goldens_misc" / "resample.safetensors")
POSITIONS = sorted(key.removesuffix(".in") for key in GOLDENS if key.startswith("pos.") and key.endswith(".in"))
PATCHES = sorted(key.removesuffix(".in") for key in GOLDENS if key.startswith("patch.") and key.endswith(".in"))
PREFIX = {"cls": 1, "noprefix": 0, "reg5": 5}


def grid(text: str) -> tuple[int, int]:
    """Parse "14" or "12x10" to (rows, columns)."""
    rows, _, columns = text.partition("x")
    return int(rows), int(columns or rows)


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_are_the_originals(name):
    kind, old, new = name.removeprefix("pos.").split("_")
    table, expected = GOLDENS[f"{name}.in"], GOLDENS[f"{name}.out"]
    given = table.clone()
    resampled = resample_position_embeddings(table, PREFIX[kind], grid(old), grid(new))
    assert resampled.shape == expected.shape
    assert (resampled - expected).abs().max() <= 1e-6
    assert torch.equal(resampled[:, : PREFIX[kind]], table[:, : PREFIX[kind]])
    assert torch.equal(table, given)


@pytest.mark.parametrize("name", PATCHES)
def test_patch_weights_are_the_originals(name):
    size = int(name.rpartition("_")[2])
    expected = GOLDENS[f"{name}.out"]
    resampled = resample_patch_weights(GOLDENS[f"{name}.in"], (size, size))
    assert resampled.shape == expected.shape
    assert (resampled - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_goldens_are_there():
    assert (len(POSITIONS), len(PATCHES)) == (5, 3)


def test_suffix_stays():
    table = torch.randn(1, 1 + 16 + 3, 4)
    resampled = resample_position_embeddings(table, 1, (4, 4), (6, 2), num_suffix=3)
    assert resampled.shape == (1, 1 + 12 + 3, 4)
    assert torch.equal(resampled[:, :1], table[:, :1])
    assert torch.equal(resampled[:, -3:], table[:, -3:])
    without = resample_position_embeddings(table[:, 1:-3], 0, (4, 4), (6, 2))
    assert torch.equal(resampled[:, 1:-3], without)


def test_same_size_changes_nothing():
    table, weight = torch.randn(1, 17, 4), torch.randn(4, 3, 8, 8)
    assert resample_position_embeddings(table, 1, (4, 4), (4, 4)) is table
    assert resample_patch_weights(weight, (8, 8)) is weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_stays(dtype):
    table, weight = torch.randn(1, 17, 4, dtype=dtype), torch.randn(4, 3, 8, 8, dtype=dtype)
    positions = resample_position_embeddings(table, 1, (4, 4), (8, 8))
    assert positions.dtype == resample_patch_weights(weight, (6, 6)).dtype == dtype
    exact = resample_position_embeddings(table.double(), 1, (4, 4), (8, 8))
    assert torch.allclose(positions.double(), exact, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("size", [(16, 16), (8, 12), (11, 16)])
def test_larger_patches_give_the_same_tokens(size):
    """With FlexiViT's pseudo-inverse, an enlarged patch gives the same token as the patch."""
    weight, patches = torch.randn(5, 3, 8, 8), torch.randn(7, 3, 8, 8)
    enlarged = nn.functional.interpolate(patches, size=size, mode="bicubic", antialias=True, align_corners=False)
    tokens = nn.functional.conv2d(patches, weight)
    assert torch.allclose(nn.functional.conv2d(enlarged, resample_patch_weights(weight, size)), tokens, atol=1e-4)


@pytest.mark.parametrize(
    ("args", "name"),
    [
        ((torch.zeros(1, 17, 4), 0, (4, 4), (8, 8)), "`table`"),
        ((torch.zeros(17, 4), 1, (4, 4), (8, 8)), "`table`"),
        ((torch.zeros(1, 17, 4), 1, (4, 4), (8, 0)), "`new_grid`"),
        ((torch.zeros(1, 17, 4), 1, (16,), (8, 8)), "`old_grid`"),
        ((torch.zeros(1, 17, 4), 1, (4, 4), (8.0, 8)), "`new_grid`"),
    ],
)
def test_wrong_positions_are_named(args, name):
    with pytest.raises(ValueError, match=name):
        resample_position_embeddings(*args)


def test_wrong_patch_weights_are_named():
    with pytest.raises(ValueError, match="`weight`"):
        resample_patch_weights(torch.zeros(4, 192), (8, 8))
    with pytest.raises(ValueError, match="`new_size`"):
        resample_patch_weights(torch.zeros(4, 3, 8, 8), (8, 8, 8))


@pytest.mark.parametrize(
    "sizes",
    [{"image_size": 64}, {"image_size": [24, 56]}, {"patch_size": 4}, {"image_size": 36, "patch_size": 12}],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"num_register_tokens": 2, "num_clr_tokens": 1}], ids=["plain", "registers"])
def test_checkpoints_load_at_other_sizes(tmp_path, sizes, options):
    model = CLCAViTForImageClassification(CLCAViTConfig(**TINY, **options))
    model.save_pretrained(tmp_path)
    config = CLCAViTConfig(**TINY | options | sizes)
    loaded = load_pretrained(str(tmp_path), config)
    expected = resample_weights(model.state_dict(), model.config, config)
    weights = loaded.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in weights)
    size = config.image_size if isinstance(config.image_size, list) else [config.image_size] * 2
    with torch.no_grad():
        assert loaded(torch.randn(1, 3, *size)).logits.isfinite().all()


def test_patch_projection_alone():
    """With the same grid, the positions are unchanged and the projection is resampled."""
    old, new = CLCAViTConfig(**TINY), CLCAViTConfig(**TINY | {"image_size": 64, "patch_size": 16})
    weights = CLCAViTForImageClassification(old).state_dict()
    resampled = resample_weights(weights, old, new)
    changed = [key for key in weights if resampled[key] is not weights[key]]
    assert changed == ["vit.embeddings.patch_embeddings.projection.weight"]
