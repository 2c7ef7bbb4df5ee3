"""run_ufgir.py with various data and training options, checked by their results."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file

from clca import CLCAViTConfig
from run_ufgir import GROUPS
from tests.helpers import tiny_model
from tests.script.helpers import CLASSES, mistake, parse, recipe, run
from ufgir.data.load import load_ufgir_dataset
from ufgir.runs.records import is_finished, read_run_records
from ufgir.runs.tables import run_rows
from ufgir.training.option_checks import check_smoothing
from ufgir.training.trainer import UFGIRTrainer
from ufgir.utils import locks as locking
from ufgir.utils.arguments import RecipeParser


QUICK = {"num_train_epochs": 1, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}


def predictions(folder):
    with open(folder / "predictions.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_subset_of_the_classes_can_be_evaluated(trained, leaves, tmp_path):
    """The data contain two of the three classes of the model; predictions may be any of the three."""
    model, _ = trained
    data = shutil.copytree(leaves, tmp_path / "data")
    for split in ("train", "validation", "test"):
        shutil.rmtree(data / split / CLASSES[0])
    whole = {row["file"].rpartition("/")[2]: row for row in predictions(model)}
    options = ["--dataset", str(data), "--do_predict", "--use_cpu", "true", "--output_dir", str(tmp_path / "out")]
    run("--model_name_or_path", str(model), *options)
    rows = predictions(tmp_path / "out")
    assert len(rows) == 4
    for row in rows:
        before = whole[row["file"].rpartition("/")[2]]
        assert {k: v for k, v in row.items() if k not in ("index", "file")} == {
            k: v for k, v in before.items() if k not in ("index", "file")
        }


def test_two_runs_in_one_folder(leaves, tmp_path, capsys, monkeypatch):
    """The second run is rejected even before the first one has written anything."""
    monkeypatch.setattr(locking, "PATIENCE", 0.1)
    arguments = [recipe(tmp_path, leaves, tmp_path / "out", **QUICK), "--max_steps", "1"]
    with locking.exclusive_lock(tmp_path / "out", ""):
        said = mistake(capsys, *arguments)
    assert "`output_dir`" in said and str(tmp_path / "out") in said and "another run" in said
    assert not (tmp_path / "out").exists()
    run(*arguments)
    assert not list(tmp_path.glob(".*"))


def test_unknown_classes_are_refused(trained, leaves, tmp_path, capsys):
    model, _ = trained
    data = shutil.copytree(leaves, tmp_path / "data")
    for split in ("train", "validation", "test"):
        (data / split / CLASSES[0]).rename(data / split / "violet")
    said = mistake(capsys, "--model_name_or_path", str(model), "--dataset", str(data), "--do_predict")
    assert "violet" in said


@pytest.mark.parametrize("loss", ["bce", "asymmetric"])
def test_several_classes_an_image(leaves, tmp_path, loss):
    for split in ("train", "validation", "test"):
        rows = []
        for index, name in enumerate(CLASSES):
            for file in sorted((leaves / split / name).iterdir()):
                rows.append({"file": str(file), "class": [name, CLASSES[(index + 1) % 3]]})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(lines)
    out = tmp_path / "out"
    options = {"metric_for_best_model": "map", "multi_label_loss": loss, "do_predict": True, "do_eval": True}
    columns = {"image_column": "file", "label_column": "class"}
    metrics = run(recipe(tmp_path, tmp_path, out, **options, **columns))
    assert set(metrics["validation"]) == set(metrics["test"]) == {"map", "micro_f1", "macro_f1"}
    config = CLCAViTConfig.from_pretrained(out)
    assert config.problem_type == "multi_label_classification" and config.multi_label_loss == loss
    labels = {row["label"] for row in predictions(out)}
    assert labels == {"blue;green", "green;red", "blue;red"}
    card = (out / "README.md").read_text()
    assert "mAP" in card and "top-1" not in card


def test_shots_and_random_validation(leaves, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(leaves / "train", data)
    path = recipe(tmp_path, data, tmp_path / "out", **QUICK, validation_split="random", shots=2)
    run(path)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["split_sizes"] == {"train": 6, "validation": 6}
    assert "`train_on_trainval`" in mistake(capsys, path, "--train_on_trainval", "true")


def test_one_model_for_several_keep_rates(leaves, tmp_path):
    """The head stores statistics of each rate, and the model is evaluated at any rate with `keep_rate`."""
    out = tmp_path / "out"
    run(recipe(tmp_path, leaves, out, train_keep_rates=[0.25, 0.5, 1.0], keep_rate=0.5, num_train_epochs=3))
    config = CLCAViTConfig.from_pretrained(out)
    assert config.train_keep_rates == [0.25, 0.5, 1.0] and config.keep_rate == [0.5]
    means = load_file(out / "model.safetensors")["classifier.norm_in.rate_mean"]
    assert means.shape[0] == 3 and (means.abs().sum(dim=1) > 0).all() and not torch.equal(means[0], means[2])
    macs = []
    for rate in ("0.25", "0.7"):
        options = ["--dataset", str(leaves), "--do_predict", "--use_cpu", "true", "--output_dir", str(tmp_path / rate)]
        run("--model_name_or_path", str(out), *options, "--keep_rate", rate)
        macs.append(json.loads((tmp_path / rate / "run.json").read_text())["macs"])
    assert macs[0] < macs[1]
    # the options of the last one: a method that has no several rates, and counts of tokens
    assert set(run("--model_name_or_path", str(out), *options, "--reduction", "none")) == {"test"}
    assert set(run("--model_name_or_path", str(out), *options, "--keep_tokens", "8")) == {"test"}


def test_everything_that_changes_training_at_once(leaves, tmp_path):
    """Groups, schedule, augmentation, EMA and gradients can be combined, and a second run gives exactly the same result."""
    options = {
        "schedule": "cosine_epochs",
        "parameter_groups": "original",
        "mixed_precision": "auto",
        "trivial_augment": True,
        "random_erasing_probability": 0.5,
        "mixup_alpha": 0.8,
        "cutmix_alpha": 1.0,
        "label_smoothing": 0.1,
        "repeated_augmentation": 2,
        "ema_decay": 0.9,
        "record_gradients": True,
        "gradient_accumulation_steps": 2,
        "group_lasso_weight": 1e-4,
        "reduction": "dyvit",
        "num_train_epochs": 3,
        "full_determinism": True,
    }
    weights = []
    for name in ("first", "second"):
        out = tmp_path / name
        run(recipe(tmp_path, leaves, out, **QUICK | options))
        weights.append(load_file(out / "model.safetensors"))
        assert (out / "ema" / "model.safetensors").is_file() and (out / "gradients.csv").is_file()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    torch.use_deterministic_algorithms(False)


# Classes of a checkpoint that is trained on


@pytest.fixture(scope="module")
def reversed_leaves(leaves, tmp_path_factory):
    """Write the same images with the class numbers reversed."""
    data = load_ufgir_dataset(leaves, class_names=CLASSES[::-1], validation_fraction=0)
    path = tmp_path_factory.mktemp("reversed") / "data"
    data.save_to_disk(path)
    return path


def test_training_goes_on_with_the_order_of_the_checkpoints_classes(trained, reversed_leaves, tmp_path):
    model, _ = trained
    out = tmp_path / "out"
    options = {"model_name_or_path": str(model), "learning_rate": 1e-9, "do_predict": True}
    again = run(recipe(tmp_path, reversed_leaves, out, **QUICK, **options))
    config = CLCAViTConfig.from_pretrained(out)
    assert [config.id2label[i] for i in range(3)] == CLASSES
    before, after = (load_file(folder / "model.safetensors")["classifier.out_proj.weight"] for folder in (model, out))
    assert (before - after).abs().max() < 1e-6
    rows = predictions(out)
    labels = datasets.load_from_disk(str(reversed_leaves))["test"]["label"]
    assert [row["label"] for row in rows] == [CLASSES[::-1][label] for label in labels]
    right = [row["prediction"] == row["label"] for row in rows]
    assert again["test"]["top1"] == pytest.approx(sum(right) / len(right))


def test_a_head_of_other_classes_is_reinitialized(trained, leaves, tmp_path, capsys, caplog):
    data = shutil.copytree(leaves, tmp_path / "data")
    for split in ("train", "validation", "test"):
        for name in CLASSES:
            (data / split / name).rename(data / split / f"dark {name}")
    path = recipe(tmp_path, data, tmp_path / "out", **QUICK, model_name_or_path=str(trained[0]))
    said = mistake(capsys, path, "--freeze", "head")
    assert "`freeze` head" in said and "dark blue" in said and "(blue, green, red)" in said
    run(path, "--learning_rate", "1e-9")
    assert "the head is re-initialized" in caplog.text
    before, after = (load_file(f / "model.safetensors") for f in (trained[0], tmp_path / "out"))
    assert not torch.allclose(before["classifier.out_proj.weight"], after["classifier.out_proj.weight"], atol=1e-4)
    name = "vit.layers.0.mlp.fc1.weight"
    torch.testing.assert_close(before[name], after[name], atol=1e-5, rtol=0)
    config = CLCAViTConfig.from_pretrained(tmp_path / "out")
    assert config.id2label == {i: f"dark {name}" for i, name in enumerate(CLASSES)}


def test_a_head_whose_classes_have_no_names_is_kept(trained, leaves, tmp_path, caplog):
    """transformers calls classes without names `LABEL_0`, ..."""
    nameless = shutil.copytree(trained[0], tmp_path / "nameless")
    config = json.loads((nameless / "config.json").read_text())
    names = [f"LABEL_{i}" for i in range(len(CLASSES))]
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (nameless / "config.json").write_text(json.dumps(config))
    path = recipe(tmp_path, leaves, tmp_path / "out", **QUICK, model_name_or_path=str(nameless))
    run(path, "--learning_rate", "1e-9")
    assert "does not name its classes" in caplog.text and "from blue to red" in caplog.text
    before, after = (load_file(f / "model.safetensors") for f in (nameless, tmp_path / "out"))
    name = "classifier.out_proj.weight"
    torch.testing.assert_close(before[name], after[name], atol=1e-5, rtol=0)
    assert CLCAViTConfig.from_pretrained(tmp_path / "out").id2label == dict(enumerate(CLASSES))


def test_a_frozen_head_keeps_its_statistics(trained, leaves, tmp_path):
    out = tmp_path / "out"
    options = {"model_name_or_path": str(trained[0]), "freeze": ["head"]}
    run(recipe(tmp_path, leaves, out, **QUICK, **options))
    before, after = (load_file(folder / "model.safetensors") for folder in (trained[0], out))
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("classifier."))
    assert not torch.equal(before["vit.layers.0.mlp.fc1.weight"], after["vit.layers.0.mlp.fc1.weight"])


# Options that would do nothing, and what the data do not give


DRAWN = {"synthetic_num_classes": 3, "synthetic_images_per_class": [4, 2, 2]}


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--distillation", "hard"], ["`distillation`", "a `teacher`"]),
        (["--distillation_temperature=4"], ["`distillation_temperature`", "a `teacher`"]),
        (["--lora_targets", "mlp"], ["`lora_targets`", "`lora_rank`"]),
        (["--lora_alpha", "4"], ["`lora_alpha`", "`lora_rank`"]),
        (["--reduction=none", "--keep_rate=0.1"], ["`keep_rate`", "a `reduction`"]),
        (["--reduction=none", "--cross_layer_cache=false", "--cache_gap=true"], ["`cache_gap`", "`cross_layer_cache`"]),
        (["--random_erasing_fill", "noise"], ["`random_erasing_fill`", "`random_erasing_probability`"]),
        (["--multi_label_loss", "asymmetric"], ["`multi_label_loss`", "several classes"]),
        (["--validation_split", "random"], ["`validation_split`", "data without a validation split"]),
        (["--schedule", "cosine_epochs", "--warmup_epochs", "0.5", "--warmup_steps", "3"], ["`warmup_steps`"]),
        (["--schedule=step_epochs", "--warmup_epochs=0.5", "--lr_scheduler_type=linear"],
         ["`lr_scheduler_type`", "`schedule` trainer"]),
        (["--unfreeze", "head"], ["`unfreeze`", "`freeze`"]),
        (["--ema_warmup"], ["`ema_warmup`", "`ema_decay`"]),
        (["--synthetic_seed", "5"], ["`synthetic_seed`", "`dataset` synthetic_leaves"]),
        (["--dataset_revision", "main"], ["`dataset_revision`", "the Hub"]),
        (["--csv_class_names", "names.csv"], ["`csv_class_names`", "list images"]),
        (["--do_train", "false", "--do_eval", "--freeze", "backbone"], ["`freeze`", "`do_train`"]),
        (["--do_train", "false", "--do_eval", "--teacher", "x"], ["`teacher`", "`do_train`"]),
        (["--do_train=false", "--do_eval", "--resume_from_checkpoint=true"], ["`resume_from_checkpoint`"]),
    ],
)  # fmt: skip
def test_options_without_effect_are_named_in_one_warning(leaves, tmp_path, caplog, argv, words):
    """Also for options of several groups, and among other options of a recipe."""
    path = recipe(tmp_path, leaves, tmp_path / "out", **QUICK, rand_augment_magnitude=5)
    run(path, *argv)
    (warning,) = [r.getMessage() for r in caplog.records if "`rand_augment_magnitude`" in r.getMessage()]
    assert all(word in warning for word in words), warning


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--shots", "2", "--train_on_trainval"], ["`shots`", "`train_on_trainval`"]),
        (["--layer_lr_decay=0.5", "--parameter_groups=original"], ["`layer_lr_decay`", "`parameter_groups`"]),
        (["--metric_for_best_model", "top5"], ["`metric_for_best_model`", "top1, macro_f1, loss", "top5"]),
        (["--metric_for_best_model", "ema_top1"], ["`metric_for_best_model`", "ema_top1"]),
        (["--max_eval_samples", "-3"], ["`max_eval_samples`", "at least 1", "-3"]),
        (["--per_device_train_batch_size", "50"], ["`per_device_train_batch_size`", "`dataloader_drop_last`"]),
        (["--train_on_trainval", "--save_strategy=best"], ["`save_strategy` best", "validation"]),
    ],
)
def test_contradictions_are_refused(leaves, tmp_path, capsys, argv, words):
    said = mistake(capsys, recipe(tmp_path, leaves, tmp_path / "out"), *argv)
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_labels_are_smoothed_once(leaves, tmp_path, capsys):
    """Either by the option or by the loss of the checkpoint. 0 in a checkpoint contradicts nothing, and neither does an evaluation."""
    model = tmp_path / "model"
    tiny_model(label_smoothing=0.1).float().save_pretrained(model)
    options = SimpleNamespace(
        augmentation=SimpleNamespace(label_smoothing=0.2),
        training=SimpleNamespace(do_train=True),
        model=SimpleNamespace(model_name_or_path=str(model)),
    )
    config = CLCAViTConfig.from_pretrained(model)
    with pytest.raises(ValueError, match=r"`label_smoothing` must be 0, got 0\.2.* 0\.1"):
        check_smoothing(options, config)
    argv = ["--dataset", str(leaves), "--model_name_or_path", str(model), "--output_dir", str(tmp_path / "out")]
    argv += ["--do_train", "--use_cpu", "true", "--label_smoothing"]
    assert "`label_smoothing` must be 0, got 0.2" in mistake(capsys, *argv, "0.2")
    check_smoothing(options, CLCAViTConfig())
    options.training.do_train = False
    check_smoothing(options, config)
    options.training.do_train, options.augmentation.label_smoothing = True, 0.0
    check_smoothing(options, config)


@pytest.mark.parametrize(
    "argv, word",
    [
        (["--image_column", "nope"], "`image_column`"),
        (["--label_separator", ";"], "`label_separator`"),
        (["--shots", "0"], "`shots`"),
    ],
)
def test_options_of_the_data_reach_drawn_leaves(tmp_path, capsys, argv, word):
    path = recipe(tmp_path, "synthetic_leaves", tmp_path / "out", **DRAWN)
    assert word in mistake(capsys, path, *argv)


def test_a_recipe_for_one_data_set_is_also_good_for_another(leaves, tmp_path, caplog):
    unused = {"lora_targets": ["mlp"], "validation_split": "random"}
    run(recipe(tmp_path, leaves, tmp_path / "out", **QUICK, **DRAWN, **unused))
    (warning,) = [r.getMessage() for r in caplog.records if "`lora_targets`" in r.getMessage()]
    assert all(f"`{name}`" in warning for name in (*DRAWN, *unused))


def test_a_single_class_is_refused(leaves, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(leaves / "train" / "red", data / "red")
    said = mistake(capsys, recipe(tmp_path, data, tmp_path / "out"))
    assert "`dataset`" in said and "one class (red)" in said and not (tmp_path / "out").exists()


def test_multi_label_images_are_judged_by_map_by_default(leaves, tmp_path):
    for split in ("train", "validation", "test"):
        files = [file for name in CLASSES for file in sorted((leaves / split / name).iterdir())]
        rows = [{"file": str(file), "label": [file.parent.name, "leaf"]} for file in files]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    run(recipe(tmp_path, tmp_path, out, do_eval=True, ema_decay=0.5))
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["best_metric"] == max(row["eval_map"] for row in state["log_history"] if "eval_map" in row)


@pytest.mark.parametrize("trackers", ["none", ["none"]])
def test_several_trackers_may_be_listed(tmp_path, trackers):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"report_to": trackers}))
    assert parse(str(path))[2].report_to == []
    path.write_text("report_to: [tensorboard, trackio]")
    assert RecipeParser(GROUPS, prog="x").parse([str(path)])[-1].report_to == ["tensorboard", "trackio"]


def test_an_unquoted_no_is_explained(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("mixed_precision: no")
    assert 'write mixed_precision: "no"' in mistake(capsys, str(path))
    path.write_text("resume_from_checkpoint: false\ndo_train: no")
    assert parse(str(path))[2].do_train is False


# Going on, and starting over


def test_a_training_goes_on_as_it_began(leaves, tmp_path, capsys, caplog):
    plan = {"eval_strategy": "no", "load_best_model_at_end": False, "num_train_epochs": 1}
    out = tmp_path / "out"
    path = recipe(tmp_path, leaves, out, **plan)
    run(path)
    again = ["--resume_from_checkpoint", "true", "--num_train_epochs", "2"]
    for option, value, before in (
        ("learning_rate", "0.05", "0.001"),
        ("weight_decay", "0.9", "0.05"),
        ("seed", "77", "5"),
        ("keep_rate", "0.7", "0.5"),
        ("shots", "3", "None"),
    ):
        said = mistake(capsys, path, *again, f"--{option}", value)
        assert f"`{option}` (" in said and before in said and value in said and "overwrite_output_dir" in said, said
    moved = shutil.copytree(leaves, tmp_path / "moved")
    (moved / "train" / "red" / "red0.png").unlink()
    assert "training images" in mistake(capsys, path, *again, "--dataset", str(moved))
    shutil.copy(leaves / "train" / "red" / "red0.png", moved / "train" / "red")  # the same again, elsewhere and later
    free = ["--max_grad_norm", "0.5", "--logging_steps", "1", "--dataloader_num_workers", "1"]
    run(path, *again, *free, "--dataset", str(moved))
    assert "`max_grad_norm` changed from 1.0 to 0.5" in caplog.text
    record = json.loads((out / "run.json").read_text())
    assert record["resumed_from"].endswith("checkpoint-4") and record["settings"]["learning_rate"] == 1e-3


def test_starting_over_leaves_nothing_of_the_earlier_training(leaves, tmp_path):
    out = tmp_path / "out"
    path = recipe(tmp_path, leaves, out, **QUICK)
    run(path, "--do_predict", "--ema_decay", "0.9", "--record_gradients", "--predictions_file", "guesses.jsonl")
    argv = ["--model_name_or_path", str(out), "--dataset", str(leaves), "--use_cpu", "true", "--output_dir", str(out)]
    run(*argv, "--do_predict")
    (out / "notes.txt").touch()
    gone = ["ema", "test_results.json", "test_ema_results.json", "predictions.csv", "guesses.jsonl", "gradients.csv"]
    gone += ["kept_patches.png"]
    assert all((out / name).exists() for name in gone)
    assert "test_ema_top1" in json.loads((out / "all_results.json").read_text())
    run(path, "--overwrite_output_dir")
    assert [name for name in gone if (out / name).exists()] == []
    assert (out / "notes.txt").exists() and not (out / "gradients.png").exists()
    assert not [name for name in json.loads((out / "all_results.json").read_text()) if name.startswith("test")]


def test_a_run_that_could_not_be_pushed_is_not_finished(leaves, tmp_path, monkeypatch):
    uploads = []

    class Hub:
        def create_repo(self, name, **kwargs):
            return type("Repo", (), {"repo_id": f"me/{name}"})()

        def upload_folder(self, **kwargs):
            if kwargs["commit_message"].startswith("End"):
                uploads.append(sorted(file.name for file in Path(kwargs["folder_path"]).iterdir()))
                if len(uploads) == 1:
                    raise OSError("the network is down")

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    out = tmp_path / "out"
    path = recipe(tmp_path, leaves, out, **QUICK, hub_strategy="end")
    push = ["--push_to_hub", "--hub_model_id", "leaves"]
    with pytest.raises(OSError, match="the network is down"):
        run(path, *push)
    assert {"model.safetensors", "README.md", "run.json"} <= set(uploads[0])
    (record,) = read_run_records([out]).finished  # its training is a result all the same
    assert record["pushed"] is False and record["train_seconds"] > 0 and not is_finished(out)
    run(path, *push)
    assert json.loads((out / "run.json").read_text())["pushed"] is True and is_finished(out)


def test_an_evaluation_of_other_data_does_not_replace_the_metrics_of_the_training(leaves, tmp_path):
    out = tmp_path / "out"
    run(recipe(tmp_path, leaves, out, **QUICK, do_predict=True))
    before = json.loads((out / "run.json").read_text())
    argv = ["--model_name_or_path", str(out), "--dataset", str(leaves), "--do_predict", "--use_cpu", "true"]
    few = run(*argv, "--max_predict_samples", "1", "--output_dir", str(out))
    record = json.loads((out / "run.json").read_text())
    assert record["metrics"] == before["metrics"] and record["split_sizes"] == before["split_sizes"]
    (evaluation,) = record["evaluations"]
    assert evaluation["metrics"] == few and evaluation["data"]["test"]["max_predict_samples"] == 1


def test_what_a_later_evaluation_measures_first_is_a_result_of_the_training(leaves, tmp_path):
    """Options for validation images do not affect test images, regardless of how the training was evaluated."""
    data, out = tmp_path / "data", tmp_path / "out"
    for split in ("train", "test"):
        shutil.copytree(leaves / split, data / split)
    few = {"validation_fraction": 0.4, "max_eval_samples": 2, "do_eval": True}
    before = run(recipe(tmp_path, data, out, **QUICK, **few))
    argv = ["--model_name_or_path", str(out), "--dataset", str(data), "--use_cpu", "true", "--output_dir", str(out)]
    test = run(*argv, "--do_predict", "--validation_split", "last")
    record = json.loads((out / "run.json").read_text())
    assert record["metrics"] == before | test and record["split_sizes"] == {"train": 9, "validation": 2, "test": 6}
    (row,) = run_rows([record | {"folder": "out"}])
    assert row["test_top1"] == test["test"]["top1"] and row["validation_top1"] == before["validation"]["top1"]
    run(*argv, "--do_eval")  # of other validation images
    assert json.loads((out / "run.json").read_text())["metrics"] == record["metrics"]


def test_images_that_were_trained_on_are_no_result(leaves, tmp_path, caplog):
    out = tmp_path / "out"
    run(recipe(tmp_path, leaves, out, **QUICK, train_on_trainval=True))
    argv = ["--model_name_or_path", str(out), "--dataset", str(leaves), "--use_cpu", "true", "--output_dir", str(out)]
    both = run(*argv, "--do_eval", "--do_predict")
    record = json.loads((out / "run.json").read_text())
    assert set(both) == {"validation", "test"} and record["metrics"] == {"test": both["test"]}
    assert record["evaluations"][0]["metrics"] == both and "the metrics of validation" in caplog.text


@pytest.mark.parametrize("stop_at", [1, 3])
def test_ctrl_c_in_a_training_says_how_to_go_on(leaves, tmp_path, capsys, monkeypatch, stop_at):
    """There is no traceback, and the training can be resumed."""
    options = QUICK | {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 4}
    path = recipe(tmp_path, leaves, tmp_path / "out", **options)
    steps, step = [], UFGIRTrainer.training_step

    def interrupted(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == stop_at:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(UFGIRTrainer, "training_step", interrupted)
        run(path)
    assert caught.value.code == 130
    error = capsys.readouterr().err
    if stop_at == 1:
        assert "run_ufgir.py: interrupted. There is no complete checkpoint" in error
    else:
        assert f"`--resume_from_checkpoint true` to resume from {tmp_path / 'out' / 'checkpoint-2'}" in error
        run(path, "--resume_from_checkpoint", "true")
        assert Path(json.loads((tmp_path / "out" / "run.json").read_text())["resumed_from"]).name == "checkpoint-2"


@pytest.mark.parametrize(
    "part, training, words",
    [
        ("Options", True, "interrupted\n"),
        ("load_data", True, "interrupted\n"),
        ("evaluate", True, "interrupted. Run the same command with `--resume_from_checkpoint true` to resume from "),
        ("predict", False, "interrupted. Run the same command again to continue the predictions"),
    ],
)
def test_ctrl_c_elsewhere(leaves, tmp_path, capsys, monkeypatch, part, training, words):
    """While options are parsed, before and after the training, and without a training."""
    options = QUICK | {"save_strategy": "epoch", "do_train": training, "do_eval": True, "do_predict": True}
    path = recipe(tmp_path, leaves, tmp_path / "out", **options)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"run_ufgir.{part}", interrupted)
    with pytest.raises(SystemExit) as caught:
        run(path)
    assert caught.value.code == 130
    assert f"run_ufgir.py: {words}" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_loaded_is_named(leaves, tmp_path, capsys):
    words = mistake(capsys, "--model_name_or_path", "someone/leaves", "--dataset", str(leaves), "--do_predict")
    assert "`model_name_or_path`" in words and "someone/leaves" in words and "local folder" in words
