"""What a kind of picture is made of: what it draws, its options, what it needs of a model, and how the web page shows it.

`ufgir.visualization.kinds.KINDS` holds one `Kind` for each kind of picture. The command `ufgir visualize`, the web page and the
gallery read everything that they need from these records.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from clca import CLCAViTConfig, CLCAViTForImageClassification

from .sheet import Column


class View(NamedTuple):
    """A model and images as it sees them.

    Attributes:
        model: any CLCA model.
        pixels: (B, C, height, width), normalised.
        pictures: (B, 3, height, width) in [0, 1], as far as patches reach.
        grid: rows and columns of patches.
        interpolate: whether the images may have another size than the model's.
    """

    model: CLCAViTForImageClassification
    pixels: torch.Tensor
    pictures: torch.Tensor
    grid: tuple[int, int]
    interpolate: bool


Draw = Callable[[View], list[Column]]  # a `Kind`, one of the functions behind them, or a `functools.partial` of one


class Option(NamedTuple):
    """An option of a picture. It is named after the argument of the function that draws, and `ufgir visualize` makes a command
    line argument of it.

    Attributes:
        help: what it says.
        default: what its absence means, in words.
        type: makes a value of one word of the command line.
        choices: the values that are allowed. None for all.
        nargs: how many words it takes, as `argparse` counts them. None for one.
        metavar: what stands for the words in the help.
        convert: makes the argument of the function of what `argparse` read. It may raise a `ValueError`.
    """

    help: str
    default: str = "none"
    type: Callable[[str], Any] = str
    choices: Collection[str] | None = None
    nargs: int | str | None = None
    metavar: str | tuple[str, ...] | None = None
    convert: Callable[[Any], Any] = lambda value: value


class Need(NamedTuple):
    """Something that a picture needs of a model.

    Attributes:
        is_met: whether a model of a configuration has it.
        refusal: the sentence that refuses a model, which stands for `{model}`.
        remedy: a sentence on what to do about it, with options of the command.
        hint: the sentence on the web page, in the place of the picture.
    """

    is_met: Callable[[CLCAViTConfig], bool]
    refusal: str
    remedy: str
    hint: str


STAGES = Need(
    lambda config: config.reduction is not None,
    "{model} reduces no tokens: there are no stages to draw.",
    "Choose a method with --reduction.",
    "No reduction: every patch stays a token, so there are no stages to draw.",
)
CLS = Need(
    lambda config: config.use_class_token,
    "this picture needs a CLS token, and {model} has none.",
    "Choose another picture with --what.",
    "No CLS token: there is no attention of it to draw.",
)


class Page(NamedTuple):
    """How the web page shows a picture.

    Attributes:
        about: what its colours mean, in one or two sentences.
        options: a model's configuration -> options of the picture.
        patch_heading: for a picture that follows one patch, its heading, with `{row}` and `{column}`. The picture is shown below
            the chosen one, and is given `patch`. None for a picture that visitors choose with a button.
    """

    about: str
    options: Callable[[CLCAViTConfig], dict[str, Any]] = lambda config: {}
    patch_heading: str | None = None


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of picture. It is called like the function that draws it: `kind(view, **options)` returns columns of a sheet.

    Attributes:
        title: its name on the page and in the gallery.
        help: what it shows, for the help of the command, after the kind's name and a colon.
        caption: what it shows, in full sentences: the beginning of its section of the gallery.
        function: draws it. Takes a `View`, and `options` by name.
        options: name -> option. All have a default in `function`.
        needs: what it needs of a model: `STAGES`, `CLS`.
        page: how the web page shows it. None if it does not.
        example: options without which it draws nothing.
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
        """Return the first need that a model of this configuration does not meet, or None."""
        return next((need for need in self.needs if not need.is_met(config)), None)

    def __call__(self, view: View, **options: Any) -> list[Column]:
        """Draw the columns of a sheet.

        Raises:
            ValueError: the model lacks what the picture needs, or an option is out of its range.
        """
        need = self.unmet(view.model.config)
        if need is not None:
            raise ValueError(need.refusal.format(model="`model`"))
        return self.function(view, **options)
