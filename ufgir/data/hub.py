"""Load data sets from the Hugging Face Hub, and fail within seconds if the Hub cannot be reached."""

import difflib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..utils.options import argument
from .catalog import FINE_GRAINED, SETS
from .checks import DatasetError
from .columns import Splits
from .sources import Opened, Source


HUB_TIMEOUT = 10.0  # seconds to wait for the first response of the Hub


def is_known_set(source: Source) -> bool:
    """Return whether the catalog has an entry of that name."""
    return source.name in SETS or source.name in FINE_GRAINED


def open_known_set(source: Source) -> Opened:
    """Open a data set of the Hub by its name in the catalog (an entry of `ufgir.data.load.LAYOUTS`).

    Raises:
        DatasetError: if it is not on the Hub.
    """
    if source.name in SETS:
        raise DatasetError(
            f"{argument('name_or_path')}: {source.name} is a set of Ultra-FGVC, which is not on the Hub. Download it, run "
            f"`ufgir prepare {source.name} --source RAW --output OUT`, and pass the folder OUT."
        )
    entry = FINE_GRAINED[source.name]
    if entry.hub_id is None:
        raise DatasetError(f"{argument('name_or_path')}: {entry.instructions()}")
    columns = {name: value or getattr(entry, name) for name, value in source.columns.items()}
    return Opened(_load(entry.hub_id, source), columns, entry=entry)


def open_hub(source: Source) -> Opened:
    """Open any other data set of the Hub (an entry of `ufgir.data.load.LAYOUTS`).

    Raises:
        DatasetError: if the name cannot be an id on the Hub, or there is no such data set.
    """
    if problem := missing_folder(source.name):
        raise DatasetError(problem)
    return Opened(_load(source.name, source), source.columns)


def _load(hub_id: str, source: Source) -> Splits:
    return load_hub(hub_id, source.config_name, source.revision, source.cache_dir, source.streaming)


def missing_folder(source: str) -> str | None:
    """Return the error message for a `source` that is not a folder and cannot be an id on the Hub; None if it can be an id.

    A name is a path, not an id, if it starts with ., / or ~, has more than two parts, or starts with an existing folder.
    """
    parts = source.replace("\\", "/").split("/")
    is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) and not source.endswith("/")
    if is_id and not (len(parts) == 2 and Path(parts[0]).is_dir()):
        return None
    parent = Path(os.path.expanduser(source)).parent
    hint = _near(source) if parent.is_dir() else f" Nor does {parent}."
    return f"{argument('name_or_path')}: the folder {source} does not exist.{hint}"


def _near(source: str) -> str:
    """Suggest a folder with a similar name as a question; return an empty string if there is none."""
    parent = Path(os.path.expanduser(source)).parent
    folders = [child.name for child in parent.iterdir() if child.is_dir()] if parent.is_dir() else []
    close = difflib.get_close_matches(Path(source).name, folders, n=1)
    return f" Did you mean {parent / close[0]}?" if close else ""


@contextmanager
def _offline() -> Iterator[None]:
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _hub_problem(name: str, revision: str | None) -> str | None:
    """Return None if the data set is on the Hub, else the reason why the Hub cannot be reached.

    `datasets` retries six times within 23 seconds before it gives up; a single request is sent first.

    Raises:
        DatasetError: if the Hub reports that the data set does not exist or may not be read.
    """
    if datasets.config.HF_HUB_OFFLINE:
        return "offline mode is on (HF_HUB_OFFLINE)"
    try:
        HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(name, revision=revision, timeout=HUB_TIMEOUT)
    except OfflineModeIsEnabled:
        return "offline mode is on (HF_HUB_OFFLINE)"
    except GatedRepoError as error:
        raise DatasetError(
            f"{argument('name_or_path')}: the data set {name} on the Hub is gated. Accept its terms on "
            f"{datasets.config.HF_ENDPOINT}/datasets/{name} and log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise DatasetError(
            f"{argument('revision')}: the data set {name} on the Hub has no revision {revision!r}."
        ) from error
    except RepositoryNotFoundError as error:
        raise DatasetError(_no_such(name, "the Hub has no data set of this name that you may read")) from error
    except HTTPError as error:
        return f"the Hub does not respond ({type(error).__name__}: {error})"
    return None


def _no_such(name: str, reason: str) -> str:
    return (
        f"{argument('name_or_path')} must be 'synthetic_leaves', a folder, a name of `ufgir datasets`, or a data set on the Hub, got "
        f"{name!r}: there is no such folder in {os.getcwd()}, and {reason}.{_near(name)}"
    )


def load_hub(
    name: str, config_name: str | None, revision: str | None, cache_dir: str | None, streaming: bool
) -> Splits:
    """Load a data set from the Hub, or from the cache if the Hub cannot be reached.

    Raises:
        DatasetError: if it is not found, not accessible or not cached; within seconds.
    """
    problem = _hub_problem(name, revision)
    arguments = {"revision": revision, "cache_dir": cache_dir, "streaming": streaming}
    try:
        if problem is None:
            return datasets.load_dataset(name, config_name, **arguments)
        with _offline():
            return datasets.load_dataset(name, config_name, **arguments)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if problem is not None:
            raise DatasetError(_no_such(name, f"{problem} and it is not in the cache")) from error
        raise DatasetError(
            f"{argument('name_or_path')}: loading {name!r} from the Hub failed ({type(error).__name__}: {error})."
        ) from error
