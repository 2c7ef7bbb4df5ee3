"""Convert a pretrained ViT of transformers or timm to a CLCA model folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from clca import CLCAViTConfig

from ..utils.checksums import list_weights
from ..utils.files import new_folder, write_text_atomically
from ..utils.text import listed
from .loading import check_new, checkpoint_config, load_with_report
from .model_card import describe_model, describe_preprocessing, on_the_hub
from .sources import KINDS, find_source, timm_architecture


MARKER = "conversion.json"  # file in a converted folder that records its source and options


def convert_pretrained(
    source: str | Path, output: str | Path, architecture: str | None = None, overwrite: bool = False, **config: Any
) -> None:
    """Convert a pretrained model to a CLCA model folder: configuration, weights, code, image processor and model card. The folder is
    written completely or not at all.

    Weights that the source does not contain, such as a new classifier, are not written, so that loading the folder reports them as
    random.

    Args:
        source: folder or Hub repository of a transformers or timm model, timm's model name, or a file of timm's weights.
        output: folder to create; it may exist if it is empty.
        architecture: timm's architecture name, for weights without timm's config.json.
        overwrite: replace the folder of an earlier conversion.
        config: fields of `CLCAViTConfig` that override the source's.

    Raises:
        OSError: if there is no such source, or the Hub cannot be reached.
        ValueError: as `load`; if `source` is already a CLCA model; or if `output` must not be replaced.
    """
    output = Path(output).resolve()
    made_of = {"source": str(source), "architecture": architecture, **config}
    if is_made_of(output, made_of, overwrite) and not overwrite:
        raise ValueError(
            f"`output` {output} already exists, converted from the same source: set `overwrite` to replace it."
        )
    kind, found = find_source(source, architecture=architecture)
    if found.contents.get("model_type") == CLCAViTConfig.model_type:
        raise ValueError(
            f"`source` {source} is already a CLCA model: load it with CLCAViTForImageClassification.from_pretrained."
        )
    wanted = checkpoint_config(source, config, architecture=architecture)
    model, untrained = load_with_report(source, wanted, architecture=architecture, ignore_mismatched_sizes=True)
    check_new(source, untrained)
    processor = kind.image_processor(found, model.config.image_size)
    licence = timm_architecture(found).licence if kind is KINDS["timm"] else None
    base_model = on_the_hub(str(source))
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["clca", "token-reduction", "vision"] + ([model.config.reduction] if model.config.reduction else []),
        license=licence if licence != "no weights" else None,
        base_model=base_model,
    )
    body = _BODY.format(
        title=output.name,
        model=describe_model(model.config),
        parameters=f"{model.num_parameters():,}",
        source=architecture or base_model or Path(source).name,
        untrained=_UNTRAINED.format(names=listed([f"`{name}`" for name in untrained])) if untrained else "",
        preprocessing=describe_preprocessing(processor, f"path/to/{output.name}"),
    )
    trained = {name: tensor for name, tensor in model.state_dict().items() if name not in untrained}
    with new_folder(output) as folder:
        model.save_pretrained(folder, state_dict=trained)
        list_weights(folder)
        processor.save_pretrained(folder)
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}", ignore_metadata_errors=False)
        write_text_atomically(folder / "README.md", str(card))
        write_text_atomically(folder / MARKER, json.dumps(made_of, indent=2) + "\n")


_BODY = """# {title}

{model} {parameters} parameters.

The weights come from `{source}`, converted by `ufgir convert`.{untrained}

```python
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("path/to/{title}", trust_remote_code=True)
image_processor = AutoImageProcessor.from_pretrained("path/to/{title}", trust_remote_code=True)
```
{preprocessing}"""

_UNTRAINED = """ The following weights are not in that model; they are not trained and not stored: {names}."""


def is_made_of(output: Path, made_of: Mapping[str, Any], overwrite: bool) -> bool:
    """Return whether `output` already contains this conversion and should be kept.

    Raises:
        ValueError: if it contains something else, or another conversion and `overwrite` is not set.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        found = json.loads((output / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`output` {output} exists and was not written by a conversion: choose another folder."
        ) from error
    if found == made_of and not overwrite:
        return True
    if not overwrite:
        raise ValueError(
            f"`output` {output} was converted from another source or with other options: set `overwrite` to replace it."
        )
    return False
