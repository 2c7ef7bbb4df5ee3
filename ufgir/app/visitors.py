"""Uploads of visitors, and the messages they see if a request fails."""

import asyncio
import logging
import os
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .limits import SWEEP_SECONDS, UPLOAD_SECONDS


if TYPE_CHECKING:
    import gradio

logger = logging.getLogger(__name__)

UNANSWERED = "The page could not answer this request ({kind}). Reload it and try again."


class Uploads:
    """Folder for uploads, shared by all pages of a process. Old files are deleted, including aborted uploads and temporary files of
    Gradio, which Gradio itself does not delete.

    Attributes:
        folder: accessible only to the user who runs the page. It is deleted when the process ends.
    """

    def __init__(self) -> None:
        given = os.environ.get("GRADIO_TEMP_DIR")
        if given:
            Path(given).mkdir(parents=True, exist_ok=True)
        self._owned = tempfile.TemporaryDirectory(prefix="ufgir-page-", dir=given or None, ignore_cleanup_errors=True)
        self.folder = Path(self._owned.name)
        os.environ["GRADIO_TEMP_DIR"] = str(self.folder)  # Gradio reads it at each request

    def sweep(self, age: float = UPLOAD_SECONDS) -> None:
        """Delete files and folders that were not changed for `age` seconds."""
        old = [path for path in self.folder.rglob("*") if time.time() - path.lstat().st_mtime >= age]
        for path in sorted(old, reverse=True):  # the contents of a folder before the folder
            with suppress(OSError):  # a folder that is not empty, or a file that was deleted in the meantime
                path.rmdir() if path.is_dir() else path.unlink()

    @asynccontextmanager
    async def watched(self, app: Any) -> AsyncIterator[None]:
        """Sweep regularly while a page is served, and delete everything afterwards."""

        async def sweeping() -> None:
            while True:
                await asyncio.sleep(SWEEP_SECONDS)
                await asyncio.to_thread(self.sweep)

        task = asyncio.create_task(sweeping())
        try:
            yield
        finally:
            task.cancel()
            self.sweep(0)


@cache
def uploads() -> Uploads:
    """Return the upload folder of this process."""
    return Uploads()


def hide_tracebacks(gr: Any, blocks: "gradio.Blocks") -> None:
    """Replace the errors of a page by one sentence without paths or code, for visitors and API clients. Messages of `gr.Error` are meant
    for visitors and are kept; other errors are logged."""
    process = blocks.process_api

    async def guarded(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return await process(*args, **kwargs)
        except gr.Error as error:
            raise gr.Error(" ".join(str(error.message).split()), print_exception=False) from error
        except Exception as error:
            logger.warning("A request failed.", exc_info=True)
            raise gr.Error(UNANSWERED.format(kind=type(error).__name__), print_exception=False) from error

    blocks.process_api = guarded


async def error_response(request: Any, error: Exception) -> Any:
    """Return the response to a request that fails before it reaches a function of the page."""
    from starlette.responses import JSONResponse  # installed with Gradio

    return JSONResponse({"error": UNANSWERED.format(kind=type(error).__name__)}, status_code=500)
