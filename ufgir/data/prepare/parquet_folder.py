"""Write checked rows to a folder of parquet shards with embedded images; the folder appears when it is complete.

During preparation the folder is named `.NAME.preparing`, next to the output. An interrupted run is resumed from there:
decoded files are not decoded again unless their size or time changed, and shards are kept if their contents are correct.
"""

import hashlib
import json
import logging
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from datasets.utils.py_utils import convert_file_size_to_int
from huggingface_hub import DatasetCardData
from tqdm.auto import tqdm

from ...utils.locks import exclusive_lock
from ..catalog import UltraFGVCSet
from ..splits import check_split_arguments, few_shots, split_rows
from .ultra_fgvc import (
    SOURCE_URL,
    Checked,
    Row,
    UnsoundData,
    check,
    default_workers,
    example,
    features,
    find_root,
    fingerprint,
    inspect_file,
    require_usable,
)


logger = logging.getLogger(__name__)

Validation = Literal["none", "last", "random"]
MARKER = "prepare.json"  # source and options of a prepared folder, and the files left out
JOURNAL = "checked.jsonl"  # one line per decoded file, during preparation
SHOWN = 20  # maximum number of problems on the card
ROW_GROUP = 100  # images that a parquet reader must load at once
LARGEST_SHARD = 2_000_000_000  # bytes, limit of an Arrow array


# Shards


@dataclass(frozen=True)
class Shard:
    """A planned parquet file."""

    name: str  # relative to the folder
    items: tuple[tuple[Row, str], ...]  # rows with the SHA-256 of their files


def plan_shards(root: Path, splits: dict[str, list[tuple[Row, str]]], shard_size: int) -> list[Shard]:
    """Assign rows in order to shards of at most `shard_size` bytes of image files, with at least one row each."""
    shards = []
    for split, items in splits.items():
        groups: list[list[tuple[Row, str]]] = []
        room = 0
        for item in items:
            size = (root / item[0].file).stat().st_size
            if size > room:
                groups.append([])
                room = max(shard_size, size)
            groups[-1].append(item)
            room -= size
        for index, group in enumerate(groups):
            shards.append(Shard(f"data/{split}-{index:05d}-of-{len(groups):05d}.parquet", tuple(group)))
    return shards


def _holds(file: Path, shard: Shard, columns: datasets.Features) -> bool:
    """Return whether `file` is complete and contains exactly the rows of `shard`."""
    try:
        with pq.ParquetFile(file) as parquet:
            if datasets.Features.from_arrow_schema(parquet.schema_arrow) != columns:
                return False
            found = (
                (row["image"]["path"], row["label"], hashlib.sha256(row["image"]["bytes"]).hexdigest())
                for batch in parquet.iter_batches(batch_size=16)
                for row in batch.to_pylist()
            )
            return list(found) == [(row.file, row.label, checksum) for row, checksum in shard.items]
    except (OSError, ValueError, TypeError, pa.ArrowException):  # missing, truncated or foreign file
        return False


def _write_shard(file: Path, root: Path, shard: Shard, columns: datasets.Features, pool: ThreadPoolExecutor) -> None:
    examples = list(pool.map(lambda item: example(root, *item), shard.items))
    table = pa.Table.from_pylist(examples, schema=columns.arrow_schema)  # the metadata contain the features
    temporary = file.with_name(f".{file.name}.tmp")
    pq.write_table(table, temporary, row_group_size=ROW_GROUP)
    os.replace(temporary, file)


# A folder that is being prepared


class _Journal:
    """Cache of `inspect_file` that stores results in a file."""

    def __init__(self, file: Path, stream: TextIO) -> None:
        self._found: dict[tuple[str, int, int], tuple[str, str | None]] = {}
        self._stream = stream
        self._lock = threading.Lock()
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                name, size, time, checksum, problem = json.loads(line)
                self._found[name, size, time] = checksum, problem
            except (ValueError, TypeError):  # line that was being written when the run ended
                continue
        if self._found:
            logger.info("%d files were decoded by an earlier run", len(self._found))
            stream.write("\n")  # ends a truncated line

    def __call__(self, file: Path) -> tuple[str, str | None]:
        stat = file.stat()
        key = (str(file), stat.st_size, stat.st_mtime_ns)
        if key not in self._found:
            outcome = inspect_file(file)
            with self._lock:
                self._found[key] = outcome
                self._stream.write(json.dumps([*key, *outcome]) + "\n")
                self._stream.flush()
        return self._found[key]


@contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """Create `.NAME.preparing` and lock it for one process.

    The folder is kept if the block fails, except for problems in the data (`UnsoundData`).
    """
    work = output.with_name(f".{output.name}.preparing")
    with exclusive_lock(
        output,
        f"`output` {output} is being prepared by another process. Wait for it to finish or choose another folder.",
    ):
        try:
            if output.exists() and (not output.is_dir() or any(output.iterdir())):
                raise ValueError(f"`output` {output} was written by another process in the meantime.")
            work.mkdir(exist_ok=True)
            yield work
        except UnsoundData:
            shutil.rmtree(work, ignore_errors=True)
            raise
        except BaseException:
            if work.exists():
                logger.warning("%s has the finished work; run the same command again to resume", work)
            raise


def prepare(
    spec: UltraFGVCSet,
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    validation: Validation = "none",
    validation_fraction: float | None = None,
    seed: int | None = None,
    shots: int | None = None,
    skip_bad: bool = False,
    num_workers: int | None = None,
    shard_size: int | str = "256MB",
) -> str:
    """Convert a raw download to a folder that `datasets.load_dataset` and `ufgir.data.load_ufgir_dataset` can load.

    `output` contains `data/<split>-*.parquet` with the columns `image` (bytes of the raw files, unchanged) and `label` (from 0), a
    dataset card `README.md` and `prepare.json`. It appears when it is complete. A call after an interruption resumes the work; a
    call after completion writes nothing.

    Args:
        spec: expected data, one of `SETS` or a small version of one.
        source: the raw download, see `ufgir.data.prepare.ultra_fgvc.find_root`.
        output: a folder that does not exist or is empty.
        validation: "none": train and test as published; "last": the last part of each class of train, as in the original code;
            "random": the same number of random images.
        validation_fraction: share of each class that is moved from train to validation, by default 0.2; at least one image
            stays in train.
        seed: seed of "random" and of `shots`, by default 0.
        shots: number of random images per class that stay in train; by default all.
        skip_bad: leave out files with problems instead of raising.
        num_workers: number of threads that decode and read; by default the number of cores, at most 8.
        shard_size: maximum number of bytes of images per shard, such as 256000000 or "256MB".

    Returns:
        A summary of the written and omitted files.

    Raises:
        UnsoundData: if the data have problems, all of which are listed; nothing is written.
        DatasetError, ValueError: if the source cannot be read, or an argument is out of range.
    """
    if validation not in get_args(Validation):
        raise ValueError(f"`validation` must be one of {', '.join(get_args(Validation))}, got {validation!r}.")
    if validation == "none" and validation_fraction is not None:
        raise ValueError("`validation_fraction` applies only with `validation` last or random.")
    if seed is not None and validation != "random" and shots is None:
        raise ValueError("`seed` applies only with `validation` random or with `shots`.")
    if seed is not None and seed < 0:
        raise ValueError(f"`seed` must be at least 0, got {seed}.")
    fraction = 0.0 if validation == "none" else 0.2 if validation_fraction is None else validation_fraction
    if validation != "none" and fraction == 0:
        raise ValueError(
            "`validation_fraction` must be in (0, 1), got 0. For no validation split, set `validation` to none."
        )
    check_split_arguments(fraction, "last" if validation == "none" else validation, shots)
    workers, bytes_per_shard = default_workers(num_workers), _bytes(shard_size)
    root, output = find_root(spec, source), Path(output).expanduser().absolute()
    options: dict[str, Any] = {"validation": validation}
    options |= {} if validation == "none" else {"validation_fraction": fraction}
    options |= {} if shots is None else {"shots": shots}
    options |= {} if validation != "random" and shots is None else {"seed": seed or 0}
    options |= {"skip_bad": skip_bad, "shard_size": bytes_per_shard}
    made_of = {"set": asdict(spec), "options": options, "source": fingerprint(root, spec)}
    made_of = json.loads(json.dumps(made_of))  # tuples become lists, as in the file
    if _is_done(output, made_of):
        return f"{output} already exists, made from the same source with the same options"

    with _work_folder(output) as work:
        with open(work / JOURNAL, "a", encoding="utf-8") as stream:
            checked = require_usable(check(spec, source, workers, _Journal(work / JOURNAL, stream)), skip_bad)
        splits = _splits(checked, fraction, (seed or 0) if validation == "random" else None, shots, seed or 0)
        shards = plan_shards(root, splits, bytes_per_shard)
        columns = features(checked.class_names)
        (work / "data").mkdir(exist_ok=True)
        for stray in {path.name for path in (work / "data").iterdir()} - {Path(shard.name).name for shard in shards}:
            (work / "data" / stray).unlink()
        total = sum(len(shard.items) for shard in shards)
        with (
            ThreadPoolExecutor(workers) as pool,
            tqdm(total=total, desc=f"Writing {spec.name}", unit="image") as bar,
        ):
            for shard in shards:
                if _holds(work / shard.name, shard, columns):
                    logger.info("%s was finished by an earlier run", shard.name)
                else:
                    _write_shard(work / shard.name, root, shard, columns, pool)
                bar.update(len(shard.items))
        marker = {"made_of": made_of, "left_out": [asdict(problem) for problem in checked.problems]}
        (work / MARKER).write_text(json.dumps(marker, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (work / "README.md").write_text(_card(checked, splits, shards, work, options), encoding="utf-8")
        (work / JOURNAL).unlink()
        os.replace(work, output)
    return _summary(checked, splits, shards, shots, output)


def _bytes(shard_size: int | str) -> int:
    try:
        size = int(shard_size) if str(shard_size).isdigit() else convert_file_size_to_int(shard_size)
    except ValueError:
        size = 0
    if not 1 <= size <= LARGEST_SHARD:
        raise ValueError(f"`shard_size` must be a number of bytes up to 2GB, such as 256MB, got {shard_size!r}.")
    return size


def _is_done(output: Path, made_of: dict[str, Any]) -> bool:
    """Return whether `output` was made from the same source with the same options."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        if json.loads((output / MARKER).read_text(encoding="utf-8"))["made_of"] == made_of:
            return True
    except (OSError, ValueError, TypeError, KeyError):  # not a prepared folder
        pass
    raise ValueError(
        f"`output` {output} exists and was made from another source or with other options. Choose another folder."
    )


def _splits(
    checked: Checked, fraction: float, validation_seed: int | None, shots: int | None, shots_seed: int
) -> dict[str, list[tuple[Row, str]]]:
    """Return the rows of each split with the SHA-256 of their files."""
    items = list(zip(checked.rows, checked.checksums, strict=True))
    published = [item for item in items if item[0].split == "train"]
    train, held_out = split_rows([row.label for row, _ in published], fraction, validation_seed)
    if fraction and not held_out:
        raise UnsoundData(f"{checked.spec.name}: no validation split, because no class has enough images.")
    splits = {"train": [published[index] for index in train], "validation": [published[index] for index in held_out]}
    if shots is not None:
        chosen = few_shots([row.label for row, _ in splits["train"]], shots, shots_seed)
        splits["train"] = [splits["train"][index] for index in chosen]
    splits["test"] = [item for item in items if item[0].split == "test"]
    return {split: found for split, found in splits.items() if found}


# Summary and dataset card


def _summary(checked: Checked, splits: dict, shards: Sequence[Shard], shots: int | None, output: Path) -> str:
    sizes = ", ".join(f"{len(items)} {split}" for split, items in splits.items())
    lines = [f"wrote {output}: {sizes} images of {checked.spec.classes} classes in {len(shards)} shards"]
    if checked.problems:
        lines += [f"problems ({len(checked.problems)}), files left out by --skip-bad:", checked.report()]
    if shots is not None:
        counts = Counter(row.label for row, _ in splits["train"])
        if few := sum(count < shots for count in counts.values()):
            lines.append(f"note: {few} classes have fewer than {shots} images for train")
    return "\n".join([*lines, *(f"note: {note}" for note in checked.notes)])


def _card(checked: Checked, splits: dict, shards: Sequence[Shard], work: Path, options: dict[str, Any]) -> str:
    """Return the dataset card, with a YAML header for `load_dataset`."""
    spec = checked.spec
    sizes = {
        split: sum((checked.root / row.file).stat().st_size for row, _ in items) for split, items in splits.items()
    }
    infos = datasets.SplitDict()
    for split, items in splits.items():
        infos.add(datasets.SplitInfo(split, num_bytes=sizes[split], num_examples=len(items)))
    info = datasets.DatasetInfo(
        features=features(checked.class_names),
        splits=infos,
        download_size=sum((work / shard.name).stat().st_size for shard in shards),
        dataset_size=sum(sizes.values()),
    )
    total = sum(map(len, splits.values()))
    data = DatasetCardData(
        pretty_name=f"Ultra-FGVC {spec.title}",
        license="unknown",
        task_categories=["image-classification"],
        tags=["fine-grained", "ultra-fine-grained", "leaves", "agriculture"],
        size_categories=["n<1K" if total < 1000 else "1K<n<10K" if total < 10_000 else "10K<n<100K"],
    )
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    MetadataConfigs({"default": {"data_files": files}}).to_dataset_card_data(data)
    rows = "\n".join(f"| {s} | {len(items)} | {_per_class(items)} | {sizes[s]:,} |" for s, items in splits.items())
    checksum = hashlib.sha256("".join(f"{r.split} {r.label} {d}\n" for r, d in _pairs(checked)).encode()).hexdigest()
    settings = ", ".join(f"`{name}` {value}" for name, value in options.items())
    left_out = "No file was left out, and all counts match the published ones."
    if checked.problems:
        shown = "\n".join(f"- {p.kind}: `{p.where}`: {p.text}" for p in checked.problems[:SHOWN])
        more = len(checked.problems) - SHOWN
        rest = f"\n- and {more} more, see `{MARKER}`" if more > 0 else ""
        left_out = f"The data **differ from the published ones**. Problems, and files left out:\n\n{shown}{rest}"
    notes = "".join(f"\n\n{note[0].upper()}{note[1:]}." for note in checked.notes)
    return f"""---
{data.to_yaml()}
---

# Ultra-FGVC {spec.title}

Photos of single leaves of {spec.classes} cultivars, a set of Ultra-FGVC (Yu et al., ICCV 2021): <{SOURCE_URL}>.

| split | images | images per class | bytes |
|---|---|---|---|
{rows}

Published: {spec.train} train and {spec.test} test images of {spec.classes} classes. `label` is numbered from 0, in the raw
data from 1; class names are the cultivars' names if the raw file names contain them, else the numbers.

```python
from datasets import load_dataset

leaves = load_dataset("path/of/this/folder")
```

## License

No license was found, neither in the download nor in its repository. Ask the authors before you share these images.

## How it was made

`ufgir prepare {spec.name}` on the raw download, folder `{checked.root.name}`, with {settings}.
Images are the unchanged bytes of the raw files; each was decoded once as a check. SHA-256 over split, label and SHA-256 of
every image without problems: `{checksum}`. Written by datasets {datasets.__version__}.

{left_out}{notes}
"""


def _pairs(checked: Checked) -> Iterator[tuple[Row, str]]:
    return zip(checked.rows, checked.checksums, strict=True)


def _per_class(items: Sequence[tuple[Row, str]]) -> str:
    counts = Counter(row.label for row, _ in items).values()
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
