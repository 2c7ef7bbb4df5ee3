"""Figures. Geometry is tested on a network with known attention, by reading the pixels of the sheet."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from clca import REDUCTIONS, CLCAViTForImageClassification
from tests.helpers import CASES, Case, slow_unless, tiny_config
from tests.visualization.helpers import cell, noise, processor
from ufgir.data.synthetic_leaves import cultivar_traits, draw_leaf
from ufgir.visualization.kinds import (
    KINDS,
    attention_columns,
    comparison,
    draw,
    kept_columns,
    kept_patches_image,
    make_view,
    merge_columns,
    rollout_columns,
    similarity_columns,
    trace_columns,
)


MODELS = [case for case in CASES if case.cache == "cache" and case.tokens in ("cls", "no_cls")]


def green_seeker(method: str | None, height: int, width: int, **changes) -> CLCAViTForImageClassification:
    """Return a network in which every token attends to the greenest patches and no layer changes the features."""
    config = tiny_config(image_size=[height, width], reduction=method, **changes)
    model = CLCAViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.vit.embeddings.parameters():
            parameter.zero_()
        projection = model.vit.embeddings.patch_embeddings.projection
        projection.weight[0, 0], projection.weight[0, 1] = -1 / 64, 1 / 64  # green minus red, the patch's mean
        model.vit.embeddings.position_embeddings[..., 1] = 1.0  # so that there is something to norm
        for layer in model.vit.layers:
            attention = layer.attention
            for part in (attention.q_proj, attention.k_proj, attention.o_proj, layer.mlp.fc2):
                part.weight.zero_()
                part.bias.zero_()
            for head in range(config.num_attention_heads):
                attention.q_proj.bias[head * attention.head_dim] = 10.0
                attention.k_proj.weight[head * attention.head_dim, 0] = 1.0
    return model


def spotted(row: int, column: int, height: int = 24, width: int = 40) -> Image.Image:
    """Return a gray image with one green patch of 8 x 8 pixels."""
    image = Image.new("RGB", (width, height), (90, 90, 90))
    image.paste((0, 255, 0), (column * 8, row * 8, column * 8 + 8, row * 8 + 8))
    return image


def patches(pixels: np.ndarray) -> np.ndarray:
    """Return the mean brightness (rows, columns) of patches of 8 x 8 pixels."""
    rows, columns = pixels.shape[0] // 8, pixels.shape[1] // 8
    return pixels.reshape(rows, 8, columns, 8, 3).mean(axis=(1, 3, 4))


def place(values: np.ndarray) -> tuple[int, int]:
    """Return row and column of the largest value."""
    row, column = np.unravel_index(values.argmax(), values.shape)
    return int(row), int(column)


# Geometry: a grid of 3 x 5 patches, which reveals swapped rows and columns


@pytest.mark.parametrize("spot", [(0, 0), (0, 4), (2, 0), (1, 3)], ids=str)
@pytest.mark.parametrize("method", [None, "topk", "evit", "ats", "tome"], ids=str)
def test_attention_and_rollout_are_on_the_attended_patch(method, spot) -> None:
    """All attention of CLS is on this patch, in the first layer and in the last, which has fewer tokens in another order."""
    model = green_seeker(method, 24, 40, **({} if method is None else {"keep_rate": 0.75}))
    for kind, count in ((attention_columns, 5), (rollout_columns, 4)):
        sheet = draw(kind, model, processor(24, 40), [spotted(*spot)], side=40)
        for column in range(1, count + 1):
            brightness = patches(cell(sheet, column))
            others = np.delete(brightness.flatten(), spot[0] * 5 + spot[1])
            assert place(brightness) == spot and brightness[spot] > others.max() + 50


@pytest.mark.parametrize("spot", [(0, 0), (0, 4), (2, 0), (1, 3)], ids=str)
def test_attended_patch_is_kept(spot) -> None:
    """After the last stage only this patch has its own colors and the others are dark. EViT's fused token holds the others."""
    for method, fused in (("topk", 0), ("evit", 14)):
        model = green_seeker(method, 24, 40, keep_tokens=[4, 1])
        sheet = draw(kept_columns, model, processor(24, 40), [spotted(*spot)], side=40)
        here, before = cell(sheet, 2), cell(sheet, 0)
        box = slice(spot[0] * 8, spot[0] * 8 + 8), slice(spot[1] * 8, spot[1] * 8 + 8)
        assert np.array_equal(here[box], before[box]) and (here[box] == (0, 255, 0)).all()
        here[box], before[box] = 0, 0
        assert (here <= 0.3 * before).all()
        view = make_view(model, processor(24, 40), [spotted(*spot)])
        (grouped,) = merge_columns(view)[1].cells
        dropped = grouped.groups[grouped.groups < 0]
        assert len(dropped) == 14 - fused and grouped.groups.shape == (3, 5)
        assert (grouped.groups == grouped.groups[spot]).sum() == 1
        traced = trace_columns(view, patch=spot)[1].cells[0]
        assert traced.caption == f"token {grouped.groups[spot]}: 1 patch"
        assert traced.groups.nonzero().tolist() == [list(spot)]


