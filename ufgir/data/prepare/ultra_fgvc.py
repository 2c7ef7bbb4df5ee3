"""Check raw downloads of Ultra-FGVC, leaves of cotton and soybean cultivars.

The data are those of Yu et al., "Benchmark Platform for Ultra-Fine-Grained Visual Categorization Beyond Human Performance"
(ICCV 2021), linked from https://github.com/XiaohanYu-GU/Ultra-FGVC. They have two layouts:
  - file names: one flat folder of `<class>_<number>_<train|test>.png` (cotton, soylocal, soyglobal);
  - annotation lists: `images/` next to `anno/train.txt` and `anno/test.txt` with lines `file class` (soygene), or one pair for each of
    the growth stages R1, R3, R4, R5, R6 (soyageing).
Classes are numbered from 1 in the raw data and from 0 here. `ufgir prepare` converts a raw download to a folder of parquet
files; the builder `UltraFGVC` loads the same rows as a `datasets.DatasetDict`.
"""

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
from tqdm.auto import tqdm

from ..catalog import SETS, UltraFGVCSet
from ..checks import DatasetError, problem_of
from ..image_files import child_folders
from .raw_layouts import SPLITS, Problem, Row


logger = logging.getLogger(__name__)

SOURCE_URL = "https://github.com/XiaohanYu-GU/Ultra-FGVC"
KINDS = {  # kind of a problem -> heading
    "list": "lines of annotation lists that cannot be used",
    "name": "images with unknown class or split",
    "missing": "listed, but missing",
    "broken": "cannot be decoded",
    "duplicate": "same bytes twice within a split",
    "leaking": "same bytes in train and test",
    "count": "counts that differ from the published ones",
}


@dataclass(frozen=True)
class Checked:
    """Raw data after every image was decoded."""

    spec: UltraFGVCSet
    root: Path
    rows: tuple[Row, ...]  # rows without problems
    checksums: tuple[str, ...]  # SHA-256 of the file per row
    class_names: tuple[str, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    def report(self) -> str:
        """List all problems by kind; empty if there are none."""
        lines = []
        for kind, heading in KINDS.items():
            if found := [problem for problem in self.problems if problem.kind == kind]:
                lines += [f"{heading} ({len(found)}):", *(f"  {p.where}: {p.text}" for p in found)]
        return "\n".join(lines)


class UnsoundData(DatasetError):
    """The raw data have problems, and leaving them out was not requested."""


def find_root(spec: UltraFGVCSet, source: str | os.PathLike) -> Path:
    """Find the folder of the set: `source` itself, or a folder up to two levels below it.

    Raises:
        DatasetError: if there is none, or more than one.
    """
    source = Path(source).expanduser().absolute()
    if not source.is_dir():
        raise DatasetError(f"`source` must be the folder of the raw download, got {source}, which is not a folder.")
    children = child_folders(source)
    nearby = [source, *children, *(grandchild for child in children for grandchild in child_folders(child))]
    roots = spec.layout.roots(source, nearby)
    if not roots:
        raise DatasetError(f"`source` {source} does not contain {spec.name}: expected {spec.layout.expected()}.")
    if len(roots) > 1:
        raise DatasetError(
            f"`source` {source} contains {spec.name} more than once. Choose one of {', '.join(map(str, roots))}."
        )
    return roots[0]


def fingerprint(root: Path, spec: UltraFGVCSet) -> str:
    """Return a hash of the names, sizes and times of the raw files, to recognize the same source quickly."""
    hasher = hashlib.sha256()
    for folder in (root / name for name in spec.layout.folders()):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name) if folder.is_dir() else ():
            stat = entry.stat(follow_symlinks=os.path.exists(entry))
            line = f"{folder.relative_to(root)}/{entry.name} {stat.st_size} {stat.st_mtime_ns}\n"
            hasher.update(line.encode(errors="surrogateescape"))
    return hasher.hexdigest()


def inspect_file(file: Path) -> tuple[str, str | None]:
    """Return the SHA-256 of a file, and the reason why it cannot be decoded (None if it can)."""
    content = file.read_bytes()
    return hashlib.sha256(content).hexdigest(), problem_of({"bytes": content, "path": None})


