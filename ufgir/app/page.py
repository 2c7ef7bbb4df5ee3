"""Web page of `ufgir app`: a leaf, a model, one or two settings side by side, and their results.

`viewer` computes results, `html` formats them and `limits` defines the limits; this module connects them. The page sends no data to
other servers and loads nothing from them.
"""

import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.extras import install_command
from ..utils.text import one_sentence
from ..visualization.kinds import KINDS
from ..visualization.records import Kind
from . import html as html
from . import limits
from .viewer import Leaf, Setting, Viewer, drawn_examples, folder_examples, open_leaf
from .visitors import error_response, hide_tracebacks, uploads


if TYPE_CHECKING:
    import gradio

DEMO_MODEL = "outputs/demo"
_DENSE = "none (every token stays)"
_KEPT = "The file is deleted as soon as it is read, or after an hour. The image is deleted when you close this page."
_SLOW = "This model is slow here, so its latency is measured only when you press the button."


def kinds_on_page(of_patch: bool) -> dict[str, Kind]:
    """Return the kinds of pictures that visitors can choose; with `of_patch`, those of the chosen patch, which are always shown."""
    pages = {name: kind for name, kind in KINDS.items() if kind.page is not None}
    return {name: kind for name, kind in pages.items() if (kind.page.patch_heading is not None) == of_patch}


