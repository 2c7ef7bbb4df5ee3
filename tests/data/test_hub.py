"""Load ids on the Hub, and fail quickly for wrong names. Nothing here uses the network."""

import datasets
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import httpx

from ufgir.data import synthetic_leaves as leaves
from ufgir.data.load import DatasetError, load_ufgir_dataset


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return leaves.synthetic_leaves(2, (2, 1, 1), image_size=16, cache_dir=tmp_path_factory.mktemp("cache"))


def test_hub_ids_go_to_load_dataset(monkeypatch, drawn):
    calls = []

    def load_dataset(name, config_name, **options):
        calls.append((name, config_name, options))
        return drawn

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_ufgir_dataset("someone/leaves", config_name="soy", revision="v1", cache_dir="cache")
    assert calls == [("someone/leaves", "soy", {"revision": "v1", "cache_dir": "cache", "streaming": False})]
    assert {name: split["label"] for name, split in loaded.items()} == {n: s["label"] for n, s in drawn.items()}


def test_neither_folder_nor_hub(tmp_path):
    with pytest.raises(DatasetError, match="'nobody/nowhere': there is no such folder"):
        load_ufgir_dataset("nobody/nowhere", cache_dir=tmp_path)


@pytest.mark.parametrize(
    "source", ["data/leafs", "./leaves", "data/leaves/train", "~nosuchuser/x", "leaves/", "a\\\\b"]
)
def test_paths_are_never_looked_up_on_the_hub(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a, **k: pytest.fail("the network was used"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("the network was used"))
    (tmp_path / "data" / "leaves").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"`name_or_path`: the folder .* does not exist") as error:
        load_ufgir_dataset(source)
    if source == "data/leafs":
        assert str(error.value).endswith("Did you mean data/leaves?")


def raise_error(kind):
    response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))

    def ask(*arguments, **options):
        assert options["timeout"] <= 10
        raise kind("no answer") if issubclass(kind, httpx.ConnectError) else kind("none", response=response)

    return ask


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (RepositoryNotFoundError, r"the Hub has no data set of this name.*\. Did you mean leaves"),
        (RevisionNotFoundError, "`revision`: the data set leafs on the Hub has no revision 'v9'"),
        (GatedRepoError, "the data set leafs on the Hub is gated. Accept its terms"),
        (httpx.ConnectError, "the Hub does not respond .ConnectError: no answer. and it is not in the cache"),
    ],
)
def test_a_single_request_to_the_hub(tmp_path, monkeypatch, kind, message):
    """`datasets` itself retries six times within 23 s."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "leaves").mkdir()
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", raise_error(kind))
    with pytest.raises(DatasetError, match=message):
        load_ufgir_dataset("leafs", revision="v9", cache_dir=tmp_path / "cache")
    assert datasets.config.HF_HUB_OFFLINE is False


def test_the_cache_is_used_if_the_hub_does_not_respond(tmp_path, monkeypatch, drawn):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", raise_error(httpx.ConnectError))

    def load_dataset(*arguments, **options):
        assert datasets.config.HF_HUB_OFFLINE  # no further request
        return drawn

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(load_ufgir_dataset("someone/leaves")) == ["train", "validation", "test"]


def test_errors_of_the_hub_are_reported(monkeypatch, drawn):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a, **k: None)

    def load_dataset(*arguments, **options):
        raise ValueError("BuilderConfig 'soy' not found")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DatasetError, match=r"loading 'someone/leaves' from the Hub failed .*BuilderConfig 'soy'"):
        load_ufgir_dataset("someone/leaves", config_name="soy")
