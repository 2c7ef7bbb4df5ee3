"""Configuration: which values it refuses and how it stores them."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, ViTConfig

from clca import CLCAViTConfig, CLCAViTForImageClassification, CLCAViTModel, __version__
from clca.configuration_clca import LARGEST
from tests.helpers import METHODS, build, images, tiny_config
from tests.limits import memory_limit


NAN = float("nan")
EVIT = {"reduction": "evit"}

# (changes to a valid tiny configuration of two stages and 16 patches, the argument that the error must name)
REFUSED: list[tuple[dict[str, Any], str]] = [
    # names of things
    ({"reduction": "evitt"}, "reduction"),
    ({"reduction": "EViT"}, "reduction"),
    ({"reduction": 3}, "reduction"),
    ({"head": "clca"}, "head"),
    ({"head": None}, "head"),
    ({"pooling": "max"}, "pooling"),
    # rates
    *[(EVIT | {"keep_rate": rate}, "keep_rate") for rate in (0, 0.0, -0.5, 1.0001, 5.0, NAN, math.inf, "0.5", True)],
    *[(EVIT | {"keep_rate": r}, "keep_rate") for r in ([0.5, 0.0], [0.5, 2.0], [0.5, "a"], [0.5, NAN], [], None)],
    ({"keep_rate": 5.0}, "keep_rate"),  # without a reduction, too
    # layers
    (EVIT | {"reduction_layers": [1, 5]}, "reduction_layers"),
    (EVIT | {"reduction_layers": [-1, 2]}, "reduction_layers"),
    (EVIT | {"reduction_layers": [1, 1]}, "reduction_layers"),
    (EVIT | {"reduction_layers": [2, 1]}, "reduction_layers"),
    (EVIT | {"reduction_layers": []}, "reduction_layers"),
    (EVIT | {"reduction_layers": [1.5]}, "reduction_layers"),
    (EVIT | {"reduction_layers": [True]}, "reduction_layers"),
    (EVIT | {"reduction_layers": ["1"]}, "reduction_layers"),
    (EVIT | {"reduction_layers": None}, "reduction_layers"),
    ({"cross_layer_cache": True, "reduction_layers": [7]}, "reduction_layers"),
    ({"head": "cla", "reduction_layers": [7]}, "reduction_layers"),
    ({"head": "ifa", "reduction_layers": [7]}, "reduction_layers"),
    # lengths
    (EVIT | {"keep_rate": [0.5, 0.5, 0.5]}, "keep_rate"),
    (EVIT | {"reduction_layers": [1, 2, 3], "keep_rate": [0.5, 0.5]}, "keep_rate"),
    (EVIT | {"keep_tokens": [8, 4, 2]}, "keep_tokens"),
    # counts
    *[(EVIT | {"keep_tokens": n}, "keep_tokens") for n in (0, -1, 17, [8, 0], [17, 4], [8, 4.0], 2.5, "8", True)],
    (EVIT | {"keep_tokens": []}, "keep_tokens"),
    (EVIT | {"keep_tokens": [8, 4], "keep_rate": 0.5}, "keep_tokens"),
    (EVIT | {"keep_tokens": [8, 4], "keep_rate": 0.5}, "keep_rate"),
    # options of a method
    ({"reduction_kwargs": {"score_by": "cls"}}, "reduction_kwargs"),
    (EVIT | {"reduction_kwargs": {"scores_by": "cls"}}, "scores_by"),
    (EVIT | {"reduction_kwargs": {"score_by": "luck"}}, "score_by"),
    (EVIT | {"reduction_kwargs": ["score_by"]}, "reduction_kwargs"),
    *[({"reduction": m, "reduction_kwargs": {"no_such_option": 1}}, "no_such_option") for m in METHODS if m],
    *[({"reduction": m, "reduction_kwargs": {"config": 1}}, "config") for m in METHODS if m],
    # cache
    ({"cross_layer_cache": True, "cache_gap": False}, "cross_layer_cache"),
    ({"cross_layer_cache": "yes"}, "cross_layer_cache"),
    # what needs CLS
    ({"use_class_token": False}, "pooling"),
    ({"use_class_token": False, "pooling": "mean", "num_clr_tokens": 1}, "num_clr_tokens"),
    ({"use_class_token": False, "pooling": "mean", "head": "cla"}, "head"),
    ({"use_class_token": False, "pooling": "mean", "head": "ifa"}, "head"),
    # sizes
    ({"image_size": 30}, "image_size"),
    ({"image_size": 4}, "image_size"),
    ({"image_size": [32, 30]}, "image_size"),
    ({"image_size": [30, 32]}, "image_size"),
    ({"image_size": [32, 32, 32]}, "image_size"),
    ({"image_size": []}, "image_size"),
    ({"image_size": 0}, "image_size"),
    ({"image_size": "32"}, "image_size"),
    ({"patch_size": 7}, "patch_size"),
    ({"patch_size": 0}, "patch_size"),
    ({"patch_size": [8, -8]}, "patch_size"),
    ({"hidden_size": 15}, "hidden_size"),
    ({"num_attention_heads": 3}, "num_attention_heads"),
    *[
        ({name: 0}, name)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels")
    ],
    *[({name: 0}, name) for name in ("cla_multiplier", "num_query_tokens")],
    *[({name: -1}, name) for name in ("num_clr_tokens", "num_register_tokens")],
    *[({name: 1.5}, name) for name in ("num_clr_tokens", "num_register_tokens", "cla_multiplier")],
    *[
        ({name: rate}, name)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")
        for rate in (-0.1, 1.0, NAN, "0.1")
    ],
    *[({name: value}, name) for name in ("initializer_range", "layerscale_value") for value in (0.0, -1.0, NAN)],
]
refused = pytest.mark.parametrize(
    ("changes", "name"),
    REFUSED,
    ids=[f"{i}-{name}-{c.get(name, '')}" for i, (c, name) in enumerate(REFUSED)],
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a saved tiny model."""
    folder = tmp_path_factory.mktemp("saved")
    build(tiny_config()).save_pretrained(folder)
    return folder


