"""What a caller gives to `load_ufgir_dataset`, and what a layout makes of it: the two records that all layouts share."""

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
        name: as the caller gave it.
        path: the same as a path, with the home folder in place of ~.
        columns: `image_column` and `label_column`, None where they are to be found.
        label_separator: what stands between several classes in one text.
        known_classes: the caller knows which classes there are.
        listings: split to the file that the caller names for it, see `csv_train`.
        csv_data_folder: what listed files are relative to.
        csv_class_names: the file with the names of classes.
        config_name: of a data set on the Hub.
        revision: of a data set on the Hub.
        cache_dir: of `datasets`.
        streaming: read while iterating.
        seed: of the drawn leaves.
        drawing: the other arguments of the drawn leaves.
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
        """Whether there is a folder of that name."""
        return self.path.is_dir()


@dataclass
class Opened:
    """Data as a layout has them, and what is known about them.

    Args:
        data: a data set, or a dict of them by the names of their splits.
        columns: `image_column` and `label_column`, None where they are to be found.
        id_names: names of integer labels.
        labels_split: `label_separator` has been applied.
        entry: the row of the catalog, which says how splits are called and how many images there are.
        where: of a split and the number of a row in it, what to call an image that lies in a table.
    """

    data: Any
    columns: dict[str, str | None]
    id_names: dict[int, str] | None = None
    labels_split: bool = False
    entry: "FineGrainedDataset | None" = None
    where: Callable[[str, int], str] | None = None
