"""One pass over many images: results, interruptions, other models and data, streams."""

import itertools
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.analysis.helpers import CLASSES, PROCESSOR, float_model, rows_of, shards
from ufgir.analysis.dataset_pass import RECORD, Statistics, analyze
from ufgir.data.streams import StreamedImages, to_stream
from ufgir.evaluation.metrics import compute_metrics
from ufgir.interpret.patterns import cluster_maps, kept_patches
from ufgir.transforms.preprocessing import EvalTransform


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
    """Images that raise an error at one index and record the requested indices."""

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
def test_resume_continues_with_the_next_shard(dataset, tmp_path, at):
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
    with pytest.raises(ValueError, match="`output`"):
        analyze(float_model(), dataset, tmp_path / "mine", **options)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_streams_match_data_in_memory_and_resume(raw, dataset, tmp_path, monkeypatch):
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


def test_statistics_use_constant_memory():
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
def test_invalid_arguments_raise_before_anything_is_written(dataset, tmp_path, changes, options, words):
    with pytest.raises(ValueError, match=words):
        analyze(float_model(**changes), dataset, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="empty"):
        analyze(float_model(), torch.utils.data.Subset(dataset, []), tmp_path / "empty")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "empty").exists()
