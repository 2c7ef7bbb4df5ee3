"""Write the README.md of a saved model: metadata for the Hub, and how to judge and load the model."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..transforms.preprocessing import sizes_of
from ..utils.files import write_text_atomically
from ..utils.metric_names import METRIC_NAMES, measured


SHOWN_CLASSES = 20


def on_the_hub(name: str | None) -> str | None:
    """Return `name` if it can be a repository on the Hub; None for a local path, which must not be in the metadata."""
    try:
        if not name or Path(name).exists():
            return None
        validate_repo_id(name)
    except (HFValidationError, OSError):
        return None
    return name


def describe_model(config: Any) -> str:
    """Return a paragraph about the network, from its configuration."""
    size = f"{config.num_hidden_layers} layers, width {config.hidden_size}, {config.num_attention_heads} heads"
    text = [f"A Vision Transformer ({size}; {config.image_size} px images in patches of {config.patch_size} px)"]
    if config.reduction is None:
        text.append(" without token reduction.")
    else:
        layers = ", ".join(map(str, config.reduction_layers))
        text.append(
            f". The method `{config.reduction}` reduces the tokens in layers {layers}, counted from 0, {_kept(config)}."
        )
    if config.cross_layer_cache:
        parts = ["the mean of all tokens"] if config.cache_gap else []
        if config.num_clr_tokens:
            parts.append(f"{config.num_clr_tokens} learned token{'s' * (config.num_clr_tokens > 1)}")
        text.append(
            f" A cross-layer cache stores {' and '.join(parts)} of every layer and adds them again after each reduction."
        )
    if config.head == "cla":
        text.append(" The head, `cla`, classifies the CLS tokens of several layers together.")
    elif config.head != "linear":
        text.append(f" The head is `{config.head}`.")
    return "".join(text)


def _kept(config: Any) -> str:
    """Return how many tokens each stage keeps, such as "with keep rate 0.5"."""
    if config.keep_tokens is not None:
        return f"to {', '.join(map(str, config.keep_tokens))} tokens"
    rates = ", ".join(map(str, config.keep_rate))
    return f"with keep rate{'s' * (len(config.keep_rate) > 1)} {rates}"


def describe_preprocessing(image_processor: Any, name: str, revision: str | None = None) -> str:
    """Return a section about the preprocessing, and how to do the same without running the code of the model's folder.

    Args:
        image_processor: the `CLCAImageProcessor` that is saved with the model.
        name: folder or Hub repository, as in the code of the card.
        revision: branch, tag or commit of the repository, if it is not main.
    """
    before, after = sizes_of(image_processor)
    arguments: dict[str, Any] = {}
    if before is None:  # given by its shortest edge
        share = image_processor.crop_pct or 1
        edge = round(image_processor.size["shortest_edge"] / share)
        steps = f"resized to a shortest edge of {edge} pixels"
        arguments["size"] = {"shortest_edge": edge}
    else:
        steps = f"resized to {before[0]} x {before[1]} pixels without keeping its aspect ratio"
        arguments["size"] = dict(zip(("height", "width"), before, strict=True))
    if before != after and after is not None:
        steps += f", and center-cropped to {after[0]} x {after[1]} pixels"
        arguments |= {"crop_size": dict(zip(("height", "width"), after, strict=True)), "do_center_crop": True}
    return _PREPROCESSING.format(
        steps=steps,
        name=name,
        revision=f', revision="{revision}"' if revision else "",
        arguments="".join(f",\n    {key}={value}" for key, value in arguments.items()),
    )


def write_model_card(
    output_dir: str | os.PathLike,
    *,
    config: Any,
    dataset_name: str,
    class_names: Sequence[str],
    split_sizes: Mapping[str, int],
    metrics: Mapping[str, Mapping[str, float]],
    settings: Mapping[str, Any],
    macs: int | None,
    dense_macs: int,
    num_parameters: int,
    model_id: str | None = None,
    base_model: str | None = None,
    dataset_id: str | None = None,
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    image_processor: Any = None,
) -> Path:
    """Write README.md to `output_dir` atomically, and return its path.

    Args:
        output_dir: folder of the saved model.
        config: the model's `CLCAViTConfig`.
        dataset_name: readable name of the data set.
        class_names: names of the classes, by index.
        split_sizes: split name -> number of images.
        metrics: split name -> metrics of `METRIC_NAMES`, fractions in [0, 1]; other entries and non-finite numbers are ignored.
        settings: all settings that differ from the script's defaults, written as a recipe.
        macs: multiply-adds of one image; None if they depend on the image.
        dense_macs: multiply-adds of this backbone without reduction, cache and aggregation head.
        num_parameters: parameters of the model.
        model_id: repository on the Hub; by default the card shows the folder's path.
        base_model: checkpoint that training started from: a Hub repository or a folder.
        dataset_id: the data set's repository on the Hub, if any.
        dataset_config: its configuration, if it has several.
        dataset_revision: its branch, tag or commit.
        revision: branch, tag or commit of `model_id` with this model, if it is not main.
        license: Hub abbreviation of the license of the weights. By default MIT, as this code, for a model trained from scratch,
            and `unknown` for a model that started from other weights, whose license applies.
        image_processor: the `CLCAImageProcessor` that is saved with the model, if any.
    """
    output_dir = Path(output_dir)
    name = model_id or str(output_dir)
    title = name.rstrip("/").split("/")[-1]
    base_id, dataset_id = on_the_hub(base_model), on_the_hub(dataset_id)
    metrics = {
        split: {key: float(values[key]) for key in METRIC_NAMES if key in values and math.isfinite(values[key])}
        for split, values in metrics.items()
    }
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=dataset_id or dataset_name,
            dataset_name=dataset_name,
            dataset_config=dataset_config,
            dataset_split=split,
            dataset_revision=dataset_revision,
            metric_type=METRIC_NAMES[key][0],
            metric_name=METRIC_NAMES[key][1],
            metric_value=round(value, 6),
        )
        for split, values in metrics.items()
        for key, value in values.items()
    ]
    tags = ["clca", "token-reduction", "fine-grained", "vision"]
    data = ModelCardData(
        license=license or ("mit" if base_model is None else "unknown"),
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=tags + ([config.reduction] if config.reduction else []),
        datasets=[dataset_id] if dataset_id else None,
        metrics=list(dict.fromkeys(METRIC_NAMES[key][0] for values in metrics.values() for key in values)) or None,
        base_model=base_id,
        model_name=title,
        eval_results=results or None,
        **({"base_model_relation": "finetune"} if base_id else {}),
    )
    body = _BODY.format(
        title=title,
        model=describe_model(config),
        base=f" Training started from `{base_model}`." if base_model else "",
        parameters=f"{num_parameters:,}",
        macs="differs by image" if macs is None else f"{macs / 1e9:.3f}",
        dense_macs=dense_macs / 1e9,
        share=_SHARE_UNKNOWN
        if macs is None
        else f"Multiply-adds, {100 * macs / dense_macs:.1f} % of the dense backbone's.",
        dataset=f"[{dataset_id}](https://huggingface.co/datasets/{dataset_id})" if dataset_id else f"`{dataset_name}`",
        splits=", ".join(f"{split} {size:,}" for split, size in split_sizes.items()),
        num_classes=len(class_names),
        classes=", ".join(class_names[:SHOWN_CLASSES]) + (", ..." if len(class_names) > SHOWN_CLASSES else ""),
        recipe=yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True).strip(),
        metrics=_metrics_table(metrics),
        name=name,
        revision=f', revision="{revision}"' if revision else "",
        preprocessing=describe_preprocessing(image_processor, name, revision) if image_processor is not None else "",
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}", ignore_metadata_errors=False)
    return write_text_atomically(output_dir / "README.md", str(card))


def _metrics_table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Format split x metric as a Markdown table, in percent, with only the measured metrics."""
    shown = measured(metrics.values())
    if not shown:
        return "Not evaluated."
    lines = [
        f"| split | {' | '.join(f'{METRIC_NAMES[key][1]} %' for key in shown)} |",
        "| --- " + "| ---: " * len(shown) + "|",
    ]
    for split, values in metrics.items():
        cells = [f"{100 * values[key]:.2f}" if key in values else "" for key in shown]
        lines.append(f"| {split} | {' | '.join(cells)} |")
    return "\n".join(lines)


