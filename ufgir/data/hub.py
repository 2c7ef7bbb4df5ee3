"""Load data sets from the Hugging Face Hub, with an answer within seconds where it cannot be reached."""

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


PATIENCE = 10.0  # seconds to wait for the Hub's first answer


def is_known_set(source: Source) -> bool:
    """Whether the catalog has a row of that name."""
    return source.name in SETS or source.name in FINE_GRAINED


def open_known_set(source: Source) -> Opened:
    """A data set of the Hub by its name in the catalog, for the table in `ufgir.data.load`.

    Raises:
        DatasetError: it is not on the Hub.
    """
    if source.name in SETS:
        raise DatasetError(
            f"{argument('name_or_path')}: {source.name} is a set of Ultra-FGVC, which is not on the Hub: download it, run "
            f"`ufgir prepare {source.name} --source RAW --output OUT`, and give the folder OUT."
        )
    entry = FINE_GRAINED[source.name]
    if entry.hub_id is None:
        raise DatasetError(f"{argument('name_or_path')}: {entry.how_to_get()}")
    columns = {name: value or getattr(entry, name) for name, value in source.columns.items()}
    return Opened(_load(entry.hub_id, source), columns, entry=entry)


def open_hub(source: Source) -> Opened:
    """Any other data set of the Hub, for the table in `ufgir.data.load`.

    Raises:
        DatasetError: the name cannot be meant as an id on the Hub, or there is no such data set.
    """
    if problem := missing_folder(source.name):
        raise DatasetError(problem)
    return Opened(_load(source.name, source), source.columns)


def _load(hub_id: str, source: Source) -> Splits:
    return load_hub(hub_id, source.config_name, source.revision, source.cache_dir, source.streaming)


def missing_folder(source: str) -> str | None:
    """The sentence for a `source` that is no folder and cannot be meant as an id on the Hub; None if it can.

    Meant as a path is what starts with ., / or ~, has more than two parts, or starts with a folder that is there.
    """
    parts = source.replace("\\", "/").split("/")
    is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) and not source.endswith("/")
    if is_id and not (len(parts) == 2 and Path(parts[0]).is_dir()):
        return None
    parent = Path(os.path.expanduser(source)).parent
    hint = _near(source) if parent.is_dir() else f" Nor does {parent}."
    return f"{argument('name_or_path')}: the folder {source} does not exist.{hint}"


def _near(source: str) -> str:
    """A folder with a similar name, as a question; else nothing."""
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


def _hub_answers(name: str, revision: str | None) -> str | None:
    """None if the data set is on the Hub, else why nothing can be heard of it.

    `datasets` asks six times in 23 seconds before it gives up: one question comes first.

    Raises:
        DatasetError: the Hub answers that there is no such data set, or that it may not be read.
    """
    if datasets.config.HF_HUB_OFFLINE:
        return "offline mode is on (HF_HUB_OFFLINE)"
    try:
        HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(name, revision=revision, timeout=PATIENCE)
    except OfflineModeIsEnabled:
        return "offline mode is on (HF_HUB_OFFLINE)"
    except GatedRepoError as error:
        raise DatasetError(
            f"{argument('name_or_path')}: the data set {name} on the Hub is gated: accept its terms on "
            f"{datasets.config.HF_ENDPOINT}/datasets/{name} and log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise DatasetError(
            f"{argument('revision')}: the data set {name} on the Hub has no revision {revision!r}."
        ) from error
    except RepositoryNotFoundError as error:
        raise DatasetError(_no_such(name, "the Hub has none of this name, or none that you may read")) from error
    except HTTPError as error:
        return f"the Hub does not answer ({type(error).__name__}: {error})"
    return None


def _no_such(name: str, reason: str) -> str:
    return (
        f"{argument('name_or_path')} must be 'synthetic_leaves', a folder, a name of `ufgir datasets`, or a data set on the Hub, got "
        f"{name!r}: there is no such folder in {os.getcwd()}, and {reason}.{_near(name)}"
    )


def load_hub(
    name: str, config_name: str | None, revision: str | None, cache_dir: str | None, streaming: bool
) -> Splits:
    """A data set of the Hub, or what is left of it in the cache where the Hub cannot be reached.

    Raises:
        DatasetError: not found, no access, not cached; within seconds.
    """
    silence = _hub_answers(name, revision)
    arguments = {"revision": revision, "cache_dir": cache_dir, "streaming": streaming}
    try:
        if silence is None:
            return datasets.load_dataset(name, config_name, **arguments)
        with _offline():
            return datasets.load_dataset(name, config_name, **arguments)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if silence is not None:
            raise DatasetError(_no_such(name, f"{silence} and it is not in the cache")) from error
        raise DatasetError(
            f"{argument('name_or_path')}: loading {name!r} from the Hub failed ({type(error).__name__}: {error})."
        ) from error
