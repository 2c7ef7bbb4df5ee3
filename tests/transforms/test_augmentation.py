"""Augmentation: sources of randomness, erasing, mixed labels, copies of images, and a training with all of it."""

import sys
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import TrainerCallback

from clca import CLCAViTForImageClassification
from clca.loss_clca import classification_loss
from tests.helpers import tiny_config
from ufgir.data.synthetic_leaves import cultivar_traits, draw_leaf
from ufgir.data.transformed import SetEpoch, TransformedImages
from ufgir.training.augmentation import AugmentingCollator, RepeatedSampler, prepare_augmentation
from ufgir.training.trainer import UFGIRTrainer
from ufgir.transforms import augmentation
from ufgir.transforms.augmentation import AugmentationArguments
from ufgir.transforms.operations import NAMES
from ufgir.transforms.preprocessing import EvalTransform, make_image_processor
from ufgir.utils.arguments import RecipeParser


SIZE, CLASSES = 32, 3
PROCESSOR = make_image_processor(SIZE, 40)
EVERYTHING = {
    "random_resized_crop": 0.5,
    "trivial_augment": True,
    "random_erasing_probability": 0.5,
    "random_erasing_fill": "noise",
    "repeated_augmentation": 2,
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
    "label_smoothing": 0.1,
}


@pytest.fixture(scope="module")
def leaves() -> list[dict]:
    traits = cultivar_traits(CLASSES)
    return [
        {"image": draw_leaf(traits[i % CLASSES], np.random.default_rng(i), 48), "label": i % CLASSES}
        for i in range(24)
    ]


def training_arguments(folder, **changes) -> transformers.TrainingArguments:
    options = {"per_device_train_batch_size": 4, "use_cpu": True, "remove_unused_columns": False, "seed": 3}
    return transformers.TrainingArguments(str(folder), **(options | changes))


def prepare(leaves, folder="unused", seed=3, **options) -> tuple[TransformedImages, AugmentingCollator | None]:
    arguments = AugmentationArguments(**options)
    transform, collator = prepare_augmentation(arguments, training_arguments(folder), PROCESSOR, CLASSES)
    return TransformedImages(leaves, transform, seed, copies=arguments.repeated_augmentation), collator


def make(**options) -> augmentation.Augmentation:
    return augmentation.Augmentation(AugmentationArguments(**options), PROCESSOR, CLASSES)


def whole_epoch(images, collator, batch_size=6, **options) -> dict[str, torch.Tensor]:
    batches = list(DataLoader(images, batch_size=batch_size, collate_fn=collator, **options))
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def assert_same(actual, expected, atol=1e-5):
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=atol)


# ---- Where chance comes from ----


def test_different_operations_in_a_batch(leaves):
    images, collator = prepare(leaves, trivial_augment=True)
    drawn = [NAMES[int(images[i]["draws"][0])] for i in range(len(leaves))]
    assert len(set(drawn)) > 8
    batch = collator([images[i] for i in range(len(leaves))])
    plain, _ = prepare(leaves)  # the same crops and flips, and nothing else
    same = [torch.allclose(batch["pixel_values"][i], plain[i]["pixel_values"], atol=1e-6) for i in range(len(leaves))]
    assert all(same[i] for i in range(len(leaves)) if drawn[i] == "identity") and sum(same) < 8


@pytest.mark.parametrize("options", [{"trivial_augment": True}, {"rand_augment_ops": 3, "rand_augment_magnitude": 15}])
def test_an_image_is_the_same_alone_in_any_batch_and_on_the_device(leaves, options):
    images, collator = prepare(leaves, random_erasing_probability=0.5, label_smoothing=0.1, **options)
    together = whole_epoch(images, collator, batch_size=24)
    assert_same(whole_epoch(images, collator, batch_size=1), together)
    assert_same(whole_epoch(images, collator, batch_size=5), together)
    order = np.random.default_rng(0).permutation(24).tolist()
    shuffled = whole_epoch(images, collator, sampler=order)
    assert_same({name: column[np.argsort(order)] for name, column in shuffled.items()}, together)
    device = AugmentingCollator(collator.augmentation, on_device=True)
    batch = device([images[i] for i in range(24)])
    assert batch["pixel_values"].dtype == torch.uint8 and batch["labels"].shape == (24,)
    assert_same(device.finish(batch, torch.device("cpu")), together)
    at_once = collator.augmentation.change_images(batch["pixel_values"], batch["draws"])  # as devices do it
    torch.testing.assert_close(at_once, together["pixel_values"], rtol=0, atol=1e-5)


