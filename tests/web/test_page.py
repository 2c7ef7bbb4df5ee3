"""The page in a real browser shows the results of Python, also offline, with mouse and keyboard, on a phone, with valid and invalid files."""

import csv
import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

from clca import CLCAViTConfig, CLCAViTForImageClassification
from clca.image_processing_clca import open_image
from tests.app.helpers import png
from tests.browsers import FADED, NAMELESS, PALE_TEXTS, SWITCHES, chromium, open_browser
from tests.helpers import CACHES, TINY
from tests.web.helpers import (
    PROCESSOR,
    image_files,
    leaf,
    need_runtime,
    served,
    session_of,
    small_graph,
    write_page,
)
from ufgir.cli import entry as cli
from ufgir.data.synthetic_leaves import SyntheticLeavesConfig
from ufgir.interpret.patterns import kept_patches


sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
expect = sync_api.expect
PATIENCE = 60_000  # milliseconds that a busy machine may take for an answer
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def browser():
    with open_browser(sync_api) as browser:
        yield browser


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("page") / "site", [small_graph(), small_graph(1, 0.5)])


@pytest.fixture(scope="module")
def address(site):
    with served(site.folder) as address:
        yield address


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    image_files(folder)
    return folder


@pytest.fixture
def context(browser):
    """Yield a context in which the tests can evaluate scripts, which the security policy of the page forbids otherwise."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, bypass_csp=True)
    yield context
    context.close()


def open_page(context, address):
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    expect(page.locator("#status")).to_have_text(re.compile(r"^Ready\."))
    return page


def look(page, file, letter="A"):
    """Choose a file, and return the results of the page as arrays."""
    panel = page.locator(f"#panel-{letter}")
    shown = int(panel.get_attribute("data-shown") or 0)
    panel.get_by_label("Choose an image").set_input_files(file)
    expect(panel).to_have_attribute("data-shown", str(shown + 1))
    found = page.evaluate(
        "letter => Object.fromEntries(Object.entries(globalThis.ufgir[letter]).map(([k, v]) => [k, v && Array.from(v)]))",
        letter,
    )
    return {name: None if value is None else np.array(value) for name, value in found.items()}


def levels_of(file):
    """Return the pixels as in evaluation, (64, 64, 3)."""
    resized = open_image(file).resize((73, 73), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((4, 4, 68, 68))).astype(int)


def test_the_page_shows_what_python_computes_and_asks_no_one_else(browser, site, address, images):
    """With the security policy of the page."""
    context = browser.new_context()
    page = context.new_page()
    asked, sent, complaints = set(), [], []
    context.on("request", lambda request: asked.add(urlsplit(request.url)[:2]))
    context.on("request", lambda request: sent.append(request.method) if request.post_data else None)
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    expect(page.locator("#status")).to_have_text(
        re.compile(r"^Ready\. The model .* runs on this device with \d threads\.")
    )
    file = images / "small.jpg"
    page.get_by_label("Choose an image, image A").set_input_files(file)
    pixels = PROCESSOR(open_image(file), return_tensors="np").pixel_values
    logits, shares = session_of(site).run(None, {"pixel_values": pixels})
    chances = np.exp(logits[0]) / np.exp(logits[0]).sum()
    rows = page.locator("#panel-A .prediction tbody tr")
    names = np.array(["ash", "<b>oak</b>", "elm"])
    expect(rows).to_have_text([f"{names[i]}{100 * chances[i]:.1f} %" for i in np.argsort(-chances)])
    expect(page.locator("#panel-A .stages figcaption")).to_contain_text(
        f"After layer 1: {(shares > 0.999).sum()} of 64 patches kept"
    )
    assert {host for scheme, host in asked if scheme not in ("blob", "data")} == {urlsplit(address).netloc}
    assert sent == [] and complaints == []
    context.close()


@pytest.mark.slow
def test_pixels_are_those_of_training(context, site, address, images):
    """Decoded as in Pillow, without color management, transparent pixels on white, resized in fixed point."""
    page, session, differing = open_page(context, address), session_of(site), {}
    for file in sorted(images.iterdir()):
        if file.name in ("broken.png", "cut.jpg", "bomb.png"):
            continue
        found, expected = look(page, file), levels_of(file)
        difference = np.abs(found["levels"].reshape(64, 64, 3) - expected)
        if difference.max():
            differing[file.name] = int(difference.max())
        pixels = PROCESSOR(open_image(file), return_tensors="np").pixel_values
        np.testing.assert_allclose(found["pixels"].reshape(pixels.shape), pixels, atol=1.001 / 255 / 0.2)
        logits, _ = session.run(None, {"pixel_values": pixels})
        np.testing.assert_allclose(found["logits"], logits[0], atol=1e-3 if not difference.max() else 0.2)
    assert differing == {}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Write the page of a model at two keep rates with the command, and return the model, its folder and the page."""
    need_runtime()
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    options = TINY | CACHES["clca"] | {"image_size": 64, "reduction": "evit", "keep_rate": 0.5}
    model = CLCAViTForImageClassification(CLCAViTConfig(**options)).eval()
    model.save_pretrained(folder / "model")
    PROCESSOR.save_pretrained(folder / "model")
    argv = ["export", str(folder / "model"), "--web", str(folder / "site"), "--keep-rates", "0.5", "0.25"]
    assert cli.main([*argv, "--title", "Small leaves"]) == 0
    return model, folder / "model", folder / "site"


