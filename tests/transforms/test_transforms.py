"""The transforms compared with the image processor, and their sources of randomness."""

import pickle

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, TrainerState, ViTImageProcessorPil

from clca import CLCAImageProcessor
from ufgir.data.splits import random_subset
from ufgir.data.transformed import SetEpoch, TransformedImages
from ufgir.transforms.images import open_image, to_rgb
from ufgir.transforms.preprocessing import (
    EvalTransform,
    TrainTransform,
    make_image_processor,
)


def make_image(mode: str, width: int = 41, height: int = 57, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "LA": 2, "CMYK": 4}.get(mode)
    if mode == "P":
        return make_image("RGB", width, height, seed).quantize(16)
    if mode == "1":
        return make_image("L", width, height, seed).convert("1")
    pixels = generator.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return (
        Image.fromarray(pixels.squeeze(), mode=None)
        if mode != "CMYK"
        else Image.frombytes(mode, (width, height), pixels)
    )


def transparent_palette() -> Image.Image:
    image = make_image("P")
    image.info["transparency"] = 3
    return image


def rows(count: int = 12, size: int = 40) -> list[dict]:
    return [{"image": make_image("RGB", size, size, seed=i), "label": i % 3} for i in range(count)]


def coordinates(height: int, width: int) -> Image.Image:
    """Return an image whose pixels contain their own row and column."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(height)[:, None]
    pixels[..., 1] = np.arange(width)[None, :]
    return Image.fromarray(pixels)


@pytest.fixture
def processor() -> CLCAImageProcessor:
    return make_image_processor(24)


@pytest.mark.parametrize("resize_size", [None, 24, 31])  # an odd margin: which side gets the pixel?
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA", "1", "CMYK", "transparent palette"])
def test_eval_transform_is_the_image_processor(mode, resize_size):
    image = transparent_palette() if mode == "transparent palette" else make_image(mode)
    processor = make_image_processor(24, resize_size)
    expected = processor(image, return_tensors="pt").pixel_values[0]
    actual = EvalTransform(processor)(image)
    assert actual.dtype == torch.float32 and actual.shape == (3, 24, 24)
    assert torch.equal(actual, expected)


def test_eval_transform_is_the_saved_and_reloaded_processor(tmp_path):
    processor = make_image_processor(24, 30, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    processor.save_pretrained(tmp_path)
    reloaded = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    image = make_image("RGB")
    expected = reloaded(image, return_tensors="pt").pixel_values[0]
    assert torch.equal(EvalTransform(processor)(image), expected)
    again = make_image_processor(24, saved=processor)  # its numbers survive, although 30 is not 24 / 0.875
    ignored = ("resample", "auto_map")
    assert {k: v for k, v in again.to_dict().items() if k not in ignored} == {
        k: v for k, v in processor.to_dict().items() if k not in ignored
    }


def test_the_aspect_ratio_is_not_kept(processor):
    """A black left half remains the left half for any width of the image."""
    wide = Image.new("RGB", (200, 20), "white")
    wide.paste("black", (0, 0, 100, 20))
    pixels = EvalTransform(processor)(wide)
    assert (pixels[:, :, :10] < 0).all() and (pixels[:, :, 14:] > 0).all()


def test_default_sizes():
    assert make_image_processor(224).resize_size == (256, 256)
    assert make_image_processor(448).resize_size == (512, 512)
    assert make_image_processor(224).resample == Image.Resampling.BICUBIC


def test_train_transform_crops_everywhere_and_flips_half(processor):
    """Every pixel contains its own coordinates, so that crop and flip are visible in the result."""
    side = processor.resize_size[0]
    transform = TrainTransform(processor)
    seen = set()
    for seed in range(400):
        pixels = transform(coordinates(side, side), np.random.default_rng(seed))
        mean, std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
        values = ((pixels * std + mean) * 255).round().long()
        top, left, right = values[0, 0, 0].item(), values[1, 0, 0].item(), values[1, 0, -1].item()
        flipped = left > right
        assert abs(left - right) == 23 and values[0, -1, 0].item() - top == 23
        seen.add((top, min(left, right), flipped))
    margins = range(side - 24 + 1)
    assert {s[0] for s in seen} == {s[1] for s in seen} == set(margins)
    assert {s[2] for s in seen} == {True, False}
    assert len({s[:2] for s in seen}) == len(margins) ** 2  # 16 places: rows and columns are drawn independently


@pytest.mark.parametrize("probability, flips", [(0.0, False), (1.0, True)])
def test_flip_probability(processor, probability, flips):
    plain = make_image_processor(24, 24)
    image = make_image("RGB", 24, 24)
    pixels = TrainTransform(plain, probability)(image, np.random.default_rng(0))
    expected = EvalTransform(plain)(image)
    torch.testing.assert_close(pixels, expected.flip(-1) if flips else expected)


def test_random_resized_crop(processor):
    """The corners of the crop are visible in the colors: areas, aspect ratios and positions are within their ranges."""
    transform = TrainTransform(processor, flip_probability=0.0, random_resized_crop=0.3)
    mean, std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    boxes = []
    for seed in range(300):
        pixels = transform(coordinates(200, 160), np.random.default_rng(seed))
        assert pixels.shape == (3, 24, 24) and pixels.dtype == torch.float32
        values = (pixels * std + mean) * 255
        steps = [(values[0, -4, 0] - values[0, 3, 0]) / 17, (values[1, 0, -4] - values[1, 0, 3]) / 17]
        boxes.append([values[0, 3, 0] - 3.5 * steps[0], values[1, 0, 3] - 3.5 * steps[1], *(24 * s for s in steps)])
    top, left, height, width = np.array(boxes).T
    area = height * width / (200 * 160)
    assert 0.28 < area.min() < 0.35 and 0.8 < area.max() < 1.02
    assert 0.72 < (width / height).min() < 0.8 and 1.25 < (width / height).max() < 1.36
    assert top.min() > -2 and left.min() > -2 and (top + height).max() < 202 and (left + width).max() < 162
    assert top.max() > 60 and left.max() > 50


def test_random_resized_crop_of_a_long_image(processor):
    """The center is used if no rectangle of the aspect ratio is large enough."""
    transform = TrainTransform(processor, flip_probability=0.0, random_resized_crop=0.9)
    pixels = transform(coordinates(20, 255), np.random.default_rng(0))
    mean, std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    columns = ((pixels * std + mean) * 255)[1, 0]
    assert columns[0] == pytest.approx(114, abs=1) and columns[-1] == pytest.approx(140, abs=1)  # 27 of 255


def test_a_sample_depends_on_seed_epoch_and_index_only(processor):
    dataset = TransformedImages(rows(), TrainTransform(processor), seed=3)
    same = TransformedImages(rows(), TrainTransform(processor), seed=3)
    for index in (5, 0, 11):
        np.random.seed(index)
        torch.manual_seed(index)
        assert torch.equal(dataset[index]["pixel_values"], same[index]["pixel_values"])
    assert torch.equal(dataset[-1]["pixel_values"], dataset[11]["pixel_values"])


@pytest.mark.parametrize("change", ["seed", "epoch", "index"])
def test_a_sample_changes_with_seed_epoch_and_index(processor, change):
    image = rows(1)[0]
    dataset = TransformedImages([image] * 12, TrainTransform(processor), seed=3)
    other = TransformedImages([image] * 12, TrainTransform(processor), seed=4 if change == "seed" else 3)
    if change == "epoch":
        other.set_epoch(1)
    shift = int(change == "index")
    differ = [not torch.equal(dataset[i]["pixel_values"], other[i + shift]["pixel_values"]) for i in range(11)]
    assert sum(differ) > 5  # 32 outcomes, so a few coincide


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_see_the_epoch_and_change_nothing(processor, persistent):
    dataset = TransformedImages(rows(), TrainTransform(processor), seed=3)
    alone = DataLoader(dataset, batch_size=5)
    workers = DataLoader(dataset, batch_size=5, num_workers=2, persistent_workers=persistent)
    epochs = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        expected = torch.cat([batch["pixel_values"] for batch in alone])
        assert torch.equal(torch.cat([batch["pixel_values"] for batch in workers]), expected)
        epochs.append(expected)
    assert not torch.equal(*epochs)


def test_labels_and_length(processor):
    dataset = TransformedImages(rows(), EvalTransform(processor))
    assert [dataset[i]["labels"] for i in range(len(dataset))] == [0, 1, 2] * 4
    with pytest.raises(IndexError):
        dataset[12]
    assert len(pickle.loads(pickle.dumps(dataset))) == 12  # what worker processes that are spawned need


def test_several_labels(processor):
    data = [{"image": make_image("RGB"), "label": labels} for labels in ([0, 2], [], [1])]
    dataset = TransformedImages(data, EvalTransform(processor), num_labels=4)
    labels = next(iter(DataLoader(dataset, batch_size=3)))["labels"]
    assert labels.dtype == torch.float32
    assert labels.tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    with pytest.raises(ValueError, match="image 0 has the class 2, which is not in 0 to 1"):
        TransformedImages(data, EvalTransform(processor), num_labels=2)[0]


def test_images_without_labels(processor):
    dataset = TransformedImages([{"image": make_image("RGB")}], EvalTransform(processor), label_column=None)
    assert set(dataset[0]) == {"pixel_values"}


def test_copies_differ_and_the_first_is_the_image_itself(processor):
    plain = TransformedImages(rows(), TrainTransform(processor), seed=3)
    copies = TransformedImages(rows(), TrainTransform(processor), seed=3, copies=3)
    assert len(copies) == 12
    differ = 0
    for i in range(12):
        assert torch.equal(copies[i]["pixel_values"], plain[i]["pixel_values"])
        assert copies[i + 24]["labels"] == plain[i]["labels"]
        differ += not torch.equal(copies[i + 12]["pixel_values"], copies[i + 24]["pixel_values"])
    assert differ > 8
    assert torch.equal(copies[-1]["pixel_values"], copies[11]["pixel_values"])
    with pytest.raises(IndexError):
        copies[36]


def test_an_augmentation_gets_8_bit_images_and_the_same_generator(processor):
    class Numbers:
        def draw(self, generator):
            return torch.tensor([generator.random()])

    image = make_image("RGB")
    sample = TrainTransform(processor, augmentation=Numbers())(image, np.random.default_rng(1))
    assert sample["pixel_values"].dtype == torch.uint8
    generator = np.random.default_rng(1)
    expected = TrainTransform(processor)(image, generator)
    mean, std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    torch.testing.assert_close((sample["pixel_values"] / 255 - mean) / std, expected)
    assert sample["draws"] == torch.tensor([generator.random()])


def test_callback_follows_the_trainer_also_after_a_resume(processor):
    dataset = TransformedImages(rows(), TrainTransform(processor))
    callback = SetEpoch(dataset)
    for state_epoch, epoch in [(0, 0), (1.0, 1), (1.75, 1), (2.0, 2)]:
        callback.on_epoch_begin(None, TrainerState(epoch=state_epoch), None)
        assert dataset.epoch == epoch


def test_to_rgb_lays_transparency_over_white():
    image = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)
    premultiplied = image.convert("RGBa")
    assert to_rgb(premultiplied).getpixel((0, 0)) == (255, 255, 255)
    opaque = Image.new("RGB", (2, 2), (1, 2, 3))
    assert to_rgb(opaque) is opaque


@pytest.mark.parametrize(
    "numbers, levels",
    [
        (np.array([[0, 257, 32896, 65535]], np.uint16), [0, 1, 128, 255]),
        (np.array([[0, 257, 32896, 65535]], np.int32), [0, 1, 128, 255]),
        (np.array([[0, 1, 128, 255]], np.int32), [0, 1, 128, 255]),
        (np.array([[0, 0.25, 0.5, 1]], np.float32), [0, 64, 128, 255]),
        (np.array([[0, 1.2, 128, 255]], np.float32), [0, 1, 128, 255]),
    ],
)
def test_more_than_8_bits_are_scaled_and_not_cut_off(tmp_path, numbers, levels):
    file = tmp_path / "a.tif"
    Image.fromarray(numbers).save(file)
    image = open_image(file)
    assert image.mode == "RGB" and np.asarray(image)[0].tolist() == [[level] * 3 for level in levels]


@pytest.mark.parametrize(
    "numbers", [np.array([[-0.1, 0.5]]), np.array([[0, 256.0]]), np.array([[0, np.nan]]), np.array([[0, 70000]])]
)
def test_numbers_that_are_no_brightness_are_refused_by_name(tmp_path, numbers):
    file = tmp_path / "heights.tif"
    Image.fromarray(numbers.astype(np.int32 if numbers.dtype == int else np.float32)).save(file)
    with pytest.raises(ValueError, match=r"heights\.tif: .*8 or 16 bits"):
        open_image(file)


def test_a_transparent_grey_of_16_bits_becomes_white(tmp_path):
    Image.fromarray(np.array([[7, 65535 // 5]], np.uint16)).save(tmp_path / "a.png", transparency=7)
    assert np.asarray(open_image(tmp_path / "a.png"))[0, :, 0].tolist() == [255, 51]


def test_images_follow_the_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the top is on the right
    coordinates(2, 3).save(tmp_path / "a.png", exif=exif)
    image = open_image(tmp_path / "a.png")
    assert image.size == (2, 3) and image.getpixel((0, 0))[:2] == (1, 0)
    assert to_rgb(image) is image  # once


def test_random_subset():
    from datasets import Dataset

    dataset = Dataset.from_dict({"x": list(range(50))})
    chosen = random_subset(dataset, 10, seed=1)["x"][:]
    assert chosen == sorted(set(chosen)) and len(chosen) == 10 and chosen != list(range(10))
    assert random_subset(dataset, 10, seed=1)["x"][:] == chosen != random_subset(dataset, 10, seed=2)["x"][:]
    assert random_subset(dataset, None, 0) is dataset is random_subset(dataset, 99, 0)
    with pytest.raises(ValueError, match=r"`max_train_samples`.*at least 1"):
        random_subset(dataset, 0, 0, "max_train_samples")


def test_wrong_numbers_are_refused(processor):
    with pytest.raises(ValueError, match="`resize_size`"):
        make_image_processor(24, 20)
    with pytest.raises(ValueError, match="`image_mean`"):
        make_image_processor(24, image_mean=[0.5])
    with pytest.raises(ValueError, match="`image_std`"):
        make_image_processor(24, image_std=[0.5, 0.5, 0])
    with pytest.raises(ValueError, match="`flip_probability`"):
        TrainTransform(processor, 1.5)
    with pytest.raises(ValueError, match="`random_resized_crop`"):
        TrainTransform(processor, random_resized_crop=1.5)
    with pytest.raises(ValueError, match="`copies`"):
        TransformedImages(rows(), EvalTransform(processor), copies=0)
    with pytest.raises(ValueError, match="`seed`"):
        TransformedImages(rows(), EvalTransform(processor), seed=-1)
    with pytest.raises(ValueError, match="`size`"):
        EvalTransform(ViTImageProcessorPil(size={"shortest_edge": 24}))