def test_workers_and_global_chance_change_nothing_and_epochs_do(leaves):
    images, collator = prepare(leaves, **EVERYTHING)
    alone = whole_epoch(images, collator)
    np.random.seed(1)
    torch.manual_seed(1)
    for workers in (1, 2):
        assert_same(whole_epoch(images, collator, num_workers=workers), alone, atol=0)
    images.set_epoch(1)
    assert (whole_epoch(images, collator)["pixel_values"] - alone["pixel_values"]).abs().amax(
        dim=(1, 2, 3)
    ).min() > 0.1
    other, _ = prepare(leaves, seed=4, **EVERYTHING)
    assert not torch.equal(whole_epoch(other, collator)["labels"], alone["labels"])


@pytest.mark.parametrize("copies", [1, 3])
def test_more_processes_change_no_image_and_no_partner(leaves, copies):
    """accelerate distributes batches in turn: two processes with half the batch see the same pairs in each step."""
    images, collator = prepare(leaves, **(EVERYTHING | {"repeated_augmentation": copies}))
    sampler = RepeatedSampler(images) if copies > 1 else SequentialSampler(images)
    one = whole_epoch(images, collator, batch_size=8, sampler=sampler)
    for processes, batch_size in ((2, 4), (4, 2)):
        shards = [
            list(BatchSamplerShard(BatchSampler(sampler, batch_size, True), processes, rank))
            for rank in range(processes)
        ]
        batches = [collator([images[i] for i in shard[step]]) for step in range(3) for shard in shards]
        assert_same({name: torch.cat([batch[name] for batch in batches]) for name in one}, one)


# ---- Erasing, mixing, labels ----


def test_erasing(leaves):
    grey = torch.full((400, 3, SIZE, SIZE), 7, dtype=torch.uint8)
    mean = make(random_erasing_probability=0.5, random_erasing_area=[0.1, 0.2], random_erasing_aspect=[0.5, 2.0])
    draws = torch.stack([mean.draw(np.random.default_rng(i)) for i in range(400)])
    assert draws.shape == (400, 5)
    pixels, _ = mean(grey, draws)
    erased = pixels[:, 0] == 0  # the mean colour
    assert erased.flatten(1).sum(dim=1).tolist() == (draws[:, 2] * draws[:, 3]).tolist()
    share = erased.float().mean(dim=(1, 2))
    assert 160 < (share > 0).sum() < 240
    assert share[share > 0].min() > 0.08 and share.max() < 0.22
    assert erased.any(dim=(0, 1)).all() and erased.any(dim=(0, 2)).all()  # every column and row
    assert torch.equal(mean(grey, draws)[0], pixels)

    noise = make(random_erasing_probability=1.0, random_erasing_fill="noise", random_erasing_count=2)
    draws = torch.stack([noise.draw(np.random.default_rng(i)) for i in range(50)])
    assert draws.shape == (50, 10) and (draws[:, [2, 7]] > 0).all()
    pixels, _ = noise(grey[:50], draws)
    values = pixels[pixels != pixels[0, 0].mode().values.mode().values][:100000]
    assert torch.equal(noise(grey[:50], draws)[0], pixels) and len(values) > 1000
    top, left, height, width = draws[0, 5:9].int().tolist()
    area = pixels[0, :, top : top + height, left : left + width]
    assert abs(area.mean()) < 0.3 and 0.8 < area.std() < 1.2 and not torch.equal(area[0], area[1])


def two_colours() -> tuple[torch.Tensor, torch.Tensor]:
    """Return four images, black, white, black, white, of the classes 0, 1, 2, 1."""
    pixels = torch.tensor([0, 255, 0, 255], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, SIZE, SIZE)
    return pixels, torch.tensor([0, 1, 2, 1])


