"""The web page without a browser: results, costs, traces, the command and the Space."""

import re
import runpy
import signal
import socket
import sys
import threading
import time
import urllib.request
from _thread import interrupt_main
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from tests.app.helpers import refused, save_checkpoint
from ufgir.app import html as app_html
from ufgir.app import page as app
from ufgir.app.viewer import (
    PICTURE_SIDE,
    Cost,
    Leaf,
    Prediction,
    Setting,
    Viewer,
    make_leaf,
    missing_weights,
)
from ufgir.cli import entry as cli
from ufgir.profiling.macs import count_macs


ROOT = Path(__file__).parents[2]


# What is seen


def test_a_look_is_what_the_model_predicts(viewer, checkpoint, leaf):
    setting = Setting("evit", 0.5, True)
    prediction = viewer.predict(checkpoint, leaf, setting)
    found = viewer.checkpoint(checkpoint)
    pixels = found.image_processor(images=[leaf.image], return_tensors="pt").pixel_values
    with torch.no_grad():
        output = found.model(pixels)
    shares = output.logits[0].softmax(0)
    assert [name for name, _ in prediction.classes] == [
        f"cultivar_{i:02d}" for i in shares.argsort(descending=True).tolist()
    ]
    assert [share for _, share in prediction.classes] == pytest.approx(sorted(shares.tolist(), reverse=True))
    assert prediction.tokens == output.token_counts and not prediction.independent
    assert viewer.predict(checkpoint, Leaf(leaf.key, leaf.image.copy()), setting) is prediction  # remembered


def test_several_classes_a_leaf(tmp_path, leaf):
    name = save_checkpoint(tmp_path, problem_type="multi_label_classification")
    prediction = Viewer().predict(name, leaf, Setting("evit", 0.5, True))
    assert prediction.independent and sum(share for _, share in prediction.classes) != pytest.approx(1, abs=1e-3)
    assert "are independent" in app_html.prediction_table(prediction)


def test_costs_beside_dense(viewer, checkpoint, leaf):
    settings = [Setting("evit", 0.5, True), Setting("evit", 0.25, True)]
    costs = [viewer.cost(checkpoint, setting, settings) for setting in settings]
    assert costs[0].macs == count_macs(viewer.checkpoint(checkpoint).model)
    assert costs[1].macs < costs[0].macs < costs[0].dense_macs
    assert costs[0].time is None and costs[0].dense_time is None
    viewer.measure(checkpoint, leaf, settings)
    costs = [viewer.cost(checkpoint, setting, settings) for setting in settings]
    assert all(cost.time.median > 0 for cost in costs) and costs[0].dense_time == costs[1].dense_time
    assert viewer.cost(checkpoint, Setting("ats", 0.5, True), settings)[:1] == (None,)  # differs by image
    assert viewer.cost(checkpoint, settings[0], settings[:1]).time is None  # measured together or not at all


def test_loading_again_forgets_the_answers_of_before(tmp_path, leaf):
    name, viewer, setting = save_checkpoint(tmp_path), Viewer(), Setting("evit", 0.5, True)
    before = viewer.predict(name, leaf, setting)
    save_checkpoint(tmp_path, num_labels=2, id2label={0: "ash", 1: "oak"})
    assert viewer.predict(name, leaf, setting) is before
    viewer.load(name)
    assert {name for name, _ in viewer.predict(name, leaf, setting).classes} == {"ash", "oak"}
    with pytest.raises(ValueError):
        viewer.load("you/nothing")
    assert viewer.checkpoint(name)  # still there


@pytest.mark.parametrize("kind", app.kinds_on_page(of_patch=False))
def test_pictures_of_the_stages(viewer, checkpoint, leaf, kind):
    shown = viewer.stages(checkpoint, leaf, Setting("tome", 0.5, True), kind)
    stages = ["after layer 1", "after layer 2"]
    names = {"attention": ["layer 1", "layer 2", "layer 4"], "kept": stages, "merge": stages}.get(kind)
    assert shown and names in (None, [picture.name for picture in shown])
    assert all(picture.image.size == (PICTURE_SIDE, PICTURE_SIDE) for picture in shown)


def test_a_trace(viewer, checkpoint, leaf):
    shown = viewer.trace(checkpoint, leaf, Setting("topk", 1.0, False), (2, 1))
    assert [picture.note for picture in shown] == ["token 10: 1 patch"] * 2  # CLS, then 4 patches a row
    with pytest.raises(ValueError, match=r"`patch` must be a row in 0 \.\. 3"):
        viewer.trace(checkpoint, leaf, Setting("topk", 0.5, False), (4, 0))
    with pytest.raises(ValueError, match="reduces no tokens"):
        viewer.trace(checkpoint, leaf, Setting(None, 1.0, False), (0, 0))