def import_gradio() -> Any:
    """Import Gradio, with its analytics disabled.

    Raises:
        ValueError: if it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise ValueError(f"the web page needs Gradio: {install_command('app')}") from error
    return gradio


def make_page(
    model: str | None = None, examples: str | os.PathLike[str] | None = None, folders: bool = True
) -> "gradio.Blocks":
    """Build the page. `launch_page` starts it.

    Args:
        model: initial model, a folder or Hub repository; None for an empty field.
        examples: folder of example images; by default drawn leaves, if the model was trained on them.
        folders: whether visitors may load models from folders of this machine, private models, and models of any size.

    Raises:
        ValueError: if Gradio is not installed, or there is no such model or folder.
    """
    gr = import_gradio()
    viewer = Viewer(folders, trusted=model)
    leaves: list[tuple[str, Leaf]] = [] if examples is None else folder_examples(examples)
    if model is not None:
        checkpoint = viewer.checkpoint(model)
        if not leaves:
            leaves = drawn_examples(checkpoint.config)
    uploads()  # before Gradio reads the folder for uploads
    page = _Page(gr, viewer, model, leaves).blocks
    hide_tracebacks(gr, page)
    return page


class _Page:
    """Components and event handlers of the page."""

    def __init__(self, gr: Any, viewer: Viewer, model: str | None, leaves: Sequence[tuple[str, Leaf]]) -> None:
        self.gr, self.viewer, self.leaves = gr, viewer, leaves
        with gr.Blocks(title="What does the model keep of a leaf?", analytics_enabled=False) as self.blocks:
            gr.HTML(html.header())
            self.name = gr.State(model)
            self.leaf = gr.State(leaves[0][1] if leaves else None)
            with gr.Row():
                with gr.Column(scale=1, min_width=300, elem_id="leaf-column"):
                    self._leaf_column()
                with gr.Column(scale=2, min_width=300):
                    self._model_row(model)
                    with gr.Row():
                        self.panels = [self._panel("A", model), self._panel("B", model)]
            self._wire()

    # Components

    def _leaf_column(self) -> None:
        gr = self.gr
        gr.HTML(html.heading("Leaf"))
        self.leaf_problem = gr.HTML(elem_id="leaf-problem")
        self.picture = gr.HTML(js_on_load=html.LEAF_JS, elem_id="leaf")
        gr.HTML(html.hint("Click a patch to follow it through the layers, or choose it here:"))
        with gr.Row():
            row, column = self._patch_inputs(self.name.value)
            self.row = gr.Number(**row, precision=0, min_width=80, elem_id="row")
            self.column = gr.Number(**column, precision=0, min_width=80, elem_id="column")
        self.upload = gr.UploadButton("Upload a leaf", file_types=["image"], elem_id="upload", variant="primary")
        gr.HTML(html.hint(_KEPT))
        self.examples = None
        if self.leaves:
            gr.HTML(html.hint("Or choose an example:"))
            self.examples = gr.HTML(html.thumbnails(self.leaves), js_on_load=html.THUMBNAILS_JS, elem_id="examples")

    def _model_row(self, model: str | None) -> None:
        gr = self.gr
        gr.HTML(html.heading("Model"))
        self.source = gr.Textbox(
            model or "",
            label="Folder or Hub repository" if self.viewer.folders else "Hub repository",
            max_lines=1,
            submit_btn="Load",
            elem_id="model",
        )
        self.model_problem = gr.HTML(elem_id="model-problem")
        self.about = gr.HTML("" if model is None else html.about_model(self.viewer.checkpoint(model)))
        choices = [(kind.title, name) for name, kind in kinds_on_page(of_patch=False).items()]
        self.kind = gr.Radio(choices, value=choices[0][1], label="Pictures", elem_id="kind")
        self.compare = gr.Checkbox(False, label="Compare with a second setting, B", elem_id="compare")

    def _panel(self, letter: str, model: str | None) -> dict[str, Any]:
        gr, parts = self.gr, {}
        with gr.Column(visible=letter == "A", min_width=300, elem_id=f"panel-{letter}") as parts["panel"]:
            gr.HTML(html.heading(f"Setting {letter}"))
            choices = self._choices(model, letter)
            parts["method"] = gr.Dropdown(
                label=f"Reduction method, {letter}", filterable=False, elem_id=f"method-{letter}", **choices["method"]
            )
            parts["rate"] = gr.Slider(
                limits.SMALLEST_KEEP_RATE,
                1,
                step=limits.SMALLEST_KEEP_RATE,
                label=f"Keep rate of each stage, {letter}",
                elem_id=f"rate-{letter}",
                **choices["rate"],
            )
            parts["cache"] = gr.Checkbox(
                label=f"Cross-layer cache (CLC), {letter}", elem_id=f"cache-{letter}", **choices["cache"]
            )
            parts["prediction"] = gr.HTML(elem_id=f"prediction-{letter}")
            parts["cost"] = gr.HTML(elem_id=f"cost-{letter}")
            parts["measure"] = gr.Button("Measure latency again", size="sm", elem_id=f"measure-{letter}")
            parts["stages"] = gr.HTML(elem_id=f"stages-{letter}")
            parts["trace"] = gr.HTML(elem_id=f"trace-{letter}")
        return parts

    def _patch_inputs(self, name: str | None) -> list[dict[str, Any]]:
        """Return the labels and initial values of the fields for the row and the column of the patch."""
        if name is None:
            return [{"label": label, "value": 0} for label in ("Row", "Column")]
        grid = zip(("Row", "Column"), self.viewer.grid(name), strict=True)
        return [{"label": f"{label}, 0 to {count - 1}", "value": count // 2} for label, count in grid]

    def _choices(self, name: str | None, letter: str) -> dict[str, dict[str, Any]]:
        """Return the choices and initial values of the controls of a setting: the model's own in A, half its keep rate in B."""
        if name is None:
            return {
                "method": {"choices": [_DENSE], "value": _DENSE},
                "rate": {"value": 0.5, "interactive": False},
                "cache": {"value": False, "interactive": False},
            }
        checkpoint = self.viewer.checkpoint(name)
        own = checkpoint.setting
        rate, method = own.keep_rate if own.method else 0.5, own.method
        if letter == "B" and method in checkpoint.fixed_rate:
            method = None
        elif letter == "B":
            rate = max(limits.SMALLEST_KEEP_RATE, round(rate / 2, 2))
        return {
            "method": {"choices": [m or _DENSE for m in checkpoint.methods], "value": method or _DENSE},
            "rate": {
                "value": rate,
                "interactive": method is not None and method not in checkpoint.fixed_rate,
            },
            "cache": {"value": own.cache, "interactive": checkpoint.cache},
        }

    # Events

    def _wire(self) -> None:
        gr = self.gr
        controls = [panel[part] for panel in self.panels for part in ("method", "rate", "cache")]
        inputs = [self.leaf, self.name, self.compare, self.kind, self.row, self.column, *controls]
        results = [panel[part] for panel in self.panels for part in ("prediction", "cost", "stages", "trace")]
        costs = [panel["cost"] for panel in self.panels]
        one = {"api_visibility": "private", "concurrency_id": "model", "concurrency_limit": limits.AT_ONCE}
        show = {"fn": self._show, "inputs": inputs, "outputs": [self.picture, *results], **one}
        measure = {"fn": self._measure, "inputs": inputs, "outputs": costs, "show_progress": "hidden", **one}
        latest = {"trigger_mode": "always_last"}  # skip intermediate values of a slider

        def pick(name: str | None, event: gr.EventData) -> list[int]:
            """Return the row and column of the clicked patch, from a position in fractions of height and width."""
            places = zip((event.y, event.x), self.viewer.grid(name), strict=True)
            return [min(max(int(place * count), 0), count - 1) for place, count in places]

        def close(request: gr.Request) -> None:
            """Delete the image of a visitor who closes the page."""
            self.blocks.state_holder.delete_state(request.session_hash)
            self.viewer.forget_leaves()

        def example(event: gr.EventData) -> tuple[Leaf, str]:
            return self.leaves[int(event.index) % len(self.leaves)][1], ""

        self.blocks.unload(close)
        self.blocks.load(**show).then(**measure)
        found = [self.leaf, self.leaf_problem]
        self.upload.upload(self._upload, [self.upload, self.leaf], found, **one).then(**show).then(**measure)
        if self.examples is not None:
            self.examples.click(example, None, found, **one).then(**show).then(**measure)
        loaded = [self.name, self.model_problem, self.about, self.row, self.column, *controls]
        load = self.source.submit(self._load, [self.source, self.name, *inputs[4:]], loaded, **one)
        load.then(**show).then(**measure)
        self.picture.click(pick, self.name, [self.row, self.column], **one).then(**show)
        for part in (self.kind, self.row, self.column):
            part.input(**show, **latest)
        for panel in self.panels:
            method = panel["method"].input(self._method, [self.name, panel["method"]], panel["rate"], **one)
            method.then(**show).then(**measure)
            for part in ("rate", "cache"):
                panel[part].input(**show, **latest).then(**measure)
            panel["measure"].click(**measure | {"fn": self._measure_now, "show_progress": "minimal"})
        second = self.compare.input(self._second, self.compare, self.panels[1]["panel"], **one)
        second.then(**show).then(**measure)

    def _upload(self, path: str | None, leaf: Leaf | None) -> tuple[Leaf | None, str]:
        try:
            return open_leaf(path) if path else leaf, ""
        except ValueError as error:
            return leaf, html.problem(f"{error} The leaf below is the previous one." if leaf else str(error))
        finally:
            if path:
                Path(path).unlink(missing_ok=True)

    def _second(self, shown: bool) -> Any:
        return self.gr.update(visible=shown)

    def _method(self, name: str | None, method: str) -> Any:
        """Enable the slider of the keep rate if the method has a variable rate; otherwise show the fixed rate."""
        if name is None or method == _DENSE:
            return self.gr.update(interactive=False)
        checkpoint = self.viewer.checkpoint(name)
        if method in checkpoint.fixed_rate:
            return self.gr.update(value=checkpoint.setting.keep_rate, interactive=False)
        return self.gr.update(interactive=True)

    def _load(self, source: str, name: str | None, *controls: Any) -> list[Any]:
        """Load another model and reset the controls to its setting; if it cannot be loaded, show the reason and change nothing."""
        try:
            checkpoint = self.viewer.load(source.strip())
        except (ValueError, OSError) as error:
            text = one_sentence(error)
            kept = f" The results below are those of {name}." if name else ""
            return [name, html.problem(text + kept), *[self.gr.skip()] * (1 + len(controls))]
        name = source.strip()
        settings = [self._choices(name, letter) for letter in "AB"]
        return [
            name,
            "",
            html.about_model(checkpoint),
            *(self.gr.update(**place) for place in self._patch_inputs(name)),
            *(self.gr.update(**setting[part]) for setting in settings for part in ("method", "rate", "cache")),
        ]

    def _show(
        self,
        leaf: Leaf | None,
        name: str | None,
        compare: bool,
        kind: str,
        row: int | None,
        column: int | None,
        *controls: Any,
    ) -> list[Any]:
        """Compute and format all results for the current controls."""
        if name is None or leaf is None:
            missing = "Choose a model." if name is None else "Upload a leaf."
            return ["", html.hint(missing), *[""] * (4 * len(self.panels) - 1)]
        patch = None if row is None or column is None else (row, column)
        settings = self._settings(compare, controls)
        results = []
        for setting in settings:
            results += self._panel_results(name, leaf, setting, settings, kind, patch)
        results += [self.gr.skip()] * (4 * (len(self.panels) - len(settings)))
        return [html.leaf(self.viewer.leaf_with_grid(name, leaf, patch)), *results]

    def _panel_results(
        self,
        name: str,
        leaf: Leaf,
        setting: Setting,
        settings: Sequence[Setting],
        kind: str,
        patch: tuple[int, int] | None,
    ) -> list[str]:
        """Return prediction, cost, stages and trace of one setting, as HTML."""
        try:
            prediction = self.viewer.predict(name, leaf, setting)
            cost = html.cost_table(self.viewer.cost(name, setting, settings), prediction)
            parts = [html.prediction_table(prediction), cost]
        except ValueError as error:
            return [html.problem(one_sentence(error)), "", "", ""]
        return [*parts, self._picture(name, leaf, setting, kind), self._pictures_of(patch, name, leaf, setting)]

    def _picture(self, name: str, leaf: Leaf, setting: Setting, kind: str) -> str:
        """Return the pictures of the chosen kind, or the reason why there are none."""
        need = self.viewer.unmet(name, setting, kind)
        if need is not None:
            return html.hint(need.hint)
        try:
            shown = self.viewer.stages(name, leaf, setting, kind)
        except ValueError as error:  # a method that reports no assignments
            return html.problem(one_sentence(error))
        return html.figures(KINDS[kind].title, shown, KINDS[kind].page.about)

    def _pictures_of(self, patch: tuple[int, int] | None, name: str, leaf: Leaf, setting: Setting) -> str:
        """Return the pictures of the chosen patch, without kinds whose requirements are not met."""
        kinds = kinds_on_page(of_patch=True)
        kinds = {key: kind for key, kind in kinds.items() if self.viewer.unmet(name, setting, key) is None}
        if kinds and patch is None:
            return html.problem("Row and column of the patch must be numbers.")
        parts = []
        for key, kind in kinds.items():
            try:
                shown = self.viewer.trace(name, leaf, setting, patch, key)
            except ValueError as error:
                return html.problem(one_sentence(error))
            heading = kind.page.patch_heading.format(row=patch[0], column=patch[1])
            parts.append(html.figures(heading, shown, kind.page.about))
        return "".join(parts)

    def _settings(self, compare: bool, controls: Sequence[Any]) -> list[Setting]:
        settings = []
        for start in range(0, 3 * (1 + compare), 3):
            method, rate, cache = controls[start : start + 3]
            settings.append(Setting(None, 1.0, cache) if method == _DENSE else Setting(method, rate, cache))
        return settings

    def _measure(
        self, leaf: Leaf | None, name: str | None, compare: bool, *rest: Any, force: bool = False
    ) -> list[Any]:
        """Return the tables of costs with latencies. Slow models are measured only with `force`, which also repeats measurements."""
        unchanged = [self.gr.skip() for _ in self.panels]
        if name is None or leaf is None:
            return unchanged
        settings = self._settings(compare, rest[3:])
        try:
            predictions = [self.viewer.predict(name, leaf, setting) for setting in settings]
            quick = sum(prediction.seconds for prediction in predictions) < limits.QUICK
            if force or (quick and not self.viewer.cost(name, settings[0], settings).time):
                self.viewer.measure(name, leaf, settings)
            costs = [self.viewer.cost(name, setting, settings) for setting in settings]
        except ValueError:  # already reported by `_show`
            return unchanged
        tables = [
            html.cost_table(cost, prediction, "" if cost.time else _SLOW)
            for cost, prediction in zip(costs, predictions, strict=True)
        ]
        return tables + unchanged[len(tables) :]

    def _measure_now(self, *inputs: Any) -> list[Any]:
        return self._measure(*inputs, force=True)