def check(
    spec: UltraFGVCSet,
    source: str | os.PathLike,
    num_workers: int | None = None,
    inspect: Callable[[Path], tuple[str, str | None]] = inspect_file,
) -> Checked:
    """Read the names or lists, decode every image once, and compare the counts with the published ones.

    Args:
        spec: expected data, one of `SETS` or a small version of one.
        source: the raw download, see `find_root`.
        num_workers: number of decoding threads; by default the number of cores, at most 8.
        inspect: replaces `inspect_file`, to reuse the results of an earlier run.

    Raises:
        DatasetError: if the layout is missing or cannot be read. Problems of single files are part of the result.
    """
    root = find_root(spec, source)
    listing = spec.layout.read(root, spec.classes)
    if not (listing.rows or listing.problems):
        raise DatasetError(f"{root} lists no images of {spec.name}: expected {spec.layout.expected()}.")
    files = list(dict.fromkeys(row.file for row in listing.rows))
    found: dict[str, tuple[str, str | None]] = {}
    problems = list(listing.problems)

    def look(file: str) -> tuple[str, str | None] | None:
        try:
            return inspect(root / file)
        except FileNotFoundError:
            return None
        except OSError as error:
            return "", f"{type(error).__name__}: {error.strerror or error}"

    with (
        ThreadPoolExecutor(default_workers(num_workers)) as pool,
        tqdm(total=len(files), desc=f"Checking {spec.name}", unit="image") as bar,
    ):
        for file, outcome in zip(files, pool.map(look, files), strict=True):
            bar.update()
            if outcome is None:
                problems.append(Problem("missing", file, "the file does not exist"))
            elif outcome[1] is not None:
                problems.append(Problem("broken", file, outcome[1]))
            else:
                found[file] = outcome
    sound = [row for row in listing.rows if row.file in found]
    checksums = {file: checksum for file, (checksum, _) in found.items()}
    bad, copies = _copies(sound, checksums)
    problems += copies + _count_problems(spec, listing.rows)
    rows = tuple(row for index, row in enumerate(sound) if index not in bad)
    names = _class_names(listing.rows, spec.classes)
    return Checked(
        spec, root, rows, tuple(checksums[r.file] for r in rows), names, tuple(problems), tuple(listing.notes)
    )


def default_workers(num_workers: int | None) -> int:
    """Return `num_workers`, or by default the number of cores, at most 8."""
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"`num_workers` must be at least 1, got {num_workers}.")
    return num_workers or min(8, os.cpu_count() or 1)


def _copies(rows: Sequence[Row], checksums: dict[str, str]) -> tuple[set[int], list[Problem]]:
    """Return the rows to leave out because others have the same bytes, and the problem of each."""
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(checksums[row.file], []).append(index)
    left_out: dict[int, Problem] = {}
    for group in groups.values():
        by_split = {split: [i for i in group if rows[i].split == split] for split in SPLITS}
        for split, members in by_split.items():
            others = by_split["test"] if split == "train" else []
            if others:
                for i in members:
                    text = f"also {_duplicate_place(rows, i, others[0])}; the train copy is left out, the test copy is kept"
                    left_out[i] = Problem("leaking", rows[i].file, text)
            elif len({rows[i].label for i in members}) > 1:
                for i in members:
                    other = next(j for j in members if rows[j].label != rows[i].label)
                    text = (
                        f"{split}, class {rows[i].label + 1}, also {_duplicate_place(rows, i, other)}, class {rows[other].label + 1}; "
                        "both are left out, because one label is wrong"
                    )
                    left_out[i] = Problem("duplicate", rows[i].file, text)
            else:
                for i in members[1:]:
                    text = f"{split}, also {_duplicate_place(rows, i, members[0])}; only the first is kept"
                    left_out[i] = Problem("duplicate", rows[i].file, text)
    return set(left_out), [left_out[i] for i in sorted(left_out)]


def _duplicate_place(rows: Sequence[Row], index: int, other: int) -> str:
    if rows[index].file == rows[other].file:
        return f"listed in {rows[other].split}" if rows[index].split != rows[other].split else "listed twice"
    return f"{rows[other].file} of {rows[other].split}"


def _count_problems(spec: UltraFGVCSet, rows: Sequence[Row]) -> list[Problem]:
    """Return problems for totals, and for classes with too few or too many images, grouped by their number."""
    problems = []
    for split in SPLITS:
        total, (fewest, most) = getattr(spec, split), getattr(spec, f"{split}_per_class")
        counts = Counter(row.label for row in rows if row.split == split)
        if (found := counts.total()) != total:
            problems.append(Problem("count", split, f"{found} images, expected {total}"))
        odd: dict[int, list[int]] = {}
        for label in range(spec.classes):
            if not fewest <= counts[label] <= most:
                odd.setdefault(counts[label], []).append(label + 1)
        span = str(fewest) if fewest == most else f"{fewest} to {most}"
        for count, classes in sorted(odd.items()):
            text = f"{count} images, expected {span}, in class {_ranges(classes)}"
            problems.append(Problem("count", split, text))
    return problems


