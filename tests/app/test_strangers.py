"""Models that visitors name: downloaded without a token, limited in size, and rejected with one sentence."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import httpx
from transformers import (
    ResNetConfig,
    ViTConfig,
    ViTForImageClassification,
)

from clca import CLCAViTConfig, CLCAViTForImageClassification
from tests.app.helpers import answer, save_checkpoint, save_processor
from tests.helpers import TINY
from ufgir.app import html as app_html
from ufgir.app import page as app
from ufgir.app import viewer as app_model
from ufgir.app.viewer import (
    Setting,
    Viewer,
    load_checkpoint,
)


def hub_of(folder, monkeypatch, **failures):
    """Simulate a Hub repository with the files of a folder; `failures` maps file stems, or `size`, to the error to raise."""

    def ask(file):
        if error := failures.get(Path(file).stem):
            raise error

    def download(name, file, **options):
        ask(file)
        if not Path(folder, file).is_file():
            raise answer(RemoteEntryNotFoundError, 404)
        return str(Path(folder, file))

    def metadata(url, token):
        ask("size")
        return SimpleNamespace(size=10**6)

    monkeypatch.setattr(app_model, "hf_hub_download", download)
    monkeypatch.setattr(app_model, "get_hf_file_metadata", metadata)


def test_models_of_strangers_are_fetched_without_a_token(tmp_path, checkpoint, monkeypatch):
    fetched = []

    def download(name, file, token=None, **options):
        fetched.append((file, token))
        if not Path(checkpoint, file).is_file():
            raise answer(RemoteEntryNotFoundError, 404)
        return str(Path(checkpoint, file))

    monkeypatch.setattr(app_model, "hf_hub_download", download)
    size = SimpleNamespace(size=10**6)
    monkeypatch.setattr(app_model, "get_hf_file_metadata", lambda url, token: fetched.append(("size", token)) or size)
    assert Viewer(folders=False).load("you/leaves").setting.method == "evit"
    files = ["config.json", "preprocessor_config.json", "processor_config.json", "size", "model.safetensors"]
    assert fetched == [(file, False) for file in files]
    size.size = 10**10
    with pytest.raises(ValueError, match=r"weights of you/leaves are too large .* 400 million"):
        load_checkpoint("you/leaves", trusted=False)
    assert fetched[-1][0] == "size"


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": 2**20},
        {"image_size": 8 * 65},
        {"head": "cla", "cla_multiplier": 10**8},
    ],
    ids=str,
)
def test_models_of_strangers_may_not_fill_the_machine(tmp_path, monkeypatch, changes):
    CLCAViTConfig(**TINY).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    monkeypatch.setattr(app_model, "hf_hub_download", lambda name, file, **options: str(tmp_path / file))
    monkeypatch.setattr(app_model, "get_hf_file_metadata", None)  # not even asked for
    with pytest.raises(
        ValueError, match=r"you/leaves (is too large for this page\. The limits are 100 layers|must be at most)"
    ):
        load_checkpoint("you/leaves", trusted=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_labels": 10**9},
        {"num_labels": 1e300},
        {"id2label": {str(i): "" for i in range(50_001)}},
        {"image_size": 20_000},
        {"image_size": [20_000, 20_000]},
        {"size": 20_000},
        {"size": {"height": 20_000, "width": 20_000}},
        {"size": 96, "crop_pct": 0.001},  # resized to 96,000 pixels a side before the crop
        {"size": 96, "crop_pct": [0.9, 0.0]},
        {"size": {"shortest_edge": 700}},  # of an image that is 20 times as long as wide
        {"image_processor": {"crop_size": {"height": 10**9, "width": 1}}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_sizes_that_a_file_states_are_checked_before_anything_is_made(checkpoint, tmp_path, monkeypatch, changes):
    """Creating a configuration with a billion classes would need gigabytes."""
    of_model = {"num_labels", "id2label", "image_size"} & set(changes)
    for file in Path(checkpoint).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / ("config.json" if of_model else "preprocessor_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    hub_of(tmp_path, monkeypatch)
    if of_model:
        monkeypatch.setattr(app_model, "load_config", None)
    monkeypatch.setattr(app_model, "load_image_processor", None)
    with pytest.raises(ValueError, match=r"you/leaves is too large .* 50,000 classes, 8 million pixels"):
        load_checkpoint("you/leaves", trusted=False)


@pytest.mark.parametrize("content", [b"[1]", b"{", b"[" * 10**5], ids=["list", "cut off", "deep"])
def test_configurations_of_strangers_are_json_objects(checkpoint, tmp_path, monkeypatch, content):
    (tmp_path / "config.json").write_bytes(content)
    hub_of(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"config\.json of you/leaves"):
        load_checkpoint("you/leaves", trusted=False)
    monkeypatch.setattr(app_model, "MOST_TEXT_BYTES", 0)
    with pytest.raises(ValueError, match=r"config\.json of you/leaves is too large"):
        load_checkpoint("you/leaves", trusted=False)


def test_strangers_do_not_learn_which_paths_exist(checkpoint, tmp_path, monkeypatch):
    """The message is the same for existing and missing relative paths."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there" / "is").mkdir(parents=True)

    def answer_to(name):
        with pytest.raises(ValueError) as caught:
            load_checkpoint(name, trusted=False)
        return re.sub(rf"(^|download |checkpoint ){re.escape(name)}", r"\1X", str(caught.value))

    for names in (("there", "nowhere"), ("there/is", "there/isnt"), ("there/is/more", "no/where/here")):
        assert answer_to(names[0]) == answer_to(names[1])
    monkeypatch.setattr(app_model, "hf_hub_download", lambda *a, **k: 1 / 0)
    for names in ((".", "./no"), ("/tmp", "/nowhere"), ("~", "~nobody"), ("../there", "../nowhere")):
        assert answer_to(names[0]) == answer_to(names[1])


