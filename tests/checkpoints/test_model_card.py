"""README.md: metadata that the Hub can read, correct text, and code that runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from PIL import Image

import run_ufgir
from clca import CLCAViTConfig, CLCAViTForImageClassification
from ufgir.checkpoints.model_card import describe_model, write_model_card
from ufgir.transforms.preprocessing import make_image_processor
from ufgir.utils.arguments import RecipeParser
from ufgir.utils.files import write_text_atomically


METRICS = {
    "validation": {"top1": 0.75, "top5": 1.0, "macro_f1": 0.7, "loss": 3.0},
    "test": {"top1": 0.5, "top5": 0.9, "macro_f1": 0.4},
}


@pytest.fixture
def config() -> CLCAViTConfig:
    return CLCAViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        reduction="evit",
        reduction_layers=[1],
        keep_rate=0.5,
        cross_layer_cache=True,
        num_clr_tokens=1,
        head="cla",
        num_labels=3,
    )


def card(folder: Path, config: CLCAViTConfig, **changes) -> ModelCard:
    arguments = {
        "config": config,
        "dataset_name": "My Leaves: a {set}",
        "class_names": ["a: b", "c\"d'", "{e}"],
        "split_sizes": {"train": 1234, "validation": 20},
        "metrics": METRICS,
        "settings": {"learning_rate": 0.001, "keep_rate": [0.5], "dataset": "a: b"},
        "macs": 5_960_000_000,
        "dense_macs": 17_570_000_000,
        "num_parameters": 86_000_000,
    }
    path = write_model_card(folder, **(arguments | changes))
    assert path == Path(folder) / "README.md"
    return ModelCard.load(path)


def test_metadata_survives_a_round_trip(tmp_path, config):
    data = card(tmp_path, config, model_id="me/leaves", dataset_id="me/leaf-photos", base_model="google/vit").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("unknown", "transformers", "image-classification")
    assert (
        card(tmp_path / "scratch", config).data.license == "mit"
    )  # others' weights keep their terms, our own have ours
    assert data.datasets == ["me/leaf-photos"] and data.base_model == "google/vit" and "evit" in data.tags
    name, results = model_index_to_eval_results(data.to_dict()["model-index"])
    assert name == "leaves"
    found = {(r.dataset_split, r.metric_name): (r.metric_type, r.metric_value) for r in results}
    assert found == {
        ("validation", "top-1"): ("accuracy", 0.75),
        ("validation", "top-5"): ("accuracy", 1.0),
        ("validation", "macro-F1"): ("f1", 0.7),
        ("test", "top-1"): ("accuracy", 0.5),
        ("test", "top-5"): ("accuracy", 0.9),
        ("test", "macro-F1"): ("f1", 0.4),
    }


def test_required_metadata_is_there(tmp_path, config):
    """The metadata contains everything that the Hub needs for a fine-tuned image classifier, with the correct types."""
    path = tmp_path / "README.md"
    card(
        tmp_path,
        config,
        model_id="me/leaves",
        dataset_id="me/leaf-photos",
        base_model="google/vit",
        license="cc-by-4.0",
    )
    metadata = yaml.safe_load(path.read_text(encoding="utf-8").split("---\n")[1])
    index = metadata.pop("model-index")
    assert metadata == {
        "license": "cc-by-4.0",
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["clca", "token-reduction", "fine-grained", "vision", "evit"],
        "metrics": ["accuracy", "f1"],
        "datasets": ["me/leaf-photos"],
        "base_model": "google/vit",
        "base_model_relation": "finetune",
    }
    assert [model["name"] for model in index] == ["leaves"]
    for result in index[0]["results"]:
        assert result["task"] == {"type": "image-classification", "name": "Image Classification"}
        assert result["dataset"]["type"] == "me/leaf-photos" and result["dataset"]["name"] == "My Leaves: a {set}"
        assert all(type(metric["value"]) is float and 0 <= metric["value"] <= 1 for metric in result["metrics"])


@pytest.mark.parametrize(
    "dataset", [{}, {"dataset_id": "me/photos", "dataset_config": "big", "dataset_revision": "v2"}]
)
def test_round_trips_through_the_classes_of_the_hub(tmp_path, config, dataset):
    """Card -> results -> index -> results, and file -> ModelCardData -> file, byte for byte."""
    first = card(tmp_path / "first", config, model_id="me/leaves", base_model="google/vit", **dataset)
    name, results = model_index_to_eval_results(first.data.to_dict()["model-index"])
    assert len(results) == 6 and all(isinstance(result, EvalResult) for result in results)
    assert {result.dataset_revision for result in results} == {dataset.get("dataset_revision")}
    assert {result.dataset_config for result in results} == {dataset.get("dataset_config")}
    index = eval_results_to_model_index(name, results)
    assert index == first.data.to_dict()["model-index"]
    assert model_index_to_eval_results(index) == (name, results) == ("leaves", first.data.eval_results)

    metadata = {key: value for key, value in first.data.to_dict().items() if key != "model-index"}
    again = ModelCardData(**metadata, model_name=name, eval_results=results)
    assert again.to_dict() == first.data.to_dict() and again.to_yaml() == first.data.to_yaml()
    first.save(tmp_path / "again.md")
    assert (tmp_path / "again.md").read_bytes() == (tmp_path / "first" / "README.md").read_bytes()


def test_a_card_without_results_round_trips(tmp_path, config):
    """Without an evaluation, there is no model-index."""
    data = card(tmp_path, config, metrics={}).data
    assert "model-index" not in data.to_dict() and data.eval_results is None
    assert ModelCardData(**data.to_dict()).to_dict() == data.to_dict()


def test_numbers_that_are_none_are_left_out(tmp_path, config):
    """NaN is neither in the metadata nor in the table."""
    metrics = {"test": {"top1": 0.5, "top5": float("nan"), "macro_f1": float("inf")}}
    found = card(tmp_path, config, metrics=metrics)
    assert [(r.metric_name, r.metric_value) for r in found.data.eval_results] == [("top-1", 0.5)]
    assert "| test | 50.00 |\n" in found.text and "nan" not in found.text


def test_revision_is_in_the_code(tmp_path, config):
    """A model on a branch is loaded from this branch."""
    text = card(tmp_path, config, model_id="me/leaves", revision="keep-rate-0.25").text
    assert text.count('"me/leaves", revision="keep-rate-0.25"') == 3
    assert "revision" not in card(tmp_path, config, model_id="me/leaves").text


@pytest.mark.parametrize("name", ["/data/gone", "a b", "https://x.org/a.csv", "..", "one/two/three"])
def test_what_cannot_be_a_repository_is_not_named_as_one(tmp_path, config, name):
    """Base model and data set are in the metadata only if they can be repositories on the Hub."""
    data = card(tmp_path, config, base_model=name, dataset_id=name).data
    assert data.datasets is None and data.base_model is None and "base_model_relation" not in data.to_dict()


def test_local_things_are_not_claimed_to_be_on_the_hub(tmp_path, config):
    data = card(tmp_path, config, base_model=str(tmp_path)).data
    assert data.datasets is None and data.base_model is None


def test_text(tmp_path, config):
    text = card(tmp_path, config).text
    assert "| test | 50.00 | 90.00 | 40.00 |" in text
    assert "| GMACs per image | 5.960 | 17.570 |" in text and "33.9 %" in text
    assert "train 1,234, validation 20" in text and "3 classes" in text and "{e}" in text
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL).group(1))
    assert settings == {"learning_rate": 0.001, "keep_rate": [0.5], "dataset": "a: b"}
    assert "Not evaluated" in card(tmp_path, config, metrics={}).text


def test_a_cost_that_differs_by_image_is_told_as_such(tmp_path, config):
    text = card(tmp_path, config, macs=None).text
    assert "| GMACs per image | differs by image | 17.570 |" in text and "of the dense backbone's" not in text
    assert "86,000,000 parameters." in text


def test_description_says_what_the_model_is(config):
    text = describe_model(config)
    for part in ("3 layers", "`evit`", "keep rate 0.5", "mean", "1 learned token", "`cla`"):
        assert part in text
    assert "without token reduction" in describe_model(CLCAViTConfig())


def test_code_in_the_card_runs(tmp_path, config):
    """In a process without this package, the code is loaded from the saved folder."""
    model_dir = tmp_path / "model"
    CLCAViTForImageClassification(config).save_pretrained(model_dir)
    make_image_processor(16).save_pretrained(model_dir)
    Image.effect_noise((30, 20), 90).convert("RGB").save(tmp_path / "leaf.png")
    text = card(model_dir, config, image_processor=make_image_processor(16)).text
    load, without_trust = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = load + (
        "trusted = image_processor(image_processor.open_image('leaf.png'), return_tensors='pt').pixel_values\n"
        "answer = classify('leaf.png', top_k=2)\n"
        "assert len(answer) == 2 and 'clca' not in __import__('sys').modules, answer\n"
    )
    code += without_trust + (
        "pixels = image_processor(image, return_tensors='pt').pixel_values\n"
        "assert type(image_processor).__module__.startswith('transformers.')\n"
        "assert (pixels - trusted).abs().max() < 1e-5\n"
    )
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_text_atomically(tmp_path / "a.txt", "old\n")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError("disk")))
        with pytest.raises(OSError, match="disk"):
            write_text_atomically(path, "new")
    assert path.read_text() == "old\n" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(path, "\udc80")
    assert path.read_text() == "old\n" and list(tmp_path.iterdir()) == [path]
    write_text_atomically(path, "new é\n")
    assert path.read_bytes() == "new é\n".encode()


def test_the_card_recipe_can_be_run_again(tmp_path):
    """The settings are a recipe that parses to the same settings and contains no secrets."""
    parser = RecipeParser((run_ufgir.ModelArguments, run_ufgir.DataArguments, run_ufgir.TrainingArguments))
    old = tmp_path / "old.yaml"
    old.write_text(
        "keep_rate: 0.9\nlr_scheduler_kwargs: {min_lr: 1e-5}\nlr_scheduler_type: cosine_with_min_lr\nhead: null\n"
    )
    argv = (
        "--do_train --keep_rate 0.5 0.25 --cross_layer_cache --synthetic-images-per-class 4 2 2 --learning_rate=1e-3"
    )
    argv += " --optim sgd --no_dataloader_drop_last --hub_token secret --output_dir here"
    groups = parser.parse([str(old), *argv.split()])
    settings = parser.settings(*groups, leave_out=run_ufgir.LOCAL)
    assert settings == {
        "keep_rate": [0.5, 0.25],
        "lr_scheduler_kwargs": {"min_lr": 1e-5},
        "lr_scheduler_type": "cosine_with_min_lr",
        "do_train": True,
        "cross_layer_cache": True,
        "synthetic_images_per_class": [4, 2, 2],
        "learning_rate": 1e-3,
        "optim": "sgd",
        "dataloader_drop_last": False,
    }
    new = tmp_path / "new.yaml"
    new.write_text(yaml.safe_dump(settings))
    again = parser.parse([str(new)])
    assert parser.settings(*again) == dict(sorted(settings.items()))