def whiteness(pixels: torch.Tensor) -> torch.Tensor:
    """Return (B, H, W), 0 for black to 1 for white."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (PROCESSOR.image_mean, PROCESSOR.image_std))
    return (pixels * std + mean).mean(dim=1)


def test_mixup_mixes_neighbors_and_their_labels():
    mixup = make(mixup_alpha=1.0)
    draws = torch.stack([mixup.draw(np.random.default_rng(i)) for i in range(4)])
    pixels, labels = mixup(two_colours()[0], draws, two_colours()[1])
    own = draws[:, 0]
    assert len(set(own.tolist())) == 4 and ((own > 0) & (own < 1)).all()
    white = whiteness(pixels)
    torch.testing.assert_close(white[:, 0, 0], torch.stack([1 - own[0], own[1], 1 - own[2], own[3]]))
    assert (white.flatten(1).std(dim=1) < 1e-6).all()
    expected = torch.zeros(4, 3)
    expected[range(4), [0, 1, 2, 1]] = own
    expected[range(4), [1, 0, 1, 2]] = 1 - own
    torch.testing.assert_close(labels, expected)


def test_cutmix_labels_are_the_areas():
    cutmix = make(cutmix_alpha=1.0)
    areas, places = [], torch.zeros(SIZE, SIZE)
    for start in range(0, 400, 4):
        draws = torch.stack([cutmix.draw(np.random.default_rng(start + i)) for i in range(4)])
        pixels, labels = cutmix(two_colours()[0], draws, two_colours()[1])
        white = whiteness(pixels).round()
        torch.testing.assert_close(whiteness(pixels), white)
        share = white.mean(dim=(1, 2))
        assert torch.equal(labels[[0, 2], [0, 2]], 1 - share[[0, 2]])
        assert torch.equal(labels[[1, 3], [1, 1]], share[[1, 3]])
        torch.testing.assert_close(labels.sum(dim=1), torch.ones(4))
        areas += share[[0, 2]].tolist()
        places += white[0] + white[2]
    assert min(areas) < 0.05 and max(areas) > 0.6 and 0.2 < np.mean(areas) < 0.5  # the edges cut boxes off
    assert places.min() > 10  # everywhere


def test_how_often_and_which():
    both = make(mixup_alpha=0.5, cutmix_alpha=0.5, mix_probability=0.6, mix_switch_probability=0.25)
    draws = torch.stack([both.draw(np.random.default_rng(i)) for i in range(1000)])
    mixup, cutmix = draws[:, 0] < 1, draws[:, 3] * draws[:, 4] > 0
    assert not (mixup & cutmix).any()
    assert 400 < mixup.sum() < 500 and 110 < cutmix.sum() < 190  # 450 and 150, less the boxes that are empty
    assert not make(mixup_alpha=0.5, mix_probability=0.0).arguments.mixes


def test_the_last_image_alone_is_not_mixed():
    mixup = make(mixup_alpha=1.0)
    draws = torch.stack([mixup.draw(np.random.default_rng(i)) for i in range(3)])
    pixels, labels = mixup(two_colours()[0][:3], draws, two_colours()[1][:3])
    torch.testing.assert_close(whiteness(pixels)[2], torch.zeros(SIZE, SIZE), rtol=0, atol=1e-6)
    torch.testing.assert_close(labels[2], torch.tensor([0.0, 0.0, 1.0]))


def test_label_smoothing(leaves):
    images, collator = prepare(leaves, label_smoothing=0.3)
    batch = collator([images[i] for i in range(4)])
    torch.testing.assert_close(batch["labels"][1], torch.tensor([0.1, 0.8, 0.1]))
    plain, _ = prepare(leaves)
    torch.testing.assert_close(batch["pixel_values"][1], plain[1]["pixel_values"], rtol=0, atol=1e-6)
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    config = tiny_config(problem_type="single_label_classification")
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0]), label_smoothing=0.3)
    torch.testing.assert_close(classification_loss(logits, batch["labels"], config), expected)


def test_several_labels_are_mixed_and_smoothed_one_by_one():
    mixup = make(mixup_alpha=1.0, label_smoothing=0.2)
    draws = torch.stack([mixup.draw(np.random.default_rng(i)) for i in range(4)])
    several = torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 0, 0], [1, 1, 1]])
    _, labels = mixup(two_colours()[0], draws, several)
    expected = 0.8 * torch.tensor([draws[0, 0], 1.0, 0.0]) + 0.1
    torch.testing.assert_close(labels[0], expected)
    config = tiny_config(problem_type="multi_label_classification")
    assert classification_loss(torch.zeros(4, 3), labels, config) == pytest.approx(np.log(2))
    assert mixup(two_colours()[0], draws)[1] is None  # images without labels


# ---- Copies of images ----


def test_copies_of_an_image_stand_together_but_are_no_neighbors(leaves):
    images, _ = prepare(leaves, repeated_augmentation=3)
    order = list(RepeatedSampler(images))
    assert len(order) == len(RepeatedSampler(images)) == 24
    counts = Counter(index % 24 for index in order)
    assert set(counts.values()) == {3} and len(counts) == 8
    assert len(set(order)) == 24  # three copies, each once
    assert all(a % 24 != b % 24 for a, b in zip(order[::2], order[1::2], strict=True))
    for image in counts:
        places = [place for place, index in enumerate(order) if index % 24 == image]
        assert max(places) - min(places) < 6
        assert not torch.equal(*(images[image + 24 * copy]["pixel_values"] for copy in (1, 2)))
    images.set_epoch(1)
    assert list(RepeatedSampler(images)) != order
    images.set_epoch(0)
    assert list(RepeatedSampler(images)) == order
    odd, _ = prepare(leaves[:7], repeated_augmentation=2)
    assert len(list(RepeatedSampler(odd))) == 7


def test_copies_after_an_interruption(leaves):
    images, _ = prepare(leaves, repeated_augmentation=3)
    loader = DataLoader(images, batch_size=4, sampler=RepeatedSampler(images))
    whole = [batch["pixel_values"] for batch in loader]
    rest = [batch["pixel_values"] for batch in skip_first_batches(loader, 4)]
    assert torch.equal(torch.cat(whole[4:]), torch.cat(rest))


# ---- Training ----


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_save = state.global_step == 4


def train(leaves, folder, resume=False, stop=False, **changes) -> UFGIRTrainer:
    arguments = AugmentationArguments(**(EVERYTHING | changes))
    options = {"num_train_epochs": 2, "learning_rate": 1e-3, "save_strategy": "no", "disable_tqdm": True}
    args = training_arguments(folder, logging_steps=1, per_device_eval_batch_size=8, **options)
    transform, collator = prepare_augmentation(arguments, args, PROCESSOR, CLASSES)
    images = TransformedImages(leaves, transform, args.seed, copies=arguments.repeated_augmentation)
    torch.manual_seed(0)
    model = CLCAViTForImageClassification(tiny_config(problem_type="single_label_classification"))
    trainer = UFGIRTrainer(
        model=model,
        args=args,
        train_dataset=images,
        eval_dataset=TransformedImages(leaves, EvalTransform(PROCESSOR)),
        data_collator=collator,
        compute_metrics=lambda output: {"accuracy": (output.predictions.argmax(-1) == output.label_ids).mean()},
        callbacks=[SetEpoch(images), *([Stop()] if stop else [])],
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4") if resume else None)
    return trainer


@pytest.fixture(scope="module")
def trained(leaves, tmp_path_factory) -> UFGIRTrainer:
    return train(leaves, tmp_path_factory.mktemp("trained"))


def weights(trainer: UFGIRTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_training_with_everything_on(trained, leaves):
    losses = [line["loss"] for line in trained.state.log_history if "loss" in line]
    assert trained.state.global_step == len(losses) == 12  # 6 steps an epoch, with copies as without
    assert np.isfinite(losses).all()
    metrics = trained.evaluate()  # plain images with plain labels, through the same collator
    assert 0 <= metrics["eval_accuracy"] <= 1
    images = EvalTransform(PROCESSOR)
    expected = trained.model.eval()(pixel_values=torch.stack([images(row["image"]) for row in leaves])).logits
    predictions = trained.predict(trained.eval_dataset)
    torch.testing.assert_close(torch.from_numpy(predictions.predictions), expected.detach(), rtol=0, atol=1e-5)


def test_training_is_the_same_on_the_device_and_by_workers(trained, leaves, tmp_path):
    device = train(leaves, tmp_path, augmentation_device="device")
    assert device.data_collator.on_device and not trained.data_collator.on_device
    torch.testing.assert_close(weights(device), weights(trained), rtol=0, atol=1e-5)
    assert not torch.allclose(weights(train(leaves, tmp_path, cutmix_alpha=0.0)), weights(trained), atol=1e-5)


def test_training_is_the_same_after_an_interruption(trained, leaves, tmp_path):
    assert train(leaves, tmp_path, stop=True).state.global_step == 4
    resumed = train(leaves, tmp_path, resume=True)
    assert resumed.state.global_step == 12
    assert torch.equal(weights(resumed), weights(trained))


# ---- Arguments ----


def test_the_defaults_are_the_papers(leaves):
    arguments = AugmentationArguments()
    assert not arguments.beyond_crop_and_flip and not arguments.mixes
    images, collator = prepare(leaves)
    assert collator is None and images.copies == 1
    assert images[0]["pixel_values"].dtype == torch.float32 and set(images[0]) == {"pixel_values", "labels"}


@pytest.mark.parametrize(
    "options",
    [
        {"flip_probability": 1.5},
        {"random_resized_crop": 0.0},
        {"rand_augment_ops": -1},
        {"rand_augment_magnitude": 31},
        {"augment_interpolation": "bicubic"},
        {"random_erasing_probability": -0.1},
        {"random_erasing_area": [0.4, 0.2]},
        {"random_erasing_area": [0.4, 1.2]},
        {"random_erasing_area": [0.4]},
        {"random_erasing_aspect": [0.0, 2.0]},
        {"random_erasing_aspect": [1.0, float("inf")]},
        {"random_erasing_count": 0},
        {"random_erasing_fill": "black"},
        {"repeated_augmentation": 0},
        {"mixup_alpha": -1.0},
        {"cutmix_alpha": float("nan")},
        {"mix_probability": 2.0},
        {"mix_switch_probability": -1.0},
        {"label_smoothing": 1.0},
        {"augmentation_device": "gpu"},
        {"trivial_augment": True, "rand_augment_ops": 2},
    ],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` .*") as caught:
        AugmentationArguments(**options)
    assert len(options) == 2 or str(next(iter(options.values()))) in str(caught.value)


@pytest.mark.parametrize(
    "name, value, options",
    [
        ("label_smoothing_factor", 0.1, {}),
        ("per_device_train_batch_size", 5, {"mixup_alpha": 0.2}),
        ("train_sampling_strategy", "sequential", {"repeated_augmentation": 2}),
        ("remove_unused_columns", True, {"random_erasing_probability": 0.2}),
    ],
)
def test_incompatible_trainer_options(tmp_path, name, value, options):
    args = training_arguments(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=f"`{name}` must"):
        prepare_augmentation(AugmentationArguments(**options), args, PROCESSOR, CLASSES)


def test_missing_draws_raise(leaves):
    images, collator = prepare(leaves, mixup_alpha=0.2)
    sample = images[0]
    del sample["draws"]
    with pytest.raises(ValueError, match="`remove_unused_columns`"):
        collator([sample])


def test_without_kornia(leaves, monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "kornia"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "kornia", None)  # an import fails
    for options in ({"trivial_augment": True}, {"rand_augment_ops": 2}):
        with pytest.raises(ValueError, match=r"`(trivial_augment|rand_augment_ops)` .*pip install 'kornia"):
            AugmentationArguments(**options)
    images, collator = prepare(leaves, **(EVERYTHING | {"trivial_augment": False}))
    assert collator([images[i] for i in range(4)])["pixel_values"].shape == (4, 3, SIZE, SIZE)


def test_options_of_the_script(capsys):
    parser = RecipeParser((AugmentationArguments,), prog="script")
    (arguments,) = parser.parse(["--trivial_augment", "--random_erasing_area", "0.1", "0.2", "--mixup_alpha=0.2"])
    assert arguments.trivial_augment and arguments.random_erasing_area == [0.1, 0.2] and arguments.mixes
    with pytest.raises(SystemExit):
        parser.parse(["--label_smoothing", "2"])
    assert "`label_smoothing` must be in [0, 1), got 2.0" in capsys.readouterr().err