@pytest.mark.slow
def test_a_real_model_says_what_pytorch_says(context, exported, tmp_path):
    """Logits and kept patches after each stage are equal, at two keep rates with the same weights."""
    model, _, folder = exported
    assert [len(list((folder / "model").glob(f"*{kind}"))) for kind in (".onnx", ".bin")] == [2, 1]
    with served(folder) as address:
        page = open_page(context, address)
        expect(page.get_by_role("heading", name="Small leaves")).to_be_visible()
        for rate in (0.5, 0.25):
            page.get_by_role("radio", name=f"{rate:g}", exact=True).check()
            expect(page.locator("#status")).to_have_text(re.compile("^Ready"))
            file = tmp_path / f"leaf{rate}.png"
            leaf(90, 80).save(file)
            found = look(page, file)
            model.set_keep_rate(rate)
            with torch.no_grad():
                output = model(PROCESSOR(open_image(file), return_tensors="pt").pixel_values, output_assignments=True)
            np.testing.assert_allclose(found["logits"], output.logits[0].numpy(), atol=1e-3)
            kept = kept_patches(output.assignments, model.config)[0].numpy()
            np.testing.assert_array_equal(found["shares"].reshape(kept.shape) > 0.999, kept)
            expect(page.locator("#panel-A .tokens")).to_contain_text(" → ".join(map(str, output.token_counts)))


