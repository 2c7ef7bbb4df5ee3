"""Comparing models, laying out their features, and passing over large sets: results, interruptions, and mistakes of users."""

import csv
import itertools
import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from clca import CLCAViTConfig, CLCAViTForImageClassification
from tests.helpers import TINY, tiny_model
from ufgir.analysis import figures as analysis_figures
from ufgir.analysis.comparison import compare_models
from ufgir.analysis.dataset_pass import RECORD, Statistics, analyze
from ufgir.analysis.embedding import collect_features, embed, spread_out
from ufgir.analysis.inputs import Batch, LayerOutputs, batches
from ufgir.cli.entry import main
from ufgir.data.streams import StreamedImages, to_stream
from ufgir.data.transformed import TransformedImages
from ufgir.evaluation.metrics import compute_metrics
from ufgir.interpret import patterns, saliency
from ufgir.interpret.patterns import cluster_maps, kept_patches
from ufgir.interpret.similarity import BatchedCKA, linear_cka, pwcca_distance
from ufgir.transforms.preprocessing import EvalTransform, make_image_processor
from ufgir.utils import plotting as figures


PROCESSOR = make_image_processor(32, resize_size=32)
CLASSES = ["ash", "beech", "cedar", "date palm", "elm", "fir", "ginkgo"]
REDUCED = {"reduction": "evit", "keep_rate": 0.5, "cross_layer_cache": True, "num_clr_tokens": 1, "head": "cla"}


def picture(index):
    noise = np.random.default_rng(index).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((32, 32))


