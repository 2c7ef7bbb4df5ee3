"""HTML of the web page: predictions, costs, pictures with captions, messages.

Text from models and files, such as class names, is escaped, because it is not trusted.
"""

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from ..profiling.macs import describe
from .limits import PICTURE_QUALITY, THUMBNAIL_SIDE
from .viewer import Checkpoint, Cost, Leaf, Picture, Prediction


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
    """Return the title and introduction of the page."""
    return _wrap(
        "<h1>What does the model keep of a leaf?</h1>",
        "<p>A token-reduction Vision Transformer drops or merges most patches of an image on its way through the layers: "
        "see which ones it keeps, what it predicts from them, and what that costs.</p>",
    )


def heading(text: str) -> str:
    """Return the heading of a section."""
    return _wrap(f"<h2>{escape(text)}</h2>")


def problem(text: str) -> str:
    """Return an error message, which screen readers announce immediately; an empty string for an empty text."""
    return _wrap(f'<p class="error" role="alert">{escape(text)}</p>') if text else ""


def hint(text: str) -> str:
    """Return a sentence that is shown instead of results."""
    return _wrap(f'<p class="quiet">{escape(text)}</p>')


def thumbnails(examples: Sequence[tuple[str, Leaf]]) -> str:
    """Return buttons with thumbnails of the examples, numbered by `data-index`."""
    buttons = []
    for index, (name, leaf) in enumerate(examples):
        small = leaf.image.copy()
        small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        label = escape(f"Example {name}", quote=True)
        buttons.append(
            f'<button type="button" data-index="{index}" aria-label="{label}" title="{label}">{_image(small, "")}</button>'
        )
    return _wrap(f'<div class="thumbs">{"".join(buttons)}</div>')


def leaf(image: Image.Image) -> str:
    """Return the image of the leaf, on which a patch is chosen by a click."""
    return _wrap(_image(image, "The leaf as the model sees it, with a frame around one patch"))


# Sends the position of a click on the leaf to the server, as fractions of its height and width.
LEAF_JS = """
element.addEventListener('click', (event) => {
  const box = event.target.closest('img')?.getBoundingClientRect();
  if (box) trigger('click', {y: (event.clientY - box.top) / box.height, x: (event.clientX - box.left) / box.width});
});
"""

# Sends the index of the clicked thumbnail to the server.
THUMBNAILS_JS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-index]');
  if (button) trigger('click', {index: Number(button.dataset.index)});
});
"""


def about_model(checkpoint: Checkpoint) -> str:
    """Describe the model, and list the methods that cannot be used with its weights."""
    lines = [f"<p>{escape(line)}.</p>" for line in describe(checkpoint.config).splitlines()]
    if checkpoint.reasons:
        names = ", ".join(checkpoint.reasons)
        items = "".join(
            f"<li><b>{escape(name)}</b>: {escape(reason)}</li>" for name, reason in checkpoint.reasons.items()
        )
        lines.append(f"<details><summary>Not available: {escape(names)}</summary><ul>{items}</ul></details>")
    return _wrap(f'<div class="quiet">{"".join(lines)}</div>')


def prediction_table(prediction: Prediction) -> str:
    """Return the most probable classes, with bars."""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="bar"><span style="width: {100 * share:.1f}%"></span></td>'
        f"<td>{100 * share:.1f} %</td></tr>"
        for name, share in prediction.classes
    )
    note = '<p class="quiet">The probabilities of the classes are independent.</p>' if prediction.independent else ""
    return _wrap(f"<h3>Prediction</h3><table><tbody>{rows}</tbody></table>{note}")


def cost_table(cost: Cost, prediction: Prediction, note: str = "") -> str:
    """Return the multiply-adds and latency of the model and of the dense model, and the number of tokens in each layer."""
    macs = [_giga(cost.macs), _giga(cost.dense_macs), _share(cost.macs, cost.dense_macs)]
    times = [cost.time and cost.time.median, cost.dense_time and cost.dense_time.median]
    latency = [*(_milliseconds(time) for time in times), _share(*times)]
    rows = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, cells in (("GMACs", macs), ("Latency, ms", latency))
    )
    tokens = " → ".join(map(str, prediction.tokens))
    if cost.macs is None:
        note = (
            f"{note} The number of kept tokens depends on the image, so GMACs cannot be computed in advance.".strip()
        )
    return _wrap(
        "<h3>Cost of one image</h3><table><thead><tr><td></td>",
        '<th scope="col">this setting</th><th scope="col">dense</th><th scope="col">share</th></tr></thead>',
        f"<tbody>{rows}</tbody></table>",
        f'<p class="quiet">Tokens in each layer: {tokens}.</p>',
        f'<p class="quiet">{escape(note)}</p>' if note else "",
    )


def _giga(macs: int | None) -> str:
    return "–" if macs is None else f"{macs / 1e9:.3g}"


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:.1f}"


def _share(ours: float | None, dense: float | None) -> str:
    return f"{100 * ours / dense:.0f} %" if ours and dense else "–"


def figures(title: str, pictures: Sequence[Picture], about: str = "") -> str:
    """Return pictures with captions below them."""
    items = "".join(
        f"<figure>{_image(picture.image, f'{title}, {picture.name}: {picture.note}')}"
        f"<figcaption>{escape(picture.name)}<br>{escape(picture.note)}</figcaption></figure>"
        for picture in pictures
    )
    text = f'<p class="quiet">{escape(about)}</p>' if about else ""
    return _wrap(f'<h3>{escape(title)}</h3>{text}<div class="figures">{items}</div>')


def _image(image: Image.Image, description: str) -> str:
    """Embed an image in the page, so that no files have to be stored and deleted."""
    stream = io.BytesIO()
    image.save(stream, format="WEBP", quality=PICTURE_QUALITY)
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img src="data:image/webp;base64,{data}" alt="{escape(description, quote=True)}">'
