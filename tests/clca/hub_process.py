"""Two people who share models over a Hub. Run by test_push_to_hub.py in processes of their own, never imported.

`python hub_process.py publish FOLDER` has this package and pushes; `python -P hub_process.py visit FOLDER` lacks it and loads.
What each step found goes to `<role>.json`, logits to `<role>.safetensors` in FOLDER.
"""

import contextlib
import importlib
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


OWNER = "tester"
MODEL, TRAINED = f"{OWNER}/leaves", f"{OWNER}/trained-leaves"
RATES = (0.25, 0.5, 0.75)
MARK = '\nMARK = "of the branch"\n'
NAMES = {0: "wild", 1: "bred", 2: "crossed"}

role, folder = sys.argv[1], Path(sys.argv[2])
logits: dict[str, torch.Tensor] = {}
torch.set_num_threads(1)


def branch(rate: float) -> str:
    return f"keep-rate-{rate}"


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(load_file(folder / "pixels.safetensors")["pixels"]).logits


# The author.


def make_model(rate: float) -> torch.nn.Module:
    """Return a model whose weights also depend on the keep rate."""
    from tests.helpers import tiny_model

    clca = {"cross_layer_cache": True, "num_clr_tokens": 1, "head": "cla"}
    model = tiny_model(reduction="evit", keep_rate=rate, id2label=NAMES, **clca).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * rate)
    return model


def push_without_token() -> dict[str, object]:
    """Push without a token, before the repository exists."""
    try:
        make_model(0.5).push_to_hub(MODEL, token="hf_wrong")
    except Exception as error:
        return {"type": type(error).__name__, "message": str(error)}
    return {"type": "nothing"}


def push_model_processor_and_card() -> dict[str, object]:
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub import __version__ as hub_version

    from ufgir.checkpoints.model_card import write_model_card
    from ufgir.transforms.preprocessing import make_image_processor

    model = make_model(1.0)
    logits["main"] = logits_of(model)
    commit = model.push_to_hub(MODEL)
    make_image_processor(32).push_to_hub(MODEL)
    card = write_model_card(
        folder / "card",
        config=model.config,
        dataset_name="leaves",
        class_names=list(NAMES.values()),
        split_sizes={"train": 30, "test": 10},
        metrics={"test": {"top1": 0.5, "top5": 1.0, "macro_f1": 0.4}},
        settings={"learning_rate": 0.001},
        macs=10**9,
        dense_macs=2 * 10**9,
        num_parameters=model.num_parameters(),
        model_id=MODEL,
    )
    written = ModelCard.load(card)
    if int(hub_version.split(".")[0]) < 2:  # it asks huggingface.co, whatever HF_ENDPOINT says
        written.validate = lambda **options: None
    written.push_to_hub(MODEL)
    HfApi().create_tag(MODEL, tag="v1.0")
    return {"first": commit.oid, "sha": HfApi().model_info(MODEL).sha}


def push_keep_rates() -> dict[str, object]:
    """Push several keep rates of one model as branches. The code of the first one is marked there."""
    from huggingface_hub import HfApi

    for rate in RATES:
        model = make_model(rate)
        logits[branch(rate)] = logits_of(model)
        model.push_to_hub(MODEL, revision=branch(rate))
    code = Path(importlib.import_module("clca.modeling_clca").__file__).read_text(encoding="utf-8") + MARK
    HfApi().upload_file(
        path_or_fileobj=code.encode(), path_in_repo="modeling_clca.py", repo_id=MODEL, revision=branch(RATES[0])
    )
    refs = HfApi().list_repo_refs(MODEL)
    return {"branches": sorted(b.name for b in refs.branches), "tags": [t.name for t in refs.tags]}


