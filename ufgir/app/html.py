"""The parts of the web page that show results, as HTML: bars, costs, pictures with captions, sentences.

Whatever comes from a model or a file is escaped: names of classes are a stranger's text.
"""

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from ..profiling.macs import describe
from .limits import PICTURE_QUALITY, THUMBNAIL_SIDE
from .viewer import Checkpoint, Cost, Leaf, Look, Shown


CSS = """
.gradio-container { max-width: 1320px !important; margin: 0 auto !important; }
.gradio-container .html-container { padding: 0 !important; }
.block:has(> .html-container > .prose:empty) { display: none !important; }
.ufgir { --bar: #2f7d32; line-height: 1.45; }
.dark .ufgir { --bar: #7bc47f; }
.ufgir h1 { font-size: 1.7rem !important; margin: 0 0 .2rem !important; }
.ufgir h2 { font-size: 1.2rem !important; margin: 0 !important; }
.ufgir h3 { font-size: 1rem !important; margin: 0 0 .3rem !important; }
.ufgir p { margin: 0 0 .2rem !important; }
.ufgir .quiet { color: var(--body-text-color); opacity: .85; font-size: .9rem; }
.ufgir .error { border-left: 4px solid #c62828; padding: .5rem .8rem; background: #fdecea; color: #5f1412; border-radius: 4px; }
.ufgir table { border: 0 !important; border-collapse: collapse; width: 100%; margin: 0 !important; font-variant-numeric: tabular-nums; }
.ufgir th, .ufgir td { padding: .2rem .3rem !important; border: 0 !important; text-align: right; }
.ufgir tr { border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important; }
.ufgir th:first-child, .ufgir td:first-child { text-align: left; overflow-wrap: anywhere; }
.ufgir tbody th { font-weight: 400; }
.ufgir .bar { width: 45%; }
.ufgir .bar span { display: block; height: .8rem; min-width: 1px; border-radius: 3px; background: var(--bar); }
.ufgir .figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(170px, 47%), 1fr)); gap: .6rem; }
.ufgir figure { margin: 0; }
.ufgir figure img { width: 100%; height: auto; display: block; margin: 0; border-radius: 4px; }
.ufgir figcaption { font-size: .85rem; margin-top: .2rem; }
.ufgir .thumbs { display: grid; grid-template-columns: repeat(auto-fill, minmax(68px, 1fr)); gap: .3rem; }
.ufgir .thumbs button { padding: 2px; border: 2px solid transparent; border-radius: 6px; background: none; cursor: pointer; }
.ufgir .thumbs button:hover { border-color: var(--bar); }
.ufgir .thumbs button:focus-visible { outline: 3px solid #1a73e8; outline-offset: 1px; }
.ufgir .thumbs img { width: 100%; aspect-ratio: 1; object-fit: cover; display: block; margin: 0; border-radius: 4px; }
#leaf img { cursor: crosshair; width: 100%; height: auto; display: block; margin: 0; border-radius: 4px; }
@media (min-width: 900px) { #leaf-column { position: sticky; top: .5rem; align-self: flex-start; } }
"""


def _wrap(*parts: str) -> str:
    return f'<div class="ufgir">{"".join(parts)}</div>'


def header() -> str:
    """Title, and one sentence."""
    return _wrap(
        "<h1>What does the model keep of a leaf?</h1>",
        "<p>A token-reduction Vision Transformer drops or merges most patches of an image on its way through the layers: "
        "see which ones it keeps, what it predicts from them, and what that costs.</p>",
    )


def heading(text: str) -> str:
    """Of a section."""
    return _wrap(f"<h2>{escape(text)}</h2>")


def problem(text: str) -> str:
    """A sentence that is read aloud at once; nothing for an empty one."""
    return _wrap(f'<p class="error" role="alert">{escape(text)}</p>') if text else ""


def hint(text: str) -> str:
    """A sentence in place of results."""
    return _wrap(f'<p class="quiet">{escape(text)}</p>')


def thumbnails(examples: Sequence[tuple[str, Leaf]]) -> str:
    """Buttons with small pictures, numbered by `data-index`."""
    buttons = []
    for index, (name, leaf) in enumerate(examples):
        small = leaf.picture.copy()
        small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        label = escape(f"Example {name}", quote=True)
        buttons.append(
            f'<button type="button" data-index="{index}" aria-label="{label}" title="{label}">{_image(small, "")}</button>'
        )
    return _wrap(f'<div class="thumbs">{"".join(buttons)}</div>')


