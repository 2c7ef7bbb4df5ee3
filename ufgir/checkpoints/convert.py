"""Any pretrained ViT, of transformers or of timm, as the folder of a CLCA model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..utils.files import new_folder, write_text_atomically
from .from_timm import is_timm_source, load_timm, read_architecture, timm_image_processor
from .from_transformers import load_transformers, load_transformers_processor
from .model_card import describe_model, on_the_hub
from .timm_architectures import find_architecture


_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")
MARKER = "conversion.json"  # in a converted folder: what it was made of


def convert_pretrained(
    source: str | Path, output: str | Path, architecture: str | None = None, overwrite: bool = False, **config: Any
) -> None:
    """Write the folder of a CLCA model with the weights of a pretrained one: configuration, weights, code, image processor
    and model card. The folder appears complete or not at all.

    Args:
        source: folder or Hub repository of a model of transformers or timm; or a file of timm's weights.
        output: folder to make; it may exist if it is empty.
        architecture: timm's name of the architecture, for weights without timm's config.json.
        overwrite: replace a folder that another conversion made.
        config: fields of `CLCAViTConfig`, in place of the source's.

    Raises:
        ValueError: as `load_timm` and `load_transformers`; or `output` holds something that may not be replaced.
    """
    output = Path(output).resolve()
    made_of = {"source": str(source), "architecture": architecture, **config}
    if is_made_of(output, made_of, overwrite) and not overwrite:
        raise ValueError(
            f"`output` {output} is already there, made of the same source: set `overwrite` to make it again."
        )
    if architecture is not None or Path(source).suffix in _WEIGHTS or is_timm_source(source):
        model = load_timm(source, architecture, **config)
        found = find_architecture(architecture) if architecture else read_architecture(source)
        processor, licence = timm_image_processor(found, model.config.image_size), found.licence
    else:
        model = load_transformers(source, **config)
        processor, licence = load_transformers_processor(source, model.config.image_size), None
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
    )
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}", ignore_metadata_errors=False)
        write_text_atomically(folder / "README.md", str(card))
        write_text_atomically(folder / MARKER, json.dumps(made_of, indent=2) + "\n")


_BODY = """# {title}

{model} {parameters} parameters.

The weights are those of `{source}`, converted by `ufgir convert`. What that model does not have, the parts of CLCA and a
classifier for other classes, is not trained yet.

```python
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("path/to/{title}", trust_remote_code=True)
image_processor = AutoImageProcessor.from_pretrained("path/to/{title}")
```
"""


def is_made_of(output: Path, made_of: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether `output` is there, converted from the same source in the same way, and is to stay.

    Raises:
        ValueError: it is something else; or another conversion, and `overwrite` is not set.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        found = json.loads((output / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`output` {output} exists and was not made by a conversion: choose another place."
        ) from error
    if found == made_of and not overwrite:
        return True
    if not overwrite:
        raise ValueError(f"`output` {output} was made of another file or with other options: set `overwrite`.")
    return False