def test_the_frame_lies_around_the_patch(viewer, checkpoint, leaf):
    plain = viewer.leaf_with_grid(checkpoint, leaf, None)
    framed = viewer.leaf_with_grid(checkpoint, leaf, (1, 2))
    width, height = framed.size
    assert plain.size == framed.size
    changed = [
        (x * 4 // width, y * 4 // height)
        for x in range(0, width, 7)
        for y in range(height)
        if plain.getpixel((x, y)) != framed.getpixel((x, y)) and 4 < y % (height // 4) < height // 4 - 4
    ]
    assert {column for column, _ in changed} <= {1, 2, 3} and {row for _, row in changed} == {1}
    assert viewer.leaf_with_grid(checkpoint, leaf, (9, 9)).tobytes() == plain.tobytes()


def test_names_of_strangers_are_escaped():
    evil = "<img src=x onerror=alert(1)>"
    prediction = Prediction([(evil, 0.5)], False, (3, 2), 0.1)
    parts = [
        app_html.prediction_table(prediction),
        app_html.problem(evil),
        app_html.hint(evil),
        app_html.cost_table(Cost(None, 10), prediction, evil),
        app_html.thumbnails([(evil + '"', make_leaf(Image.new("RGB", (4, 4))))]),
    ]
    assert all("<img src=x" not in part for part in parts)
    assert "GMACs cannot be computed in advance" in parts[3] and 'aria-label="Example &lt;img' in parts[4]
    assert '"' not in re.search(r'aria-label="([^>]*?)" title', parts[4]).group(1)


def test_the_command_refuses_in_a_sentence(capsys, tmp_path, monkeypatch, checkpoint):
    monkeypatch.chdir(tmp_path)
    message = refused(capsys)
    assert "outputs/demo" in message and "`make demo`" in message
    assert "`--port` must be in 0 .. 65535" in refused(capsys, checkpoint, "--port", "99999")
    assert "there is no checkpoint you/nothing" in refused(capsys, "you/nothing")
    assert "`--examples` must be a folder" in refused(capsys, checkpoint, "--examples", "nowhere")
    assert "choose another `--host`" in refused(capsys, checkpoint, "--host", "192.0.2.1", "--port", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"cannot be served at 127.0.0.1:{port}" in refused(capsys, checkpoint, "--port", port)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'gradio" in refused(capsys, checkpoint)


def test_the_command_serves_until_ctrl_c(capsys, checkpoint, monkeypatch, request):
    pages = []

    def visit(address):
        with urllib.request.urlopen(address, timeout=20) as answer:
            pages.append(answer.read().decode())
        interrupt_main()

    def ready(page, host, port, share, ready):
        def later(address):
            ready(address)
            threading.Thread(target=visit, args=(address,)).start()

        launch(page, host, port, share, later)

    launch = app.launch_page
    monkeypatch.setattr(app, "launch_page", ready)
    # Where a shell starts the tests in the background it has them ignore Ctrl-C, and the page would be served for ever.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    start = time.monotonic()
    assert cli.main(["app", checkpoint, "--port", "0"]) == 0
    assert time.monotonic() - start < 60
    out = capsys.readouterr().out.splitlines()
    assert (
        re.fullmatch(r"The page is at http://127.0.0.1:\d+/ until Ctrl-C.", out[0]) and out[1] == "The page is closed."
    )
    assert "What does the model keep of a leaf?" in pages[0]


def test_the_space(checkpoint, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("ufgir.app.launch_page", made.append)  # which the Space imports
    monkeypatch.setenv("MODEL_ID", checkpoint)
    Image.new("RGB", (8, 8)).save(tmp_path / "leaf.png")
    monkeypatch.setenv("EXAMPLES", str(tmp_path))
    space = runpy.run_path(str(ROOT / "spaces" / "app.py"), run_name="__main__")
    assert made == [space["page"]]
    monkeypatch.delenv("MODEL_ID")
    runpy.run_path(str(ROOT / "spaces" / "app.py"))  # begins with an empty field


def test_the_header_of_the_space():
    header = yaml.safe_load((ROOT / "spaces" / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert header["sdk"] == "gradio" and (ROOT / "spaces" / header["app_file"]).is_file()
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"gradio=={header['sdk_version']}\n" in constraints
    assert len(header["short_description"]) <= 60  # the Hub takes no more


def test_nothing_is_lacking_from_a_model_for_itself(viewer, checkpoint):
    model = viewer.checkpoint(checkpoint).model
    assert missing_weights(model, model.config) == []