def test_image_size_not_a_multiple_of_the_patch_size() -> None:
    """Only the area covered by patches is drawn, each patch in its place."""
    model = green_seeker("topk", 24, 40, keep_tokens=[4, 1])
    image = Image.new("RGB", (45, 30), (90, 90, 90))
    image.paste((0, 255, 0), (24, 8, 32, 16))
    with pytest.raises(ValueError, match="30 x 45 pixels do not match the model's 24 x 40"):
        draw(kept_columns, model, processor(30, 45), [image])
    for kind in (kept_columns, attention_columns):
        sheet = draw(kind, model, processor(30, 45), [image], side=40, interpolate_pos_encoding=True)
        assert place(patches(cell(sheet, 2))) == (1, 3)
    wide = Image.new("RGB", (56, 16), (90, 90, 90))
    wide.paste((0, 255, 0), (48, 8, 56, 16))
    sheet = draw(kept_columns, model, processor(16, 56), [wide], side=56, interpolate_pos_encoding=True)
    assert place(patches(cell(sheet, 2, 56, 16))) == (1, 6)


@pytest.mark.parametrize("index", range(3))
def test_kept_patches_lie_on_the_leaf(monkeypatch, index) -> None:
    """A network that attends to green keeps the leaf, on synthetic leaves. A copy of the leaf on blue ground gives the true mask."""

    def leaf() -> Image.Image:
        return draw_leaf(cultivar_traits(3)[index], np.random.default_rng(index), image_size=96)

    image = leaf()
    blue = np.zeros((3, 96, 96), np.float32)
    blue[2] = 1.0
    monkeypatch.setattr("ufgir.data.synthetic_leaves._background", lambda rng, size: blue.copy())
    on_blue = np.asarray(leaf(), dtype=int)
    ground = on_blue[..., 2] > 2 * on_blue[..., :2].max(axis=2)
    is_leaf = ~ground.reshape(12, 8, 12, 8).all(axis=(1, 3))  # at least a bit of it
    assert 30 < is_leaf.sum() < 100

    model = green_seeker("topk", 96, 96, keep_tokens=[60, 30])
    sheet = draw(kept_columns, model, processor(96, 96), [image], side=96)
    before, after = patches(cell(sheet, 0, 96, 96)), patches(cell(sheet, 2, 96, 96))
    kept = after > 0.9 * before
    assert kept.sum() == 30 and (kept & is_leaf).sum() == 30


# Every kind, of every model


@pytest.mark.parametrize("kind", KINDS)
# Models without CLS: no reduction, one pruning method and one merging method suffice, since all methods behave alike.
@pytest.mark.parametrize(
    "case", slow_unless(lambda case: case.tokens == "cls" or case.method in (None, "topk", "tome"), MODELS), ids=str
)
def test_every_kind_of_every_model(case, kind) -> None:
    """There is one column per stage, layer, range or reference, and one captioned cell per image."""
    model = case.model()
    config, stages = model.config, len(REDUCTIONS[case.method].layers(model.config)) if case.method else 0
    options = KINDS[kind].example
    expected = {
        "kept": stages,
        "merge": stages,
        "trace": stages,
        "attention": 5,
        "rollout": 4,
        "similarity": 1 + config.use_class_token,
        "gradcam": 1,
    }.get(kind)
    view = make_view(model, processor(), noise())
    if KINDS[kind].unmet(config) is not None:
        assert not expected or not config.use_class_token
        with pytest.raises(ValueError, match=r"reduces no tokens|needs a CLS token"):
            KINDS[kind](view, **options)
        return
    columns = KINDS[kind](view, **options)
    assert len(columns) == (expected or len(columns)) > 0 and all(len(column.cells) == 2 for column in columns)
    for column in columns:
        for drawn in column.cells:
            assert drawn.image.shape == (3, 32, 32) and drawn.image.isfinite().all() and drawn.caption
            assert (drawn.image >= -1e-6).all() and (drawn.image <= 1 + 1e-6).all()
            assert drawn.groups is None or drawn.groups.shape == (4, 4)


