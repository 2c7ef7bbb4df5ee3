"""Import paths of release 0.1.0: every module, and the names in its README, docs and model cards."""

import importlib
import sys
import warnings

import pytest

from ufgir._moved import MOVED


# In README.md, docs/ and notebooks of release 0.1.0, as `from ufgir.x import y` or `ufgir.x.y`.
NAMES = [
    "dataset_scripts.synthetic_leaves.write_image_folder",
    "ufgir.adapters.adapt",
    "ufgir.analysis.analyze",
    "ufgir.app.launch_page",
    "ufgir.app.make_page",
    "ufgir.app_model.Viewer",
    "ufgir.attention_maps.cls_attention_of_patches",
    "ufgir.checkpoints.load_original",
    "ufgir.checkpoints.load_original_file",
    "ufgir.checkpoints.load_timm",
    "ufgir.cli.main",
    "ufgir.data.load_images",
    "ufgir.data.load_ufgir_dataset",
    "ufgir.data.to_multi_hot",
    "ufgir.elastic.draw_keep_rate",
    "ufgir.feature_maps.feature_similarity",
    "ufgir.from_timm.load_timm",
    "ufgir.from_transformers.load_transformers",
    "ufgir.gradients.read_gradients",
    "ufgir.metrics.compute_multilabel_metrics",
    "ufgir.patterns.cluster_maps",
    "ufgir.profiling.count_macs",
    "ufgir.profiling.dense_config",
    "ufgir.quantization.quantize_model",
    "ufgir.saliency.compare_maps",
    "ufgir.similarity.BatchedCKA",
    "ufgir.streaming.StreamedImages",
    "ufgir.tracing.trace_patches",
    "ufgir.tracing.unmerge",
    "ufgir.training.UFGIRTrainer",
    "ufgir.transforms.EvalTransform",
    "ufgir.transforms.TransformedImages",
    "ufgir.transforms.make_image_processor",
    "ufgir.transforms.to_rgb",
    "ufgir.visualization.attention_columns",
    "ufgir.visualization.comparison",
    "ufgir.visualization.draw",
    "ufgir.visualization.kept_columns",
    "ufgir.visualization.kept_patches_image",
]


# Old modules whose name a package has today: it answers for their names.
PACKAGES = {"analysis", "app", "checkpoints", "cli", "data", "profiling", "training", "transforms", "visualization"}


def import_anew(name):
    """Import a module for the first time, and return it with the warnings."""
    sys.modules.pop(name, None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FutureWarning)
        module = importlib.import_module(name)
    return module, [str(warning.message) for warning in caught if str(warning.message).startswith(f"{name} ")]


@pytest.mark.parametrize("old", [old for old in MOVED if old.partition(".")[2] not in PACKAGES])
def test_old_modules_warn_once_and_have_the_names_of_the_new_ones(old):
    module, told = import_anew(old)
    new = importlib.import_module(MOVED[old].split()[0])
    assert told == [f"{old} has moved to {new.__name__}."]
    public = [name for name, value in vars(new).items() if getattr(value, "__module__", None) == new.__name__]
    assert all(getattr(module, name) is vars(new)[name] for name in public)


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_packages_answer_for_the_names_of_old_modules(package):
    package = importlib.import_module(f"ufgir.{package}")
    for place in MOVED[package.__name__].split():
        new = importlib.import_module(place)
        public = [name for name, value in vars(new).items() if getattr(value, "__module__", None) == new.__name__]
        public = [name for name in public if name not in vars(package)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            assert all(getattr(package, name) is vars(new)[name] for name in public)


@pytest.mark.parametrize("path", NAMES)
def test_old_names_can_be_imported(path):
    module, _, name = path.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        found = getattr(importlib.import_module(module), name)
    assert found.__name__ == name
    assert found.__module__.startswith(("ufgir.", "clca."))


def test_a_name_that_never_was_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        importlib.import_module("ufgir.data").nothing_of_the_kind  # noqa: B018
