"""run_ufgir.py with a teacher, and with LoRA."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from clca import CLCAViTForImageClassification
from clca.loss_clca import distillation_loss
from tests.helpers import images, labels, tiny_config, tiny_model
from tests.script.helpers import CLASSES, mistake, recipe, run
from ufgir.training.distillation import Distillation, DistillationArguments
from ufgir.training.teacher import Teacher
from ufgir.transforms.preprocessing import EvalTransform, make_image_processor


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Save a stock ViT with the classes of `leaves`."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(3)
    names = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    size = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(**size, intermediate_size=32, **names)).save_pretrained(folder)
    return folder


def test_the_teacher_takes_its_share_of_the_loss(teacher):
    names = dict(enumerate(CLASSES))
    student = tiny_model(image_size=16, patch_size=4, reduction="evit", keep_rate=0.5, id2label=names).float()
    pixels, targets = images(3, 16, 16).float(), labels(3)
    logits = AutoModelForImageClassification.from_pretrained(teacher)(pixels).logits
    for kind, default in (("soft", 0.5), ("hard", 0.3)):
        distillation = Distillation(DistillationArguments(teacher=str(teacher), distillation=kind), student.config)
        said = distillation.inputs(pixels)
        torch.testing.assert_close(said["teacher_logits"], logits)
        output = student(pixels, targets)
        plain = output.loss
        expected = (1 - default) * plain + default * distillation_loss(output.logits, logits, kind)
        torch.testing.assert_close(distillation.loss(output, **said), expected)
        assert set(output.loss_terms) == {"classification", "distillation"}


def test_a_teacher_sees_images_as_it_was_trained_on_them(teacher, tmp_path, caplog):
    """The student has another normalization, and the teacher is saved in half precision."""
    model = AutoModelForImageClassification.from_pretrained(teacher)
    model.half().save_pretrained(tmp_path)
    own = make_image_processor(16, 16, image_mean=[0.5, 0.4, 0.6], image_std=[0.5, 0.3, 0.2])
    own.save_pretrained(tmp_path)
    processor = make_image_processor(16, 16)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    config = tiny_config(image_size=16, patch_size=4, id2label=dict(enumerate(CLASSES)))
    distillation = Distillation(DistillationArguments(teacher=str(tmp_path)), config, processor)
    said = distillation.inputs(EvalTransform(processor)(image)[None])["teacher_logits"]
    expected = model.float()(EvalTransform(own)(image)[None]).logits
    torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-5)
    Distillation(DistillationArguments(teacher=str(teacher)), config, processor)
    assert "has no image processor" in caplog.text


@pytest.mark.parametrize(
    "options, words",
    [
        ({"distillation": "warm"}, "`distillation` must be soft or hard, got 'warm'"),
        ({"distillation_weight": 2.0}, "must be in [0, 1], got 2.0"),
        ({"distillation_temperature": 0.0}, "must be positive"),
    ],
)
def test_mistaken_options(options, words):
    with pytest.raises(ValueError) as caught:
        DistillationArguments(**options)
    assert words in str(caught.value)


def test_a_weight_has_no_effect_without_a_teacher(caplog):
    DistillationArguments(distillation_weight=0.1)
    assert "`distillation_weight`" in caplog.text and "`teacher`" in caplog.text


def test_teachers_that_do_not_fit(teacher, tmp_path):
    config = tiny_config(image_size=16, patch_size=4, id2label={0: "a", 1: "b", 2: "c"})
    with pytest.raises(ValueError, match=r"`teacher`.* classes in the same order"):
        Distillation(DistillationArguments(teacher=str(teacher)), config)
    config = tiny_config(id2label=dict(enumerate(CLASSES)))
    with pytest.raises(ValueError, match="`image_size` 32, got 16"):
        Distillation(DistillationArguments(teacher=str(teacher)), config)
    with pytest.raises(ValueError, match="could not be loaded"):
        Distillation(DistillationArguments(teacher=str(tmp_path)), config)
    config = tiny_config(image_size=16, patch_size=4, id2label=dict(enumerate(CLASSES)), reduction="dyvit")
    with pytest.raises(ValueError, match="`reduction_kwargs`"):
        Distillation(DistillationArguments(teacher=str(teacher), distillation_weight=0.5), config)


@pytest.mark.parametrize("reduction", ["evit", "dyvit"])
def test_training_with_a_teacher(teacher, leaves, tmp_path, reduction):
    """The log contains the terms of the loss, and the teacher affects the weights."""
    changes = {"reduction": reduction, "num_train_epochs": 1, "logging_steps": 1, "eval_strategy": "no"}
    changes |= {"save_strategy": "no", "load_best_model_at_end": False}
    weights = []
    for name, options in (("plain", []), ("taught", ["--teacher", str(teacher)])):
        out = tmp_path / name
        run(recipe(tmp_path, leaves, out, **changes), *options)
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        terms = {key for line in history for key in line if key.startswith("loss_")}
        weights.append(load_file(out / "model.safetensors"))
    assert terms >= {"loss_classification"} and len(terms) > 1
    assert terms >= ({"loss_distillation"} if reduction == "evit" else {"loss_keep_ratio", "loss_token_distillation"})
    for line in history:
        if "loss_classification" in line:
            parts = [value for key, value in line.items() if key.startswith("loss_")]
            if reduction == "dyvit":  # there, all parts add up
                assert sum(parts) == pytest.approx(line["loss"], abs=2e-3)
    assert any(not torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.fixture(scope="module")
def dyvit(leaves, tmp_path_factory):
    """Return (folder, recipe) of a short training of DynamicViT."""
    folder = tmp_path_factory.mktemp("dyvit")
    changes = {"reduction": "dyvit", "num_train_epochs": 1, "logging_steps": 1, "eval_strategy": "no"}
    changes |= {"save_strategy": "no", "load_best_model_at_end": False}
    return folder, recipe(folder, leaves, folder / "out", **changes)


def test_a_teacher_that_reduces_tokens(trained, dyvit, capsys, caplog):
    """Its tokens are not patches: requiring them raises an error before training; otherwise only its logits are distilled."""
    folder, path = dyvit
    teacher = ["--teacher", str(trained[0])]
    sentence = mistake(capsys, path, *teacher, "--distill_tokens", "true")
    assert all(word in sentence for word in ("reduces its tokens (`reduction` evit)", "--distill_tokens false"))
    assert not (folder / "out").exists()
    for out, options, warned in (("unset", [], True), ("off", ["--distill_tokens", "false"], False)):
        caplog.clear()
        run(path, *teacher, *options, "--output_dir", str(folder / out))
        assert ("distilling only its logits" in caplog.text) == warned
        history = json.loads((folder / out / "trainer_state.json").read_text())["log_history"]
        terms = {key for line in history for key in line if key.startswith("loss_")}
        assert terms == {"loss_classification", "loss_keep_ratio", "loss_cls_distillation"}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, None),
        ({"num_clr_tokens": 1, "cross_layer_cache": True}, None),
        ({"reduction": "heuristic", "keep_rate": 0.5, "cross_layer_cache": True}, None),  # every row stays
        ({"reduction": "topk", "keep_rate": 1.0}, None),
        (
            {"reduction": "topk", "keep_rate": 0.9, "cross_layer_cache": True, "num_clr_tokens": 2},
            "reduces its tokens",
        ),
        ({"reduction": "patchmerger", "keep_rate": 1.0}, "reduces its tokens"),  # as many, but others
        ({"reduction": "ats", "keep_rate": 1.0}, "reduces its tokens"),
        ({"hidden_size": 32}, "has tokens of width 32 instead of the student's 16"),
        ({"patch_size": 4}, "does not have one token for each of the student's 16 patches"),
        ({"patch_size": 16}, "does not have one token for each of the student's 16 patches"),
    ],
)
def test_whose_tokens_can_be_distilled(changes, words):
    """For CLCA models, the check in advance agrees with the training."""
    student = tiny_config(reduction="dyvit", keep_rate=0.5)
    teacher = Teacher(tiny_model(**changes).float(), student.num_patches)
    problem = teacher.token_mismatch(student)
    assert problem is None if words is None else words in problem
    if problem is None:
        assert teacher(images().float())["teacher_tokens"].shape == (3, 16, 16)


@pytest.mark.parametrize(
    "patch_size, width, words",
    [(8, 16, None), (8, 32, "width 32"), (4, 16, "one token for each"), (16, 16, "one token for each")],
)
def test_whose_tokens_of_other_models_can_be_distilled(patch_size, width, words):
    """A ViT with smaller patches has more tokens, which do not correspond."""
    names = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32}
    model = ViTForImageClassification(ViTConfig(patch_size=patch_size, hidden_size=width, **names))
    problem = Teacher(model, 16).token_mismatch(tiny_config())
    assert problem is None if words is None else words in problem


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21 asks for it
def test_lora_trains_little_and_leaves_a_whole_model(leaves, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    run(recipe(tmp_path, leaves, base, num_train_epochs=1, reduction="sit"))
    options = ["--model_name_or_path", str(base), "--lora_rank", "2", "--do_predict", "true", "--weight_decay", "0"]
    metrics = run(recipe(tmp_path, leaves, out, reduction="sit"), *options)
    assert {file.name for file in (out / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    model = CLCAViTForImageClassification.from_pretrained(out)
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys() and 0 <= metrics["test"]["top1"] <= 1
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "vit.layers.0.attention.q_proj.weight" in changed and any(n.startswith("classifier") for n in changed)
    assert any(".reduction." in name for name in changed)  # its own parameters are new, and train
    assert not {"vit.embeddings.cls_token", "vit.layers.0.attention.k_proj.weight", "vit.layernorm.weight"} & changed
    # what the adapter's checkpoints were evaluated with is what was saved
    again = run("--model_name_or_path", str(out), "--dataset", str(leaves), "--do_predict", "--use_cpu", "true",
                "--output_dir", str(tmp_path / "again"))  # fmt: skip
    assert again["test"] == metrics["test"] and model.config.num_labels == 3


def test_mistaken_adapters(capsys, leaves, tmp_path):
    path = recipe(tmp_path, leaves, tmp_path / "out")
    for options, words in (
        (["--lora_rank", "0"], "`lora_rank` must be at least 1"),
        (["--lora_rank", "2", "--lora_targets", "heads"], "must be attention, mlp or both"),
        (["--lora_rank", "2", "--lora_dropout", "1"], "must be in [0, 1)"),
    ):
        assert words in mistake(capsys, path, *options)
