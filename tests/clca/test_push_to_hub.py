"""Sharing models over a Hub: push, load by name and revision, train from it, update. huggingface_hub's own client runs
in separate processes, against a local server.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from safetensors.torch import load_file, save_file

import clca
from tests.clca.hub_server import TOKEN, HubServer
from tests.helpers import images


ROOT = Path(__file__).parents[2]
CODE = {path.name for path in Path(clca.__file__).parent.glob("*.py")} - {"__init__.py"}
SAVED = {"config.json", "model.safetensors", "README.md", *CODE}
MODEL, TRAINED = "tester/leaves", "tester/trained-leaves"
RATES = (0.25, 0.5, 0.75)
NAMES = ["wild", "bred", "crossed"]


class Person(NamedTuple):
    """Results of one process, and its logits."""

    results: dict[str, dict[str, Any]]
    logits: dict[str, torch.Tensor]

    def step(self, name: str) -> dict[str, Any]:
        result = self.results[name]
        assert "error" not in result, result["error"]
        return result


class Hub(NamedTuple):
    """The server after all steps, and the results of both processes."""

    server: HubServer
    author: Person
    visitor: Person
    pushed: dict[str, set[str]]  # files of each revision before the visitor pushed, by its name


def run_process(role: str, folder: Path, url: str, *options: str, **environment: str) -> Person:
    """Run hub_process.py with a separate home folder, online only towards the local server."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k != "PYTHONPATH"}
    home = folder / f"home of {role}"
    home.mkdir()
    kept |= {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.run(
        [sys.executable, *options, str(Path(__file__).with_name("hub_process.py")), role, str(folder)],
        cwd=home,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    results = json.loads((folder / f"{role}.json").read_text(encoding="utf-8"))
    return Person(results, load_file(folder / f"{role}.safetensors"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Push as an author, then load and push again as a visitor without the package."""
    folder = tmp_path_factory.mktemp("hub")
    save_file({"pixels": images().float()}, folder / "pixels.safetensors")
    Image.effect_noise((40, 50), 90).convert("RGB").save(folder / "image.png")
    with HubServer() as server:
        author = run_process("publish", folder, server.url, PYTHONPATH=str(ROOT))
        pushed = {}
        if MODEL in server.repositories:
            pushed = {name: server.files(MODEL, name) for name in server.repositories[MODEL].branches}
        visitor = run_process("visit", folder, server.url, "-P")
        yield Hub(server, author, visitor, pushed)


def test_what_is_pushed(hub: Hub) -> None:
    """Model, image processor, card and code are pushed, and the server knows all requests."""
    hub.author.step("push_model_processor_and_card")
    assert hub.pushed["main"] == SAVED | {"preprocessor_config.json", ".gitattributes"}
    for name in CODE:
        assert hub.server.read(MODEL, name) == (Path(clca.__file__).parent / name).read_bytes()
    config = json.loads(hub.server.read(MODEL, "config.json"))
    assert {"AutoConfig", "AutoModel", "AutoModelForImageClassification"} <= set(config["auto_map"])
    assert hub.server.unknown == []


def test_load_by_name(hub: Hub) -> None:
    """Logits and class names are equal in a process without the package; no weight is missing, and the code comes from
    the Hub."""
    result = hub.visitor.step("load_main")
    assert result["module"].startswith("transformers_modules.tester.leaves.")
    assert result["labels"] == NAMES
    assert torch.equal(hub.visitor.logits["main"], hub.author.logits["main"])
    assert hub.visitor.step("package_was_absent")["imported"] == []


def test_auto_classes(hub: Hub) -> None:
    """Configuration and backbones also load by name."""
    expected = {
        "config": "CLCAViTConfig",
        "backbone": "CLCAViTModel",
        "dense": ["CLCAViTBackbone", ["stage2"]],
        "keep_rate": [1.0],
    }
    assert hub.visitor.step("auto_classes") == expected


def test_code_runs_only_where_it_is_trusted(hub: Hub) -> None:
    """Without `trust_remote_code` transformers raises an error that names the argument."""
    error = hub.visitor.step("refuse_unknown_code")
    assert error["type"] == "ValueError" and "trust_remote_code=True" in error["message"]


def test_pipeline(hub: Hub) -> None:
    """The image classification pipeline works by the repository's name, with its class names."""
    predictions = hub.visitor.step("classify")["predictions"]
    assert sorted(p["label"] for p in predictions) == sorted(NAMES)
    assert sum(p["score"] for p in predictions) == pytest.approx(1.0, abs=1e-5)


def test_keep_rates_as_revisions(hub: Hub) -> None:
    """One repository holds several keep rates: each branch has its own rate, weights and code. A tag and a commit
    load, too."""
    names = [f"keep-rate-{rate}" for rate in RATES]
    assert hub.author.step("push_keep_rates") == {"branches": [*names, "main"], "tags": ["v1.0"]}
    found = hub.visitor.step("load_revisions")
    for rate, name in zip(RATES, names, strict=True):
        assert hub.pushed[name] == hub.pushed["main"]
        assert found[name] == {"keep_rate": [rate], "mark": "of the branch" if rate == RATES[0] else None}
        assert torch.equal(hub.visitor.logits[name], hub.author.logits[name])
    first = hub.author.step("push_model_processor_and_card")["first"]
    for name in ("v1.0", first):
        assert found[name] == {"keep_rate": [1.0], "mark": None}
        assert torch.equal(hub.visitor.logits[name], hub.author.logits["main"])
    different = {tuple(hub.author.logits[name].flatten().tolist()) for name in [*names, "main"]}
    assert len(different) == len(RATES) + 1


def test_the_cache_is_enough(hub: Hub) -> None:
    """A model that was loaded once loads again without the Hub."""
    hub.visitor.step("load_without_asking")
    assert torch.equal(hub.visitor.logits["cached"], hub.visitor.logits["main"])


def test_card_survives_later_pushes(hub: Hub) -> None:
    """Pushing the model again, or to a branch, keeps the existing card."""
    hub.visitor.step("push_again")
    for revision in ("main", "keep-rate-0.25"):
        card = ModelCard(hub.server.read(MODEL, "README.md", revision).decode())
        assert card.data.library_name == "transformers" and "## How to load" in card.text
        name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
        assert name == "leaves" and {r.metric_name: r.metric_value for r in results}["top-1"] == 0.5


def test_the_script_trains_from_and_pushes_to_the_hub(hub: Hub) -> None:
    """`run_ufgir --push_to_hub` starts from a branch. The new repository holds model, processor, code and card, and
    loads."""
    metrics = hub.author.step("train_from_the_hub")["metrics"]
    assert hub.server.files(TRAINED) >= SAVED | {"preprocessor_config.json", "predictions.csv", "run.json"}
    result = hub.visitor.step("load_trained")
    assert torch.equal(hub.visitor.logits["trained"], hub.author.logits["trained"])
    assert not torch.equal(hub.author.logits["trained"], hub.author.logits["keep-rate-0.5"])
    assert result["size"] == json.loads(hub.server.read(MODEL, "preprocessor_config.json"))["size"]
    assert result["card"]["base_model"] == MODEL
    assert f'from_pretrained("{TRAINED}", trust_remote_code=True)' in result["text"]
    name, results = model_index_to_eval_results(result["card"]["model-index"])
    assert name == "trained-leaves"
    assert {(r.dataset_split, r.metric_name): r.metric_value for r in results} == {
        (split, shown): pytest.approx(metrics[split][key], abs=1e-6)
        for split in metrics
        for key, shown in (("top1", "top-1"), ("macro_f1", "macro-F1"))
    }


def test_pushing_again_updates(hub: Hub) -> None:
    """A visitor without the package pushes. The name then loads the new weights; branches and tags stay. Code is
    pushed as well."""
    result = hub.visitor.step("push_again")
    logits = hub.visitor.logits
    assert hub.server.repositories[MODEL].branches["main"] == result["commit"]
    assert torch.equal(logits["updated"], logits["pushed"]) and not torch.equal(logits["updated"], logits["main"])
    assert torch.equal(logits["branch_after"], logits["keep-rate-0.5"])
    assert torch.equal(logits["tag_after"], logits["main"])
    assert hub.server.files(MODEL) == hub.pushed["main"]


def test_unknown_names(hub: Hub) -> None:
    """transformers' own errors are raised, not a failure in our code."""
    errors = hub.visitor.step("errors")
    assert errors["repository"]["type"] == errors["revision"]["type"] == "OSError"
    assert "tester/nothing is not a local folder" in errors["repository"]["message"]
    assert "keep-rate-0.9 is not a valid git identifier" in errors["revision"]["message"]


def test_a_wrong_token_is_refused(hub: Hub) -> None:
    """An error names the cause, and no repository is created."""
    error = hub.author.step("push_without_token")
    assert "401" in error["message"], error