@pytest.mark.parametrize("method", sorted(REDUCTIONS))
def test_captions_count(method) -> None:
    """The captions count kept patches and groups; compared with the tokens after the stage."""
    model = Case(method, "plain", "cls").model()
    view = make_view(model, processor(), noise())
    assignments = model(view.pixels, output_assignments=True).assignments
    kept, merged = kept_columns(view), merge_columns(view)
    for stage, names in enumerate(zip(kept, merged, strict=True)):
        assert [column.name for column in names] == [f"after layer {[1, 2][stage]}"] * 2
        for image, (one, other) in enumerate(zip(*(column.cells for column in names), strict=True)):
            tokens = int((assignments[stage][image].sum(dim=-1) > 0).sum()) - 1
            groups = other.groups[other.groups >= 0].unique()
            dropped = int((other.groups < 0).sum())
            assert other.caption.startswith(f"{len(groups)} group") and (f"{dropped} dropped" in other.caption) == (
                dropped > 0
            )
            assert 1 <= len(groups) <= tokens
            if method in ("topk", "ats", "dyvit", "kmedoids", "heuristic"):  # a group is a patch
                assert (
                    len(groups) == tokens and one.caption == f"{tokens} of 16 patches kept" and dropped == 16 - tokens
                )
            if method in ("evit", "tome", "dpcknn", "sit", "patchmerger", "sinkhorn"):
                assert dropped == 0


def test_many_images_are_processed_in_batches(monkeypatch) -> None:
    """ATS pads the images of a batch; each image is drawn as if it were alone, in the given order."""
    model = Case("ats", "cache", "cls").model()
    images = noise(5)
    whole = draw(merge_columns, model, processor(), images, [str(i) for i in range(5)], side=32)
    monkeypatch.setattr("ufgir.visualization.kinds._BATCH", 2)
    assert (
        draw(merge_columns, model, processor(), images, [str(i) for i in range(5)], side=32).tobytes()
        == whole.tobytes()
    )
    monkeypatch.setattr("ufgir.visualization.kinds._BATCH", 1)
    assert (
        draw(merge_columns, model, processor(), images, [str(i) for i in range(5)], side=32).tobytes()
        == whole.tobytes()
    )


def test_input_column_shows_the_preprocessed_image() -> None:
    """The preprocessing of any image processor is undone."""
    model, (image,) = CLCAViTForImageClassification(tiny_config()), noise(1)
    size = {"height": 32, "width": 32}
    for options in ({}, {"do_normalize": False}, {"do_normalize": False, "do_rescale": False}):
        view = make_view(model, ViTImageProcessorPil(size=size, **options), [image])
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        assert (view.images[0] - expected).abs().max() < 1e-5


def test_figure_of_run_ufgir() -> None:
    model = Case("evit", "cache", "cls").model()
    model.train()
    sheet = kept_patches_image(model, processor(), noise(), ["a", "b"], side=48)
    assert model.training
    assert sheet.size == (3 * 52 + 4, 16 + 2 * (16 + 48 + 16 + 4) + 4)
    assert sheet.tobytes() == draw(kept_columns, model, processor(), noise(), ["a", "b"], side=48).tobytes()


