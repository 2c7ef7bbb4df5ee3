"""The web page without a browser: pictures of strangers, settings on the same weights, costs, traces, sentences."""

import logging
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
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import httpx
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    ResNetConfig,
    ViTConfig,
    ViTForImageClassification,
)

from clca import REDUCTIONS, CLCAViTConfig, CLCAViTForImageClassification
from tests.app.helpers import png, save_checkpoint, save_processor
from tests.helpers import TINY
from ufgir.app import html as app_html
from ufgir.app import page as app
from ufgir.app import viewer as app_model
from ufgir.app.viewer import (
    LONGEST_SIDE,
    PICTURE_SIDE,
    Cost,
    Leaf,
    Look,
    Setting,
    Viewer,
    drawn_examples,
    folder_examples,
    lacking,
    load_checkpoint,
    make_leaf,
    open_leaf,
    own_setting,
    setting_config,
    with_weights,
)
from ufgir.checkpoints.loading import load_config, load_model
from ufgir.cli import entry as cli
from ufgir.cli.common import open_image
from ufgir.data.load import load_images
from ufgir.data.transformed import TransformedImages
from ufgir.profiling.macs import count_macs
from ufgir.transforms.preprocessing import EvalTransform
from ufgir.visualization.kinds import make_view


ROOT = Path(__file__).parents[2]
OWN_PARAMETERS = {"dpcknn", "dyvit", "patchmerger", "sinkhorn", "sit"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("evit"))


@pytest.fixture(scope="module")
def viewer():
    return Viewer()


@pytest.fixture(scope="module")
def leaf():
    return make_leaf(Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 40))


# Pictures


def test_pictures_of_all_kinds_become_small_and_rgb(tmp_path):
    turned = Image.new("RGB", (40, 20), "green")
    turned.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright
    turned.save(tmp_path / "turned.png", exif=exif)
    assert open_leaf(tmp_path / "turned.png").picture.size == (20, 40)
    Image.new("RGBA", (10, 10), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_leaf(tmp_path / "clear.png").picture.getpixel((5, 5)) == (255, 255, 255)
    Image.new("CMYK", (3000, 10)).save(tmp_path / "long.jpg")
    assert open_leaf(tmp_path / "long.jpg").picture.size[0] == LONGEST_SIDE
    for mode in ("1", "L", "P", "I;16"):
        Image.new(mode, (8, 6)).save(tmp_path / "mode.png")
        assert open_leaf(tmp_path / "mode.png").picture.mode == "RGB"


def test_a_huge_picture_is_made_small_and_a_bomb_is_refused(tmp_path):
    (tmp_path / "huge.png").write_bytes(png(12000, 9000))
    assert open_leaf(tmp_path / "huge.png").picture.size == (1024, 768)
    (tmp_path / "bomb.png").write_bytes(png(30000, 30000, rows=1))
    with pytest.raises(ValueError, match=r"bomb.png has more than 120 million pixels: make it smaller"):
        open_leaf(tmp_path / "bomb.png")


def test_no_file_reaches_another_program(tmp_path, monkeypatch):
    """Pillow gives EPS to Ghostscript, whatever the file is called."""
    called = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *eps, **options: called.append(eps))
    (tmp_path / "leaf.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n")
    with pytest.raises(ValueError, match=r"leaf\.png is not a picture"):
        open_leaf(tmp_path / "leaf.png")
    assert called == []


def test_a_file_is_the_same_picture_everywhere(tmp_path, viewer, checkpoint):
    """On the page, in `ufgir visualize` and in `ufgir predict`: turned by its camera, transparent, of 16 bits."""
    turned, exif = Image.effect_mandelbrot((40, 40), (-2, -1, 1, 1), 40).convert("RGB"), Image.Exif()
    exif[274] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    clear = turned.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((40, 40)))
    clear.save(tmp_path / "clear.png")
    levels = torch.arange(1600, dtype=torch.int32).view(40, 40).mul(40).numpy().astype("uint16")
    Image.fromarray(levels).save(tmp_path / "deep.png")
    model, processor = viewer.checkpoint(checkpoint)[:2]
    for file in sorted(tmp_path.iterdir()):
        images = TransformedImages(load_images(str(file), verify=False), EvalTransform(processor), label_column=None)
        expected = images[0]["pixel_values"]
        for pixels in (
            viewer.view(checkpoint, open_leaf(file)).pixels[0],
            make_view(model, processor, [open_image(str(file))]).pixels[0],
        ):
            torch.testing.assert_close(pixels, expected)