def _ranges(numbers: Iterable[int]) -> str:
    """Format numbers with ranges: 1, 3-5, 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _class_names(rows: Iterable[Row], classes: int) -> tuple[str, ...]:
    """Return the cultivar at the start of the file names, if it is unique per class; else the raw class numbers."""
    cultivars: dict[int, set[str]] = {}
    for row in rows:
        cultivars.setdefault(row.label, set()).add(re.split(r"[-_]", PurePosixPath(row.file).name)[0])
    names = {label: next(iter(found)) for label, found in cultivars.items() if len(found) == 1}
    if len(set(names.values())) == classes and not any(name.isdigit() for name in names.values()):
        return tuple(names[label] for label in range(classes))
    return tuple(str(number) for number in range(1, classes + 1))


def features(class_names: Sequence[str]) -> datasets.Features:
    """Return the columns of the prepared data."""
    return datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(class_names))})


def example(root: Path, row: Row, checksum: str) -> dict[str, Any]:
    """Return a row with the bytes of its file.

    Raises:
        DatasetError: if the file changed after it was checked.
    """
    content = (root / row.file).read_bytes()
    if hashlib.sha256(content).hexdigest() != checksum:
        raise DatasetError(f"{root / row.file} changed after it was checked. Run the command again.")
    return {"image": {"bytes": content, "path": row.file}, "label": row.label}


@dataclass
class UltraFGVCConfig(datasets.BuilderConfig):
    """Set to load (published or a small version), and whether to leave out bad files."""

    spec: UltraFGVCSet | None = None  # by default the published set with the name of the config
    skip_bad: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spec is None:
            if self.name not in SETS:
                raise ValueError(f"`config_name` must be one of {', '.join(SETS)}, got {self.name!r}.")
            self.spec = SETS[self.name]


class UltraFGVC(datasets.GeneratorBasedBuilder):
    """Builder: `UltraFGVC(config_name="cotton", data_dir=RAW).download_and_prepare()`; nothing is downloaded.

    The raw data are checked first: `UnsoundData` lists all problems, unless `skip_bad=True` leaves out the files.
    """

    BUILDER_CONFIG_CLASS = UltraFGVCConfig
    config: UltraFGVCConfig
    BUILDER_CONFIGS = [UltraFGVCConfig(name=name, version="1.0.0") for name in SETS]

    def __init__(self, *args: Any, data_dir: str | os.PathLike | None = None, **kwargs: Any) -> None:
        if data_dir is None:
            raise ValueError("`data_dir` must be the folder of the raw download, got None.")
        self._checked: Checked | None = None
        data_dir = os.fspath(Path(data_dir).expanduser().absolute())
        spec = kwargs.get("spec") or SETS.get(kwargs.get("config_name"))
        if spec is not None:  # changes of the raw files invalidate the cache
            kwargs.setdefault("hash", fingerprint(find_root(spec, data_dir), spec)[:16])
        super().__init__(*args, data_dir=data_dir, **kwargs)

    def checked(self) -> Checked:
        """Return the raw data, checked once."""
        if self._checked is None:
            self._checked = require_usable(check(self.config.spec, self.config.data_dir), self.config.skip_bad)
        return self._checked

    def _info(self) -> datasets.DatasetInfo:
        title = self.config.spec.title
        root = find_root(self.config.spec, self.config.data_dir)
        rows = self.config.spec.layout.read(root, self.config.spec.classes).rows
        names = _class_names(rows, self.config.spec.classes)
        return datasets.DatasetInfo(description=f"Ultra-FGVC {title}.", features=features(names), homepage=SOURCE_URL)

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        self.checked()  # here, because errors of _generate_examples are wrapped
        return [datasets.SplitGenerator(name=split, gen_kwargs={"split": split}) for split in SPLITS]

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        checked = self.checked()
        for row, checksum in zip(checked.rows, checked.checksums, strict=True):
            if row.split == split:
                yield row.file, example(checked.root, row, checksum)


def require_usable(checked: Checked, skip_bad: bool) -> Checked:
    """Return `checked` if it can be used.

    Raises:
        UnsoundData: if it has problems and `skip_bad` is not set, or a split has no images left.
    """
    spec = checked.spec
    if checked.problems and not skip_bad:
        raise UnsoundData(f"{spec.name}: problems ({len(checked.problems)}) in {checked.root}\n{checked.report()}")
    if empty := [split for split in SPLITS if not any(row.split == split for row in checked.rows)]:
        raise UnsoundData(f"{spec.name}: no images are left in {' and '.join(empty)}\n{checked.report()}")
    return checked
