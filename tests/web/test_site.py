"""The folder of the page: its parts, their sources, and the server."""

import base64
import hashlib
import http.client
import json
import re
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import onnx
import onnxruntime
import pytest
import yaml

from clca.image_processing_clca import CLCAImageProcessor
from tests.web.helpers import CONFIG, PROCESSOR, kept_json, served, small_graph
from ufgir.cli import entry as cli
from ufgir.web import runtime
from ufgir.web.graphs import share_weights
from ufgir.web.runtime import runtime_files
from ufgir.web.server import HEADERS, serve_folder
from ufgir.web.site import assemble, preprocessing


@pytest.fixture
def parts(tmp_path):
    """Return replacements of the files of ONNX Runtime Web."""
    files = {}
    for name in runtime.WASM:
        files[name] = tmp_path / f"given-{name}"
        files[name].write_text(name)
    return files


def write(folder, parts, graphs=None, title="Leaves"):
    graphs = [small_graph()] if graphs is None else graphs
    return assemble(CONFIG, preprocessing(PROCESSOR, CONFIG), graphs, parts, folder, "float32", title)


def files_of(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_the_worker_keeps_every_file_with_its_checksum(tmp_path, parts):
    site = write(tmp_path / "site", parts)
    worker = (site.folder / "sw.js").read_text(encoding="utf-8")
    kept = json.loads(re.search(r"^const FILES = (\{.*?\});", worker, re.MULTILINE).group(1))
    assert set(kept) == files_of(site.folder) - {"sw.js", "README.md"} and "{{" not in worker
    for name, checksum in kept.items():
        found = hashlib.sha256((site.folder / name).read_bytes()).digest()
        assert checksum == "sha256-" + base64.b64encode(found).decode()
    assert set(site.sizes) == files_of(site.folder)


def test_graphs_share_one_file_of_weights(tmp_path, parts):
    graphs = [small_graph(), small_graph(keep_rate=0.5), small_graph(1, 0.25)]
    expected = [onnxruntime.InferenceSession(graph.model.SerializeToString()) for graph in graphs]
    size = graphs[0].model.graph.initializer[0].ByteSize()
    site = write(tmp_path / "site", parts, graphs)
    (weights,) = (site.folder / "model").glob("*.bin")
    assert abs(weights.stat().st_size - 2 * size) < 100  # equal ones once
    pixels = np.random.default_rng(0).normal(size=(1, 3, 64, 64)).astype("f4")
    told = kept_json(site)
    assert [graph["keepRate"] for graph in told["graphs"]] == [None, 0.5, 0.25]
    for file, session in zip((graph["file"] for graph in told["graphs"]), expected, strict=True):
        found = onnxruntime.InferenceSession(site.folder / file).run(None, {"pixel_values": pixels})
        for ours, theirs in zip(found, session.run(None, {"pixel_values": pixels}), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_small_tensors_stay_in_the_graph():
    graph = small_graph().model
    content, name = share_weights([graph], "w-{hash}.bin")
    apart = {t.name for t in graph.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert apart == {"filters"} and len(content) == 16 * 3 * 64 * 4
    assert name == f"w-{hashlib.sha256(content).hexdigest()[:12]}.bin"


def test_what_the_page_is_told(tmp_path, parts):
    site = write(tmp_path / "site", parts, title='A & <b>"x"</b>')
    told = kept_json(site)
    assert told["classes"] == ["ash", "<b>oak</b>", "elm"] and told["grid"] == [8, 8]
    assert told["image"] == {
        "resize": [73, 73],
        "crop": [64, 64],
        "filter": "bicubic",
        "scale": 1 / 255,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    page = (site.folder / "index.html").read_text(encoding="utf-8")
    assert "<title>A &amp; &lt;b>&quot;x&quot;&lt;/b></title>" in page and "{{" not in page
    assert not re.search(r"https?://", page + (site.folder / "app.js").read_text(encoding="utf-8"))
    manifest = json.loads((site.folder / "manifest.webmanifest").read_text(encoding="utf-8"))
    assert all((site.folder / icon["src"]).is_file() for icon in manifest["icons"])
    header = yaml.safe_load((site.folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert (
        header["sdk"] == "static"
        and header["custom_headers"].items()
        >= {
            "cross-origin-embedder-policy": "require-corp",
            "cross-origin-opener-policy": "same-origin",
        }.items()
    )


def test_a_page_that_is_built_again_takes_the_place_of_the_old_one(tmp_path, parts):
    folder = tmp_path / "site"
    write(folder, parts)
    (folder / "README.md").write_text("my own")
    (folder / "notes.txt").write_text("mine")
    before = files_of(folder)
    write(folder, parts, [small_graph(3)])
    after = files_of(folder)
    assert len(after) == len(before) and len(list((folder / "model").iterdir())) == 2
    assert (folder / "README.md").read_text() == "my own" and (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "processor, words",
    [
        (CLCAImageProcessor(size={"shortest_edge": 64}), "resizes to a height and a width.*`size`"),
        (CLCAImageProcessor(size={"height": 32, "width": 32}), r"produces images of \(32, 32\)"),
        (CLCAImageProcessor(size={"height": 64, "width": 64}, resample=0), "`resample`"),
        (CLCAImageProcessor(size={"height": 64, "width": 64}, do_resize=False), "resizes to a height and a width"),
    ],
    ids=["edge", "size", "nearest", "none"],
)
def test_processors_that_a_browser_cannot_follow_are_refused(processor, words):
    with pytest.raises(ValueError, match=words):
        preprocessing(processor, CONFIG)


# ONNX Runtime Web


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_without_npm_a_sentence_says_what_to_install(no_cache, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        ValueError, match=r"onnxruntime-web 1\.30\.0.*npm is not installed.*install Node\.js.*`--runtime`"
    ):
        runtime_files()


def test_without_a_network_npm_is_quoted(no_cache, tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ValueError, match=r"npm could not download.*ENOTFOUND.*`--runtime`"):
        runtime_files()


def test_other_files_are_not_taken(no_cache, tmp_path):
    with pytest.raises(ValueError, match=r"does not contain ort\.wasm\.min\.mjs"):
        runtime_files(source=tmp_path / "nowhere")
    (tmp_path / "dist").mkdir()
    for name in runtime.WASM:
        (tmp_path / "dist" / name).write_text("other")
    with pytest.raises(ValueError, match=r"is not from onnxruntime-web 1\.30\.0"):
        runtime_files(source=tmp_path)
    (tmp_path / "package.tgz").write_bytes(b"other")
    with pytest.raises(ValueError, match="its SHA-512 is"):
        runtime_files(source=tmp_path / "package.tgz")


# The server


def test_the_server_sends_headers_and_nothing_from_outside(tmp_path, parts):
    site = write(tmp_path / "site", parts)
    (tmp_path / "secret.txt").write_text("secret")
    with served(site.folder) as address:
        connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)

        def get(path, method="GET", **headers):
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer, answer.read()

        answer, body = get("/")
        assert body == (site.folder / "index.html").read_bytes()
        assert {name: answer.getheader(name) for name in HEADERS} == HEADERS
        assert answer.getheader("Content-Type").startswith("text/html")
        assert get("/app.js", "HEAD")[1] == b"" and get("/app.js?x=1")[0].status == 200
        again, body = get("/app.js", **{"If-None-Match": get("/app.js")[0].getheader("ETag")})
        assert again.status == 304 and body == b""
        packed, _ = get("/model.json", **{"Accept-Encoding": "gzip"})
        assert packed.getheader("Content-Encoding") == "gzip"
        for path in ("/../secret.txt", "/%2e%2e/secret.txt", "/model", "/nothing"):
            assert get(path)[0].status == 404
        connection.close()


def test_it_is_served_until_ctrl_c(tmp_path, parts):
    site, pages = write(tmp_path / "site", parts), []

    def visit(address):
        host = urlsplit(address)
        assert host.hostname == "127.0.0.1"
        with pytest.raises(ValueError, match=f"cannot be served at 127.0.0.1:{host.port}"):
            serve_folder(site.folder, host.port)
        pages.append(address)
        raise KeyboardInterrupt

    serve_folder(site.folder, 0, visit)
    assert len(pages) == 1


# The command


@pytest.mark.parametrize(
    "options, words",
    [
        (["--serve"], "`--serve` has no effect without `--web`"),
        (["--web", "FILE"], "`--web` must be a folder"),
        (["--web", "page", "--serve", "99999"], "`--serve` must be in 0 .. 65535, got 99999"),
        (["--web", "page", "--keep-rates", "2"], "`--keep-rates` must be in (0, 1], got 2.0"),
    ],
)
def test_the_command_refuses_in_a_sentence(options, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("")
    with pytest.raises(SystemExit):
        cli.main(["export", "nowhere", *options])
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
