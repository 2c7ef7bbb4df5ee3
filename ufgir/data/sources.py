"""Records shared by all layouts: the arguments of `load_ufgir_dataset` (`Source`) and the data that a layout opens (`Opened`)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .catalog import FineGrainedDataset


@dataclass(frozen=True)
class Source:
    """A name or path, and the arguments that the layouts read.

    Args:
        name: name or path as given by the caller.
        path: the same as a path, with ~ expanded.
        columns: `image_column` and `label_column`; None to find them automatically.
        label_separator: separator between several classes in a text.
        known_classes: whether the caller gives the class names.
        listings: split -> file named by the caller, see `csv_train`.
        csv_data_folder: folder that the listed files are relative to.
        csv_class_names: file with the class names.
        config_name: configuration of a data set on the Hub.
        revision: revision of a data set on the Hub.
        cache_dir: cache folder of `datasets`.
        streaming: read the data during iteration.
        seed: seed of the drawn leaves.
        drawing: other arguments of the drawn leaves.
    """

    name: str
    path: Path
    columns: dict[str, str | None] = field(default_factory=lambda: {"image_column": None, "label_column": None})
    label_separator: str | None = None
    known_classes: bool = False
    listings: Mapping[str, str | None] = field(default_factory=dict)
    csv_data_folder: str | None = None
    csv_class_names: str | None = None
    config_name: str | None = None
    revision: str | None = None
    cache_dir: str | None = None
    streaming: bool = False
    seed: int = 0
    drawing: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_folder(self) -> bool:
        """Whether `path` is an existing folder."""
        return self.path.is_dir()


@dataclass
class Opened:
    """Data opened by a layout, and their properties.

    Args:
        data: a data set, or a dict of split name -> data set.
        columns: `image_column` and `label_column`; None to find them automatically.
        id_names: names of integer labels.
        labels_split: whether `label_separator` has already been applied.
        entry: catalog entry with the names of the splits and the expected numbers of images.
        where: function of a split and a row number that returns a name for an image stored in a table.
    """

    data: Any
    columns: dict[str, str | None]
    id_names: dict[int, str] | None = None
    labels_split: bool = False
    entry: "FineGrainedDataset | None" = None
    where: Callable[[str, int], str] | None = None