def train_from_the_hub() -> dict[str, object]:
    """Train with the script from a branch of the model, and push the result."""
    import yaml

    import run_ufgir

    recipe = {
        "model_name_or_path": MODEL,
        "model_revision": branch(0.5),
        "dataset": "synthetic_leaves",
        "synthetic_num_classes": 3,
        "synthetic_images_per_class": [2, 1, 1],
        "synthetic_image_size": 40,
        "do_train": True,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 3,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "do_eval": True,
        "do_predict": True,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "hub_model_id": TRAINED,
        "output_dir": str(folder / "out"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    metrics = run_ufgir.main([str(path), "--push_to_hub"])
    from clca import CLCAViTForImageClassification

    logits["trained"] = logits_of(CLCAViTForImageClassification.from_pretrained(folder / "out"))
    return {"metrics": metrics}


# The visitor.


class NoPackage:
    """Hide the package if it is installed."""

    hidden = ("clca", "ufgir", "modeling_clca", "configuration_clca", "run_ufgir")

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in self.hidden:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)


def load(repository: str = MODEL, **options: object) -> torch.nn.Module:
    from transformers import AutoModelForImageClassification

    model, info = AutoModelForImageClassification.from_pretrained(
        repository, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model


def load_main() -> dict[str, object]:
    model = load()
    logits["main"] = logits_of(model)
    return {"module": type(model).__module__, "labels": list(model.config.id2label.values())}


def auto_classes() -> dict[str, object]:
    from transformers import AutoBackbone, AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(MODEL, trust_remote_code=True)
    backbone = AutoModel.from_pretrained(MODEL, trust_remote_code=True)
    dense = AutoBackbone.from_pretrained(MODEL, trust_remote_code=True, out_indices=[2])
    return {
        "config": type(config).__name__,
        "backbone": type(backbone).__name__,
        "dense": [type(dense).__name__, dense.out_features],
        "keep_rate": config.keep_rate,
    }


def refuse_unknown_code() -> dict[str, object]:
    """Reject the code of a model, as a user who does not trust it."""
    from transformers import AutoModelForImageClassification

    return error_of(lambda: AutoModelForImageClassification.from_pretrained(MODEL, trust_remote_code=False))


def classify() -> dict[str, object]:
    from transformers import pipeline

    classifier = pipeline("image-classification", model=MODEL, trust_remote_code=True)
    return {"predictions": classifier(str(folder / "image.png"), top_k=3)}


def load_revisions() -> dict[str, object]:
    """Load branches, a tag and a commit in one process."""
    published = json.loads((folder / "publish.json").read_text(encoding="utf-8"))
    revisions = [*map(branch, RATES), "v1.0", published["push_model_processor_and_card"]["first"]]
    found = {}
    for revision in revisions:
        model = load(revision=revision)
        logits[revision] = logits_of(model)
        mark = getattr(sys.modules[type(model).__module__], "MARK", None)
        found[revision] = {"keep_rate": model.config.keep_rate, "mark": mark}
    return found


def load_without_asking() -> dict[str, object]:
    """Load from the cache."""
    logits["cached"] = logits_of(load(local_files_only=True))
    return {}


def load_trained() -> dict[str, object]:
    from huggingface_hub import ModelCard
    from transformers import AutoImageProcessor, ViTImageProcessorPil

    logits["trained"] = logits_of(load(TRAINED))
    card = ModelCard.load(TRAINED)
    try:
        processor = AutoImageProcessor.from_pretrained(TRAINED)
    except ImportError:  # transformers below 5.18 wants torchvision for it
        processor = ViTImageProcessorPil.from_pretrained(TRAINED)
    return {
        "card": card.data.to_dict(),
        "text": card.text,
        "size": dict(processor.size),
    }


def error_of(call: Callable[[], object]) -> dict[str, object]:
    try:
        call()
    except Exception as error:
        return {"type": type(error).__name__, "message": str(error)}
    return {"type": "nothing", "message": ""}


def errors() -> dict[str, object]:
    return {
        "repository": error_of(lambda: load(f"{OWNER}/nothing")),
        "revision": error_of(lambda: load(revision="keep-rate-0.9")),
    }


def push_again() -> dict[str, object]:
    """Push without the package, including code. The branch then returns the new weights and an old commit the old
    ones."""
    model = load()
    with torch.no_grad():
        model.vit.layernorm.bias.add_(1.0)
        model.vit.embeddings.cls_token.add_(1.0)
    logits["pushed"] = logits_of(model)
    commit = model.push_to_hub(MODEL)
    logits["updated"] = logits_of(load())
    logits["branch_after"] = logits_of(load(revision=branch(0.5)))
    logits["tag_after"] = logits_of(load(revision="v1.0"))
    return {"commit": commit.oid}


def package_was_absent() -> dict[str, object]:
    return {"imported": sorted(name for name in sys.modules if name.partition(".")[0] in NoPackage.hidden)}


STEPS: dict[str, tuple[Callable[[], dict[str, object]], ...]] = {
    "publish": (push_without_token, push_model_processor_and_card, push_keep_rates, train_from_the_hub),
    "visit": (
        load_main,
        auto_classes,
        refuse_unknown_code,
        classify,
        load_revisions,
        load_without_asking,
        load_trained,
        errors,
        push_again,
        package_was_absent,
    ),
}

if role == "visit":
    sys.meta_path.insert(0, NoPackage())
results: dict[str, dict[str, object]] = {}
for step in STEPS[role]:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            results[step.__name__] = step()
    except BaseException:
        results[step.__name__] = {"error": traceback.format_exc()}
(folder / f"{role}.json").write_text(json.dumps(results), encoding="utf-8")
save_file({name: tensor.contiguous().clone() for name, tensor in logits.items()}, folder / f"{role}.safetensors")
