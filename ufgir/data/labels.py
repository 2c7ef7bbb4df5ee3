"""Convert the labels of any source to class indices, with the same class names in all splits; one or several classes per image."""

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch

from .checks import LISTED, DatasetError, check_same_classes, listed


logger = logging.getLogger(__name__)


def to_multi_hot(labels: Sequence[int], num_classes: int) -> torch.Tensor:
    """Convert the class indices of an image to a target (num_classes,), float32: 1 for its classes, 0 for the others.

    Raises:
        ValueError: if an index is not in 0 ... num_classes - 1.
    """
    if outside := [label for label in labels if not 0 <= label < num_classes]:
        raise ValueError(f"`labels` must lie in 0 ... {num_classes - 1}, got {listed(outside)}.")
    target = torch.zeros(num_classes, dtype=torch.float32)
    target[list(labels)] = 1.0
    return target


def class_feature(feature: Any) -> datasets.ClassLabel | None:
    """Return the `ClassLabel` of a label column, or of a column of lists; None if it has none."""
    inner = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature
    return inner if isinstance(inner, datasets.ClassLabel) else None


def is_multi_label(feature: Any) -> bool:
    """Return whether a label column has a list of classes per image."""
    return isinstance(feature, datasets.List | datasets.LargeList)


def check_class_names(class_names: Sequence[str] | None) -> None:
    """Raise ValueError unless `class_names` is None or a list of at least one distinct name."""
    if class_names is None:
        return
    if isinstance(class_names, str) or not class_names or not all(isinstance(name, str) for name in class_names):
        raise ValueError(f"`class_names` must be a list of at least one name, got {class_names!r}.")
    if len(set(class_names)) < len(class_names):
        twice = sorted({name for name in class_names if list(class_names).count(name) > 1})
        raise ValueError(f"`class_names` must be distinct, got duplicates: {listed(twice)}.")


def split_text(text: str, separator: str) -> list[str]:
    """ "cat; dog" -> ["cat", "dog"]; empty parts are dropped."""
    return [part for part in (part.strip() for part in text.split(separator)) if part]


# Plain integers: `01` and `1.0` are not, and longer numbers are names as well (e.g. barcodes).
_PLAIN = re.compile(r"-?(?:0|[1-9][0-9]{0,18})")


def is_plain_integer(text: str) -> bool:
    """Return whether a label is written as a plain integer: `7` is; `007`, `+7` and `7.0` are names."""
    return _PLAIN.fullmatch(text) is not None


def without_fraction(text: str) -> str:
    """Convert `7.0`, as written by tables with empty cells, to `7`; return other text unchanged."""
    return re.sub(r"\.0+$", "", text) if re.fullmatch(r"-?(?:0|[1-9][0-9]{0,18})\.0+", text) else text


def as_lists(labels: Sequence[str], separator: str) -> list[list[str]] | list[list[int]]:
    """Split each text into a list of classes; into lists of integers if all classes are plain integers."""
    parts = [split_text(text, separator) for text in labels]
    if all(is_plain_integer(part) for row in parts for part in row) and any(parts):
        return [[int(part) for part in row] for row in parts]
    return parts


def one_spelling(classes: Mapping[str, Iterable[str]], source: str, known: Iterable[str] = ()) -> dict[str, str]:
    """Return name as written -> class name; names that differ only in Unicode form (NFC, NFD) are one class.

    The spelling is taken from `known`, else from the first split, else NFC is used.

    Args:
        classes: split -> class names in it.
        source: name of the data in messages.
        known: class names of an existing model.
    """
    preferred: dict[str, str] = {}
    for names in (known, *classes.values()):
        spellings: dict[str, set[str]] = {}
        for name in names:
            spellings.setdefault(unicodedata.normalize("NFC", name), set()).add(name)
        for form, found in spellings.items():
            preferred.setdefault(form, next(iter(found)) if len(found) == 1 else form)
    called = {name: preferred[unicodedata.normalize("NFC", name)] for names in classes.values() for name in names}
    if merged := sorted({new for old, new in called.items() if old != new}):
        logger.warning(
            "%s: class names that differ only in Unicode form (NFC, NFD) are merged: %s",
            source,
            listed(merged),
        )
    return called


def warn_of_look_alikes(names: Iterable[str], source: str) -> None:
    """Log a warning that names classes which differ only in case, spaces or leading zeros."""
    groups: dict[str, list[str]] = {}
    for name in names:
        key = " ".join(name.casefold().split())
        key = re.sub(r"^(-?)0+(?=[0-9])", r"\1", without_fraction(key)) if re.fullmatch(r"[-+0-9.]+", key) else key
        groups.setdefault(key, []).append(name)
    if alike := [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]:
        logger.warning(
            "%s: class names that differ only in case, spaces or leading zeros are different classes: %s",
            *(source, listed(alike)),
        )