@refused
def test_refused_at_construction(changes: dict[str, Any], name: str) -> None:
    """A ValueError names the argument in back-ticks."""
    with pytest.raises(ValueError, match=f"`{name}`"):
        tiny_config(**changes)


@refused
def test_refused_when_a_model_is_built(changes: dict[str, Any], name: str) -> None:
    """An invalid value that is set later is refused at once, or when a model is built."""
    config = tiny_config()

    def set_and_build() -> None:
        for key, value in changes.items():
            setattr(config, key, value)
        CLCAViTForImageClassification(config)

    with pytest.raises(ValueError, match=f"`{name}`"):
        set_and_build()


@refused
def test_refused_as_an_override_of_a_saved_model(changes: dict[str, Any], name: str, saved: Path) -> None:
    """transformers does not check values passed to `from_pretrained`."""
    with pytest.raises(ValueError, match=f"`{name}`"):
        CLCAViTForImageClassification.from_pretrained(saved, **changes)


@pytest.mark.parametrize("name", LARGEST)
@pytest.mark.parametrize("size", [10**9, 1e9])
def test_sizes_in_a_file_cannot_fill_the_memory(name: str, size: float, saved: Path, tmp_path: Path) -> None:
    """Nothing is made of such a size: neither a name for each class nor a list of the layers."""
    contents = json.loads((saved / "config.json").read_text()) | {name: size, "id2label": None, "label2id": None}
    (tmp_path / "config.json").write_text(json.dumps(contents))
    for load in (CLCAViTConfig.from_pretrained, AutoConfig.from_pretrained):
        with memory_limit(2**30), pytest.raises(ValueError, match=f"`{name}` must be at most {LARGEST[name]}"):
            load(tmp_path, reduction_layers="all")
    with memory_limit(2**30), pytest.raises(ValueError, match=f"`{name}`"):
        CLCAViTConfig.from_pretrained(saved, **{name: size})
    with memory_limit(2**30), pytest.raises(ValueError, match=f"`{name}`"):
        CLCAViTConfig(**{name: size})


def test_changed_lists_are_checked_when_a_model_is_built() -> None:
    """A list that was changed in place, which no setter sees."""
    config = tiny_config(reduction="evit", keep_rate=[0.5, 0.5])
    config.keep_rate[1] = 5.0
    for model_class in (CLCAViTModel, CLCAViTForImageClassification):
        with pytest.raises(ValueError, match="`keep_rate`"):
            model_class(config)


def test_valid_overrides_of_a_saved_model_pass(saved: Path) -> None:
    model = CLCAViTForImageClassification.from_pretrained(
        saved, reduction="evit", keep_rate=0.5, reduction_layers=(2,)
    )
    assert model.config.keep_rate == [0.5]
    assert model.config.reduction_layers == [2]
    assert model(images()).token_counts == (17, 17, 17, 10, 10, 10)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("keep_rates", "keep_rate"), ("reduction_layer", "reduction_layers"), ("num_clr_token", "num_clr_tokens")],
)
def test_misspelt_arguments_are_refused_with_a_suggestion(wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match=f"`{wrong}`.*`{right}`"):
        tiny_config(**{wrong: 1})


def test_unknown_arguments_are_all_named() -> None:
    with pytest.raises(ValueError, match=r"`qqqq`.*`zzzz`"):
        tiny_config(zzzz=1, qqqq=2)


