"""Serve a built page on this machine, with the headers that allow it to use several threads."""

import gzip
import posixpath
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # revalidate each time, so that a rebuilt page is loaded
}
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".md": "text/markdown; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".wasm": "application/wasm",
    ".webmanifest": "application/manifest+json",
}
_UNPACKED = (".png",)  # files that are already compressed


@lru_cache(maxsize=64)
def _packed(path: Path, changed: int) -> bytes:
    """Compress a file with gzip; `changed` is its modification time in nanoseconds, a key of the cache."""
    return gzip.compress(path.read_bytes(), 6, mtime=0)


class _Handler(SimpleHTTPRequestHandler):
    """Request handler that serves the files of one folder, compressed if the browser supports it."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        root = Path(self.directory).resolve()
        wanted = posixpath.normpath(unquote(urlsplit(self.path).path)).lstrip("/")
        path = (root / wanted).resolve()
        if path == root:
            path = root / "index.html"
        if not path.is_relative_to(root) or not path.is_file():
            self.send_error(404)
            return
        changed = path.stat().st_mtime_ns
        mark = f'"{changed:x}-{path.stat().st_size:x}"'
        if self.headers.get("If-None-Match") == mark:
            self.send_response(304)
            self.send_header("ETag", mark)
            self.end_headers()
            return
        packs = "gzip" in self.headers.get("Accept-Encoding", "") and path.suffix not in _UNPACKED
        content = _packed(path, changed) if packs else path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", TYPES.get(path.suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", mark)
        if packs:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        if body:
            self.wfile.write(content)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


def make_server(folder: Path, port: int = 8000) -> ThreadingHTTPServer:
    """Create a server of a folder at 127.0.0.1 without starting it; port 0 selects a free port.

    Raises:
        ValueError: if the port is in use.
    """
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, directory=str(folder)))
    except (OSError, OverflowError) as error:
        raise ValueError(f"the page cannot be served at 127.0.0.1:{port}: choose another `--serve` port.") from error


def serve_folder(folder: Path, port: int = 8000, ready: Callable[[str], None] = lambda address: None) -> None:
    """Serve a built page until Ctrl-C; `ready` is called with its URL.

    Raises:
        ValueError: if the port is in use.
    """
    with make_server(folder, port) as server, suppress(KeyboardInterrupt):
        ready(f"http://127.0.0.1:{server.server_address[1]}/")
        server.serve_forever()