def gaps_of(ids: Sequence[int]) -> str:
    """List the numbers from 0 that are missing among sorted distinct `ids`; empty if there are none.

    Memory does not grow with the size of the ids.
    """
    first: list[int] = []
    count, expected = 0, 0
    for class_id in ids:
        count += class_id - expected
        first += range(expected, min(class_id, expected + LISTED - len(first)))
        expected = class_id + 1
    return ", ".join(map(str, first)) + (f" and {count - len(first):,} more" if count > len(first) else "")


def _whole(label: Any) -> Any:
    """Convert a whole float to an integer (tables with empty cells store 0 as 0.0); return other labels unchanged."""
    return int(label) if isinstance(label, float) and label.is_integer() else label


def _flat(labels: Sequence[Any], multi: bool) -> Iterable[Any]:
    return (label for row in labels for label in (row or ())) if multi else labels


@dataclass
class _Labels:
    """The raw labels of a split."""

    split: str
    values: list[Any]  # per image: an index, an integer or a text; or a list of them
    multi: bool
    names: list[str] | None  # of a ClassLabel

    @classmethod
    def read(cls, split: str, dataset: datasets.Dataset, source: str, separator: str | None) -> "_Labels":
        feature = dataset.features["label"]
        kind, multi = class_feature(feature), is_multi_label(feature)
        inner = feature.feature if multi else feature
        if not isinstance(inner, datasets.ClassLabel | datasets.Value):
            raise DatasetError(
                f"{source}: the label column of {split} must contain classes (ClassLabel, text or integers), or lists of "
                f"them, got {feature}."
            )
        values = dataset.select_columns("label")[:]["label"]
        if separator is not None:
            if multi or not all(isinstance(value, str) for value in values):
                raise DatasetError(
                    f"`label_separator` requires text, but the labels of {source}, {split}, are {feature}. Leave it out."
                )
            values, multi = as_lists(values, separator), True
        if multi:
            values = [row if row is None else list(map(_whole, row)) for row in values]
        else:
            values = list(map(_whole, values))
        labels = cls(split, values, multi, None if kind is None else kind.names)
        labels._check(source)
        return labels

    def _check(self, source: str) -> None:
        """Raise DatasetError unless every image has a class and all labels have one type."""
        if self.multi and any(row is None for row in self.values):
            raise DatasetError(f"{source}: {self.split} has images whose list of labels is missing: label None.")
        present = set(_flat(self.values, self.multi))
        if self.names is not None:
            missing = {label for label in present if label is None or not 0 <= label < len(self.names)}
        else:
            missing = present & {None, ""}
        if missing:
            raise DatasetError(
                f"{source}: {self.split} has images without a class: label {listed(sorted(missing, key=str))}."
            )
        types = {type(label) for label in present}
        if self.names is None and types not in ({int}, {str}) and (types or not self.multi):
            found = ", ".join(sorted(kind.__name__ for kind in types))
            raise DatasetError(f"{source}: labels of {self.split} must be all integers or all text, got {found}.")

    @property
    def kind(self) -> str:
        """The type of the labels, to compare splits."""
        if self.names is not None:
            kind = "ClassLabel"
        else:
            first = next(iter(_flat(self.values, self.multi)), "")
            kind = "integers" if isinstance(first, int) else "text"
        return f"lists of {kind}" if self.multi else kind

    def present(self) -> set[Any]:
        return set(_flat(self.values, self.multi))