def test_options_of_the_kinds() -> None:
    model = Case("tome", "plain", "cls").model()
    view = make_view(model, processor(), noise())
    assert [c.name for c in attention_columns(view, [4, 0])] == ["layer 4", "layer 0"]
    heads = attention_columns(view, [1], "all")
    assert [c.name for c in heads] == ["layer 1, head 0", "layer 1, head 1"]
    assert torch.equal(attention_columns(view, [1], [1])[0].cells[0].image, heads[1].cells[0].image)
    assert not torch.equal(heads[0].cells[0].image, heads[1].cells[0].image)
    assert [c.name for c in rollout_columns(view, [(0, 3), (4, 5)])] == ["layers 0 to 2", "layer 4"]
    assert [c.name for c in similarity_columns(view, ["cls"], [0, 4])] == ["to CLS, layer 0", "to CLS, layer 4"]
    means, distinct = merge_columns(view), merge_columns(view, "distinct")
    assert torch.equal(means[0].cells[0].groups, distinct[0].cells[0].groups)
    assert not torch.equal(means[0].cells[0].image, distinct[0].cells[0].image)
    assert trace_columns(view, token=0)[0].cells[0].caption == "token 0: 0 patches"  # CLS
    counts = [int(trace_columns(view, token=t)[0].cells[0].caption.split(": ")[1].split()[0]) for t in range(1, 5)]
    assert sum(counts) == 16  # of the four tokens that are left


def test_patch_held_by_no_token() -> None:
    model = green_seeker("topk", 24, 40, keep_tokens=[4, 1])
    last = trace_columns(make_view(model, processor(24, 40), [spotted(0, 0)]), patch=(2, 2))[1].cells[0]
    assert last.caption == "no token holds it"


# Grids


def test_grid_of_models() -> None:
    """Each place shows the last column that the model has alone; models are created one at a time."""
    models = [green_seeker("topk", 24, 40, keep_tokens=[6, count]) for count in (5, 3, 2, 1)]
    alive = []

    def produce():
        for model in models:
            alive.append(model)
            yield model, processor(24, 40)

    names, titles = ["few", "fewer"], ["a leaf", "another"]
    images = [spotted(1, 1), spotted(2, 4)]
    sheet = comparison(kept_columns, produce(), names, images, titles, ["one", "two"], side=40)
    assert alive == models
    assert sheet.size == (3 * 44 + 4, 16 + 4 * (16 + 24 + 16 + 4) + 4)
    for place_of, model in enumerate(models):
        row, column = divmod(place_of, 2)
        for image in range(2):
            alone = draw(kept_columns, model, processor(24, 40), images[image : image + 1], side=40)
            top = 16 + (2 * image + row) * 60 + 16
            left = 4 + (1 + column) * 44
            assert np.array_equal(cell(alone, 2), np.asarray(sheet.crop((left, top, left + 40, top + 24))))


def test_invalid_arguments() -> None:
    model = Case("evit", "plain", "cls").model()
    view = make_view(model, processor(), noise())
    for function in (
        lambda images: draw(kept_columns, model, processor(), images),
        lambda i: make_view(model, processor(), i),
    ):
        with pytest.raises(ValueError, match="`images` must"):
            function([])
    with pytest.raises(ValueError, match="`images` must"):
        comparison(kept_columns, [(model, processor())], ["a"], [])
    with pytest.raises(ValueError, match="`titles` must hold one text per image, 2, got 1"):
        draw(kept_columns, model, processor(), noise(), ["one"])
    for models in ([], [(model, processor())]):
        with pytest.raises(ValueError, match=f"`models` must hold 1 x 2 models, got {len(models)}"):
            comparison(kept_columns, models, ["a", "b"], noise())
    for options in ({}, {"token": 1, "patch": (0, 0)}):
        with pytest.raises(ValueError, match="`token` and `patch`"):
            trace_columns(view, **options)
    for token in (-1, 99):
        with pytest.raises(ValueError, match=f"`token` must be in 0 .. .*, got {token}"):
            trace_columns(view, token=token)
    for patch in ((4, 0), (0, -1)):
        with pytest.raises(ValueError, match=r"`patch` must be a row in 0 \.\. 3 and a column in 0 \.\. 3"):
            trace_columns(view, patch=patch)
    for heads in ("some", [], [2]):
        with pytest.raises(ValueError, match=r"`heads` must be 'mean', 'all' or indices in 0 \.\. 1"):
            attention_columns(view, heads=heads)
    with pytest.raises(ValueError, match="`colors` must be one of mean, distinct, got 'red'"):
        merge_columns(view, "red")
