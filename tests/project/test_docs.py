"""The documentation site builds without warnings and is complete."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import threading
from argparse import SUPPRESS, ArgumentParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from filelock import FileLock
from PIL import Image
from sphinx.util.inventory import InventoryFile

import clca
from run_ufgir import GROUPS
from tests.browsers import open_browser
from ufgir.cli.entry import COMMANDS
from ufgir.utils.arguments import RecipeParser
from ufgir.web.server import make_server


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
COMMAND_MODULES = re.compile(r"ufgir\.cli\b")  # the reference of the commands has them
PATIENCE = 120_000  # milliseconds that a busy machine may need to load a page
# Elements of the content that exceed the window, except in a parent that scrolls.
TOO_WIDE = """() => {
  const width = document.documentElement.clientWidth, right = (e) => e.getBoundingClientRect().right;
  const scrolls = (e) => e !== document.body && (
    (getComputedStyle(e).overflowX !== 'visible' && right(e) <= width + 1) || scrolls(e.parentElement));
  const wide = [...document.querySelectorAll('.content *')].filter((e) => right(e) > width + 1 && !scrolls(e.parentElement));
  return [document.documentElement.scrollWidth - width, wide.slice(0, 3).map((e) => e.outerHTML.slice(0, 80))];
}"""


def extension(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / "_extensions" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(folder, *options):
    """Build the site without network; warnings are errors."""
    options = ["-W", "--keep-going", "-q", "-d", folder / "doctrees", *options]
    process = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, DOCS, folder / "html"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert process.returncode == 0 and not process.stderr, process.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site without the pages of source code, which are most of it. Processes of pytest-xdist share one."""
    shared = tmp_path_factory.getbasetemp()
    folder = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "site"
    statements = ast.parse((DOCS / "conf.py").read_text()).body
    (listed,) = [node for node in statements if ast.unparse(node).startswith("extensions = ")]
    extensions = ast.literal_eval(listed.value)
    with FileLock(f"{folder}.lock"):
        if not (folder / "built").exists():
            build(folder, "-D", f"extensions={','.join(name for name in extensions if name != 'sphinx.ext.viewcode')}")
            (folder / "built").touch()
    return folder / "html"


@pytest.fixture(scope="module")
def names(site):
    """Return kind -> names of the Python objects on the site."""
    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    return {kind.removeprefix("py:"): set(objects) for kind, objects in inventory.items()}


def text_of(page):
    """Return the text of a page, without tags."""
    words = re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))
    return words.replace("&lt;", "<").replace("&gt;", ">").replace("&#39;", "'").replace("&amp;", "&")


class Links(HTMLParser):
    """Targets of the links in a page, and its anchors."""

    def __init__(self, page):
        super().__init__()
        self.targets, self.anchors = [], {""}
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors.add(attributes.get("id"))
        self.targets += [attributes[name] for name in ("href", "src") if attributes.get(name)]


def test_every_public_name_is_there(names):
    everything = set().union(*names.values())
    assert [name for name in clca.__all__ if f"clca.{name}" not in everything] == []


def test_every_module_is_there(names):
    files = [file for part in ("clca", "ufgir", "dataset_scripts") for file in (ROOT / part).rglob("*.py")]
    paths = {file.parent if file.name == "__init__.py" else file.with_suffix("") for file in files}
    modules = {".".join(path.relative_to(ROOT).parts) for path in paths if not path.name.startswith("_")}
    modules = {name for name in modules - {"ufgir"} if not COMMAND_MODULES.match(name)}
    missing = sorted(modules - names["module"])
    assert missing == [], "add them to a page of docs/api/"


def test_every_command_and_option_is_there(site):
    words = text_of(site / "commands.html")
    assert len(COMMANDS) > 10
    for name in COMMANDS:
        assert f"\nufgir {name}" in words
        parser = ArgumentParser()
        importlib.import_module(f"ufgir.cli.{name.replace('-', '_')}").configure(parser)
        for action in parser._actions:
            if action.help is not SUPPRESS:  # an alias of an earlier release
                assert (action.option_strings or [str(action.metavar or action.dest)])[0] in words


def test_every_option_of_the_script_is_there(site):
    words = text_of(site / "options.html")
    options = RecipeParser(GROUPS, prog="run_ufgir.py").options
    assert [name for name in options if not re.search(rf"--{name}\b", words)] == []
    assert "==SUPPRESS==" not in words and "%(default)s" not in words