def unify_labels(
    splits: Mapping[str, datasets.Dataset],
    source: str,
    *,
    class_names: Sequence[str] | None = None,
    id_names: Mapping[int, str] | None = None,
    separator: str | None = None,
) -> dict[str, datasets.Dataset]:
    """Convert `label` to `ClassLabel`, or `List(ClassLabel)` for multi-label data, with the same names in every split.

    Args:
        splits: data with a column `label` of `ClassLabel`, text, integers, or lists of these.
        source: name of the data in messages.
        class_names: class names by index; labels are mapped onto them by name. By default the names of the `ClassLabel`, the
            sorted texts of the first split, or the integers from 0 to the highest.
        id_names: names of integer labels; by default the integers as text.
        separator: separator between the classes of one image in a text.

    Raises:
        DatasetError: if labels are missing, of mixed types, unknown, or different between splits.
    """
    labels = {name: _Labels.read(name, split, source, separator) for name, split in splits.items()}
    first = next(iter(labels.values()))
    for other in labels.values():
        if other.kind != first.kind:
            raise DatasetError(
                f"{source}: labels are {first.kind} in {first.split}, but {other.kind} in {other.split}."
            )

    def names_of(split: _Labels) -> dict[Any, str]:
        """Return raw label -> class name for the labels in a split."""
        if split.names is not None:
            return {label: split.names[label] for label in split.present()}
        return {label: (id_names or {}).get(label, str(label)) for label in split.present()}

    named = {name: names_of(split) for name, split in labels.items()}
    spelled = {name: split.names or list(named[name].values()) for name, split in labels.items()}
    called = one_spelling(spelled, source, class_names or ())
    if class_names is not None:
        called = _as_read_before(called, class_names, source)
    named = {name: {label: called[text] for label, text in found.items()} for name, found in named.items()}
    found = {name: set(names.values()) for name, names in named.items()}
    if class_names is not None:
        names = list(class_names)
        _check_known(found, names, source)
    else:
        names = _own_classes(labels, named, called, source)
        check_same_classes(found, source)
        warn_of_look_alikes(names, source)

    index = {name: i for i, name in enumerate(names)}
    unified = {}
    for name, split in splits.items():
        if labels[name].names == names and separator is None:
            unified[name] = split
            continue
        code = {label: index[text] for label, text in named[name].items()}
        values: list[Any] = (
            [code[label] for label in labels[name].values]
            if not first.multi
            else [list(dict.fromkeys(code[label] for label in row)) for row in labels[name].values]
        )
        feature = datasets.ClassLabel(names=names)
        feature = datasets.List(feature) if first.multi else feature
        unified[name] = split.remove_columns("label").add_column("label", values, feature=feature)
    return unified


def _as_read_before(called: dict[str, str], known: Sequence[str], source: str) -> dict[str, str]:
    """Rename `000` to `0` if the known classes have that name, because earlier versions read such labels as numbers.

    Nothing is renamed if two classes would become one.
    """
    numbers = {
        text: str(int(name))
        for text, name in called.items()
        if name not in known and re.fullmatch(r"0[0-9]{1,17}", name) and str(int(name)) in known
    }
    others = {name for text, name in called.items() if text not in numbers}
    if not numbers or len(set(numbers.values())) < len(numbers) or others & set(numbers.values()):
        return called
    logger.warning(
        "%s: %s are read as %s to match the known classes, because earlier versions read such labels as numbers",
        *(source, listed(numbers), listed(numbers.values())),
    )
    return called | numbers


def _check_known(found: Mapping[str, set[str]], names: Sequence[str], source: str) -> None:
    for split, present in found.items():
        if unknown := sorted(present - set(names)):
            raise DatasetError(
                f"{source}: {split} has {len(unknown)} classes that are not among the {len(names)} known ones: "
                f"{listed(unknown)}. Known classes: {listed(names)}."
            )
        if lacking := len(set(names) - present):
            logger.info("%s: %s has images of %d of %d classes", source, split, len(names) - lacking, len(names))


def _own_classes(
    labels: Mapping[str, _Labels], named: Mapping[str, dict[Any, str]], called: Mapping[str, str], source: str
) -> list[str]:
    """Return the class names by index, as in the first split."""
    first = next(iter(labels.values()))
    if first.names is not None:
        own = {name: [called[text] for text in split.names or ()] for name, split in labels.items()}
        names = own[first.split]
        if len(set(names)) < len(names):
            twice = sorted(name for name, count in Counter(names).items() if count > 1)
            raise DatasetError(
                f"{source}: class names of {first.split} differ only in Unicode form (NFC, NFD): {listed(twice)}. Rename them."
            )
        check_same_classes({name: set(texts) for name, texts in own.items()}, source)
        if unordered := [name for name, texts in own.items() if set(texts) == set(names) and texts != names]:
            raise DatasetError(
                f"{source}: {', '.join(unordered)} lists the same classes as {first.split} in another order."
            )
        return names
    present = sorted(first.present())
    if not present:
        raise DatasetError(f"{source}: no image of {first.split} has a label.")
    if isinstance(present[0], str):
        return sorted(set(named[first.split].values()))
    if present[0] < 0 or (gaps := gaps_of(present)):
        problem = f"got {present[0]}" if present[0] < 0 else f"no image of {first.split} has {gaps}"
        raise DatasetError(
            f"{source}: class ids must run from 0 to {present[-1]} without a gap; {problem}. Renumber the "
            "classes, or use names as labels."
        )
    return [named[first.split][label] for label in present]