@pytest.mark.parametrize("kind", [RepositoryNotFoundError, GatedRepoError, RemoteEntryNotFoundError])
def test_what_strangers_cannot_have(checkpoint, monkeypatch, kind):
    for name in ("you/no/thing", "no thing"):
        with pytest.raises(ValueError, match=rf"no public checkpoint {name} on the Hub"):
            load_checkpoint(name, trusted=False)
    hub_of(checkpoint, monkeypatch, config=answer(kind, 404))
    with pytest.raises(ValueError, match="no public checkpoint you/nothing on the Hub"):
        load_checkpoint("you/nothing", trusted=False)
    hub_of(checkpoint, monkeypatch, model=answer(RemoteEntryNotFoundError, 404))
    with pytest.raises(ValueError, match=r"you/pickled has no model\.safetensors, the only supported format"):
        load_checkpoint("you/pickled", trusted=False)


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("not in the cache"),
        answer(HfHubHTTPError, 503),
        httpx.ConnectError("refused"),
        httpx.ReadError("reset"),
        OfflineModeIsEnabled("offline"),
        TimeoutError("too slow"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_lost_connection_is_no_fault_of_the_model(checkpoint, monkeypatch, error):
    lost = "could not download you/leaves from the Hub: check the connection and try again."
    page = app._Page(app.import_gradio(), Viewer(folders=False), None, [])
    for place in ("config", "preprocessor_config", "processor_config", "size", "model"):
        hub_of(checkpoint, monkeypatch, **{place: error})
        with pytest.raises(ValueError, match=f"^{re.escape(lost)}$"):
            load_checkpoint("you/leaves", trusted=False)
    assert page._load("you/leaves", None)[:2] == [None, app_html.problem(lost)]
    hub_of(checkpoint, monkeypatch)
    assert page._load("you/leaves", None)[:2] == ["you/leaves", ""]


@pytest.mark.parametrize("place", ["config", "preprocessor_config", "processor_config", "model"])
def test_a_lost_connection_is_a_sentence_to_the_owner_too(checkpoint, monkeypatch, place):
    hub_of(checkpoint, monkeypatch, **{place: httpx.ReadError("reset")})
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", app_model.hf_hub_download)
    page = app._Page(app.import_gradio(), Viewer(), None, [])
    name, problem = page._load("you/leaves", None)[:2]
    assert name is None and "you/leaves" in problem


def test_a_full_disk_is_told(checkpoint, monkeypatch):
    hub_of(checkpoint, monkeypatch, model=OSError("No space left on device"))
    with pytest.raises(ValueError, match=r"^you/leaves cannot be loaded: No space left on device$"):
        load_checkpoint("you/leaves", trusted=False)


def test_what_was_fetched_before_needs_no_hub(tmp_path, monkeypatch):
    """Cached files, and files that are known to be missing, need no request."""
    repository, commit = tmp_path / "models--you--leaves", "0" * 40
    save_checkpoint(repository / "snapshots" / commit)
    for file, text in (("refs/main", commit), (f".no_exist/{commit}/processor_config.json", "")):
        (repository / file).parent.mkdir(parents=True)
        (repository / file).write_text(text)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert load_checkpoint("you/leaves", trusted=False).setting.method == "evit"
    (repository / ".no_exist" / commit / "processor_config.json").unlink()
    with pytest.raises(ValueError, match="could not download you/leaves"):
        load_checkpoint("you/leaves", trusted=False)


def test_a_stock_vit_can_be_reduced(tmp_path, leaf):
    own = {k: v for k, v in TINY.items() if k not in ("num_labels", "reduction_layers")}
    ViTForImageClassification(ViTConfig(**own)).save_pretrained(tmp_path)
    save_processor(tmp_path)
    found = load_checkpoint(str(tmp_path))
    assert found.setting == Setting(None, 1.0, False) and "topk" in found.methods and found.cache
    prediction = Viewer().predict(str(tmp_path), leaf, Setting("topk", 0.5, False))
    assert prediction.tokens[0] == 17 and prediction.tokens[-1] < 9


def test_bad_checkpoints_are_refused(tmp_path, checkpoint):
    def refused(name, text, **options):
        with pytest.raises(ValueError, match=text) as caught:
            load_checkpoint(str(name), **options)
        assert "\n" not in str(caught.value)

    refused("you/nothing", "there is no checkpoint you/nothing")
    refused("  ", "`MODEL` is empty")
    refused(tmp_path, "it has no config.json")
    refused(checkpoint, "looks like a folder of this machine", trusted=False)
    refused("/nowhere", "looks like a folder of this machine", trusted=False)
    ResNetConfig().save_pretrained(tmp_path / "resnet")
    refused(tmp_path / "resnet", "`model_type` 'resnet'")
    CLCAViTConfig(**TINY).save_pretrained(tmp_path / "bare")
    refused(tmp_path / "bare", "has no image processor")
    save_processor(tmp_path / "bare")
    refused(tmp_path / "bare", "the weights of .* cannot be loaded")
    model = CLCAViTForImageClassification(CLCAViTConfig(**TINY))
    model.vit.save_pretrained(tmp_path / "headless")
    save_processor(tmp_path / "headless")
    refused(tmp_path / "headless", "does not contain classifier.bias, classifier.weight")
