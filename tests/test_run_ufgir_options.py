"""run_ufgir.py with data and training options beyond the plain run: what each is for is seen in what is left behind."""

import csv
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from clca import CLCAViTConfig

from .test_run_ufgir import CLASSES, leaves, mistake, recipe, run, trained  # noqa: F401 (fixtures)


QUICK = {"num_train_epochs": 1, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}


def predictions(folder):
    with open(folder / "predictions.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_subset_of_the_classes_can_be_evaluated(trained, leaves, tmp_path):  # noqa: F811
    """The data hold two of the three classes that the model knows: the guesses may be any of the three."""
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


def test_unknown_classes_are_refused(trained, leaves, tmp_path, capsys):  # noqa: F811
    model, _ = trained
    data = shutil.copytree(leaves, tmp_path / "data")
    for split in ("train", "validation", "test"):
        (data / split / CLASSES[0]).rename(data / split / "violet")
    said = mistake(capsys, "--model_name_or_path", str(model), "--dataset", str(data), "--do_predict")
    assert "violet" in said


@pytest.mark.parametrize("loss", ["bce", "asymmetric"])
def test_several_classes_an_image(leaves, tmp_path, loss):  # noqa: F811
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


def test_shots_and_random_validation(leaves, tmp_path, capsys):  # noqa: F811
    data = tmp_path / "data"
    shutil.copytree(leaves / "train", data)
    path = recipe(tmp_path, data, tmp_path / "out", **QUICK, validation_split="random", shots=2)
    run(path)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["split_sizes"] == {"train": 6, "validation": 6}
    assert "`train_on_trainval`" in mistake(capsys, path, "--train_on_trainval", "true")


def test_one_model_for_several_keep_rates(leaves, tmp_path):  # noqa: F811
    """Its head keeps statistics of each rate, and it is evaluated at any by `keep_rate`."""
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


def test_everything_that_changes_training_at_once(leaves, tmp_path):  # noqa: F811
    """Groups, schedule, augmentation, EMA, gradients: they go together, and a second run is the same to the last bit."""
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