def _theme(gr: Any) -> Any:
    """Return Gradio's theme with darker colors, for sufficient contrast, and system fonts, which need no download."""
    theme = gr.themes.Default(primary_hue="green", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return theme.set(
        body_text_color_subdued="*neutral_600",
        block_info_text_color="*neutral_600",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_border_color="*primary_700",
        checkbox_background_color_selected="*primary_700",
        checkbox_border_color="*neutral_500",
        slider_color="*primary_700",
    )


def free_port(host: str) -> int:
    """Return a free port."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def serve_page(page: "gradio.Blocks", host: str | None = None, port: int | None = None, share: bool = False) -> str:
    """Start to serve a page in the background; `page.close()` stops it.

    Args:
        page: result of `make_page`.
        host: address to listen on; None for Gradio's environment variable, which a Space sets.
        port: port to listen on; 0 for a free one, None for Gradio's environment variable.
        share: also serve the page at a public URL through a tunnel of Gradio.

    Returns:
        URL of the page.

    Raises:
        ValueError: if the port is in use, or the host is not an address of this machine.
    """
    gr = import_gradio()
    try:
        _, local, public = page.queue(max_size=limits.MOST_WAITING, api_open=False).launch(
            server_name=host,
            server_port=free_port(host or "127.0.0.1") if port == 0 else port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,  # errors other than `gr.Error` are only logged
            app_kwargs={"exception_handlers": {Exception: error_response}, "lifespan": uploads().watched},
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            pwa=False,
            enable_monitoring=False,
            mcp_server=False,
            max_file_size=limits.MAX_UPLOAD,
            state_session_capacity=limits.SESSIONS,
            theme=_theme(gr),
            css=html.CSS,
        )
    except OSError as error:
        raise ValueError(
            f"the page cannot be served at {host}:{port}: choose another `--host` or `--port`."
        ) from error
    return public or local


def launch_page(
    page: "gradio.Blocks",
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve a page until Ctrl-C, with the arguments of `serve_page`; `ready` is called with the URL once the page can be loaded."""
    address = serve_page(page, host, port, share)
    try:
        ready(address)
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        pass
    finally:
        page.close(verbose=False)
