"""Convert a checkpoint file of the original code, or a folder of them, to model folders."""

import csv
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData
from tqdm import tqdm

from clca import CLCAViTForImageClassification

from ..utils.checksums import list_weights
from ..utils.files import new_folder, write_text_atomically
from ..utils.text import one_sentence
from .convert import MARKER, is_made_of
from .from_original import OriginalFile, build, original_image_processor, read_original_file
from .model_card import describe_model, describe_preprocessing


logger = logging.getLogger(__name__)

REPORT = "conversion_report.json"
SUFFIXES = (".pth", ".pt")


class Outcome(NamedTuple):
    """Results of converting the files of a folder, by their relative paths."""

    converted: list[str]
    skipped: list[str]  # already complete
    failed: dict[str, str]  # file -> reason

    def summary(self) -> str:
        """Return the counts and the first failures, one per line."""
        counts = f"converted {len(self.converted)}, skipped {len(self.skipped)}, failed {len(self.failed)}"
        shown = [f"  {name}: {reason}" for name, reason in list(self.failed.items())[:20]]
        more = [f"  and {len(self.failed) - 20} more"] if len(self.failed) > 20 else []
        return "\n".join([counts, *shown, *more])


def convert_file(
    path: str | os.PathLike,
    output: str | os.PathLike,
    *,
    class_names: Sequence[str] | None = None,
    overwrite: bool = False,
    **overrides: Any,
) -> bool:
    """Convert a checkpoint file to a model folder: configuration, weights, code, image processor and model card.

    The folder is written completely or not at all.

    Args:
        path: the file.
        output: folder to create; it may exist if it is empty.
        class_names: names of the classes, by index.
        overwrite: replace the folder of an earlier conversion.
        overrides: fields of `CLCAViTConfig`, see `load_original_file`.

    Returns:
        Whether the folder was written; False if it already exists, converted from the same file with the same options.

    Raises:
        ValueError: as `load_original_file`; if the numbers of class names and classes differ; or if `output` must not be replaced.
        OSError: if the folder cannot be written.
    """
    path, output = Path(path), Path(output).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    overrides = {name: value for name, value in overrides.items() if value is not None}
    options = {"image_size": None, "num_attention_heads": None, "class_names": None} | overrides
    if class_names is not None:
        options["class_names"] = hashlib.sha256(json.dumps(list(class_names)).encode()).hexdigest()
    made_of = {"source": path.name, "bytes": path.stat().st_size, "ends": _fingerprint(path), **options}
    if is_made_of(output, made_of, overwrite):
        return False

    file = read_original_file(path)
    model = build(file, overrides)
    if class_names is not None:
        if len(class_names) != model.config.num_labels:
            raise ValueError(
                f"`class_names` must have {model.config.num_labels} names for the classes of `{path}`, got {len(class_names)}."
            )
        model.config.id2label = dict(enumerate(class_names))
        model.config.label2id = {name: index for index, name in enumerate(class_names)}
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        list_weights(folder)
        processor = original_image_processor(file, model.config.image_size)
        processor.save_pretrained(folder)
        write_text_atomically(folder / "README.md", _card(file, model, processor, output.name))
        write_text_atomically(folder / MARKER, json.dumps(made_of, indent=2) + "\n")
    return True


def convert_folder(
    folder: str | os.PathLike,
    output: str | os.PathLike,
    class_names: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
    **options: Any,
) -> Outcome:
    """Convert all checkpoint files below a folder, each to `output` / its relative path without suffix.

    Existing conversions are skipped, so that the same call continues an interrupted one. Files that cannot be converted are logged
    and skipped. `conversion_report.json` in `output` lists the result of each file.

    Args:
        folder: folder that is searched recursively for .pth and .pt files.
        output: folder for the results.
        class_names: names of the classes, by index; or a mapping from data set names to such lists.
        options: further arguments of `convert_file`.

    Raises:
        ValueError: if there is no checkpoint file below `folder`.
    """
    folder, output = Path(folder), Path(output)
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    if not files:
        raise ValueError(f"there is no {' or '.join(SUFFIXES)} file below {folder}.")
    outcome = Outcome([], [], {})
    try:
        for path in tqdm(files, desc="converting", unit="file", disable=None):
            name = path.relative_to(folder)
            try:
                names = _names_for(path, class_names) if isinstance(class_names, Mapping) else class_names
                written = convert_file(path, output / name.with_suffix(""), class_names=names, **options)
            except Exception as error:  # convert the other files anyway
                outcome.failed[str(name)] = one_sentence(error) or type(error).__name__
                logger.warning("Skipping %s: %s", name, outcome.failed[str(name)])
            else:
                (outcome.converted if written else outcome.skipped).append(str(name))
    finally:
        write_text_atomically(output / REPORT, json.dumps(outcome._asdict(), indent=2) + "\n")
    return outcome