def pictures(count=37):
    columns = {"image": [picture(i) for i in range(count)], "label": [i % 7 for i in range(count)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    return datasets.Dataset.from_dict(columns, features=features)


def float_model(**changes):
    return tiny_model(**({"num_labels": 7} | REDUCED | changes)).float()


@pytest.fixture(scope="module")
def raw():
    return pictures()


@pytest.fixture(scope="module")
def dataset(raw):
    return TransformedImages(raw, EvalTransform(PROCESSOR))


@pytest.fixture(scope="module")
def pixels(dataset):
    return torch.stack([dataset[i]["pixel_values"] for i in range(len(dataset))])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two models and one without reduction and CLS, with image processors, and a folder of images."""
    folder = tmp_path_factory.mktemp("models")
    settings = {"a": {}, "b": {"keep_rate": 0.25}, "plain": {"reduction": None, "keep_rate": 1.0}}
    settings["no_cls"] = {"use_class_token": False, "pooling": "mean", "num_clr_tokens": 0, "head": "linear"}
    for name, changes in settings.items():
        torch.manual_seed(0)
        names = {"id2label": dict(enumerate(CLASSES)), "label2id": {c: i for i, c in enumerate(CLASSES)}}
        config = CLCAViTConfig(**({k: v for k, v in TINY.items() if k != "num_labels"} | REDUCED | changes | names))
        CLCAViTForImageClassification(config).save_pretrained(folder / name)
        PROCESSOR.save_pretrained(folder / name)
    for i in range(21):
        place = folder / "leaves" / "test" / CLASSES[i % 7]
        place.mkdir(parents=True, exist_ok=True)
        picture(i).save(place / f"{i}.png")
    return folder


def rows_of(path):
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def shards(folder):
    return pq.read_table(sorted(Path(folder).glob("images-*.parquet"))).to_pylist()


# Features on the way


@pytest.mark.parametrize("cache", [{}, {"cross_layer_cache": False, "num_clr_tokens": 0, "head": "linear"}])
def test_layer_outputs_are_the_recorded_hidden_states(cache, pixels):
    model = float_model(**cache)
    with torch.no_grad(), LayerOutputs(model, [0, 2, 4]) as outputs:
        hidden = model(pixels[:2], output_hidden_states=True).hidden_states
        found = outputs.all_tokens()
    for layer, tokens in zip([0, 2, 4], found, strict=True):
        torch.testing.assert_close(tokens, hidden[layer + 1])
    model(pixels[:2])
    assert outputs.tokens == {}  # it looks no longer


def test_padding_is_not_among_the_tokens(pixels):
    model = float_model(reduction="ats", keep_rate=0.9)
    with torch.no_grad(), LayerOutputs(model, [2]) as outputs:
        model(pixels)
        (tokens,), seen = outputs.all_tokens(), outputs.visible[2]
    assert not seen.all()
    assert not tokens[~seen].any()


def test_batches_leave_broken_images_out_or_stop(raw, dataset):
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, index):
            if index in (0, 5):
                raise OSError("image file is truncated")
            return dataset[index]

    found = list(batches(Broken(), 4, start=3, skip_broken=True))
    assert [batch.indices for batch in found] == [[3, 4, 6], [7, 8, 9]]
    assert [batch.broken for batch in found] == [["image 5"], []]
    with pytest.raises(ValueError, match=r"image 0 cannot be read: .*truncated"):
        list(batches(Broken(), 4))
    with pytest.raises(ValueError, match="empty"):
        list(batches(torch.utils.data.Subset(dataset, []), 4))


# Comparing


def test_comparing_two_models(dataset, pixels):
    a, b = float_model(), float_model(keep_rate=0.25, reduction_layers=[2, 3])
    source = batches(dataset, 10)
    found = compare_models([a, b], source, ["cka-plain", "pwcca", "cka", "norms", "patterns"], layers=([0, 4], [4]))
    with torch.no_grad(), LayerOutputs(a, [0, 4]) as of_a, LayerOutputs(b, [4]) as of_b:
        output_a, output_b = a(pixels, output_assignments=True), b(pixels, output_assignments=True)
        xs, (y,) = of_a.cls(), of_b.cls()
    for measure, function in (("cka-plain", linear_cka), ("pwcca", pwcca_distance)):
        np.testing.assert_allclose(found.matrices[measure], [[function(x, y)] for x in xs], atol=1e-5)
    assert found.matrices["cka"].shape == (2, 1)
    assert [(row["model"], row["layer"]) for row in found.norms] == [("a", 0), ("a", 4), ("b", 4)]
    assert (found.images, found.scalars()["cka-plain_layer_4"]) == (37, found.matrices["cka-plain"][1, 0])
    kept = [kept_patches(o.assignments, m.config).float().mean(dim=(0, 2)) for o, m in ((output_a, a), (output_b, b))]
    assert [row["kept_a_mean"] for row in found.stages] == pytest.approx(kept[0].tolist())
    assert [row["kept_b_mean"] for row in found.stages] == pytest.approx(kept[1].tolist())
    assert found.maps[0]["depth_mean"].shape == (4, 4)
    assert found.map_metrics["emd"] > 0


def test_layers_of_one_model_on_all_tokens(dataset, pixels):
    found = compare_models([float_model()], batches(dataset, 10), ["cka"], features="tokens")
    matrix = found.matrices["cka"]
    np.testing.assert_allclose(np.diag(matrix), 1)
    np.testing.assert_allclose(matrix, matrix.T)
    expected = BatchedCKA()
    with torch.no_grad():
        for part in pixels.split(10):
            expected.update(float_model()(part, output_hidden_states=True).hidden_states[1:])
    np.testing.assert_allclose(matrix, expected.matrix(), rtol=1e-4)


def test_a_model_with_pixels_of_its_own_gets_them(dataset):
    model = float_model()
    other = {"pixel_values": torch.zeros(5, 3, 32, 32), "pixel_values_2": torch.randn(5, 3, 32, 32)}
    found = compare_models([model, model], [Batch([*range(5)], other, 5, [])], ["cka-plain"], layers=([4], [4]))
    assert np.isnan(found.matrices["cka-plain"]).all()  # the first saw equal images
    with pytest.raises(ValueError, match="no images"):
        compare_models([model], [], ["cka"])


# Embedding


def test_embeddings_keep_groups_together():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 20)
    features = rng.normal(size=(60, 12)) + 30 * rng.normal(size=(3, 12))[labels]
    for method in ("tsne", "pca"):
        points = embed(features, method)
        np.testing.assert_array_equal(points, embed(features, method))
        distances = np.linalg.norm(points[:, None] - points, axis=-1) + 1e9 * np.eye(60)
        assert (labels[distances.argmin(axis=1)] == labels).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"features": np.ones((3, 5))}, "at least 4 images, got 3"),
        ({"method": "umap"}, "tsne or pca, got 'umap'"),
        ({"perplexity": 0.5}, "at least 1, got 0.5"),
        ({"features": np.full((9, 5), np.nan)}, "finite"),
    ],
)
def test_embeddings_that_cannot_be_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        embed(**({"features": np.ones((9, 5))} | arguments))


def test_features_are_those_the_head_reads(dataset, pixels):
    model = float_model()
    with torch.no_grad():
        cls = model.vit(pixels, output_hidden_states=True).hidden_states[-1][:, 0]
        logits = model(pixels).logits
    source = lambda: batches(dataset, 10)  # noqa: E731
    found = collect_features(model, source())
    np.testing.assert_allclose(found.values, cls.numpy(), atol=1e-5)
    assert (found.indices, found.labels) == ([*range(37)], [i % 7 for i in range(37)])
    aggregated = torch.from_numpy(collect_features(model, source(), "cla").values)
    again = model.classifier.out_proj(aggregated.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(again, logits, atol=1e-4, rtol=1e-4)
    assert not model.classifier.out_proj._forward_pre_hooks
    plain = float_model(head="linear")
    pooled = torch.from_numpy(collect_features(plain, source(), "pooled").values)
    torch.testing.assert_close(plain.classifier(pooled), plain(pixels).logits, atol=1e-4, rtol=1e-4)


def test_thumbnails_are_spread_out():
    points = np.array([[0.0, 0.0], [0.01, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    assert set(spread_out(points, 4)) == {2, 3, 4, 0} or set(spread_out(points, 4)) == {2, 3, 4, 1}
    assert len(spread_out(points, 5, apart=0.1)) == 4
    assert len(spread_out(np.zeros((3, 2)), 3)) == 1  # all in one place
    assert spread_out(points, 0) == []


@pytest.mark.parametrize("classes", [3, 24, 90])
def test_many_classes_can_be_told_apart(classes):
    with figures.style():
        labels = [*range(classes), -1]
        points = np.random.default_rng(0).normal(size=(classes + 1, 2))
        drawn = analysis_figures.draw_points(points, labels, [f"c{i}" for i in range(classes)], ("x", "y"))
        axes = drawn.axes[0]
        if classes <= 24:
            looks = {
                (tuple(c.get_facecolor()[0]), tuple(c.get_paths()[0].vertices.ravel())) for c in axes.collections[1:]
            }
            assert len(looks) == classes
            assert len(axes.get_legend().get_texts()) == classes + 1
        else:
            assert [text.get_text() for text in axes.texts] == [str(i) for i in range(classes)]


# One pass over many images


def test_analysis_of_each_image_and_of_all(dataset, pixels, tmp_path):
    model = float_model()
    result = analyze(
        model,
        dataset,
        tmp_path / "out",
        layers=[0, 4],
        assignments=True,
        class_names=CLASSES,
        batch_size=5,
        shard_size=8,
    )
    with torch.no_grad():
        output = model(pixels, output_assignments=True, output_hidden_states=True)
    rows = shards(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("images-*.parquet"))) == 4  # of two batches each
    assert [row["index"] for row in rows] == [*range(37)]
    logits = torch.tensor([row["logits"] for row in rows])
    torch.testing.assert_close(logits, output.logits, atol=1e-5, rtol=1e-5)
    labels = torch.arange(37) % 7
    losses = torch.nn.functional.cross_entropy(output.logits, labels, reduction="none")
    torch.testing.assert_close(torch.tensor([row["loss"] for row in rows]), losses, atol=1e-5, rtol=1e-5)
    kept, clusters = (f(output.assignments, model.config) for f in (kept_patches, cluster_maps))
    for i, row in enumerate(rows):
        for stage in range(2):
            assert row[f"kept_{stage}"] == kept[i, stage].nonzero().flatten().tolist()
            assert row[f"cluster_{stage}"] == clusters[i, stage].tolist()
            own = [row[f"share_{stage}"][patch] for patch in row[f"kept_{stage}"]]
            assert own == pytest.approx([1] * len(own))
    features = torch.tensor([row["cls_4"] for row in rows])
    torch.testing.assert_close(features, output.hidden_states[5][:, 0], atol=1e-5, rtol=1e-5)
    expected = compute_metrics((output.logits.numpy(), labels.numpy()))
    assert {k: result.metrics[k] for k in expected} == pytest.approx(expected)
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert (record["images"], record["metrics"]["loss"]) == (37, pytest.approx(float(losses.mean())))
    assert [row["kept_mean"] for row in record["stages"]] == pytest.approx(kept.float().mean(dim=(0, 2)).tolist())
    of_classes = rows_of(tmp_path / "out" / "classes.csv")
    assert [row["class"] for row in of_classes] == CLASSES
    assert float(of_classes[2]["loss"]) == pytest.approx(float(losses[2::7].mean()), rel=1e-5)
    assert len(rows_of(tmp_path / "out" / "maps.csv")) == 16


class Interrupted(Exception):
    pass


class Fragile(torch.utils.data.Dataset):
    """Breaks down at an image; notes what was asked for."""

    def __init__(self, dataset, at=None):
        self.dataset, self.at, self.asked = dataset, at, []

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.asked.append(index)
        if index == self.at:
            raise KeyboardInterrupt
        return self.dataset[index]


def same_files(first, second):
    for path in sorted(Path(first).iterdir()):
        other = Path(second) / path.name
        if path.suffix == ".parquet":
            assert pq.read_table(path).equals(pq.read_table(other)), path
        elif path.suffix == ".csv":
            assert path.read_bytes() == other.read_bytes(), path


@pytest.mark.parametrize("at", [7, 22, 36])
def test_an_interrupted_analysis_goes_on_with_the_next_shard(dataset, tmp_path, at):
    options = {"batch_size": 5, "shard_size": 10, "layers": [4]}
    whole = analyze(float_model(), Fragile(dataset), tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        analyze(float_model(), Fragile(dataset, at), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    rest = Fragile(dataset)
    result = analyze(float_model(), rest, tmp_path / "out", **options)
    assert (rest.asked[0], result.resumed_at) == (at // 10 * 10,) * 2
    assert result.metrics == pytest.approx(whole.metrics)
    same_files(tmp_path / "whole", tmp_path / "out")
    assert not (tmp_path / "_out.partial").exists()
    again = Fragile(dataset)
    assert analyze(float_model(), again, tmp_path / "out", **options).metrics == result.metrics
    assert again.asked == []  # it is done


def test_an_interruption_between_shard_and_state_repeats_the_shard(dataset, tmp_path, monkeypatch):
    options = {"batch_size": 5, "shard_size": 10}
    whole = analyze(float_model(), dataset, tmp_path / "whole", **options)
    real = np.savez

    def fail(file, about, **arrays):
        if json.loads(str(about))["shards"] == 2:
            raise OSError("no space left on device")
        real(file, about=about, **arrays)

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="no space"):
        analyze(float_model(), dataset, tmp_path / "out", **options)
    monkeypatch.undo()
    result = analyze(float_model(), dataset, tmp_path / "out", **options)
    assert (result.resumed_at, result.images) == (10, whole.images)
    same_files(tmp_path / "whole", tmp_path / "out")


def test_another_model_starts_over_and_never_overwrites(dataset, tmp_path):
    options = {"batch_size": 5, "shard_size": 10}
    with pytest.raises(KeyboardInterrupt):
        analyze(float_model(), Fragile(dataset, 12), tmp_path / "out", **options)
    result = analyze(float_model(keep_rate=0.25), Fragile(dataset), tmp_path / "out", **options)
    assert (result.resumed_at, len(shards(tmp_path / "out"))) == (0, 37)
    with pytest.raises(ValueError, match="another model, other images"):
        analyze(float_model(), Fragile(dataset), tmp_path / "out", **options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="something else"):
        analyze(float_model(), dataset, tmp_path / "mine", **options)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_stream_is_analysed_as_data_in_memory_and_resumed(raw, dataset, tmp_path, monkeypatch):
    def stream():
        splits = to_stream(datasets.DatasetDict(test=raw))
        return StreamedImages(splits["test"], EvalTransform(PROCESSOR), batch_size=5)

    options = {"batch_size": 5, "shard_size": 10, "layers": [4]}
    whole = analyze(float_model(), dataset, tmp_path / "whole", **options)
    broken, real, count = stream(), EvalTransform.__call__, itertools.count()

    def fail(self, image, generator=None):
        if next(count) == 23:
            raise Interrupted
        return real(self, image, generator)

    with monkeypatch.context() as patch:
        patch.setattr(EvalTransform, "__call__", fail)
        with pytest.raises(Interrupted):
            analyze(float_model(), broken, tmp_path / "out", **options)
    result = analyze(float_model(), stream(), tmp_path / "out", **options)
    assert result.resumed_at == 20
    assert result.metrics == pytest.approx(whole.metrics)
    same_files(tmp_path / "whole", tmp_path / "out")


def test_unknown_labels_and_dense_models(dataset, tmp_path):
    class Unlabelled(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            return dataset[index] | {"labels": -1 if index % 2 else index % 7}

    result = analyze(float_model(reduction=None, keep_rate=1.0), Unlabelled(), tmp_path / "out")
    rows = shards(tmp_path / "out")
    assert [row["label"] for row in rows] == [0, None, 2, None, 4, None]
    assert [row["loss"] is None for row in rows] == [False, True] * 3
    assert "kept_0" not in rows[0]
    assert result.metrics["loss"] == pytest.approx(np.mean([row["loss"] for row in rows[::2]]))


def test_several_classes_an_image(dataset, tmp_path):
    class Several(torch.utils.data.Dataset):
        def __len__(self):
            return 9

        def __getitem__(self, index):
            return {**dataset[index], "labels": torch.eye(7)[[index % 7, (index + 3) % 7]].sum(dim=0)}

    model = float_model(problem_type="multi_label_classification")
    result = analyze(model, Several(), tmp_path / "out", batch_size=4)
    rows = shards(tmp_path / "out")
    assert [row["label"] for row in rows] == [sorted([i % 7, (i + 3) % 7]) for i in range(9)]
    chosen = np.array([[k in row["prediction"] for k in range(7)] for row in rows])
    targets = np.array([[k in row["label"] for k in range(7)] for row in rows])
    micro = 2 * (chosen & targets).sum() / (chosen.sum() + targets.sum())
    assert result.metrics["micro_f1"] == pytest.approx(micro)


def test_statistics_do_not_grow_with_the_images():
    statistics = Statistics(float_model().config)

    def size():
        return sum(array.nbytes for array in statistics.state().values())

    def add(count):
        draw = np.random.default_rng(count).random((count, 7))
        statistics.update(draw > 0.5, draw > 0.6, draw.argsort(axis=1), draw[:, 0], count)

    add(10)
    before = size()
    add(10_000)
    assert (size(), statistics.images) == (before, 10_010)


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"reduction": None, "keep_rate": 1.0}, {"assignments": True}, "reduces no tokens"),
        (
            {"use_class_token": False, "pooling": "mean", "num_clr_tokens": 0, "head": "linear"},
            {"layers": [1]},
            "no CLS token",
        ),
        ({}, {"layers": [5]}, r"0 \.\. 4, got 5"),
        ({}, {"shard_size": 0}, "`shard_size` must be at least 1"),
    ],
)
def test_what_cannot_be_analysed_is_refused_before_anything_is_written(dataset, tmp_path, changes, options, words):
    with pytest.raises(ValueError, match=words):
        analyze(float_model(**changes), dataset, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="empty"):
        analyze(float_model(), torch.utils.data.Subset(dataset, []), tmp_path / "empty")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "empty").exists()


# On the command line


def test_analyze_command(checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/ufgir", "analyze", "a model"])
    arguments = ["analyze", str(checkpoints / "a"), "--dataset", str(checkpoints / "leaves"), "--output"]
    assert main([*arguments, str(tmp_path / "out"), "--features", "4", "--assignments", "--batch-size", "8"]) == 0
    assert "21 images" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["models"][0]["reduction"] == "evit"
    assert (record["data"]["split"], record["data"]["images"]) == ("test", 21)
    assert record["command"] == "ufgir analyze 'a model'"
    assert {"date", "host", "versions"} <= set(record)
    rows = shards(tmp_path / "out")
    assert sorted(Path(row["file"]).name for row in rows) == sorted(f"{i}.png" for i in range(21))
    assert {row["label"] for row in rows} == set(range(7))
    for name in ("depth.png", "kept.png"):
        assert Image.open(tmp_path / "out" / name).width > 300
    (checkpoints / "leaves" / "test" / "ash" / "zz.png").write_text("not a picture")
    try:
        assert main([*arguments, str(tmp_path / "broken"), "--skip-broken"]) == 1
        assert "zz.png" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            main([*arguments, str(tmp_path / "stops")])
        assert "`--skip-broken` leaves such images out" in capsys.readouterr().err
    finally:
        (checkpoints / "leaves" / "test" / "ash" / "zz.png").unlink()


def test_streaming_and_stopping_on_the_command_line(checkpoints, tmp_path, capsys, monkeypatch):
    arguments = ["analyze", str(checkpoints / "a"), "--dataset", str(checkpoints / "leaves"), "--batch-size", "4"]
    arguments += ["--shard-size", "4", "--output"]
    assert main([*arguments, str(tmp_path / "whole"), "--max-images", "10", "--streaming"]) == 0
    assert [row["index"] for row in shards(tmp_path / "whole")] == [*range(10)]
    real, count = EvalTransform.__call__, itertools.count()

    def stop(self, image, generator=None):
        if next(count) == 9:
            raise KeyboardInterrupt
        return real(self, image, generator)

    with monkeypatch.context() as patch:
        patch.setattr(EvalTransform, "__call__", stop)
        assert main([*arguments, str(tmp_path / "out")]) == 130
    assert "goes on" in capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "out")]) == 0
    assert "21 images, 8 of them done before" in capsys.readouterr().out


def test_compare_and_correlate_commands(checkpoints, tmp_path, capsys):
    models, leaves = [str(checkpoints / "a"), str(checkpoints / "b")], ["--dataset", str(checkpoints / "leaves")]
    what = ["--what", "cka", "cka-plain", "pwcca", "norms", "patterns", "--layers", "1", "4"]
    assert main(["compare", *models, *leaves, *what, "--batch-size", "8", "--output", str(tmp_path / "0")]) == 0
    record = json.loads((tmp_path / "0" / "comparison.json").read_text())
    assert record["names"] == ["a", "b"]
    assert record["scalars"]["cka-plain_layer_4"] == pytest.approx(record["matrices"]["cka-plain"][1][1])
    assert [(r["layer_a"], r["layer_b"]) for r in rows_of(tmp_path / "0" / "pwcca.csv")] == [
        ("1", "1"),
        ("1", "4"),
        ("4", "1"),
        ("4", "4"),
    ]
    assert len(rows_of(tmp_path / "0" / "patterns.csv")) == 2
    assert len(rows_of(tmp_path / "0" / "maps.csv")) == 32
    for name in ("cka", "pwcca", "norms", "depth"):
        assert (tmp_path / "0" / f"{name}.png").exists()
    for i, (a, b) in enumerate((("a", "plain"), ("b", "plain")), start=1):  # as if they had been compared
        (tmp_path / str(i)).mkdir()
        other = {"models": [{"name": str(checkpoints / name)} for name in (a, b)], "scalars": {"cka-plain_mean": -i}}
        (tmp_path / str(i) / "comparison.json").write_text(json.dumps(other))
    results = tmp_path / "results.csv"
    lines = [f"{checkpoints / name},{top1}" for name, top1 in (("a", 0.9), ("b", 0.85), ("plain", 0.5))]
    results.write_text("\n".join(["run,test_top1", *lines]))
    capsys.readouterr()
    folders = [str(tmp_path / str(i)) for i in range(3)]
    assert main(["correlate", *folders, "--results", str(results), "--output", str(tmp_path / "gaps.csv")]) == 0
    assert "test_top1" in capsys.readouterr().out
    found = {row["measure"]: row for row in rows_of(tmp_path / "gaps.csv")}
    assert found["cka-plain_mean"]["pairs"] == "3"
    assert float(found["cka-plain_mean"]["spearman"]) == pytest.approx(-0.5)  # gaps 0.05, 0.4, 0.35
    told = json.loads((tmp_path / "gaps.json").read_text())["pairs"]
    assert [pair["gap"] for pair in told] == pytest.approx([0.05, 0.4, 0.35])


def test_embed_command(checkpoints, tmp_path, capsys):
    arguments = [
        str(checkpoints / "a"),
        "--dataset",
        str(checkpoints / "leaves"),
        "--features",
        "cla",
        "--thumbnails",
        "4",
    ]
    assert main(["embed", *arguments, "--output", str(tmp_path / "out")]) == 0
    assert "21 images, 32 features" in capsys.readouterr().out
    for method in ("tsne", "pca"):
        rows = rows_of(tmp_path / "out" / f"{method}.csv")
        assert [int(row["index"]) for row in rows] == [*range(21)]
        assert rows[0]["label"] in CLASSES
        assert Image.open(tmp_path / "out" / f"{method}.png").width > 600


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["analyze", "plain", "--assignments"], "plain reduces no tokens"),
        (["analyze", "no_cls", "--features", "1"], "no_cls has no CLS token"),
        (["analyze", "a", "--split", "train"], "has no train images; it has test"),
        (["analyze", "a", "--max-images", "0"], "`--max-images` must be at least 1, got 0"),
        (["analyze", "a", "--streaming", "--skip-broken"], "leave out one of them"),
        (["analyze", "a", "--device", "cuda:99"], "`--device` cuda:99 is not there"),
        (["analyze", "a", "--dataset-options", '{"shotz": 1}'], "Unknown argument `shotz`"),
        (["compare", "a", "--what", "patterns"], "name a second one"),
        (["compare", "a", "plain", "--what", "patterns"], "the second model reduces no tokens"),
        (["compare", "a", "a", "--changes-b", '{"image_size": 64}', "--what", "patterns"], "grids of 4 x 4 and 8 x 8"),
        (["compare", "a", "no_cls"], "no_cls has no CLS token"),
        (["compare", "a", "--what", "svcca"], "cka, cka-plain, pwcca"),
        (["compare", "a", "b", "--what", "cca", "--features", "tokens"], "may differ in number"),
        (["compare", "a", "b", "--layers", "7"], "got 7"),
        (["compare", "a", "--layers-b", "1"], "need a MODEL_B"),
        (["compare", "a", "b", "--layers-b", "7"], "`--layers-b` must name at least one layer of 0 .. 4, got 7"),
        (["compare", "a", "b", "--layers", "7"], "`--layers` must name at least one layer of 0 .. 4, got 7"),
        (
            ["compare", "a", "a", "--changes-b", '{"keep_rates": [0.25]}'],
            "no field `keep_rates`. Did you mean `keep_rate`?",
        ),
        (["compare", "a", "--changes-a", '{"xyzzy": 1}'], "`--changes-a`: a configuration has no field `xyzzy`"),
        (["compare", "a", "a", "--changes-b", "[]"], "must be a JSON object, got []"),
        (["analyze", "a", "--dataset-options", "[]"], "must be a JSON object, got []"),
        (["analyze", "a", "--features", "99"], "`--features` must name at least one layer of 0 .. 4, got 99"),
        (["embed", "a", "--layer", "99"], "`--layer` must name at least one layer of 0 .. 4, got 99"),
        (["compare", "a", "b", "--what", "cca", "--max-images", "9"], "16 channels need more than 17 images"),
        (["compare", "a", "--max-images", "3"], "at least 4 images"),
        (["compare", "nowhere"], "there is no checkpoint"),
        (["embed", "plain", "--features", "pooled", "--layer", "1"], "leave it out"),
        (["embed", "no_cls"], "no_cls has no CLS token"),
        (["embed", "no_cls", "--features", "cla"], "aggregates no CLS tokens"),
        (["embed", "a", "--max-images", "3"], "at least 4 images"),
    ],
)
def test_mistakes_get_one_sentence(checkpoints, tmp_path, capsys, monkeypatch, arguments, words):
    read = []
    monkeypatch.setattr(EvalTransform, "__call__", lambda *image: read.append(image))
    models = ("a", "b", "plain", "no_cls", "nowhere")
    arguments = [str(checkpoints / a) if a in models else a for a in arguments]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--dataset", str(checkpoints / "leaves"), "--output", str(tmp_path / "out")])
    told = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert read == []  # it is said before any image is looked at
    assert words in told
    assert not (tmp_path / "out").exists()


def test_other_data_are_never_taken_for_those_of_a_finished_analysis(checkpoints, raw, dataset, tmp_path, capsys):
    drawn = {"num_classes": 7, "images_per_class": [1, 0, 1], "image_size": 32}
    arguments = ["analyze", str(checkpoints / "a"), "--dataset", "synthetic_leaves", "--output", str(tmp_path / "out")]
    # models of a folder of leaves know other classes than drawn ones
    config = json.loads((checkpoints / "a" / "config.json").read_text())
    config["id2label"] = {str(i): f"cultivar_{i:02d}" for i in range(7)}
    config["label2id"] = {name: int(i) for i, name in config["id2label"].items()}
    arguments[1] = str(tmp_path / "model")
    (tmp_path / "model").mkdir()
    for file in (checkpoints / "a").iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert main([*arguments, "--dataset-options", json.dumps(drawn)]) == 0
    assert main([*arguments, "--dataset-options", json.dumps(drawn)]) == 0
    assert "7 of them done before" in capsys.readouterr().out
    for other in ({"difficulty": "hard"}, {"seed": 1}):
        with pytest.raises(SystemExit):
            main([*arguments, "--dataset-options", json.dumps(drawn | other)])
        assert "another model, other images or with other options" in capsys.readouterr().err

    def stream(rows):
        return StreamedImages(
            to_stream(datasets.DatasetDict(test=rows))["test"], EvalTransform(PROCESSOR), batch_size=5
        )

    analyze(float_model(), stream(raw), tmp_path / "stream", batch_size=5, data={"seed": 0})
    with pytest.raises(ValueError, match="another model, other images"):
        analyze(float_model(), stream(raw.select(range(9))), tmp_path / "stream", batch_size=5, data={"seed": 1})


def test_only_what_a_command_wrote_is_replaced(checkpoints, tmp_path, capsys):
    leaves, out = ["--dataset", str(checkpoints / "leaves")], tmp_path / "out"
    for command, options in (("compare", ["--what", "cka-plain"]), ("embed", ["--method", "pca"])):
        arguments = [command, str(checkpoints / "a"), *leaves, *options, "--output", str(out / command)]
        assert main(arguments) == 0
        written = {path.name for path in (out / command).iterdir()}
        assert main(arguments) == 0  # its own result is replaced
        assert {path.name for path in (out / command).iterdir()} == written
        for other in ("notes.md", "sub"):
            (out / command / other).mkdir() if other == "sub" else (out / command / other).write_text("mine")
            with pytest.raises(SystemExit):
                main(arguments)
            assert f"holds other files, such as {other}" in capsys.readouterr().err
            assert (out / command / other).exists()
            (out / command / other).rmdir() if other == "sub" else (out / command / other).unlink()


@pytest.mark.parametrize("command", ["compare", "embed"])
def test_ctrl_c_is_no_traceback(checkpoints, tmp_path, capsys, monkeypatch, command):
    def stop(self, image, generator=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(EvalTransform, "__call__", stop)
    arguments = [str(checkpoints / "a"), "--dataset", str(checkpoints / "leaves"), "--output", str(tmp_path / "out")]
    assert main([command, *arguments]) == 130
    assert capsys.readouterr().out == "interrupted\n" and list(tmp_path.iterdir()) == []


def test_models_that_were_changed_are_no_runs(checkpoints, tmp_path, capsys):
    models, out = [str(checkpoints / "a")] * 2, str(tmp_path / "pair")
    changes = ["--changes-b", '{"keep_rate": [0.25]}']
    leaves = ["--dataset", str(checkpoints / "leaves")]
    assert main(["compare", *models, *changes, *leaves, "--what", "patterns", "--output", out]) == 0
    record = json.loads((tmp_path / "pair" / "comparison.json").read_text())
    assert [model["changes"] for model in record["models"]] == [{}, {"keep_rate": [0.25]}]
    assert record["names"] == ["a", "a, keep rate 0.25"]
    (tmp_path / "results.csv").write_text(f"run,test_top1\n{checkpoints / 'a'},0.5\n")
    with pytest.raises(SystemExit):
        main(["correlate", out, "--results", str(tmp_path / "results.csv")])
    assert "with keep_rate [0.25], whose accuracy is not that of the run" in capsys.readouterr().err


def test_a_run_may_be_called_by_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, pair in enumerate((("1", "2"), ("1", "3"), ("2", "3"))):
        Path(f"c{i}").mkdir()
        record = {"models": [{"name": name} for name in pair], "scalars": {"cka_mean": 0.1 * i}}
        Path(f"c{i}", "comparison.json").write_text(json.dumps(record))
    Path("results.csv").write_text("run,test_top1\n1,0.9\n2,0.5\n3,0.2\n")
    assert main(["correlate", "c0", "c1", "c2", "--results", "results.csv", "--output", "gaps.csv"]) == 0
    gaps = [pair["gap"] for pair in json.loads(Path("gaps.json").read_text())["pairs"]]
    assert gaps == pytest.approx([0.4, 0.7, 0.3])


def test_correlate_refuses_what_it_cannot_join(checkpoints, tmp_path, capsys):
    (tmp_path / "pair").mkdir()
    record = {"models": [{"name": "x"}, {"name": "y"}], "scalars": {"cka_mean": 0.5}}
    (tmp_path / "pair" / "comparison.json").write_text(json.dumps(record))
    (tmp_path / "results.csv").write_text("run,test_top1\nx,0.5\n")
    (tmp_path / "empty").mkdir()
    for folder, results, words in (
        ("pair", "results.csv", "compares y, which is not among the runs"),
        ("empty", "results.csv", "holds no comparison.json"),
        ("pair", "nowhere.csv", "neither a folder nor a table"),
    ):
        with pytest.raises(SystemExit):
            main(["correlate", str(tmp_path / folder), "--results", str(tmp_path / results)])
        assert words in capsys.readouterr().err


def test_packages_that_are_not_there_are_named_with_the_extra(monkeypatch, checkpoints, tmp_path, capsys):
    for name in ("sklearn", "sklearn.metrics", "sklearn.decomposition", "scipy", "scipy.stats", "ot"):
        monkeypatch.setitem(sys.modules, name, None)
    square = np.eye(3) + 1
    calls = (
        lambda: saliency.earth_movers_distance(square, square),
        lambda: saliency.spearman_correlation(square, square),
        lambda: patterns.cluster_agreement(np.arange(4), np.arange(4)),
        lambda: patterns.gap_correlation([1, 2, 3], [1, 2, 3]),
        lambda: embed(np.ones((9, 5))),
    )
    for call in calls:
        with pytest.raises(ImportError, match=r"clca-vit\[analysis\]"):
            call()
    with pytest.raises(SystemExit):  # before any model is loaded
        main(["embed", "nowhere", "--dataset", "nowhere", "--output", str(tmp_path / "out")])
    assert "sklearn must be installed" in capsys.readouterr().err