def test_a_misspelt_override_of_a_saved_model_is_refused(saved: Path) -> None:
    with pytest.raises(TypeError, match="keep_rates"):
        CLCAViTForImageClassification.from_pretrained(saved, keep_rates=0.5)


@pytest.mark.parametrize("key", ["auto_map", "name_or_path", "_name_or_path", "attn_implementation", "torch_dtype"])
def test_keys_of_transformers_pass_at_construction(key: str) -> None:
    """Checkpoints and Auto classes pass them."""
    value = {"auto_map": {}, "attn_implementation": "eager", "torch_dtype": "float32"}
    assert tiny_config(**{key: value.get(key, "x")}).hidden_size == 16


@pytest.mark.parametrize("key", ["top_k", "temperature", "prefix", "max_length", "pruned_heads", "use_cache"])
def test_what_only_old_files_hold_is_refused_in_a_call(key: str) -> None:
    """`top_k=8` is an easy mistake for `keep_tokens`. The fields of a stock configuration are accepted."""
    with pytest.raises(ValueError, match=f"no argument `{key}`"):
        tiny_config(**{key: 8})
    assert CLCAViTConfig(**ViTConfig(hidden_size=24, num_attention_heads=2).to_dict()).hidden_size == 24


@pytest.mark.parametrize(
    "override",
    [{"keep_rate": 0.25}, {"keep_tokens": [8, 4]}, {"keep_rate": [0.25, 0.5]}, {"reduction_layers": [2, 3]}],
)
def test_targets_of_other_keep_rates_do_not_stay(override: dict[str, Any], tmp_path: Path) -> None:
    """DynamicViT's targets are dropped when the keep rates they belong to change. Its other options are kept, and so
    are targets that are passed explicitly."""
    kwargs = {"ratio_targets": [0.8, 0.64], "ratio_weight": 3.0}
    tiny_config(reduction="dyvit", keep_rate=0.8, reduction_kwargs=kwargs).save_pretrained(tmp_path)
    assert CLCAViTConfig.from_pretrained(tmp_path).reduction_kwargs == kwargs
    assert CLCAViTConfig.from_pretrained(tmp_path, **override).reduction_kwargs == {"ratio_weight": 3.0}
    given = {"ratio_targets": [0.5, 0.25]}
    assert CLCAViTConfig.from_pretrained(tmp_path, reduction_kwargs=given, **override).reduction_kwargs == given


def own(config: CLCAViTConfig) -> dict[str, Any]:
    """Return `to_dict()` without the entries in which transformers records where a configuration and its code come
    from."""
    return {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "auto_map")}


