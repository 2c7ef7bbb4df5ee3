"""The web page in a real browser: mouse, keyboard and phone, with valid and invalid files."""

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from tests.app.helpers import png, save_checkpoint
from tests.browsers import FADED, NAMELESS, PALE_TEXTS, open_browser
from ufgir.app.page import make_page, serve_page
from ufgir.app.viewer import Setting, Viewer, open_leaf


sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
expect = sync_api.expect

# of Gradio's own queue
pytestmark = pytest.mark.filterwarnings("ignore::Warning:gradio.queueing")

PATIENCE = 60_000  # milliseconds that a busy machine may take for an answer
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def browser():
    with open_browser(sync_api) as browser:
        yield browser


@pytest.fixture(scope="module")
def desk(browser):
    """Yield a desktop browser context, whose pages share the cache for Gradio's files."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield context
    context.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("models") / "evit")


@pytest.fixture(scope="module")
def server(model):
    page = make_page(model)
    yield serve_page(page, "127.0.0.1", 0)
    page.close(verbose=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 40).save(folder / "leaf.png")
    (folder / "huge.png").write_bytes(png(12000, 9000))
    (folder / "bomb.png").write_bytes(png(30000, 30000, rows=1))
    (folder / "broken.png").write_bytes(b"not a picture")
    (folder / "cut.png").write_bytes((folder / "leaf.png").read_bytes()[:200])
    return folder


def open_page(context, server):
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(server)
    expect(page.locator("#prediction-A tr")).to_have_count(3)
    expect(page.locator("#trace-A figure")).to_have_count(2)
    # a picture on its way has no size yet: what is clicked then is not the picture
    page.wait_for_function("document.querySelector('#leaf img')?.naturalWidth > 0")
    return page


@pytest.fixture
def page(desk, server):
    page = open_page(desk, server)
    yield page
    page.close()


def cells(page, part, row):
    return page.locator(f"#{part} tr", has_text=row).locator("td")


def upload(page, path):
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Upload a leaf").click()
    chooser.value.set_files(path)


def expect_prediction(page, letter, model, leaf, setting):
    """Wait until the page shows the prediction of the model."""
    rows = page.locator(f"#prediction-{letter} tr")
    classes = Viewer().predict(model, leaf, setting).classes
    expect(rows).to_have_text([f"{name}{100 * share:.1f} %" for name, share in classes])


def test_it_works_out_of_the_box_and_asks_no_other_server(desk, server):
    page = desk.new_page()
    asked, complaints = set(), []
    page.on("request", lambda request: asked.add(urlsplit(request.url)[:2]))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(server)
    expect(page.locator("h1")).to_have_text("What does the model keep of a leaf?")
    expect(page.locator("#stages-A figure")).to_have_count(2)
    latency = cells(page, "cost-A", "Latency, ms")
    expect(latency).to_have_text([re.compile(r"^\d+\.\d$")] * 2 + [re.compile(r"^\d+ %$")])
    expect(cells(page, "cost-A", "GMACs").nth(2)).to_have_text(re.compile(r"^\d+ %$"))
    assert {host for scheme, host in asked if scheme != "data"} == {urlsplit(server).netloc}
    assert complaints == []
    page.close()


def test_good_and_bad_files(page, model, files):
    before = page.locator("#prediction-A tbody").inner_text()
    for name in ("broken.png", "cut.png"):
        upload(page, files / name)
        sentence = f"{name} is not an image that can be read. Try another JPEG or PNG file."
        expect(page.locator("#leaf-problem [role=alert]")).to_contain_text(sentence)
    upload(page, files / "bomb.png")
    expect(page.locator("#leaf-problem")).to_contain_text("more than 120 million pixels")
    assert page.locator("#prediction-A tbody").inner_text() == before  # what was there stays
    for name in ("leaf.png", "huge.png"):
        upload(page, files / name)
        expect_prediction(page, "A", model, open_leaf(files / name), Setting("evit", 0.5, True))
        expect(page.locator("#leaf-problem")).to_be_hidden()


def test_the_keep_rate_slides(page):
    macs = cells(page, "cost-A", "GMACs").first
    captions = page.locator("#stages-A figcaption")
    before, kept = macs.inner_text(), captions.first.inner_text()
    slider = page.get_by_role("slider", name=re.compile("Keep rate of each stage, A"))
    slider.focus()
    slider.press("Home")
    expect(captions.first).not_to_have_text(kept)
    expect(macs).not_to_have_text(before)
    expect(page.locator("#rate-A input[type=number]")).to_have_value("0.01")
    assert float(macs.inner_text()) < float(before)
    slider.press("End")
    expect(captions.last).to_contain_text("16 of 16 patches kept")


def test_two_settings_side_by_side(page, model, files):
    upload(page, files / "leaf.png")
    expect(page.locator("#panel-B")).to_be_hidden()
    page.get_by_label("Compare with a second setting, B").check()
    expect(page.locator("#prediction-B tr")).to_have_count(3)
    left, right = (page.locator(f"#panel-{letter}").bounding_box() for letter in "AB")
    assert abs(left["y"] - right["y"]) < 2 and left["x"] + left["width"] <= right["x"]
    page.get_by_label("Reduction method, B").click()
    page.get_by_role("option", name="tome", exact=True).click()
    page.get_by_label("Cross-layer cache (CLC), B").uncheck()
    leaf = open_leaf(files / "leaf.png")
    expect_prediction(page, "B", model, leaf, Setting("tome", 0.25, False))
    expect_prediction(page, "A", model, leaf, Setting("evit", 0.5, True))
    page.get_by_label("Groups of patches").check()
    expect(page.locator("#stages-B h3")).to_have_text("Groups of patches")
    expect(page.locator("#stages-B figcaption").first).to_contain_text("groups")


def test_without_reduction_there_are_no_stages(page):
    page.get_by_label("Reduction method, A").click()
    expect(page.get_by_role("option", name="topk", exact=True)).to_be_visible()
    expect(page.get_by_role("option", name="dyvit")).to_have_count(0)
    page.get_by_role("option", name="none").click()
    expect(page.locator("#stages-A")).to_contain_text("No reduction")
    expect(page.locator("#trace-A figure")).to_have_count(0)
    expect(page.locator("#rate-A input[type=range]")).to_be_disabled()
    page.get_by_label("Attention of CLS").check()
    expect(page.locator("#stages-A figure")).to_have_count(3)  # of the two layers that would reduce, and the last
    page.get_by_text("Not available:").click()
    expect(page.get_by_text("dyvit has parameters that this checkpoint does not contain")).to_be_visible()


def test_follow_a_token_by_mouse_and_keyboard(page):
    picture = page.locator("#leaf img")
    box = picture.bounding_box()
    picture.click(position={"x": box["width"] * 0.6, "y": box["height"] * 0.1})  # of 4 x 4 patches
    expect(page.locator("#trace-A h3")).to_have_text("Token of the patch in row 0, column 2")
    expect(page.locator("#row input")).to_have_value("0")
    expect(page.locator("#column input")).to_have_value("2")
    row = page.get_by_label("Row, 0 to 3")
    row.focus()
    row.press("ArrowUp")
    expect(page.locator("#trace-A h3")).to_have_text("Token of the patch in row 1, column 2")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowUp")
    expect(page.locator("#trace-A h3")).to_have_text("Token of the patch in row 1, column 3")
    page.keyboard.press("ArrowUp")
    expect(page.locator("#trace-A [role=alert]")).to_contain_text("a column in 0 .. 3, got 1 and 4")
    page.keyboard.press("Backspace")
    expect(page.locator("#trace-A [role=alert]")).to_have_text("Row and column of the patch must be numbers.")


def test_everything_can_be_reached_by_tab(page):
    page.locator("h1").click()
    reached = []
    name = "(e => e.ariaLabel || e.labels?.[0]?.innerText.trim() || e.innerText)(document.activeElement)"
    while len(reached) < 40:
        page.keyboard.press("Tab")
        reached.append(page.evaluate(name))
    order = ["Row, 0 to 3", "Column, 0 to 3", "Upload a leaf", "Example cultivar_00", "Folder or Hub repository"]
    order += ["Kept patches", "Compare with a second setting, B", "Reduction method, A"]
    order += ["Keep rate of each stage, A", "Cross-layer cache (CLC), A", "Measure latency again"]
    places = [next((i for i, text in enumerate(reached) if wanted in text), -1) for wanted in order]
    assert -1 not in places and places == sorted(places), reached
    before = page.locator("#prediction-A tbody").inner_text()
    page.get_by_role("button", name="Example cultivar_02").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#prediction-A tbody")).not_to_have_text(before, use_inner_text=True)


@pytest.mark.slow
def test_another_model(page, tmp_path, model):
    field = page.get_by_label("Folder or Hub repository")
    field.fill("you/nothing-here")
    page.get_by_role("button", name="Load", exact=True).click()
    problem = page.locator("#model-problem [role=alert]")
    expect(problem).to_contain_text("there is no checkpoint you/nothing-here")
    expect(problem).to_contain_text(f"The results below are those of {model}.")
    expect(page.locator("#prediction-A tr")).to_have_count(3)
    plain = save_checkpoint(
        tmp_path / "plain", reduction=None, keep_rate=1.0, id2label={0: "<b>oak</b>", 1: "ash", 2: "elm"}
    )
    field.fill(plain)
    field.press("Enter")
    expect(page.locator("#prediction-A")).to_contain_text("<b>oak</b>")  # a name, not a piece of the page
    expect(page.locator("#model-problem")).to_be_hidden()
    expect(page.locator("#stages-A")).to_contain_text("No reduction")
    page.get_by_label("Reduction method, A").click()
    page.get_by_role("option", name="topk", exact=True).click()
    expect(page.locator("#stages-A figure")).to_have_count(2)
    field.fill(save_checkpoint(tmp_path / "sit", reduction="sit"))
    field.press("Enter")
    expect(page.locator("#rate-A input[type=range]")).to_be_disabled(timeout=PATIENCE)  # its slots are parameters


def test_visitors_do_not_see_each_other(desk, server, page, files):
    other = open_page(desk, server)
    before = other.locator("#prediction-A tbody").inner_text()
    upload(page, files / "leaf.png")
    expect(page.locator("#prediction-A tbody")).not_to_have_text(before, use_inner_text=True)
    expect(other.locator("#prediction-A tbody")).to_have_text(before, use_inner_text=True)
    slider = other.get_by_role("slider", name=re.compile("Keep rate of each stage, A"))
    slider.press("End")
    expect(other.locator("#stages-A figcaption").last).to_contain_text("16 of 16")
    expect(page.locator("#stages-A figcaption").last).not_to_contain_text("16 of 16")
    other.close()


def test_a_phone(browser, server):
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True, device_scale_factor=2
    )
    page = open_page(context, server)
    page.get_by_label("Compare with a second setting, B").check()
    expect(page.locator("#trace-B figure")).to_have_count(2)
    page.get_by_text("Not available:").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    wide = """() => [...document.querySelectorAll('.gradio-container *')].filter((e) => e.checkVisibility())
      .filter((e) => e.getBoundingClientRect().right > 391 && !e.closest('[style*="position: absolute"]'))
      .map((e) => e.outerHTML.slice(0, 200))"""
    assert page.evaluate(wide) == []
    assert page.evaluate(NAMELESS) == []
    page.locator("#leaf img").tap(position={"x": 5, "y": 5})
    expect(page.locator("#trace-B h3")).to_have_text("Token of the patch in row 0, column 0")
    for scheme in ("light", "dark"):
        page.evaluate("scheme => document.body.classList.toggle('dark', scheme === 'dark')", scheme)
        page.evaluate(FADED)
        assert page.evaluate(PALE_TEXTS) == [], scheme
    context.close()


def test_folders_are_not_for_the_public(desk, model):
    page = make_page(None, folders=False)
    address = serve_page(page, "127.0.0.1", 0)
    tab = desk.new_page()
    tab.goto(address)
    expect(tab.locator("#prediction-A")).to_contain_text("Choose a model.")
    tab.get_by_label("Hub repository").fill(str(Path(model)))
    tab.keyboard.press("Enter")
    expect(tab.locator("#model-problem")).to_contain_text("looks like a folder of this machine")
    tab.close()
    page.close(verbose=False)
