"""ONNX Runtime Web, which runs the graphs in a browser. npm downloads it when a page is built; the page contains its files."""

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ..utils.files import whole_files


PACKAGE = "onnxruntime-web"
VERSION = "1.30.0"
INTEGRITY = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="  # SHA-512 of the package

# SHA-256 of the files that a page needs, in the order module, loader, WebAssembly.
WASM = {
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
WEBGPU = {
    "ort.webgpu.min.mjs": "3dffff71811bc13a3a3d9591c57ca5ee5735b8f5f3eaf789510b02bb040ae3a0",
    "ort-wasm-simd-threaded.asyncify.mjs": "3d1c85995364bb643302fc6fd877a0c3ba5ae72401815e0f24828a53d9191e28",
    "ort-wasm-simd-threaded.asyncify.wasm": "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da",
}


def runtime_files(webgpu: bool = False, source: str | os.PathLike[str] | None = None) -> dict[str, Path]:
    """Find or download the files of ONNX Runtime Web that a page needs, and check their checksums.

    Args:
        webgpu: the variant that also supports GPUs, through WebGPU.
        source: folder with these files, the unpacked npm package, or the packed npm package (.tgz). By default, npm downloads
            the package once to the user's cache.

    Returns:
        Name -> file.

    Raises:
        ValueError: if npm or the network is missing, or files are missing or not from `VERSION`.
    """
    files = WEBGPU if webgpu else WASM
    if source is None:
        folder = _cache()
        if not _are_there(folder, files):
            _fetch(folder)
    elif Path(source).is_file():
        folder = _cache()
        _unpack(Path(source), folder)
    else:
        folder = next((place for place in (Path(source, "dist"), Path(source)) if place.is_dir()), Path(source))
    for name, checksum in files.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(
                f"`runtime` {folder} does not contain {name}: it must contain {', '.join(files)} of {PACKAGE} {VERSION}."
            )
        if hashlib.sha256(file.read_bytes()).hexdigest() != checksum:
            raise ValueError(f"`runtime` {file} is not from {PACKAGE} {VERSION}: use the files of this version.")
    return {name: folder / name for name in files}


def is_cached(webgpu: bool = False) -> bool:
    """Return whether `runtime_files` needs neither npm nor a network."""
    return _are_there(_cache(), WEBGPU if webgpu else WASM)


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "ufgir", f"{PACKAGE}-{VERSION}")


def _are_there(folder: Path, files: Mapping[str, str]) -> bool:
    return all((folder / name).is_file() for name in files)


def _fetch(folder: Path) -> None:
    """Download the package with npm, which uses the proxies and registries configured on this machine."""
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            f"the page needs {PACKAGE} {VERSION}, which npm downloads, and npm is not installed: install Node.js "
            "(`apt-get install npm`, or nodejs.org), or pass `--runtime` with a folder that contains the package."
        )
    with tempfile.TemporaryDirectory(prefix="ufgir-") as place:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--silent", "--pack-destination", place]
        try:
            done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=600, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ValueError(f"npm could not download {PACKAGE} {VERSION}: {type(error).__name__}.") from error
        packed = next(Path(place).glob("*.tgz"), None)
        if done.returncode or packed is None:
            message = next((line for line in done.stderr.splitlines() if line.strip()), "without an error message")
            raise ValueError(
                f"npm could not download {PACKAGE} {VERSION} ({message.strip()}). Try again, or pass `--runtime`."
            )
        _unpack(packed, folder)


def _unpack(packed: Path, folder: Path) -> None:
    """Check the checksum of the package, and extract the files that pages need."""
    found = base64.b64encode(hashlib.sha512(packed.read_bytes()).digest()).decode()
    if found != INTEGRITY:
        raise ValueError(f"{packed} is not {PACKAGE} {VERSION}: its SHA-512 is {found}, not {INTEGRITY}.")
    with tarfile.open(packed) as archive, whole_files(folder) as place:
        for name in (*WASM, *WEBGPU):
            file = archive.extractfile(f"package/dist/{name}")
            if file is not None:
                (place / name).write_bytes(file.read())


if __name__ == "__main__":  # download the package for the tests
    try:
        runtime_files()
    except ValueError as error:
        sys.exit(str(error))