def write_config(folder: Path, **changes: Any) -> None:
    tiny_config().save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_unknown_keys_of_a_file_are_dropped_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file of a newer version loads, with one warning about the unknown keys."""
    write_config(tmp_path, from_the_future=1, another_one={"a": 2})
    with caplog.at_level(logging.WARNING):
        config = CLCAViTConfig.from_pretrained(tmp_path)
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "from_the_future" in warnings[0]
    assert "another_one" in warnings[0]
    assert not hasattr(config, "from_the_future")
    assert own(config) == own(tiny_config())


@pytest.mark.parametrize("load", [CLCAViTConfig.from_pretrained, AutoConfig.from_pretrained])
def test_a_file_of_this_version_loads_in_silence(load: Any, saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = load(saved)
    assert type(config) is CLCAViTConfig
    assert not [r for r in caplog.records if r.name.startswith("clca")]


# The keys of google/vit-base-patch16-224's file and of others, written by transformers 4.
OLD_FILE = {
    "_name_or_path": "google/vit-base-patch16-224-in21k",
    "architectures": ["ViTForImageClassification"],
    "attention_probs_dropout_prob": 0.0,
    "encoder_stride": 16,
    "finetuning_task": "image-classification",
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 16,
    "id2label": {"0": "tench", "1": "goldfish"},
    "image_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 32,
    "label2id": {"tench": 0, "goldfish": 1},
    "layer_norm_eps": 1e-12,
    "model_type": "vit",
    "num_attention_heads": 2,
    "num_channels": 3,
    "num_hidden_layers": 2,
    "patch_size": 8,
    "problem_type": "single_label_classification",
    "qkv_bias": True,
    "torch_dtype": "float32",
    "transformers_version": "4.13.0",
    "_num_labels": 2,
    "use_cache": True,
    "is_decoder": False,
    "pruned_heads": {},
    "tie_word_embeddings": True,
    "torchscript": False,
    "chunk_size_feed_forward": 0,
    "top_k": 50,
}


def test_the_file_of_an_old_stock_vit_loads_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OLD_FILE))
    with caplog.at_level(logging.WARNING):
        config = CLCAViTConfig.from_pretrained(tmp_path, reduction="evit", keep_rate=0.5, reduction_layers=[1])
    assert not [r for r in caplog.records if r.name.startswith("clca")]
    assert config.id2label == {0: "tench", 1: "goldfish"}
    assert config.num_labels == 2
    assert config.problem_type == "single_label_classification"
    assert CLCAViTForImageClassification(config).config.reduction == "evit"


EVERYTHING = {
    "reduction": "evit",
    "reduction_layers": (1, 3),
    "keep_rate": (0.5, 1),
    "reduction_kwargs": {"score_by": "received"},
    "cross_layer_cache": True,
    "num_clr_tokens": 2,
    "cache_pool_cls": True,
    "head": "cla",
    "cla_multiplier": 3,
    "layerscale_value": 1e-5,
    "num_register_tokens": 1,
    "prefix_position_embeddings": False,
    "use_qk_norm": True,
    "use_swiglu_ffn": True,
    "drop_path_rate": 0.1,
    "image_size": (32, 48),
    "patch_size": (8, 16),
    "id2label": {0: "a", 1: "b", 2: "c"},
    "label2id": {"a": 0, "b": 1, "c": 2},
}


@pytest.mark.parametrize("changes", [{}, {"keep_tokens": (8, 4), "reduction": "topk"}, EVERYTHING], ids=str)
def test_a_round_trip_changes_nothing(changes: dict[str, Any], tmp_path: Path) -> None:
    """Saving and loading preserves `to_dict()`, with the class and with AutoConfig."""
    config = tiny_config(**changes)
    config.save_pretrained(tmp_path)
    assert own(CLCAViTConfig.from_pretrained(tmp_path)) == own(config)
    assert own(AutoConfig.from_pretrained(tmp_path)) == own(config)
    assert own(CLCAViTConfig.from_dict(config.to_dict())) == own(config)


def test_the_file_says_which_version_made_it(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["clca_version"] == __version__
    assert stored["model_type"] == "clca_vit"


@pytest.mark.parametrize(
    ("name", "given", "stored"),
    [
        ("keep_rate", 0.5, [0.5]),
        ("keep_rate", 1, [1]),
        ("keep_rate", (0.5, 0.25), [0.5, 0.25]),
        ("keep_rate", [1, 0.5], [1, 0.5]),
        ("keep_tokens", 4, [4]),
        ("keep_tokens", (8, 4), [8, 4]),
        ("reduction_layers", (1, 2), [1, 2]),
        ("image_size", (32, 48), [32, 48]),
        ("patch_size", (8, 4), [8, 4]),
    ],
)
def test_sequences_are_stored_as_lists(name: str, given: Any, stored: list[float]) -> None:
    value = getattr(tiny_config(reduction="topk", **{name: given}), name)
    assert value == stored
    assert type(value) is list


def test_lists_are_not_shared() -> None:
    """Neither with the caller nor between configurations."""
    layers = [1, 2]
    one, other = tiny_config(reduction_layers=layers), tiny_config(reduction_layers=layers)
    one.reduction_layers.append(3)
    assert layers == other.reduction_layers == [1, 2]
    CLCAViTConfig().reduction_layers.append(11)
    assert CLCAViTConfig().reduction_layers == [3, 6, 9]


def test_the_defaults_fit_a_shallow_network() -> None:
    """Default `reduction_layers` beyond the last layer are allowed if they are not used."""
    config = CLCAViTConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=32)
    assert config.reduction_layers == [3, 6, 9]
    assert not config.uses_reduction_layers
    assert len(CLCAViTForImageClassification(config).vit.layers) == 2


def test_the_defaults_are_a_vit() -> None:
    """The defaults are those of `ViTConfig`, without reduction and cache, and with a linear head on CLS."""
    ours, stock = CLCAViTConfig().to_dict(), ViTConfig().to_dict()
    differing = {key for key, value in stock.items() if ours[key] != value}
    assert differing == {"model_type"}
    assert (ours["reduction"], ours["cross_layer_cache"], ours["head"]) == (None, False, "linear")
    assert (ours["keep_rate"], ours["keep_tokens"], ours["pooling"]) == ([1.0], None, "cls")


@pytest.mark.parametrize("method", [m for m in METHODS if m])
def test_options_of_every_method_survive(method: str, tmp_path: Path) -> None:
    config = tiny_config(reduction=method, keep_rate=(0.75, 0.5))
    config.save_pretrained(tmp_path)
    assert own(CLCAViTConfig.from_pretrained(tmp_path)) == own(config)


def test_no_layerscale_written_as_zero(tmp_path: Path) -> None:
    """Files with options of the original may contain 0. In a call 0 is refused."""
    write_config(tmp_path, layerscale_value=0.0)
    assert CLCAViTConfig.from_pretrained(tmp_path).layerscale_value is None
