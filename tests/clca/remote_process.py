"""A clean process that uses saved models as anybody would who lacks this package. Run by test_remote_code.py, never imported.

`python -P remote_process.py FOLDER REPOSITORY`: FOLDER holds the models `one` and `two`, `pixels.safetensors` and
`image.png`; what each step found goes to `results.json` and `logits.safetensors` there.
"""

import importlib.util
import json
import sys
import traceback
from pathlib import Path
from unittest import mock


class NoPackage:
    """Hide the package if it is installed."""

    hidden = ("clca", "ufgir", "modeling_clca", "configuration_clca")

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in self.hidden:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)


blocker = NoPackage()
sys.meta_path.insert(0, blocker)

import torch  # noqa: E402
from huggingface_hub import HfApi  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    pipeline,
)


folder, repository = Path(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
pixels = load_file(folder / "pixels.safetensors")["pixels"]
logits: dict[str, torch.Tensor] = {}
loaded: dict[str, torch.nn.Module] = {}


def load(name: str) -> torch.nn.Module:
    model, info = AutoModelForImageClassification.from_pretrained(
        folder / name, trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    loaded[name] = model
    with torch.no_grad():
        logits[name] = model.eval()(pixels).logits
    return model


def module_of(model: torch.nn.Module) -> object:
    return sys.modules[type(model).__module__]


def load_first() -> dict[str, object]:
    model = load("one")
    return {"module": type(model).__module__, "labels": list(model.config.id2label.values())}


def auto_classes() -> dict[str, object]:
    config = AutoConfig.from_pretrained(folder / "one", trust_remote_code=True)
    fresh = AutoModelForImageClassification.from_config(config, trust_remote_code=True)
    return {
        "config": type(config).__name__,
        "fresh": type(fresh).__name__,
        "keep_rate": config.keep_rate,
    }


def load_backbone() -> dict[str, object]:
    backbone = AutoModel.from_pretrained(folder / "one", trust_remote_code=True).eval()
    with torch.no_grad():
        logits["backbone"] = backbone(pixels).last_hidden_state
    return {"class": type(backbone).__name__}


def load_feature_maps() -> dict[str, object]:
    """Load a backbone with feature maps from a saved classifier by AutoBackbone.

    AutoBackbone asks the Hub about its argument, even about a local folder, which the Hub refuses. Here the request
    succeeds."""
    with mock.patch.object(HfApi, "repo_exists", return_value=True):
        backbone = AutoBackbone.from_pretrained(folder / "one", trust_remote_code=True, out_indices=[2, 5]).eval()
    with torch.no_grad():
        logits["maps"] = torch.stack(backbone(pixels).feature_maps)
    backbone.save_pretrained(folder / "backbone")
    config = AutoConfig.from_pretrained(folder / "backbone", trust_remote_code=True)
    again = AutoBackbone.from_config(config, trust_remote_code=True)
    return {"class": type(backbone).__name__, "again": type(again).__name__, "out_features": again.out_features}


def load_second() -> dict[str, object]:
    """Load a model with different code in the same process."""
    second = load("two")
    first = loaded["one"]
    with torch.no_grad():
        logits["one_again"] = first(pixels).logits
    return {"marks": [getattr(module_of(model), "MARK", None) for model in (first, second)]}


def save_again() -> dict[str, object]:
    """Save a remotely loaded model with its code, twice in a row."""
    loaded["one"].save_pretrained(folder / "three")
    load("three").save_pretrained(folder / "four")
    model = load("four")
    return {"module": type(model).__module__, "files": sorted(p.name for p in (folder / "four").iterdir())}


def overrides() -> dict[str, object]:
    def load_with(**options: object) -> torch.nn.Module:
        return AutoModelForImageClassification.from_pretrained(folder / "one", trust_remote_code=True, **options)

    model = load_with(keep_rate=1.0, reduction=None)
    try:
        load_with(keep_rate=5.0)
    except ValueError as error:
        return {"refused": str(error), "counts": list(model(pixels).token_counts)}
    return {"refused": "nothing"}


def other_size() -> dict[str, object]:
    """At another image size, the code saved with the model resamples the position embeddings."""
    model, info = AutoModelForImageClassification.from_pretrained(
        folder / "one", trust_remote_code=True, image_size=48, output_loading_info=True
    )
    logits["positions"] = model.vit.embeddings.position_embeddings.detach()
    backbone = AutoModel.from_pretrained(folder / "one", trust_remote_code=True, image_size=48)
    logits["positions_of_backbone"] = backbone.embeddings.position_embeddings.detach()
    return {"info": {name: sorted(keys) for name, keys in info.items()}, "module": type(model).__module__}


def classify() -> dict[str, object]:
    classifier = pipeline("image-classification", model=str(folder / "one"), trust_remote_code=True)
    return {"predictions": classifier(str(folder / "image.png"), top_k=2)}


def package_was_absent() -> dict[str, object]:
    return {"imported": sorted(name for name in sys.modules if name.partition(".")[0] in NoPackage.hidden)}


def import_package() -> dict[str, object]:
    """Import the package after all. Its own class then loads the same folder."""
    sys.meta_path.remove(blocker)
    sys.path.insert(0, repository)
    import clca

    model = clca.CLCAViTForImageClassification.from_pretrained(folder / "one").eval()
    with torch.no_grad():
        logits["package"] = model(pixels).logits
    still_there = load("two")
    resized = AutoModelForImageClassification.from_pretrained(folder / "one", trust_remote_code=True, image_size=48)
    logits["positions_again"] = resized.vit.embeddings.position_embeddings.detach()
    return {"module": type(model).__module__, "second": type(still_there).__module__}


results: dict[str, dict[str, object]] = {}
assert importlib.util.find_spec("torch") is not None
for step in (
    load_first,
    auto_classes,
    load_backbone,
    load_feature_maps,
    load_second,
    save_again,
    overrides,
    other_size,
    classify,
    package_was_absent,
    import_package,
):
    try:
        results[step.__name__] = step()
    except Exception:
        results[step.__name__] = {"error": traceback.format_exc()}
(folder / "results.json").write_text(json.dumps(results))
save_file({name: tensor.contiguous() for name, tensor in logits.items()}, folder / "logits.safetensors")