@pytest.mark.parametrize("content", [b"", b"no picture", png(64, 64)[:60]], ids=["empty", "text", "cut off"])
def test_broken_files_are_refused(tmp_path, content):
    (tmp_path / "leaf.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"^leaf.png is not a picture that can be read"):
        open_leaf(tmp_path / "leaf.png")


def test_equal_pictures_are_equal_leaves():
    green, other = Image.new("RGB", (8, 8), "green"), Image.new("RGB", (8, 8), "olive")
    assert make_leaf(green) == make_leaf(green.copy()) and hash(make_leaf(green)) == hash(make_leaf(green.copy()))
    assert make_leaf(green) != make_leaf(other)
    assert make_leaf(Image.new("RGB", (4, 16), "green")) != make_leaf(green)


def test_examples_are_drawn_only_for_a_model_of_drawn_leaves(checkpoint):
    config = load_checkpoint(checkpoint).config
    examples = drawn_examples(config, count=2)
    assert [name for name, _ in examples] == ["cultivar_00", "cultivar_01"]
    assert examples[0][1].picture.size == (32, 32) and examples[0][1] != examples[1][1]
    config.id2label = {0: "oak", 1: "ash", 2: "elm"}
    assert drawn_examples(config) == []


def test_examples_of_a_folder(tmp_path, caplog):
    with pytest.raises(ValueError, match="holds no picture that can be read"):
        folder_examples(tmp_path)
    (tmp_path / "ash").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "ash" / "a leaf.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    (tmp_path / "notes.txt").write_text("no picture")
    with caplog.at_level(logging.WARNING):
        assert [name for name, _ in folder_examples(tmp_path)] == ["a leaf"]
    assert "b.png is not a picture" in caplog.text
    with pytest.raises(ValueError, match="must be a folder of pictures"):
        folder_examples(tmp_path / "b.png")


# Settings


def test_the_own_setting_leaves_the_configuration_as_it_is():
    config = CLCAViTConfig(**TINY, reduction="evit", keep_rate=[0.5, 0.32], cross_layer_cache=True)
    own = own_setting(config)
    assert own == Setting("evit", 0.4, True)  # 0.5 * 0.32 = 0.4 * 0.4
    assert setting_config(config, own).keep_rate == [0.5, 0.32]
    assert setting_config(config, own._replace(cache=False)).keep_rate == [0.5, 0.32]
    assert setting_config(config, own._replace(keep_rate=0.3)).keep_rate == [0.3]
    config = CLCAViTConfig(**TINY, reduction="evit", keep_tokens=[8, 4])
    own = own_setting(config)
    assert own == Setting("evit", 0.5, False)  # 4 of 16 patches after two stages
    changed = setting_config(config, own._replace(keep_rate=0.25))
    assert changed.keep_rate == [0.25] and changed.keep_tokens is None


def test_options_of_a_method_stay_with_it():
    config = CLCAViTConfig(**TINY, reduction="topk", keep_rate=0.5, reduction_kwargs={"score_by": "received"})
    assert setting_config(config, Setting("topk", 0.3, False)).reduction_kwargs == {"score_by": "received"}
    assert not setting_config(config, Setting("evit", 0.3, False)).reduction_kwargs


def test_a_plain_vit_gets_stages_that_fit_its_depth():
    config = CLCAViTConfig(num_hidden_layers=12)
    assert setting_config(config, Setting("evit", 0.5, False)).reduction_layers == [3, 6, 9]
    config = CLCAViTConfig(num_hidden_layers=4)
    assert setting_config(config, Setting("evit", 0.5, True)).reduction_layers == [1, 2, 3]


@pytest.mark.parametrize(
    "setting", [Setting("tome", 0.3, True), Setting("evit", 0.25, False), Setting(None, 1.0, True)]
)
def test_a_setting_is_the_checkpoint_with_other_options(checkpoint, setting):
    model = load_checkpoint(checkpoint).model
    config = setting_config(model.config, setting)
    other = with_weights(model, config)
    pixels = torch.randn(2, 3, 32, 32)
    loaded = CLCAViTForImageClassification.from_pretrained(
        checkpoint,
        reduction=setting.method,
        keep_rate=setting.keep_rate,
        cross_layer_cache=setting.cache,
    )
    with torch.no_grad():
        torch.testing.assert_close(other(pixels).logits, loaded.eval()(pixels).logits, rtol=0, atol=0)
        assert other(pixels).token_counts == loaded(pixels).token_counts
    theirs = dict(model.named_parameters())
    assert all(p.data_ptr() == theirs[name].data_ptr() for name, p in other.named_parameters())  # nothing is copied
    assert model.config.reduction == "evit"  # and the checkpoint is as before


def test_only_methods_without_lacking_parameters_are_offered(checkpoint, tmp_path):
    found = load_checkpoint(checkpoint)
    assert set(found.methods) == {None} | (set(REDUCTIONS) - OWN_PARAMETERS) and found.methods[0] is None
    assert set(found.reasons) == OWN_PARAMETERS and not found.fixed_rate and found.cache
    assert "sit has parameters of its own, which these weights lack" in found.reasons["sit"]
    with pytest.raises(ValueError, match="dyvit has parameters of its own"):
        with_weights(found.model, setting_config(found.config, Setting("dyvit", 0.5, True)))
    slots = load_checkpoint(save_checkpoint(tmp_path, reduction="sit"))
    assert "sit" in slots.methods and "patchmerger" in slots.reasons
    assert slots.fixed_rate == {"sit"}  # its slots are parameters
    with pytest.raises(ValueError, match=r"sit has parameters of its own, which these weights lack at keep rate 0.25"):
        with_weights(slots.model, setting_config(slots.config, Setting("sit", 0.25, True)))


@pytest.mark.parametrize("method", [None, "topk"])
def test_a_model_for_several_keep_rates_serves_other_settings(tmp_path, leaf, method):
    name = save_checkpoint(tmp_path, train_keep_rates=[0.25, 0.5])
    viewer, setting = Viewer(), Setting(method, 0.5 if method else 1.0, True)
    assert method in viewer.checkpoint(name).methods
    look = viewer.look(name, leaf, setting)
    config = load_config(name, {"reduction": method} | ({"keep_rate": [0.5]} if method else {}))
    with torch.no_grad():
        logits = load_model(name, config).model(viewer.view(name, leaf).pixels).logits[0]
    assert [share for _, share in look.classes] == pytest.approx(sorted(logits.softmax(0).tolist(), reverse=True))


def test_a_processor_that_resizes_the_shorter_side(tmp_path, leaf):
    name = save_checkpoint(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    assert [len(drawn_examples(load_checkpoint(name).config)), Viewer().view(name, leaf).grid] == [3, (4, 4)]
    assert app.make_page(name)


def test_a_method_of_one_rate_shows_it_and_latency_is_measured(tmp_path, leaf):
    name = save_checkpoint(tmp_path, reduction="sit")
    viewer = Viewer()
    page = app._Page(app.import_gradio(), viewer, name, [("a leaf", leaf)])
    assert page._method(name, "sit") == page.gr.update(value=0.5, interactive=False)
    assert page._method(name, "topk") == page.gr.update(interactive=True)
    assert page._method(name, app._DENSE) == page.gr.update(interactive=False)
    functions = list(page.blocks.fns.values())
    for first in ("_upload", "example", "_load"):  # each is followed by a look and by a measurement
        index = next(i for i, one in enumerate(functions) if one.fn.__name__ == first)
        assert [one.fn.__name__ for one in functions[index + 1 : index + 3]] == ["_show", "_measure"]


# Models of strangers


def answer(kind, status):
    """An error that the Hub answered with."""
    return kind("no", response=httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co")))


def hub_of(folder, monkeypatch, **failures):
    """Let the Hub have the files of a folder as any repository; `failures`: what is raised for a file, by its stem, or for
    `size`."""

    def ask(file):
        if error := failures.get(Path(file).stem):
            raise error

    def download(name, file, **options):
        ask(file)
        if not Path(folder, file).is_file():
            raise answer(RemoteEntryNotFoundError, 404)
        return str(Path(folder, file))

    def metadata(url, token):
        ask("size")
        return SimpleNamespace(size=10**6)

    monkeypatch.setattr(app_model, "hf_hub_download", download)
    monkeypatch.setattr(app_model, "get_hf_file_metadata", metadata)


def test_models_of_strangers_are_fetched_without_a_token(tmp_path, checkpoint, monkeypatch):
    fetched = []

    def download(name, file, token=None, **options):
        fetched.append((file, token))
        if not Path(checkpoint, file).is_file():
            raise answer(RemoteEntryNotFoundError, 404)
        return str(Path(checkpoint, file))

    monkeypatch.setattr(app_model, "hf_hub_download", download)
    size = SimpleNamespace(size=10**6)
    monkeypatch.setattr(app_model, "get_hf_file_metadata", lambda url, token: fetched.append(("size", token)) or size)
    assert Viewer(folders=False).load("you/leaves").setting.method == "evit"
    files = ["config.json", "preprocessor_config.json", "processor_config.json", "size", "model.safetensors"]
    assert fetched == [(file, False) for file in files]
    size.size = 10**10
    with pytest.raises(ValueError, match=r"weights of you/leaves are too large .* 400 million"):
        load_checkpoint("you/leaves", trusted=False)
    assert fetched[-1][0] == "size"


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": 2**20},
        {"image_size": 8 * 65},
        {"head": "cla", "cla_multiplier": 10**8},
    ],
    ids=str,
)
def test_models_of_strangers_may_not_fill_the_machine(tmp_path, monkeypatch, changes):
    CLCAViTConfig(**TINY | changes).save_pretrained(tmp_path)
    monkeypatch.setattr(app_model, "hf_hub_download", lambda name, file, **options: str(tmp_path / file))
    monkeypatch.setattr(app_model, "get_hf_file_metadata", None)  # not even asked for
    with pytest.raises(ValueError, match=r"you/leaves is too large for this page\. It takes models of 100 layers"):
        load_checkpoint("you/leaves", trusted=False)


@pytest.mark.parametrize("kind", [RepositoryNotFoundError, GatedRepoError, RemoteEntryNotFoundError])
def test_what_strangers_cannot_have(checkpoint, monkeypatch, kind):
    for name in ("you/no/thing", "no thing"):
        with pytest.raises(ValueError, match=rf"no checkpoint {name} on the Hub that everybody may read"):
            load_checkpoint(name, trusted=False)
    hub_of(checkpoint, monkeypatch, config=answer(kind, 404))
    with pytest.raises(ValueError, match="no checkpoint you/nothing on the Hub that everybody may read"):
        load_checkpoint("you/nothing", trusted=False)
    hub_of(checkpoint, monkeypatch, model=answer(RemoteEntryNotFoundError, 404))
    with pytest.raises(ValueError, match=r"you/pickled has no model\.safetensors, the only weights"):
        load_checkpoint("you/pickled", trusted=False)


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("not in the cache"),
        answer(HfHubHTTPError, 503),
        httpx.ConnectError("refused"),
        httpx.ReadError("reset"),
        OfflineModeIsEnabled("offline"),
        TimeoutError("too slow"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_lost_connection_is_no_fault_of_the_model(checkpoint, monkeypatch, error):
    lost = "the Hub cannot be reached, or does not give out you/leaves now: check the connection and try again."
    page = app._Page(app.import_gradio(), Viewer(folders=False), None, [])
    for place in ("config", "preprocessor_config", "processor_config", "size", "model"):
        hub_of(checkpoint, monkeypatch, **{place: error})
        with pytest.raises(ValueError, match=f"^{re.escape(lost)}$"):
            load_checkpoint("you/leaves", trusted=False)
    assert page._load("you/leaves", None)[:2] == [None, app_html.problem(lost)]
    hub_of(checkpoint, monkeypatch)
    assert page._load("you/leaves", None)[:2] == ["you/leaves", ""]


@pytest.mark.parametrize("place", ["config", "preprocessor_config", "processor_config", "model"])
def test_a_lost_connection_is_a_sentence_to_the_owner_too(checkpoint, monkeypatch, place):
    hub_of(checkpoint, monkeypatch, **{place: httpx.ReadError("reset")})
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", app_model.hf_hub_download)
    page = app._Page(app.import_gradio(), Viewer(), None, [])
    name, problem = page._load("you/leaves", None)[:2]
    assert name is None and "you/leaves" in problem


def test_a_full_disk_is_told(checkpoint, monkeypatch):
    hub_of(checkpoint, monkeypatch, model=OSError("No space left on device"))
    with pytest.raises(ValueError, match=r"^you/leaves cannot be loaded: No space left on device$"):
        load_checkpoint("you/leaves", trusted=False)


def test_what_was_fetched_before_needs_no_hub(tmp_path, monkeypatch):
    """Neither for its files nor for those that it is known to lack."""
    repository, commit = tmp_path / "models--you--leaves", "0" * 40
    save_checkpoint(repository / "snapshots" / commit)
    for file, text in (("refs/main", commit), (f".no_exist/{commit}/processor_config.json", "")):
        (repository / file).parent.mkdir(parents=True)
        (repository / file).write_text(text)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert load_checkpoint("you/leaves", trusted=False).setting.method == "evit"
    (repository / ".no_exist" / commit / "processor_config.json").unlink()
    with pytest.raises(ValueError, match="the Hub cannot be reached"):
        load_checkpoint("you/leaves", trusted=False)


def test_a_stock_vit_can_be_reduced(tmp_path, leaf):
    own = {k: v for k, v in TINY.items() if k not in ("num_labels", "reduction_layers")}
    ViTForImageClassification(ViTConfig(**own)).save_pretrained(tmp_path)
    save_processor(tmp_path)
    found = load_checkpoint(str(tmp_path))
    assert found.setting == Setting(None, 1.0, False) and "topk" in found.methods and found.cache
    look = Viewer().look(str(tmp_path), leaf, Setting("topk", 0.5, False))
    assert look.tokens[0] == 17 and look.tokens[-1] < 9


def test_bad_checkpoints_are_refused(tmp_path, checkpoint):
    def refused(name, text, **options):
        with pytest.raises(ValueError, match=text) as caught:
            load_checkpoint(str(name), **options)
        assert "\n" not in str(caught.value)

    refused("you/nothing", "there is no checkpoint you/nothing")
    refused("  ", "`MODEL` is empty")
    refused(tmp_path, "it has no config.json")
    refused(checkpoint, "looks like a folder of this machine", trusted=False)
    refused("/nowhere", "looks like a folder of this machine", trusted=False)
    ResNetConfig().save_pretrained(tmp_path / "resnet")
    refused(tmp_path / "resnet", "`model_type` 'resnet'")
    CLCAViTConfig(**TINY).save_pretrained(tmp_path / "bare")
    refused(tmp_path / "bare", "has no image processor")
    save_processor(tmp_path / "bare")
    refused(tmp_path / "bare", "the weights of .* cannot be loaded")
    model = CLCAViTForImageClassification(CLCAViTConfig(**TINY))
    model.vit.save_pretrained(tmp_path / "headless")
    save_processor(tmp_path / "headless")
    refused(tmp_path / "headless", "is not trained for this network: it has no classifier.bias, classifier.weight")


# What is seen


def test_a_look_is_what_the_model_predicts(viewer, checkpoint, leaf):
    setting = Setting("evit", 0.5, True)
    look = viewer.look(checkpoint, leaf, setting)
    found = viewer.checkpoint(checkpoint)
    pixels = found.image_processor(images=[leaf.picture], return_tensors="pt").pixel_values
    with torch.no_grad():
        output = found.model(pixels)
    shares = output.logits[0].softmax(0)
    assert [name for name, _ in look.classes] == [
        f"cultivar_{i:02d}" for i in shares.argsort(descending=True).tolist()
    ]
    assert [share for _, share in look.classes] == pytest.approx(sorted(shares.tolist(), reverse=True))
    assert look.tokens == output.token_counts and not look.independent
    assert viewer.look(checkpoint, Leaf(leaf.key, leaf.picture.copy()), setting) is look  # remembered


def test_several_classes_a_leaf(tmp_path, leaf):
    name = save_checkpoint(tmp_path, problem_type="multi_label_classification")
    look = Viewer().look(name, leaf, Setting("evit", 0.5, True))
    assert look.independent and sum(share for _, share in look.classes) != pytest.approx(1, abs=1e-3)
    assert "a probability of its own" in app_html.prediction(look)


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
    before = viewer.look(name, leaf, setting)
    save_checkpoint(tmp_path, num_labels=2, id2label={0: "ash", 1: "oak"})
    assert viewer.look(name, leaf, setting) is before
    viewer.load(name)
    assert {name for name, _ in viewer.look(name, leaf, setting).classes} == {"ash", "oak"}
    with pytest.raises(ValueError):
        viewer.load("you/nothing")
    assert viewer.checkpoint(name)  # still there


@pytest.mark.parametrize("kind", app.shown_kinds(of_patch=False))
def test_pictures_of_the_stages(viewer, checkpoint, leaf, kind):
    shown = viewer.stages(checkpoint, leaf, Setting("tome", 0.5, True), kind)
    stages = ["after layer 1", "after layer 2"]
    names = {"attention": ["layer 1", "layer 2", "layer 4"], "kept": stages, "merge": stages}.get(kind)
    assert shown and names in (None, [picture.name for picture in shown])
    assert all(picture.picture.size == (PICTURE_SIDE, PICTURE_SIDE) for picture in shown)


def test_a_trace(viewer, checkpoint, leaf):
    shown = viewer.trace(checkpoint, leaf, Setting("topk", 1.0, False), (2, 1))
    assert [picture.note for picture in shown] == ["token 10: 1 patch"] * 2  # CLS, then 4 patches a row
    with pytest.raises(ValueError, match=r"`patch` must be a row in 0 \.\. 3"):
        viewer.trace(checkpoint, leaf, Setting("topk", 0.5, False), (4, 0))
    with pytest.raises(ValueError, match="reduces no tokens"):
        viewer.trace(checkpoint, leaf, Setting(None, 1.0, False), (0, 0))


def test_the_frame_lies_around_the_patch(viewer, checkpoint, leaf):
    width, height = viewer.picture_size(checkpoint)
    plain = viewer.leaf_with_grid(checkpoint, leaf, None)
    framed = viewer.leaf_with_grid(checkpoint, leaf, (1, 2))
    assert plain.size == framed.size == (width, height)
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
    look = Look([(evil, 0.5)], False, (3, 2), 0.1)
    parts = [
        app_html.prediction(look),
        app_html.problem(evil),
        app_html.hint(evil),
        app_html.cost_table(Cost(None, 10), look, evil),
        app_html.thumbnails([(evil + '"', make_leaf(Image.new("RGB", (4, 4))))]),
    ]
    assert all("<img src=x" not in part for part in parts)
    assert "GMACs cannot be said in advance" in parts[3] and 'aria-label="Example &lt;img' in parts[4]
    assert '"' not in re.search(r'aria-label="([^>]*?)" title', parts[4]).group(1)


# The command, and the Space


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(["app", *argv])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


def test_the_command_refuses_in_a_sentence(capsys, tmp_path, monkeypatch, checkpoint):
    monkeypatch.chdir(tmp_path)
    assert "there is no model in outputs/demo: run `make demo`" in refused(capsys)
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
    assert "pip install 'clca-vit[app]'" in refused(capsys, checkpoint)


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
    assert lacking(model, model.config) == []
