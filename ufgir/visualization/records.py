"""Records that describe a kind of figure: how to draw it, its options, its requirements, and its place on the web page.

`ufgir.visualization.kinds.KINDS` holds one `Kind` for each kind of figure. `ufgir visualize`, the web page and the gallery are
generated from these records.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from clca import CLCAViTConfig, CLCAViTForImageClassification

from .sheet import Column


class View(NamedTuple):
    """A model and a batch of preprocessed images.

    Attributes:
        model: any CLCA model.
        pixels: (B, C, height, width), normalized; the input of the model.
        images: (B, 3, height, width) in [0, 1], to draw on; cropped to the area that the patches cover.
        grid: number of rows and of columns of patches.
        interpolate: whether to interpolate position embeddings, so that images may differ in size from the model's input.
    """

    model: CLCAViTForImageClassification
    pixels: torch.Tensor
    images: torch.Tensor
    grid: tuple[int, int]
    interpolate: bool


Draw = Callable[[View], list[Column]]  # a `Kind`, one of the functions behind them, or a `functools.partial` of one


class Option(NamedTuple):
    """An option of a figure. Its name is that of an argument of the drawing function; `ufgir visualize` adds it as a command-line
    argument.

    Attributes:
        help: the help text.
        default: the default, in words, for the help.
        type: converts one command-line word to a value.
        choices: the allowed values; None for any.
        nargs: number of words, as in `argparse`; None for one.
        metavar: placeholder of the words in the help.
        convert: converts the value parsed by `argparse` to the argument of the function. May raise ValueError.
        alias: an earlier name of the option, accepted on the command line but not listed in the help; None for none.
    """

    help: str
    default: str = "none"
    type: Callable[[str], Any] = str
    choices: Collection[str] | None = None
    nargs: int | str | None = None
    metavar: str | tuple[str, ...] | None = None
    convert: Callable[[Any], Any] = lambda value: value
    alias: str | None = None


class Need(NamedTuple):
    """A requirement of a figure on the model.

    Attributes:
        is_met: returns whether a model with the given configuration meets it.
        refusal: error message for a model that does not meet it; contains the placeholder `{model}`.
        remedy: a sentence that names the command-line option to change.
        hint: the sentence that the web page shows instead of the figure.
    """

    is_met: Callable[[CLCAViTConfig], bool]
    refusal: str
    remedy: str
    hint: str


STAGES = Need(
    lambda config: config.reduction is not None,
    "{model} reduces no tokens: there are no stages to draw.",
    "Choose a method with --reduction.",
    "No reduction: every patch keeps its token, so there are no stages to draw.",
)
CLS = Need(
    lambda config: config.use_class_token,
    "this figure needs a CLS token, and {model} has none.",
    "Choose another figure with --what.",
    "No CLS token, so there is no CLS attention to draw.",
)


class Page(NamedTuple):
    """How the web page shows a figure.

    Attributes:
        about: the meaning of its colors, in one or two sentences.
        options: maps a model's configuration to options of the figure.
        patch_heading: heading, with `{row}` and `{column}`, of a figure about one patch. Such a figure is shown below the selected
            one and is called with `patch`. None for a figure that is selected with a button.
    """

    about: str
    options: Callable[[CLCAViTConfig], dict[str, Any]] = lambda config: {}
    patch_heading: str | None = None


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of figure. Call it like its drawing function: `kind(view, **options)` returns the columns of a sheet.

    Attributes:
        title: name on the web page and in the gallery.
        help: short description for the command's help, shown after the name and a colon.
        caption: description in full sentences; the first sentences of its section in the gallery.
        function: the drawing function. Takes a `View`, and `options` as keyword arguments.
        options: option by name. `function` has a default for each.
        needs: requirements on the model: `STAGES`, `CLS`.
        page: how the web page shows it; None to leave it out.
        example: options that the function needs in order to draw anything.
    """

    title: str
    help: str
    caption: str
    function: Callable[..., list[Column]]
    options: Mapping[str, Option] = field(default_factory=dict)
    needs: tuple[Need, ...] = ()
    page: Page | None = None
    example: Mapping[str, Any] = field(default_factory=dict)

    def unmet(self, config: CLCAViTConfig) -> Need | None:
        """Return the first requirement that a model with this configuration does not meet, or None."""
        return next((need for need in self.needs if not need.is_met(config)), None)

    def __call__(self, view: View, **options: Any) -> list[Column]:
        """Draw the columns of a sheet.

        Raises:
            ValueError: if the model does not meet a requirement, or an option is out of range.
        """
        need = self.unmet(view.model.config)
        if need is not None:
            raise ValueError(need.refusal.format(model="`model`"))
        return self.function(view, **options)