def leaf(picture: Image.Image) -> str:
    """The leaf, to be clicked on."""
    return _wrap(_image(picture, "The leaf as the model sees it, with a frame around one patch"))


# Tells the server where the leaf was clicked, in parts of its height and width.
LEAF_JS = """
element.addEventListener('click', (event) => {
  const box = event.target.closest('img')?.getBoundingClientRect();
  if (box) trigger('click', {y: (event.clientY - box.top) / box.height, x: (event.clientX - box.left) / box.width});
});
"""

# Tells the server which thumbnail was pressed.
THUMBNAILS_JS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-index]');
  if (button) trigger('click', {index: Number(button.dataset.index)});
});
"""


def about_model(checkpoint: Checkpoint) -> str:
    """What the model is, and which methods its weights cannot serve."""
    lines = [f"<p>{escape(line)}.</p>" for line in describe(checkpoint.config).splitlines()]
    if checkpoint.reasons:
        own = ", ".join(checkpoint.reasons)
        items = "".join(
            f"<li><b>{escape(name)}</b>: {escape(reason)}</li>" for name, reason in checkpoint.reasons.items()
        )
        lines.append(f"<details><summary>Not offered: {escape(own)}</summary><ul>{items}</ul></details>")
    return _wrap(f'<div class="quiet">{"".join(lines)}</div>')


def prediction(look: Look) -> str:
    """The best classes with bars."""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="bar"><span style="width: {100 * share:.1f}%"></span></td>'
        f"<td>{100 * share:.1f} %</td></tr>"
        for name, share in look.classes
    )
    note = '<p class="quiet">Each class has a probability of its own.</p>' if look.independent else ""
    return _wrap(f"<h3>Prediction</h3><table><tbody>{rows}</tbody></table>{note}")


def cost_table(cost: Cost, look: Look, note: str = "") -> str:
    """Multiply-adds, latency and tokens, beside those of the dense model."""
    macs = [_giga(cost.macs), _giga(cost.dense_macs), _share(cost.macs, cost.dense_macs)]
    times = [cost.time and cost.time.median, cost.dense_time and cost.dense_time.median]
    latency = [*(_milliseconds(time) for time in times), _share(*times)]
    rows = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, cells in (("GMACs", macs), ("Latency, ms", latency))
    )
    tokens = " → ".join(map(str, look.tokens))
    if cost.macs is None:
        note = f"{note} This method keeps other numbers of tokens for other images: GMACs cannot be said in advance.".strip()
    return _wrap(
        "<h3>Cost of one image</h3><table><thead><tr><td></td>",
        '<th scope="col">this setting</th><th scope="col">dense</th><th scope="col">share</th></tr></thead>',
        f"<tbody>{rows}</tbody></table>",
        f'<p class="quiet">Tokens, layer by layer: {tokens}.</p>',
        f'<p class="quiet">{escape(note)}</p>' if note else "",
    )


def _giga(macs: int | None) -> str:
    return "–" if macs is None else f"{macs / 1e9:.3g}"


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:.1f}"


def _share(ours: float | None, dense: float | None) -> str:
    return f"{100 * ours / dense:.0f} %" if ours and dense else "–"


def figures(title: str, pictures: Sequence[Shown], about: str = "") -> str:
    """Pictures with captions below them."""
    items = "".join(
        f"<figure>{_image(shown.picture, f'{title}, {shown.name}: {shown.note}')}"
        f"<figcaption>{escape(shown.name)}<br>{escape(shown.note)}</figcaption></figure>"
        for shown in pictures
    )
    text = f'<p class="quiet">{escape(about)}</p>' if about else ""
    return _wrap(f'<h3>{escape(title)}</h3>{text}<div class="figures">{items}</div>')


def _image(picture: Image.Image, description: str) -> str:
    """The picture itself inside the page: no file that must be kept or cleared away."""
    stream = io.BytesIO()
    picture.save(stream, format="WEBP", quality=PICTURE_QUALITY)
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img src="data:image/webp;base64,{data}" alt="{escape(description, quote=True)}">'
