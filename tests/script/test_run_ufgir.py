"""The script: recipes and flags, user errors, and all steps from images to a model that loads."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)

import run_ufgir
from clca import CLCAViTForImageClassification
from tests.script.helpers import CLASSES, MODEL, mistake, parse, recipe, run, weights
from ufgir.transforms.preprocessing import read_image_processor
from ufgir.utils.arguments import RecipeParser


# Recipes and flags


def test_the_command_line_wins_over_the_recipe(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("keep_rate: [0.5, 0.25]\nlearning_rate: 1e-3\nseed: 3\nhead: null\ncross_layer_cache: yes\n")
    model, _, training = parse(str(path), "--learning_rate", "5e-4", "--keep_rate", "0.7")
    assert training.learning_rate == 5e-4 and model.keep_rate == [0.7]
    assert training.seed == 3 and model.head is None and model.cross_layer_cache is True
    model, _, training = parse(str(path))
    assert training.learning_rate == 1e-3 and model.keep_rate == [0.5, 0.25]


@pytest.mark.parametrize(
    "write", [json.dumps, lambda recipe: "keep_rate: 1\nlr_scheduler_kwargs: {min_lr: 1e-5}\nreduction_kwargs: {a: 1}"]
)
def test_json_recipes_and_nested_values(tmp_path, write):
    """Plain YAML would read 1e-5 as text."""
    path = tmp_path / "a.json"
    path.write_text(write({"reduction_kwargs": {"a": 1}, "lr_scheduler_kwargs": {"min_lr": 1e-5}, "keep_rate": 1}))
    model, _, training = parse(str(path))
    assert json.loads(model.reduction_kwargs) == {"a": 1} and training.lr_scheduler_kwargs == {"min_lr": 1e-5}
    assert model.keep_rate == [1.0]


def test_unset_options_stay_none():
    model, data, _ = parse("--do_train")
    assert [name for name, value in vars(model).items() if value is not None] == ["ignore_mismatched_sizes"]
    assert data.resize_size is None


@pytest.mark.parametrize(
    "text, words",
    [
        ("learning_rat: 1e-3", ["`learning_rat`", "did you mean learning_rate?"]),
        ("keep_rates: [0.5]", ["`keep_rates`", "did you mean keep_rate?"]),
        ("zzzzzzzz: 1", ["`zzzzzzzz`"]),
        ("seed: many", ["--seed", "'many'"]),
        ("learning_rate: [1, 2]", ["`learning_rate`", "one value"]),
        ("keep_rate: [0.5, half]", ["--keep_rate", "'half'"]),
        ("keep_rate: {a: 1}", ["--keep_rate"]),
        ("do_train: perhaps", ["--do_train", "perhaps"]),
        ("image_size: 22.4", ["--image_size", "22.4"]),
        ("do_train: true\neval_strategy: sometimes", ["sometimes"]),
        ("seed: 1\nseed: 2", ["duplicate", "`seed`"]),
        ("- a\n- b", ["option: value"]),
        ("a: [", ["not a YAML or JSON file"]),
    ],
)
def test_bad_recipes(tmp_path, capsys, text, words):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    sentence = mistake(capsys, str(path), "--output_dir", str(tmp_path / "out"))
    assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--learning_rat", "1"], ["--learning_rat", "did you mean --learning_rate?"]),
        (["--learning-rat=1"], ["did you mean --learning_rate?"]),
        (["--learning", "1"], ["--learning"]),  # no abbreviations: a new option would change what they mean
        (["--keep_rate", "half"], ["--keep_rate", "'half'"]),
        (["missing.yaml"], ["missing.yaml"]),
        (["--do_train", "true", "extra"], ["'extra'"]),
        ([], ["do_train"]),
    ],
)
def test_bad_flags(capsys, argv, words):
    sentence = mistake(capsys, *argv)
    assert all(word in sentence for word in words), sentence


def test_help_says_something_about_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        run("--help")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    parser = RecipeParser(run_ufgir.GROUPS)
    for name, declared in parser.options.items():
        assert f"--{name}" in text and declared.metadata.get("help"), name
    assert "--no_" not in text and "--keep-rate" not in text


def test_recipes_in_the_repository_parse():
    files = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
    assert files
    for file in files:
        assert file.read_text().startswith(f"# python run_ufgir.py recipes/{file.name}"), file
        model, _, training = parse(str(file))
        assert training.do_train
        if model.model_name_or_path is None:
            run_ufgir.make_config(model)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"head": "linear"}, {"head": "linear", "reduction": "evit", "keep_rate": [0.5]}),
        ({"keep_tokens": [4]}, {"keep_tokens": [4], "keep_rate": [1.0]}),
        ({"reduction": "topk"}, {"reduction": "topk", "cross_layer_cache": True}),
        ({"reduction": "none"}, {"reduction": None, "keep_rate": [0.5]}),
        ({"cross_layer_cache": False, "num_clr_tokens": 0}, {"cross_layer_cache": False, "num_clr_tokens": 0}),
    ],
)
def test_options_change_a_checkpoint_and_leave_the_rest(trained, changes, expected):
    model = run_ufgir.ModelArguments(model_name_or_path=str(trained[0]), **changes)
    config = run_ufgir.make_config(model).to_dict()
    assert {name: config[name] for name in expected} == expected
    untouched = set(MODEL) - set(changes) - set(expected)
    saved = json.loads((trained[0] / "config.json").read_text())
    assert {name: config[name] for name in untouched} == {name: saved[name] for name in untouched}


# Mistakes: one sentence, status 2, and nothing written


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"image_size": 18}, ["`image_size`", "`patch_size`", "18"]),
        ({"reduction_layers": [1, 3]}, ["`reduction_layers`", "[1, 3]"]),
        ({"reduction_layers": [-1]}, ["`reduction_layers`", "-1"]),
        ({"keep_rate": 0.0}, ["`keep_rate`", "(0, 1]", "0.0"]),
        ({"keep_rate": 1.5}, ["`keep_rate`", "(0, 1]", "1.5"]),
        ({"keep_rate": [0.5, 0.5]}, ["`keep_rate`"]),
        ({"reduction": "evitt"}, ["`reduction`", "evitt"]),
        ({"reduction_kwargs": "[1]"}, ["`reduction_kwargs`", "JSON"]),
        ({"hidden_size": 15}, ["`hidden_size`"]),
        ({"resize_size": 8}, ["`resize_size`"]),
        ({"image_std": [1.0]}, ["`image_std`"]),
        ({"predictions_file": "a.txt"}, ["`predictions_file`"]),
        ({"max_train_samples": 0}, ["at least 1"]),
        ({"per_device_train_batch_size": 50}, ["`per_device_train_batch_size`", "50", "18"]),
        ({"resume_from_checkpoint": "true"}, ["`resume_from_checkpoint`"]),
        ({"resume_from_checkpoint": "/nowhere"}, ["`resume_from_checkpoint`", "/nowhere"]),
        ({"model_name_or_path": "/nowhere/at all"}, ["/nowhere/at all"]),
        ({"dataset": "/nowhere"}, ["/nowhere"]),
        ({"image_column": "photo"}, ["photo"]),
        ({"attn_implementation": "telepathy"}, ["telepathy"]),
        ({"dataset": "synthetic_leaves", "synthetic_difficulty": "absurd"}, ["`difficulty`", "absurd"]),
        ({"lr_scheduler_type": "zigzag"}, ["zigzag"]),
    ],
)
def test_mistakes_are_reported_before_anything_is_written(leaves, tmp_path, capsys, changes, words):
    out = tmp_path / "out"
    sentence = mistake(capsys, recipe(tmp_path, leaves, out, **changes))
    assert all(word in sentence for word in words), sentence
    assert not out.exists()


def test_configuration_mistakes_come_before_the_data_are_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ufgir.training.setup.load_ufgir_dataset", lambda *a, **k: pytest.fail("the data were loaded"))
    mistake(capsys, recipe(tmp_path, tmp_path, tmp_path / "out", keep_rate=2))


def test_empty_class(own_leaves, tmp_path, capsys):
    for file in (own_leaves / "train" / "green").iterdir():
        file.unlink()
    sentence = mistake(capsys, recipe(tmp_path, own_leaves, tmp_path / "out"))
    assert "green" in sentence and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"no picture", "truncated"])
def test_unreadable_image(own_leaves, tmp_path, capsys, content):
    file = own_leaves / "test" / "red" / "red1.png"
    file.write_bytes(file.read_bytes()[:60] if content == "truncated" else content)
    sentence = mistake(capsys, recipe(tmp_path, own_leaves, tmp_path / "out"))
    assert "red1.png" in sentence and not (tmp_path / "out").exists()


def test_labels_that_differ_between_splits(own_leaves, tmp_path, capsys):
    (own_leaves / "validation" / "green").rename(own_leaves / "validation" / "grean")
    sentence = mistake(capsys, recipe(tmp_path, own_leaves, tmp_path / "out"))
    assert "grean" in sentence and not (tmp_path / "out").exists()


def test_test_split_is_needed_to_predict(own_leaves, tmp_path, capsys):
    shutil.rmtree(own_leaves / "test")
    sentence = mistake(capsys, recipe(tmp_path, own_leaves, tmp_path / "out", do_predict=True))
    assert "no test images" in sentence and not (tmp_path / "out").exists()


def test_another_training_in_the_folder_is_not_mixed_with(trained, leaves, tmp_path, capsys):
    out = shutil.copytree(trained[0], tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    sentence = mistake(capsys, recipe(tmp_path, leaves, out))
    assert all(word in sentence for word in ("--resume_from_checkpoint", "--overwrite_output_dir")), sentence
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    run(recipe(tmp_path, leaves, out, num_train_epochs=1), "--overwrite_output_dir")
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-4"]


def test_resuming_a_finished_run_changes_nothing(leaves, tmp_path):
    """Trainer itself would make one more step. Results that were lost after the last step are written again."""
    out = tmp_path / "out"
    steps = {"max_steps": 2, "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    path = recipe(tmp_path, leaves, out, **steps)
    metrics, before = run(path), weights(out)
    (out / "model.safetensors").unlink()
    assert run(path, "--resume_from_checkpoint", "true") == metrics
    assert all(torch.equal(value, before[name]) for name, value in weights(out).items())


# The whole way


def test_train_evaluate_predict(trained, leaves):
    out, metrics = trained
    assert set(metrics) == {"validation", "test"}
    for name in (
        "model.safetensors",
        "config.json",
        "modeling_clca.py",
        "preprocessor_config.json",
        "README.md",
        "predictions.csv",
        "kept_patches.png",
        "trainer_state.json",
        "test_results.json",
    ):
        assert (out / name).is_file(), name
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {str(i): name for i, name in enumerate(CLASSES)}
    assert config["problem_type"] == "single_label_classification"
    assert config["reduction"] == "evit" and config["layer_norm_eps"] == 1e-6 and config["intermediate_size"] == 64
    assert "# out" in (out / "README.md").read_text() and "keep_rate" in (out / "README.md").read_text()


def test_predictions_file(trained, leaves):
    out, metrics = trained
    with (out / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["index"] for row in rows] == [str(i) for i in range(6)]
    right = 0
    for row in rows:
        assert Path(row["file"]).parent.name == row["label"] and Path(row["file"]).is_file()
        chances = [float(row[f"probability_{i}"]) for i in (1, 2, 3)]
        assert sum(chances) == pytest.approx(1, abs=1e-5) and chances == sorted(chances, reverse=True)
        assert sorted(row[f"class_{i}"] for i in (1, 2, 3)) == CLASSES and row["prediction"] == row["class_1"]
        right += row["label"] == row["prediction"]
    assert right / 6 == pytest.approx(metrics["test"]["top1"])


def test_saved_folder_classifies_in_a_pipeline_as_it_was_evaluated(trained):
    out, _ = trained
    classify = pipeline("image-classification", model=str(out), trust_remote_code=True)
    with (out / "predictions.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            answer = {guess["label"]: guess["score"] for guess in classify(row["file"], top_k=3)}
            assert answer[row["prediction"]] == pytest.approx(float(row["probability_1"]), abs=2e-6)
            assert set(answer) == set(CLASSES)


def test_a_saved_model_is_evaluated_and_predicts_the_same(trained, leaves, tmp_path):
    out, metrics = trained
    argv = ["--model_name_or_path", str(out), "--dataset", str(leaves), "--output_dir", str(tmp_path / "again")]
    again = run(
        *argv, "--do_eval", "--do_predict", "--predictions_file", "p.jsonl", "--use_cpu", "--num_pictures", "0"
    )
    assert again == metrics
    lines = [json.loads(line) for line in (tmp_path / "again" / "p.jsonl").read_text().splitlines()]
    with (out / "predictions.csv").open(newline="") as file:
        for line, row in zip(lines, csv.DictReader(file), strict=True):
            assert (line["index"], line["label"], line["prediction"]) == (
                int(row["index"]),
                row["label"],
                row["prediction"],
            )
            assert line["top"][0]["probability"] == pytest.approx(float(row["probability_1"]), abs=1e-5)
    assert not (tmp_path / "again" / "model.safetensors").exists()


def test_a_model_is_not_judged_on_other_classes(trained, own_leaves, tmp_path, capsys):
    for split in ("train", "validation", "test"):
        (own_leaves / split / "red").rename(own_leaves / split / "a red one")  # now the first of the classes
    argv = [
        "--model_name_or_path",
        str(trained[0]),
        "--dataset",
        str(own_leaves),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert "a red one" in mistake(capsys, *argv, "--do_eval")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_training_equals_uninterrupted_training(leaves, tmp_path, workers):
    """Interrupted in the middle of the second of three epochs; the order of images, crops, drop path and optimizer continue."""
    plan = {
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "save_total_limit": 20,
        "drop_path_rate": 0.2,
        "dataloader_num_workers": workers,
    }
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(recipe(tmp_path, leaves, whole, **plan))
    assert (whole / "checkpoint-6").is_dir()  # 4 steps an epoch: the middle of the second
    shutil.copytree(whole / "checkpoint-6", stopped / "checkpoint-6")
    run(recipe(tmp_path, leaves, stopped, **plan), "--resume_from_checkpoint", "true")
    expected, actual = weights(whole), weights(stopped)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert any(not torch.equal(expected[name], weights(whole / "checkpoint-6")[name]) for name in expected)


def test_metrics_of_the_steps_since_are_no_metrics_of_the_training(leaves, tmp_path):
    """A resumed training cannot compute its mean loss and speed, so they are not written."""
    out = tmp_path / "out"
    path = recipe(tmp_path, leaves, out, num_train_epochs=1, do_predict=True)
    run(path)
    stored = {"train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
    for name in ("train_results.json", "all_results.json"):
        assert set(json.loads((out / name).read_text())) >= {"epoch", *stored}
    run(path, "--resume_from_checkpoint", "true", "--num_train_epochs", "2")
    assert json.loads((out / "train_results.json").read_text()) == {"epoch": 2.0}
    everything = json.loads((out / "all_results.json").read_text())
    assert everything["epoch"] == 2.0 and "test_top1" in everything and not stored & set(everything)


def test_a_cost_that_differs_between_images_is_omitted(leaves, tmp_path, caplog):
    """For ATS without padding, it is missing in the log, the card and the record."""
    plan = {"reduction": "ats", "num_train_epochs": 1, "eval_strategy": "no", "save_strategy": "no"}
    plan |= {"load_best_model_at_end": False}
    for kwargs, differs in (("{}", True), ('{"pad_to_bound": true}', False)):
        out = tmp_path / str(differs)
        caplog.clear()
        run(recipe(tmp_path, leaves, out, reduction_kwargs=kwargs, **plan))
        said = [message for message in caplog.messages if "GMACs" in message]
        assert len(said) == 2 and all(("GMACs differ by image" in line) == differs for line in said)
        assert ("| differs by image |" in (out / "README.md").read_text()) == differs
        assert (json.loads((out / "run.json").read_text())["macs"] is None) == differs


def test_the_best_checkpoint_is_the_one_that_is_saved(trained):
    out, metrics = trained
    state = json.loads((out / "trainer_state.json").read_text())
    best = max(entry["eval_top1"] for entry in state["log_history"] if "eval_top1" in entry)
    assert state["best_metric"] == best == metrics["validation"]["top1"]
    saved = weights(out)
    assert all(torch.equal(saved[k], v) for k, v in weights(Path(state["best_model_checkpoint"])).items())


def test_stock_vit_is_fine_tuned_with_its_own_numbers(leaves, tmp_path):
    stock = tmp_path / "stock"
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=9,
    )
    model = ViTForImageClassification(config)
    model.save_pretrained(stock)
    transformers.ViTImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.4] * 3).save_pretrained(stock)
    out = tmp_path / "out"
    run(
        *["--model_name_or_path", str(stock), "--ignore_mismatched_sizes", "--dataset", str(leaves), "--do_train"],
        *[
            "--reduction",
            "topk",
            "--reduction_layers",
            "1",
            "--keep_rate",
            "0.5",
            "--output_dir",
            str(out),
            "--use_cpu",
        ],
        *["--max_steps", "1", "--warmup_steps", "1", "--learning_rate", "0", "--per_device_train_batch_size", "4"],
        "--disable_tqdm=true",
    )
    saved = CLCAViTForImageClassification.from_pretrained(out)
    assert saved.config.reduction == "topk" and saved.config.num_labels == 3 and saved.config.layer_norm_eps == 1e-12
    expected = model.vit.state_dict()
    actual = saved.vit.state_dict()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())  # at a learning rate of 0
    processor = read_image_processor(str(out))
    assert list(processor.image_mean) == [0.5] * 3
    assert processor.resize_size == (18, 18) and dict(processor.size) == {"height": 16, "width": 16}


def test_another_image_size_resamples_position_embeddings(trained, leaves, tmp_path):
    """Evaluated at twice the size on upscaled images, the model still uses the positions of patches correctly."""
    argv = ["--model_name_or_path", str(trained[0]), "--dataset", str(leaves), "--use_cpu", "--image_size", "32"]
    run(
        *argv,
        "--do_train",
        "--output_dir",
        str(tmp_path),
        "--max_steps",
        "1",
        "--warmup_steps",
        "1",
        "--per_device_train_batch_size",
        "4",
    )
    before, after = weights(trained[0]), weights(tmp_path)  # the first step's learning rate is 0
    name = "vit.embeddings.position_embeddings"
    old, new = (w[name][0, 1:].unflatten(0, (side, side)).permute(2, 0, 1) for w, side in ((before, 4), (after, 8)))
    torch.testing.assert_close(
        torch.nn.functional.interpolate(old[None], size=(8, 8), mode="bicubic", antialias=True)[0], new
    )
    assert torch.equal(before[name][:, :1], after[name][:, :1])
    assert all(
        torch.equal(before[k], after[k]) for k in before if k != name and "running" not in k and "num_batches" not in k
    )


def test_shapes_that_do_not_fit_name_the_way_out(trained, own_leaves, tmp_path, capsys):
    for split in ("train", "validation", "test"):
        shutil.rmtree(own_leaves / split / "red")
    argv = [
        "--model_name_or_path",
        str(trained[0]),
        "--dataset",
        str(own_leaves),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert "`ignore_mismatched_sizes`" in mistake(capsys, *argv, "--do_train", "--per_device_train_batch_size", "2")
    assert not (tmp_path / "out").exists()


def test_train_on_trainval_never_looks_at_test_while_training(leaves, tmp_path):
    out = tmp_path / "out"
    metrics = run(recipe(tmp_path, leaves, out, train_on_trainval=True, do_predict=True, num_train_epochs=1))
    assert set(metrics) == {"test"}
    history = json.loads((out / "trainer_state.json").read_text())
    assert history["max_steps"] == 27 // 4 and not any("eval_top1" in entry for entry in history["log_history"])


def test_evaluation_uses_every_image(trained, leaves, tmp_path):
    """9 validation images in batches of 4: `dataloader_drop_last` is for training only."""
    out, metrics = trained
    argv = ["--model_name_or_path", str(out), "--dataset", str(leaves), "--output_dir", str(tmp_path), "--use_cpu"]
    small = run(*argv, "--do_eval", "--per_device_eval_batch_size", "4")
    assert small["validation"]["top1"] == pytest.approx(metrics["validation"]["top1"])
    results = json.loads((tmp_path / "validation_results.json").read_text())
    assert results["validation_top1"] * 9 == pytest.approx(round(results["validation_top1"] * 9))


def test_push_uploads_our_card(trained, leaves, tmp_path, monkeypatch):
    uploads = []

    class Hub:
        def create_repo(self, name, **kwargs):
            return type("Repo", (), {"repo_id": f"me/{name}"})()

        def upload_folder(self, repo_id, folder_path, **kwargs):
            uploads.append(
                (repo_id, (Path(folder_path) / "README.md").read_text() if "End" in kwargs["commit_message"] else "")
            )

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    run(
        recipe(tmp_path, leaves, tmp_path / "out", num_train_epochs=1, hub_strategy="end"),
        "--push_to_hub",
        "--hub_model_id",
        "leaves",
    )
    repository, card = uploads[-1]
    assert repository == "me/leaves" and "## How to load" in card and "library_name: transformers" in card


def test_any_kind_of_source_is_trained(leaves, tmp_path, capsys):
    """A backbone of another family and size is resampled and gets a new head; it is not evaluated before training."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2}
    source, out = tmp_path / "dinov2", tmp_path / "out"
    names = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    classifier = Dinov2ForImageClassification(Dinov2Config(image_size=28, patch_size=7, **sizes, **names))
    classifier.save_pretrained(source)
    transformers.ViTImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.4] * 3).save_pretrained(source)
    argv = ["--model_name_or_path", str(source), "--dataset", str(leaves), "--image_size", "14", "--use_cpu"]
    argv += ["--reduction", "evit", "--reduction_layers", "1", "--keep_rate", "0.5", "--output_dir", str(out)]
    assert "classifier.weight" in mistake(capsys, *argv, "--do_eval")
    run(*argv, "--do_train", "--max_steps", "1", "--warmup_steps", "1", "--per_device_train_batch_size", "4")
    saved = CLCAViTForImageClassification.from_pretrained(out)
    assert (saved.config.image_size, saved.config.num_labels, saved.config.layerscale_value) == (14, 3, 1.0)
    queries = re.compile(
        r".*layer\.2\.attention\.(q_proj|attention\.query)\.weight"
    )  # below transformers 5.18 the latter
    (theirs,) = (weight for name, weight in classifier.state_dict().items() if queries.fullmatch(name))
    assert torch.equal(saved.vit.layers[2].attention.q_proj.weight, theirs)  # the first step's learning rate is 0
    assert list(read_image_processor(str(out)).image_mean) == [0.5] * 3
