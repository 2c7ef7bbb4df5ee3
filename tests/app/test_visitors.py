"""Uploads of visitors, and the messages for invalid requests."""

import json
import os
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from tests.app.helpers import png
from ufgir.app import limits
from ufgir.app.page import make_page, serve_page
from ufgir.app.viewer import make_leaf
from ufgir.app.visitors import uploads


# of Gradio's own queue
pytestmark = pytest.mark.filterwarnings("ignore::Warning:gradio.queueing")


@pytest.fixture(scope="module")
def served(checkpoint):
    """Yield a public page and its address."""
    page = make_page(checkpoint, folders=False)
    yield page, serve_page(page, "127.0.0.1", 0)
    page.close(verbose=False)


def files():
    return [file for file in uploads().folder.rglob("*") if file.is_file() and file.stat().st_size]


def ask(address, path, data, kind="application/json"):
    """Return status and text of the response."""
    request = urllib.request.Request(f"{address}gradio_api/{path}", data, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def call(served, function, data, session):
    """Return the last message of a function of the page that is called as an API."""
    page, address = served
    number = next(i for i, one in page.fns.items() if one.fn.__name__ == function)
    body = {"data": data, "fn_index": number, "session_hash": session}
    assert ask(address, "queue/join", json.dumps(body).encode())[0] == 200
    with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash={session}", timeout=60) as lines:
        for line in lines:
            if line.startswith(b"data:"):
                message = json.loads(line[5:])
                if message["msg"] == "process_completed":
                    return message
    raise AssertionError("no answer")


def upload(served, content):
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="leaf.png"\r\n\r\n'
        + content
        + b"\r\n--x--\r\n"
    )
    status, text = ask(served[1], "upload", body, "multipart/form-data; boundary=x")
    assert status == 200
    return json.loads(text)[0]


def leaves_in_memory(page, session):
    return [value for _, value, _ in page.state_holder[session].state_components if value.__class__.__name__ == "Leaf"]


@pytest.mark.parametrize("content", [png(40, 30), b"broken"], ids=["image", "broken"])
def test_an_upload_is_deleted_once_it_is_read(served, content):
    session = f"upload{len(content)}"
    path = upload(served, content)
    assert Path(path).is_file() and Path(path).is_relative_to(uploads().folder)
    message = call(served, "_upload", [{"path": path, "meta": {"_type": "gradio.FileData"}}, None], session)
    assert message["success"]
    assert files() == []
    leaf = make_leaf(Image.new("RGB", (40, 30)))
    assert (leaves_in_memory(served[0], session) == [leaf]) == (content != b"broken")


def test_the_image_is_forgotten_when_the_page_is_closed(served):
    page = served[0]
    call(
        served,
        "_upload",
        [{"path": upload(served, png(30, 30)), "meta": {"_type": "gradio.FileData"}}, None],
        "leaving",
    )
    assert len(leaves_in_memory(page, "leaving")) == 1
    with urllib.request.urlopen(f"{served[1]}gradio_api/heartbeat/leaving", timeout=60) as open_page:
        assert b"ALIVE" in open_page.readline()
    until = time.monotonic() + 60
    while leaves_in_memory(page, "leaving") and time.monotonic() < until:
        time.sleep(0.05)
    assert leaves_in_memory(page, "leaving") == []
    assert files() == []


def test_uploads_that_nobody_reads_are_gone_within_an_hour(served):
    """Aborted uploads, which Gradio does not track, and their folders are deleted as well."""
    folder = uploads().folder
    assert limits.UPLOAD_SECONDS + limits.SWEEP_SECONDS <= 3600 and folder.stat().st_mode & 0o077 == 0
    unread, broken_off = Path(upload(served, png(20, 20))), folder / "tmpabc"
    broken_off.write_bytes(b"the first half")
    uploads().sweep()
    assert unread.is_file() and broken_off.is_file()
    for file in (unread, broken_off):
        os.utime(file, (0, time.time() - limits.UPLOAD_SECONDS - 1))
    uploads().sweep()
    assert not unread.exists() and not broken_off.exists()
    uploads().sweep(0)
    assert list(folder.iterdir()) == []


def test_nothing_is_left_when_the_page_ends(checkpoint):
    page = make_page(checkpoint)
    address = serve_page(page, "127.0.0.1", 0)
    path = Path(upload((page, address), png(20, 20)))
    assert path.is_file()
    page.close(verbose=False)
    assert not path.exists() and files() == []


CONTROLS = [None, None, False, "kept", 0, 0, "evit", 0.5, True, "evit", 0.5, True]


@pytest.mark.parametrize(
    "function, data",
    [
        ("_show", []),
        ("_show", ["x"] * 12),
        ("_show", [*CONTROLS[:4], "a", *CONTROLS[5:]]),
        ("_show", [*CONTROLS[:7], 7, *CONTROLS[8:]]),
        ("_show", [*CONTROLS[:2], {"a": 1}, *CONTROLS[3:]]),
        ("_load", [None] * 11),
        ("pick", [None]),
        ("_upload", ["setup.cfg", None]),
        ("_upload", [{"path": "setup.cfg", "meta": {"_type": "gradio.FileData"}}, None]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_of_the_api_are_sentences(served, function, data, caplog):
    message = call(served, function, data, "stranger")
    error = message["output"]["error"]
    assert not message["success"] and error and "\n" not in error and len(error) < 400
    for secret in (str(Path.cwd()), "object at", "Traceback", "pydantic"):
        assert secret not in error
    unknown = ask(served[1], "queue/join", json.dumps({"data": [], "fn_index": 999, "session_hash": "x"}).encode())
    assert unknown[0] == 500 and "Reload it and try again." in json.loads(unknown[1])["error"]


def test_files_of_the_machine_are_all_alike(served):
    """The response does not reveal whether a path exists."""
    answers = [
        ask(served[1], f"file={path}", None) for path in ("setup.cfg", "nowhere.cfg", "/etc/passwd", "/etc/nobody")
    ]
    assert {status for status, _ in answers} == {403}