@pytest.mark.slow
def test_200_leaves_get_the_classes_that_predict_gives_them(context, exported, tmp_path):
    _, source, folder = exported
    leaves, drawn = tmp_path / "leaves", SyntheticLeavesConfig(num_classes=10, image_size=109)
    leaves.mkdir()
    for index in range(200):
        drawn.draw("test", index % 10, index // 10).save(leaves / f"{index:03d}.png")
    assert cli.main(["predict", str(source), str(leaves), "--output", str(tmp_path / "predictions.csv")]) == 0
    with (tmp_path / "predictions.csv").open(newline="") as lines:
        expected = {Path(row["file"]).name: row["prediction"] for row in csv.DictReader(lines)}
    with served(folder) as address:
        page = open_page(context, address)
        found = {file.name: f"LABEL_{look(page, file)['logits'].argmax()}" for file in sorted(leaves.iterdir())}
    assert found == expected and len(found) == 200 and len(set(found.values())) > 1


@pytest.mark.slow
def test_offline_after_the_first_visit_and_a_new_model_takes_its_place(context, tmp_path, images):
    folder = tmp_path / "site"
    write_page(folder, title="First")
    with served(folder) as address:
        page = open_page(context, address)
        page.evaluate("navigator.serviceWorker.ready.then(() => true)")
        devtools = context.new_cdp_session(page)
        errors = devtools.send("Page.getInstallabilityErrors")["installabilityErrors"]
        assert {error["errorId"] for error in errors} <= {"in-incognito"}  # as all pages of these tests are
        assert devtools.send("Page.getAppManifest")["errors"] == []
        first = look(page, images / "plain.png")["logits"]
        context.set_offline(True)
        page.reload()
        expect(page.locator("#status")).to_have_text(re.compile(r"^Ready\. .* 2 threads|^Ready\."))
        np.testing.assert_array_equal(look(page, images / "plain.png")["logits"], first)
        context.set_offline(False)
        write_page(folder, [small_graph(5)], title="Second")
        page.reload()
        expect(page.locator("#update")).to_be_visible()
        page.get_by_role("button", name="Reload to use it").click()
        expect(page.get_by_role("heading", name="Second")).to_be_visible()
        expect(page.locator("#status")).to_have_text(re.compile(r"^Ready\."))
        second = look(page, images / "plain.png")["logits"]
        assert np.abs(second - first).max() > 0.1
        context.set_offline(True)
        page.reload()
        expect(page.locator("#status")).to_have_text(re.compile(r"^Ready\."))
        np.testing.assert_array_equal(look(page, images / "plain.png")["logits"], second)
        assert page.evaluate("caches.keys()").__len__() == 1


@pytest.mark.slow
def test_files_that_cannot_be_used_get_a_sentence(context, address, images, tmp_path):
    page = open_page(context, address)
    before = look(page, images / "plain.png")["logits"]
    problem = page.locator("#panel-A > .error")
    for name, words in (
        ("broken.png", "broken.png is damaged, or not an image"),
        ("cut.jpg", "cut.jpg is damaged"),
        ("bomb.png", "144 million pixels; the limit is 120"),
    ):
        page.get_by_label("Choose an image, image A").set_input_files(images / name)
        expect(problem).to_contain_text(words)
        expect(problem).to_contain_text("The results below are those of the previous image.")
    (tmp_path / "heavy.png").write_bytes(bytes(101_000_000))
    page.get_by_label("Choose an image, image A").set_input_files(tmp_path / "heavy.png")
    expect(problem).to_contain_text("heavy.png has 101.0 MB; the limit is 100.0 MB")
    np.testing.assert_array_equal(look(page, images / "plain.png")["logits"], before)
    expect(problem).to_be_hidden()


@pytest.mark.slow
def test_a_photo_of_50_megapixels(context, site, address, tmp_path):
    (tmp_path / "photo.png").write_bytes(png(8660, 5774))
    page = open_page(context, address)
    page.get_by_label("Choose an image, image A").set_input_files(tmp_path / "photo.png")
    expect(page.locator("#panel-A .busy")).to_have_text(
        re.compile("Reading 50 million pixels: this takes a few seconds")
    )
    expect(page.locator("#panel-A .results")).to_be_visible()
    assert page.evaluate("globalThis.ufgir.A.levels.every((level) => level === 0)")


@pytest.mark.slow
def test_what_a_leaf_of_no_class_and_a_failure_look_like(context, tmp_path, images):
    flat = small_graph(spread=0.0)
    site = write_page(tmp_path / "site", [flat])
    with served(site.folder) as address:
        page = open_page(context, address)
        look(page, images / "plain.png")
        expect(page.locator("#panel-A .unsure")).to_contain_text(
            "Uncertain: the best class has a probability of only 33 %"
        )
    broken = write_page(tmp_path / "broken", [small_graph()])
    for file in (broken.folder / "model").glob("*.onnx"):
        file.unlink()
    with served(broken.folder) as address:
        page = context.new_page()
        page.goto(address)
        expect(page.locator("#problem")).to_contain_text("Files of the model are missing")
    page = context.new_page()
    page.add_init_script("WebAssembly.validate = () => false")
    with served(site.folder) as address:
        page.goto(address)
        expect(page.locator("#problem")).to_contain_text("This browser does not support WebAssembly with SIMD")
    page = context.new_page()
    page.goto((site.folder / "index.html").as_uri())
    expect(page.locator("#cannot")).to_contain_text("If you opened it as a file")
    expect(page.locator("#cannot")).to_be_visible()


@pytest.mark.slow
def test_memory_that_runs_out_is_told(context, address, images):
    page = context.new_page()
    page.add_init_script(
        "window.createImageBitmap = () => Promise.reject(new RangeError('Array buffer allocation failed'))"
    )
    page.goto(address)
    expect(page.locator("#status")).to_have_text(re.compile(r"^Ready\."))
    page.get_by_label("Choose an image, image A").set_input_files(images / "plain.png")
    expect(page.locator("#panel-A > .error")).to_contain_text("damaged, or not an image")
    told = page.evaluate(
        "import('./app.js').then((m) => [m.sentence('std::bad_alloc'), m.sentence('missing model.bin'), m.sentence('odd')])"
    )
    assert (
        "does not have enough free memory" in told[0]
        and "Files of the model are missing" in told[1]
        and "(odd)" in told[2]
    )


@pytest.mark.slow
def test_two_images_side_by_side_by_keyboard(context, address, images):
    page = open_page(context, address)
    expect(page.locator("#panel-B")).to_be_hidden()
    focused = "(e => e.ariaLabel || e.labels?.[0]?.innerText.trim() || e.innerText)(document.activeElement)"
    names = [
        "as trained",
        "Compare two images",
        "Choose an image, image A",
        "Take a photo, image A",
        "About this model",
    ]
    for name in names:
        page.keyboard.press("Tab")
        assert page.evaluate(focused) == name
    page.get_by_label("Compare two images").focus()
    page.keyboard.press("Space")
    expect(page.locator("#panel-B")).to_be_visible()
    first, second = look(page, images / "plain.png", "A"), look(page, images / "lossy.webp", "B")
    assert np.abs(first["logits"] - second["logits"]).max() > 0
    left, right = (page.locator(f"#panel-{letter}").bounding_box() for letter in "AB")
    assert abs(left["y"] - right["y"]) < 2 and left["x"] + left["width"] <= right["x"]
    page.get_by_role("radio").first.focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator("#panel-A")).to_have_attribute("data-shown", "2")
    expect(page.locator("#panel-B")).to_have_attribute("data-shown", "2")
    assert np.abs(page.evaluate("Array.from(globalThis.ufgir.A.logits)") - first["logits"]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(browser, address, images, scheme):
    context = browser.new_context(
        viewport={"width": 360, "height": 740},
        is_mobile=True,
        has_touch=True,
        device_scale_factor=2,
        color_scheme=scheme,
        bypass_csp=True,
    )
    page = open_page(context, address)
    page.get_by_label("Compare two images").check()
    look(page, images / "large.jpg", "A")
    look(page, images / "turned.jpg", "B")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("#panel-A").bounding_box()["width"] > 300
    assert page.get_by_label("Take a photo, image A").get_attribute("capture") == "environment"
    page.get_by_text("About this model").click()
    assert page.evaluate(NAMELESS) == []
    unnamed = "[...document.querySelectorAll('canvas, section')].filter((e) => !e.ariaLabel).map((e) => e.outerHTML)"
    assert page.evaluate(unnamed) == []
    page.evaluate(FADED)
    assert page.evaluate(PALE_TEXTS) == []
    context.close()


@pytest.mark.slow
def test_a_host_without_headers_gets_threads_from_the_service_worker(context, site, tmp_path, monkeypatch):
    """On a static host without custom headers, the page reloads itself once and then has threads."""
    monkeypatch.setattr("ufgir.web.server.HEADERS", {"Cache-Control": "no-cache"})
    shutil.copytree(site.folder, tmp_path / "site")
    with served(tmp_path / "site") as address:
        page = context.new_page()
        page.goto(address)
        expect(page.locator("#status")).to_have_text(re.compile(r"with \d threads"))
        assert page.evaluate("globalThis.crossOriginIsolated")


@pytest.mark.slow
def test_webgpu_by_a_software_adapter_and_without_one(browser, tmp_path, images):
    site = write_page(tmp_path / "site", webgpu=True)
    pixels = PROCESSOR(open_image(images / "plain.png"), return_tensors="np").pixel_values
    logits, _ = session_of(site).run(None, {"pixel_values": pixels})
    adapter = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]
    with served(site.folder) as address:
        for switches, means in ((adapter, "WebGPU"), ([], "thread")):
            other = browser.browser_type.launch(executable_path=chromium(), args=[*SWITCHES, *switches])
            page = open_page(other.new_context(bypass_csp=True), address)
            expect(page.locator("#status")).to_contain_text(means)
            np.testing.assert_allclose(look(page, images / "plain.png")["logits"], logits[0], atol=1e-3)
            other.close()