_SHARE_UNKNOWN = "The number of kept tokens depends on the image, so the multiply-adds cannot be computed in advance."

_BODY = """# {title}

{model}{base}
It was made with CLCA, cross-layer cache aggregation for token reduction in ultra-fine-grained image recognition
([paper](https://huggingface.co/papers/2501.00243)).

## Data

{dataset}: {splits} images, {num_classes} classes ({classes}).

## Recipe

Options that differ from the defaults of `run_ufgir.py`:

```yaml
{recipe}
```

## Metrics

{metrics}

Macro-F1 is the unweighted mean of the F1 of all classes.

## Cost

| | this model | same backbone, dense |
| --- | ---: | ---: |
| GMACs per image | {macs} | {dense_macs:.3f} |

{share} {parameters} parameters.

## How to load

The repository contains the code of the model, which requires `trust_remote_code=True`.

```python
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

model = AutoModelForImageClassification.from_pretrained("{name}"{revision}, trust_remote_code=True)
image_processor = AutoImageProcessor.from_pretrained("{name}"{revision}, trust_remote_code=True)

classify = pipeline("image-classification", model="{name}"{revision}, trust_remote_code=True)
# classify("leaf.png", top_k=5) -> [{{"label": ..., "score": ...}}, ...]
```
{preprocessing}"""

_PREPROCESSING = """
## Preprocessing

An image is rotated according to its EXIF orientation, its transparent parts become white, and it is scaled to 8 bits per channel,
{steps}. With `trust_remote_code=True`, `image_processor` does all of this, as in training. A pipeline converts an image
before it calls `image_processor`, which drops an alpha channel and clips 16-bit values: open such images with
`classify(image_processor.open_image("leaf.png"))`. With transformers 5.10 to 5.17 `AutoImageProcessor` needs torchvision;
where it is not installed, use `classify.image_processor`.

Without `trust_remote_code=True`, transformers loads its own `ViTImageProcessor`, which resizes to the input size without the
crop and ignores the EXIF orientation. The demo model of CLCA then classifies 91.5 % of its 200 test images correctly instead of
97.5 %. Two lines correct this, except for 16-bit images:

```python
from PIL import Image, ImageOps
from transformers import ViTImageProcessor

image_processor = ViTImageProcessor.from_pretrained(
    "{name}"{revision}{arguments}
)
image = ImageOps.exif_transpose(Image.open("leaf.png"))
```
"""