def test_links_to_the_repository(monkeypatch):
    """On GitHub they lead to files; on the site they lead to the reference or become text."""
    pages = {path: path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md") if "_build" not in path.parts}
    targets = [(page, target) for page, text in pages.items() for target in re.findall(r"\]\((\.\./[^)#\s]+)", text)]
    assert len(targets) > 20
    assert [target for page, target in targets if not (page.parent / target).exists()] == []
    monkeypatch.syspath_prepend(DOCS / "_extensions")
    assert extension("from_code").expanded("[a](../clca/layers_clca.py), [`b.py`](../tests/b.py), [c](c.md)") == (
        "{py:mod}`a <clca.layers_clca>`, `b.py`, [c](c.md)"
    )


def test_every_guide_is_there(site):
    pages = {path.relative_to(DOCS).with_suffix("") for path in DOCS.rglob("*") if path.suffix in (".md", ".ipynb")}
    pages = {page for page in pages if page.parts[0] != "_build"}
    assert len(pages) > 25
    assert [str(page) for page in sorted(pages) if not (site / page).with_suffix(".html").is_file()] == []


def broken_links(site):
    pages = {page: Links(page) for page in site.rglob("*.html")}
    broken = []
    for page, links in pages.items():
        for target in links.targets:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            file = (page.parent / unquote(url.path)).resolve() if url.path else page
            if not file.is_file() or (file in pages and unquote(url.fragment) not in pages[file].anchors):
                broken.append(f"{page.relative_to(site)}: {target}")
    assert sum(len(links.targets) for links in pages.values()) > 1000
    return broken


def test_links_and_images_resolve(site):
    assert broken_links(site) == []


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with open_browser(sync_api) as browser:
        yield browser


@pytest.fixture(scope="module")
def address(site):
    with make_server(site, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.mark.slow
def test_search_finds_the_guides(browser, address):
    """The right page is among the first three results, also for a number, which Sphinx alone does not index."""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    for query, guide in (
        ("resume", "training.html"),
        ("448", "checkpoints.html"),
        ("LoRA", "training.html"),
        ("multi-label", "datasets.html"),
        ("ONNX", "export.html"),
        ("CLCAViTConfig", "api/clca.html"),
    ):
        page.goto(f"{address}search.html?q={query}")
        page.locator("#search-results ul.search li").first.wait_for()
        page.locator("#search-results .search-summary", has_text="found").wait_for()
        targets = page.locator("#search-results ul.search li > a").evaluate_all(
            "l => l.map((a) => a.getAttribute('href'))"
        )
        assert guide in [target.split("#")[0].split("?")[0] for target in targets[:3]], (query, targets[:10])
    page.close()


@pytest.mark.slow
def test_pages_fit_a_phone(browser, address, site):
    """No page scrolls sideways at a width of 390 pixels; wide tables and code scroll by themselves."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    pages = [file.relative_to(site) for file in sorted(site.rglob("*.html")) if file.stem != "search"]
    assert len(pages) > 40
    for name in pages:
        page.goto(f"{address}{name}")
        assert page.evaluate(TOO_WIDE) == [0, []], name
    context.close()


@pytest.mark.slow
def test_links_to_the_source_resolve(tmp_path):
    whole = build(tmp_path)
    assert (whole / "_modules" / "clca" / "modeling_clca.html").is_file()
    assert broken_links(whole) == []


@pytest.mark.parametrize(
    "markdown, rst",
    [
        ("`CLCAViTConfig` says", ":py:obj:`CLCAViTConfig` says"),
        ("`keep_rate=0.5`, `a b`s", "``keep_rate=0.5``, ``a b``\\ s"),
        ("2 * 3 | x_ and *optional*", "2 \\* 3 \\| x\\_ and *optional*"),
        ("``literal`` stays", "``literal`` stays"),
    ],
)
def test_words_of_docstrings(markdown, rst):
    assert extension("docstrings").inline(markdown) == rst


def test_blocks_of_docstrings():
    lines = ["Like this:", "- one", "- two", "Done.", "", "    code()", "", "```python", "x = 1", "```"]
    assert [line for line in extension("docstrings").to_rst(lines) if line] == [
        "Like this:", "- one", "- two", "Done.", "::", "    code()", ".. code-block:: python", "   x = 1",
    ]  # fmt: skip
    table = extension("docstrings").to_rst(["| a | b |", "| --- | --- |", "| `c` | d |"])
    assert [line for line in table if line] == [
        ".. list-table::", "   :header-rows: 1", "   * - a", "     - b", "   * - ``c``", "     - d",
    ]  # fmt: skip


def test_code_of_the_guide_to_pytorch(tmp_path, monkeypatch):
    """Its Python blocks run, and what it says about modes, norms and kept patches is true of a tiny demo model."""
    monkeypatch.chdir(tmp_path)
    size = {"image_size": 32, "patch_size": 8, "hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 24}
    method = {"num_hidden_layers": 3, "reduction": "evit", "reduction_layers": [0, 1], "keep_rate": 0.5}
    method |= {"cross_layer_cache": True, "num_clr_tokens": 1, "head": "cla"}
    labels = {f"cultivar_{index}": index for index in range(10)}
    own = {index: label for label, index in labels.items()}
    config = clca.CLCAViTConfig(**size, **method, id2label=own, label2id=labels)
    clca.CLCAViTForImageClassification(config).save_pretrained("outputs/demo")
    clca.CLCAImageProcessor(size={"height": 32, "width": 32}, crop_pct=0.875).save_pretrained("outputs/demo")
    for label in [*labels] * 3:
        folder = Path("outputs", "demo_leaves", "train", label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), 50).save(folder / f"{len(list(folder.iterdir()))}.png")
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "pytorch.md").read_text(encoding="utf-8"), re.M | re.S)
    names = {}
    exec("\n".join(blocks), names)
    model, kept, rates = names["model"], names["kept"], names["rates"]
    assert names["several"].training and names["several"].config.train_keep_rates == rates
    assert sorted(names["draw_keep_rate"](rates, seed=1, step=step) for step in range(3)) == rates
    assert model.vit.layernorm.weight.grad is None and model.classifier.out_proj.weight.grad is not None
    assert not clca.CLCAViTForImageClassification.from_pretrained("outputs/trained").training
    assert kept.shape == (8, 4, 4) and kept.flatten(1).any(1).all() and not kept.all()
    with pytest.raises(ValueError, match=r"`pixel_values`.*`head`='cla'"):
        model.train()(names["pixel_values"][:1])


def test_code_of_the_guide_to_methods(monkeypatch):
    """Its Python blocks run; registered methods are removed afterwards."""
    methods = dict(clca.REDUCTIONS)
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "adding-a-method.md").read_text(), re.M | re.S)
    assert len(blocks) == 4
    try:
        exec("\n".join(blocks), {})
        assert set(clca.REDUCTIONS) - set(methods) == {"largest_norm", "neighbours"}
    finally:
        clca.REDUCTIONS.clear()
        clca.REDUCTIONS.update(methods)