def read_class_names(path: str | os.PathLike) -> list[str] | dict[str, list[str]]:
    """Read the class names by index from a text file with one name per line, or a CSV file with `class_id` and `class_name`.

    For a folder of such files, return a dictionary from file names without suffix (the data sets) to their classes.

    Raises:
        ValueError: if there is no such file, or ids are not consecutive numbers from 0 or 1.
    """
    path = Path(path)
    if path.is_dir():
        names = {file.stem: _class_names(file) for file in sorted(path.iterdir()) if file.suffix in (".csv", ".txt")}
        if not names:
            raise ValueError(f"`class_names`: there is no .csv or .txt file in {path}.")
        return names
    if not path.is_file():
        raise ValueError(f"`class_names`: there is no file {path}.")
    return _class_names(path)


def _class_names(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"`class_names`: {path} is not a text file.") from error
    if not lines or "class_name" not in next(csv.reader(lines[:1])):
        return [line.strip() for line in lines]
    try:
        rows = {int(row["class_id"]): row["class_name"].strip() for row in csv.DictReader(lines)}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"`class_names`: each row of {path} must have a `class_id` and a `class_name`.") from error
    if len(rows) != len(lines) - 1 or sorted(rows) not in (list(range(len(rows))), list(range(1, len(rows) + 1))):
        raise ValueError(
            f"`class_names`: the {len(lines) - 1} ids in {path} must be unique and consecutive, starting from 0 or 1."
        )
    return [rows[index] for index in sorted(rows)]


def _names_for(path: Path, class_names: Mapping[str, Sequence[str]]) -> Sequence[str] | None:
    """Return the classes of the data set at the beginning of the file name; None if there are none."""
    return class_names.get(path.name.partition("_")[0])


def _fingerprint(path: Path, most: int = 1 << 16) -> str:
    """Hash both ends of a file. The end of a checkpoint, a zip archive, contains a checksum of every tensor."""
    with path.open("rb") as file:
        head = file.read(most)
        file.seek(max(path.stat().st_size - most, 0))
        return hashlib.sha256(head + file.read(most)).hexdigest()


def _card(file: OriginalFile, model: CLCAViTForImageClassification, processor: Any, title: str) -> str:
    """Return the README.md of a converted model."""
    config, options = model.config, file.options
    tags = ["clca", "token-reduction", "fine-grained", "vision"] + ([config.reduction] if config.reduction else [])
    data = ModelCardData(library_name="transformers", pipeline_tag="image-classification", tags=tags, model_name=title)
    kept = f"keep rate {_listed(config.keep_rate)}"
    if config.keep_tokens is not None:
        kept = f"{_listed(config.keep_tokens)} tokens kept"
    rows = {
        "file": f"`{file.path.name}`",
        "model name in the original code": f"`{file.model_name}`",
        "method": "none" if config.reduction is None else f"`{config.reduction}`, {kept}",
        "data set": options.get("dataset_name"),
        "classes": config.num_labels,
        "training epochs (configured)": options.get("epochs"),
        "seed": options.get("seed"),
        "weights": "`model_ema`: the averaged weights, which had the best score" if file.averaged else None,
    }
    rows |= {f"{name}, as reported by the file": f"{value:g}" for name, value in file.reported.items()}
    body = _BODY.format(
        title=title,
        model=describe_model(config),
        table="\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None),
        parameters=f"{model.num_parameters():,}",
        preprocessing=describe_preprocessing(processor, "FOLDER"),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}", ignore_metadata_errors=False))


def _listed(values: Iterable[float]) -> str:
    return ", ".join(map(str, values))


_BODY = """# {title}

{model} {parameters} parameters.

The weights come from a checkpoint file of the original implementation of CLCA, cross-layer cache aggregation for token
reduction in ultra-fine-grained image recognition ([paper](https://huggingface.co/papers/2501.00243)), converted by
`ufgir convert`. They have the license of the file.

| | |
| --- | --- |
{table}

Values marked "as reported by the file" were copied from it and not measured again.

## How to load

The folder contains the code of the model, which requires `trust_remote_code=True`. FOLDER is this folder, or its Hub repository.

```python
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

model = AutoModelForImageClassification.from_pretrained("FOLDER", trust_remote_code=True)
image_processor = AutoImageProcessor.from_pretrained("FOLDER", trust_remote_code=True)

classify = pipeline("image-classification", model="FOLDER", trust_remote_code=True)
# classify("leaf.png", top_k=5) -> [{{"label": ..., "score": ...}}, ...]
```
{preprocessing}"""
