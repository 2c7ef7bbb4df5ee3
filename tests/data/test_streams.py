"""Streams give the same images as in-memory data, for any number of workers and ranks, epoch and first row."""

import logging

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from tests.helpers import build, tiny_config
from tests.image_layouts import make_csv, make_folder
from ufgir.data import synthetic_leaves as leaves
from ufgir.data.load import DatasetError, load_ufgir_dataset
from ufgir.data.streams import StreamedImages, own_share_loader
from ufgir.data.transformed import SetEpoch, TransformedImages
from ufgir.transforms.preprocessing import TrainTransform, make_image_processor


NAMES = ["cultivar_00", "cultivar_01", "cultivar_02"]
ROWS = 21  # of train; not a multiple of the batch sizes below
BATCH = 4


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return leaves.synthetic_leaves(3, (7, 1, 1), image_size=16, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def parquet(drawn, tmp_path_factory):
    """Write the same data to three files of train and one of test, with embedded images."""
    folder = tmp_path_factory.mktemp("parquet")
    for index in range(3):
        drawn["train"].shard(3, index, contiguous=True).to_parquet(folder / f"train-0000{index}-of-00003.parquet")
    drawn["test"].to_parquet(folder / "test.parquet")
    return folder


@pytest.fixture(scope="module")
def stream(parquet, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return load_ufgir_dataset(parquet, streaming=True, validation_fraction=0, cache_dir=cache)


@pytest.fixture(scope="module")
def transform():
    return TrainTransform(make_image_processor(16, resize_size=20))


def images(stream, transform, **options):
    return StreamedImages(stream["train"], transform, seed=3, **options)


def in_memory(drawn, transform, epoch=0):
    """Return the samples of `TransformedImages` for the same rows."""
    dataset = TransformedImages(drawn["train"], transform, seed=3)
    dataset.set_epoch(epoch)
    return [dataset[row] for row in range(ROWS)]


def same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one["labels"] == other["labels"]
        assert torch.equal(one["pixel_values"], other["pixel_values"])


def rows_of(batches):
    return [
        {"pixel_values": pixels, "labels": int(label)}
        for batch in batches
        for pixels, label in zip(batch["pixel_values"], batch["labels"], strict=True)
    ]


# The loader


def pairs(split):
    return [(row["image"].tobytes(), row["label"]) for row in split]


def test_parquet_streams_what_it_loads(stream, drawn):
    assert isinstance(stream, datasets.IterableDatasetDict) and list(stream) == ["train", "test"]
    for name, split in stream.items():
        assert isinstance(split, datasets.IterableDataset)
        assert split.features["label"] == datasets.ClassLabel(names=NAMES)
        assert split.features["image"] == datasets.Image()
        assert pairs(split) == pairs(drawn[name])


@pytest.mark.parametrize("layout", ["folder", "csv", "save_to_disk", "synthetic_leaves"])
def test_files_in_a_folder_stream_what_they_load(tmp_path, drawn, layout):
    source, options = tmp_path, {}
    if layout == "folder":
        make_folder(tmp_path, ("",), images=5)
    elif layout == "csv":
        make_csv(tmp_path, {"train": 5, "test": 1})
    elif layout == "save_to_disk":
        drawn.save_to_disk(tmp_path / "saved")
        source = tmp_path / "saved"
    else:
        source = layout
        options = {"num_classes": 2, "images_per_class": (3, 1, 0), "image_size": 16, "cache_dir": tmp_path}
    loaded = load_ufgir_dataset(source, shots=3, **options)
    streamed = load_ufgir_dataset(source, shots=3, streaming=True, **options)
    assert list(streamed) == list(loaded)
    for name in loaded:
        assert streamed[name].features == loaded[name].features
        assert pairs(streamed[name]) == pairs(loaded[name])


def test_hub_ids_are_streamed(monkeypatch, stream):
    calls = []
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **options: calls.append((a, options)) or stream)
    loaded = load_ufgir_dataset("someone/leaves", streaming=True, validation_fraction=0)
    assert calls == [(("someone/leaves", None), {"revision": None, "cache_dir": None, "streaming": True})]
    assert pairs(loaded["test"]) == pairs(stream["test"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`streaming`: `validation_fraction` .* needs the labels of all"),
        ({"shots": 2, "validation_fraction": 0}, "`streaming`: `shots` needs the labels of all images"),
        ({"verify": True}, "`verify=True` .*`streaming`"),
    ],
)
def test_options_that_need_all_labels_raise(parquet, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        load_ufgir_dataset(parquet, streaming=True, cache_dir=tmp_path, **options)


@pytest.fixture(scope="module")
def text_parquet(drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    names = [NAMES[label] for label in drawn["train"]["label"]]
    drawn["train"].remove_columns("label").add_column("variety", names).to_parquet(folder / "train.parquet")
    return folder


def test_text_labels_are_streamed_if_the_classes_are_given(text_parquet, drawn, transform, tmp_path):
    options = {"streaming": True, "validation_fraction": 0, "label_column": "variety", "cache_dir": tmp_path}
    with pytest.raises(DatasetError, match=r"labels of .*, train, are not ClassLabel.*`class_names`"):
        load_ufgir_dataset(text_parquet, **options)
    given = ["x", *NAMES[::-1]]
    train = load_ufgir_dataset(text_parquet, class_names=given, **options)["train"]
    assert train.features["label"].names == given
    assert pairs(train) == [(image, 3 - label) for image, label in pairs(drawn["train"])]
    found = list(StreamedImages(train, transform, seed=3, batch_size=BATCH))
    same(found, [row | {"labels": 3 - row["labels"]} for row in in_memory(drawn, transform)])
    short = load_ufgir_dataset(text_parquet, class_names=NAMES[:2], **options)["train"]
    with pytest.raises(DatasetError, match="train has an image of the class 'cultivar_02', which is not among the 2"):
        list(short)


def test_class_labels_are_mapped_by_name_while_streaming(parquet, drawn, tmp_path):
    given = ["x", *NAMES[::-1]]
    options = {"streaming": True, "validation_fraction": 0, "cache_dir": tmp_path}
    train = load_ufgir_dataset(parquet, class_names=given, **options)["train"]
    assert pairs(train) == [(image, 3 - label) for image, label in pairs(drawn["train"])]


# Transformed images


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_same_images_in_the_same_batches_for_any_workers_and_ranks(stream, drawn, transform, workers, world_size):
    expected = in_memory(drawn, transform)
    for rank in range(world_size):
        dataset = images(stream, transform, batch_size=BATCH, rank=rank, world_size=world_size)
        blocks = [expected[start : start + BATCH] for start in range(rank * BATCH, ROWS, world_size * BATCH)]
        batches = list(DataLoader(dataset, BATCH, num_workers=workers))
        assert [len(batch["labels"]) for batch in batches] == [len(block) for block in blocks]
        same(rows_of(batches), [row for block in blocks for row in block])


@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_no_row_is_lost_or_repeated(stream, drawn, transform, batch_size, world_size):
    options = {"batch_size": batch_size, "world_size": world_size, "num_rows": ROWS}
    ranks = [images(stream, transform, rank=rank, **options) for rank in range(world_size)]
    found = [list(rank) for rank in ranks]
    assert [len(rank) for rank in ranks] == [len(rows) for rows in found]
    key = lambda row: (row["labels"], row["pixel_values"].sum().item())  # noqa: E731
    same(sorted((row for rows in found for row in rows), key=key), sorted(in_memory(drawn, transform), key=key))


@pytest.mark.parametrize(
    ("batch_size", "world_size", "rows"), [(4, 1, 20), (4, 2, 8), (5, 4, 5), (7, 3, 7), (11, 2, 0)]
)
def test_drop_last_gives_all_ranks_the_same_full_batches(stream, transform, batch_size, world_size, rows):
    for rank in range(world_size):
        options = {"batch_size": batch_size, "world_size": world_size, "num_rows": ROWS, "drop_last": True}
        dataset = images(stream, transform, rank=rank, **options)
        kept = images(stream, transform, rank=rank, batch_size=batch_size, world_size=world_size)
        assert len(dataset) == rows
        same(list(dataset), list(kept)[:rows])


def test_only_the_epoch_and_the_seed_change_the_images(stream, drawn, transform):
    dataset = images(stream, transform)
    first = list(dataset)
    same(list(dataset), first)
    torch.manual_seed(7), np.random.seed(7)
    same(list(dataset), first)
    dataset.set_epoch(1)
    assert dataset.epoch == 1
    second = list(dataset)
    # `datasets` reads the files in another order
    assert sorted(row["labels"] for row in second) == sorted(row["labels"] for row in first)
    assert not torch.equal(second[0]["pixel_values"], first[0]["pixel_values"])
    dataset.set_epoch(0)
    same(list(dataset), first)
    other = StreamedImages(stream["train"], transform, seed=4)
    assert not torch.equal(next(iter(other))["pixel_values"], first[0]["pixel_values"])


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_in_the_middle_of_an_epoch(stream, transform, workers, shuffled):
    quick = {"max_buffer_input_shards": 1}  # with several, `datasets` sleeps 5 s after each pass over parquet files

    def dataset():
        train = stream["train"].shuffle(seed=1, buffer_size=8, **quick) if shuffled else stream["train"]
        return StreamedImages(train, transform, seed=3, batch_size=BATCH)

    whole = dataset()
    loader = DataLoader(whole, BATCH, num_workers=workers, persistent_workers=workers > 0)
    epochs = []
    for epoch in range(3):
        whole.set_epoch(epoch)
        epochs.append(list(loader))
    resumed = dataset()
    resumed.skip(3 * BATCH, epoch=1)
    loader = DataLoader(resumed, BATCH, num_workers=workers, persistent_workers=workers > 0)
    resumed.set_epoch(1)
    same(rows_of(loader), rows_of(epochs[1][3:]))
    resumed.set_epoch(2)
    same(rows_of(loader), rows_of(epochs[2]))


def test_skipping_any_number_of_rows(stream, transform):
    dataset = images(stream, transform, batch_size=BATCH)
    whole = list(dataset)
    for rows in (0, 1, 5, ROWS, ROWS + 9):
        dataset.skip(rows)
        same(list(dataset), whole[rows:])


def test_rows_of_others_are_not_decoded(stream, transform, monkeypatch):
    decoded = []
    decode = datasets.Image.decode_example
    monkeypatch.setattr(
        datasets.Image, "decode_example", lambda self, *a, **k: decoded.append(1) or decode(self, *a, **k)
    )
    assert len(list(images(stream, transform, batch_size=BATCH, rank=1, world_size=2))) == len(decoded) == 9
    decoded.clear()
    dataset = images(stream, transform, batch_size=BATCH)
    dataset.skip(18)
    assert len(list(dataset)) == len(decoded) == 3


def test_a_broken_image_is_named_when_it_is_reached(tmp_path, transform):
    make_folder(tmp_path, ("train",), ("a", "b"), images=3)
    (tmp_path / "train" / "b" / "1.png").write_text("not an image")
    stream = load_ufgir_dataset(tmp_path, streaming=True, validation_fraction=0)
    rows = iter(images(stream, transform))
    assert [next(rows)["labels"] for _ in range(4)] == [0, 0, 0, 1]
    with pytest.raises(DatasetError, match=r"b/1\.png \(row 4 of the stream\) cannot be read: UnidentifiedImageError"):
        next(rows)


def test_without_labels_and_with_a_transform_of_several_columns(stream, drawn, transform):
    def both(image, generator):
        return {"pixel_values": transform(image, generator), "draws": torch.ones(2)}

    samples = list(StreamedImages(stream["train"], both, seed=3, label_column=None))
    assert all(sample.keys() == {"pixel_values", "draws"} for sample in samples)
    for sample, other in zip(samples, in_memory(drawn, transform), strict=True):
        assert torch.equal(sample["pixel_values"], other["pixel_values"])


def test_an_invalid_label_is_named(transform):
    features = datasets.Features({"image": datasets.Image(mode="RGB"), "label": datasets.ClassLabel(names=["a"])})
    split = datasets.Dataset.from_dict({"image": [Image.new("RGB", (4, 4))], "label": [-1]}, features=features)
    dataset = StreamedImages(split.to_iterable_dataset(), transform)
    with pytest.raises(DatasetError, match=r"row 0 of the stream has the label -1, .* 1 classes"):
        list(dataset)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "`seed` must not be negative, got -1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, r"`rank` must be in 0 \.\.\. 1 \(`world_size` - 1\), got 2"),
        ({"label_column": "genus"}, r"`dataset` lacks the columns genus\. Available: image, label"),
        ({"label_column": "image", "image_column": "label"}, "`label_column` 'image' must contain ClassLabel"),
    ],
)
def test_invalid_arguments_are_named(stream, transform, options, message):
    with pytest.raises(ValueError, match=message):
        StreamedImages(stream["train"], transform, **options)
    with pytest.raises(ValueError, match="`rows` must not be negative, got -1"):
        images(stream, transform).skip(-1)
    with pytest.raises(TypeError, match="`num_rows`"):
        len(images(stream, transform))


def test_the_loader_of_a_rank_does_not_split_its_share_again(stream, drawn, transform):
    expected = in_memory(drawn, transform, epoch=0)
    options = {"batch_size": BATCH, "world_size": 2, "drop_last": True}
    for rank in range(2):
        loader = own_share_loader(images(stream, transform, rank=rank, **options), "cpu", num_workers=0)
        blocks = [expected[start : start + BATCH] for start in range(rank * BATCH, 16, 2 * BATCH)]
        same(rows_of(loader), [row for block in blocks for row in block])
        loader.set_epoch(5)
        next(iter(loader))
        assert loader.dataset.epoch == 5


@pytest.mark.parametrize("length", [{"num_rows": ROWS}, {}])
def test_trainer_learns_from_a_stream(stream, transform, tmp_path, length, caplog):
    seen = []

    class Recorder(TrainTransform):
        def __call__(self, image, generator):
            seen.append(generator.bit_generator.seed_seq.entropy)
            return super().__call__(image, generator)

    processor = make_image_processor(16, resize_size=20)
    dataset = images(stream, Recorder(processor), batch_size=BATCH, drop_last=True, **length)
    arguments = TrainingArguments(
        output_dir=tmp_path,
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **({"num_train_epochs": 2} if length else {"max_steps": 10}),
    )
    model = build(tiny_config(image_size=16, num_labels=3)).float()
    with caplog.at_level(logging.ERROR):
        trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[SetEpoch(dataset)])
        trainer.train()
    assert trainer.state.global_step == 10
    # two epochs of five batches, whose images have generators of their own
    assert seen[:40] == [(3, epoch, row, 0) for epoch in range(2) for row in range(20)]
