"""What the web page shows, without the page: pictures opened with care, models under other settings, what they cost.

A setting is a method, a keep rate and the cross-layer cache on or off. The weights of a checkpoint serve all settings that add
no parameters: the models of several settings share them.
"""

import hashlib
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image, ImageDraw
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, SAFE_WEIGHTS_NAME

from clca import REDUCTIONS, CLCAViTConfig, CLCAViTForImageClassification
from clca.budget_clca import Budget, as_pair

from ..checkpoints.keep_rates import at_one_rate, has_one_rate, rate_of
from ..checkpoints.loading import load_config, load_image_processor, load_model
from ..data.synthetic_leaves import SyntheticLeavesConfig
from ..profiling.macs import count_macs, dense_config, macs_in_advance, on_meta
from ..profiling.timing import InterleavedTiming, Quartiles, quartiles, steady
from ..transforms.images import to_rgb
from ..utils.text import one_sentence
from ..visualization.kinds import KINDS, input_columns, make_view
from ..visualization.records import Draw, Need, View
from ..visualization.sheet import cell_size, draw_cell
from .limits import (
    BYTES_PER_PARAMETER,
    CHECKPOINTS,
    COSTS,
    DRAWINGS,
    DRAWN_EXAMPLES,
    FEWEST_ROUNDS,
    FOLDER_EXAMPLES,
    FORMATS,
    LATENCIES,
    LONGEST_SIDE,
    MOST_CLASSES,
    MOST_ELONGATED,
    MOST_INPUT_PIXELS,
    MOST_LAYERS,
    MOST_PARAMETERS,
    MOST_PATCHES,
    MOST_PIXELS,
    MOST_ROUNDS,
    MOST_TEXT_BYTES,
    PICTURE_SIDE,
    PREDICTIONS,
    SETTINGS,
    SMALLEST_DRAWN,
    SMALLEST_KEEP_RATE,
    TIMING_SECONDS,
    TOO_LARGE,
    TOP_CLASSES,
)


logger = logging.getLogger(__name__)


# Pictures


@dataclass(frozen=True)
class Leaf:
    """A picture that answers are remembered by.

    Attributes:
        key: digest of its pixels.
        picture: RGB, at most `LONGEST_SIDE` pixels long.
    """

    key: str
    picture: Image.Image = field(compare=False, repr=False)


def make_leaf(picture: Image.Image) -> Leaf:
    """Any picture, made upright, RGB and small."""
    picture.draft(None, (2 * LONGEST_SIDE, 2 * LONGEST_SIDE))  # JPEG files are decoded small at once
    picture = to_rgb(picture)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    digest = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes())
    return Leaf(digest.hexdigest(), picture)


def open_leaf(path: str | os.PathLike[str]) -> Leaf:
    """Read a picture of a stranger: turned as its camera says, and made small.

    Raises:
        ValueError: no image of `FORMATS`, a broken one, or one of more than `MOST_PIXELS` or longer than `MOST_ELONGATED` times its
            width.
    """
    name = Path(path).name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as picture:
                if picture.width * picture.height > MOST_PIXELS:
                    raise Image.DecompressionBombError
                elongated = max(picture.size) > MOST_ELONGATED * min(picture.size)
                leaf = None if elongated else make_leaf(picture)
    except Image.DecompressionBombError as error:
        most = MOST_PIXELS // 10**6
        raise ValueError(f"{name} has more than {most} million pixels: make it smaller and try again.") from error
    except Exception as error:  # Pillow's decoders raise nearly everything for a broken file
        raise ValueError(f"{name} is not a picture that can be read. Try another JPEG or PNG file.") from error
    if leaf is None:
        raise ValueError(f"{name} is more than {MOST_ELONGATED} times as long as wide: crop it and try again.")
    return leaf


def drawn_examples(config: CLCAViTConfig, count: int = DRAWN_EXAMPLES) -> list[tuple[str, Leaf]]:
    """Leaves of the drawn data set, one of each of the first classes, if the model was trained on it; else none.

    Args:
        config: the model's. The pictures are as large as those it takes.
        count: of leaves at most.
    """
    names = [config.id2label[i] for i in range(config.num_labels)]
    size = max(*as_pair(config.image_size), SMALLEST_DRAWN)
    data = SyntheticLeavesConfig(num_classes=len(names), image_size=size) if names else None
    if data is None or data.class_names != names:
        return []
    return [(name, make_leaf(data.draw("test", i, 0))) for i, name in enumerate(data.class_names[:count])]


def folder_examples(folder: str | os.PathLike[str], count: int = FOLDER_EXAMPLES) -> list[tuple[str, Leaf]]:
    """The first pictures of a folder, at any depth, with their file names.

    Raises:
        ValueError: no folder, or none with pictures that can be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`--examples` must be a folder of pictures, got {folder}.")
    endings, examples = Image.registered_extensions(), []
    for path in sorted(folder.rglob("*")):
        if len(examples) < count and path.suffix.lower() in endings and path.is_file():
            try:
                examples.append((path.stem, open_leaf(path)))
            except ValueError as error:
                logger.warning("%s", error)
    if not examples:
        raise ValueError(f"`--examples` {folder} holds no picture that can be read.")
    return examples


# Settings


class Setting(NamedTuple):
    """How a model reduces its tokens.

    Attributes:
        method: a name of `clca.REDUCTIONS`, or None.
        keep_rate: of every stage; without a method 1.
        cache: cross-layer cache.
    """

    method: str | None
    keep_rate: float
    cache: bool


def own_setting(config: CLCAViTConfig) -> Setting:
    """The setting of a checkpoint. Several rates, or counts, become the one rate that leaves as much after the last stage."""
    if config.reduction is None:
        return Setting(None, 1.0, config.cross_layer_cache)
    stages = len(config.reduction_layers)
    budget = Budget.of(config)
    rate = math.prod(rate ** (1 / len(budget.keep_rate)) for rate in budget.keep_rate)
    if budget.keep_tokens is not None:
        rate = min(1.0, budget.keep_tokens[-1] / config.num_patches) ** (1 / stages)
    return Setting(config.reduction, max(round(rate, 2), SMALLEST_KEEP_RATE), config.cross_layer_cache)


def setting_config(config: CLCAViTConfig, setting: Setting) -> CLCAViTConfig:
    """The configuration of a checkpoint under a setting; its own setting leaves it as it is.

    Raises:
        ValueError: what the method refuses.
    """
    if setting == own_setting(config):
        return config
    values: dict[str, Any] = {"reduction": setting.method, "cross_layer_cache": setting.cache}
    if (setting.method, setting.keep_rate) != own_setting(config)[:2]:
        values |= {"keep_rate": [setting.keep_rate], "keep_tokens": None}
    if setting.method != config.reduction:
        values["reduction_kwargs"] = None
        if has_one_rate(setting.method):
            values["train_keep_rates"] = None
    if not config.uses_reduction_layers:  # a plain ViT: three stages, as in the paper
        depth = config.num_hidden_layers
        values["reduction_layers"] = sorted({depth // 4, depth // 2, 3 * depth // 4})
    return CLCAViTConfig.from_dict(config.to_dict() | values)


def weights_for(model: CLCAViTForImageClassification, config: CLCAViTConfig) -> dict[str, torch.Tensor]:
    """The weights of a model, not copied, as a model of another configuration has them: of one for several keep rates those at
    one rate, where the other has one only."""
    rates = model.config.train_keep_rates
    if rates and not config.train_keep_rates:
        return at_one_rate(model.state_dict(), rates, rate_of(config))
    return model.state_dict()


def lacking(model: CLCAViTForImageClassification, config: CLCAViTConfig) -> list[str]:
    """Parameters that a model of this configuration needs and the given one lacks, or has in another shape."""
    have = {name: value.shape for name, value in weights_for(model, config).items()}
    return [name for name, value in on_meta(config).state_dict().items() if have.get(name) != value.shape]


def with_weights(
    model: CLCAViTForImageClassification, config: CLCAViTConfig, fill: bool = False
) -> CLCAViTForImageClassification:
    """A model of another configuration on the same weights, which are not copied.

    Args:
        model: whose weights.
        config: of the new model.
        fill: put zeros where the weights are lacking, for a model whose numbers do not matter.

    Raises:
        ValueError: the weights are lacking.
    """
    missing = lacking(model, config)
    if missing and not fill:
        raise ValueError(_why_lacking(config, missing))
    other, weights = on_meta(config), weights_for(model, config)
    zeros = {name: torch.zeros(value.shape) for name, value in other.state_dict().items() if name in missing}
    other.load_state_dict(
        {name: zeros.get(name, weights.get(name)) for name in other.state_dict()}, strict=True, assign=True
    )
    return other.eval()


def _why_lacking(config: CLCAViTConfig, missing: Sequence[str]) -> str:
    rates = ", ".join(f"{rate:g}" for rate in Budget.of(config).keep_rate)
    return (
        f"{config.reduction or 'This setting'} has parameters of its own, which these weights lack at keep rate {rates} "
        f"({len(missing)} tensors): they must be trained first."
    )


@contextmanager
def _asking_the_hub(name: str) -> Iterator[None]:
    """Say so where the Hub gave no answer about `name`: a lost connection tells nothing of what a repository holds.

    Raises:
        ValueError: no answer, or the files cannot be kept on this machine.
    """
    try:
        yield
    # `LocalEntryNotFoundError`: not fetched before, and the Hub not reached. The HTTP client's errors are no OSError.
    except (LocalEntryNotFoundError, HTTPError, ConnectionError, TimeoutError) as error:
        raise ValueError(
            f"the Hub cannot be reached, or does not give out {name} now: check the connection and try again."
        ) from error
    except OSError as error:  # without the path that `str(error)` ends with
        raise ValueError(f"{name} cannot be loaded: {error.strerror or one_sentence(error)}") from error


def _fetch(name: str) -> str:
    """The folder of a repository's files that a model is made of, and of no others, fetched without the token of this machine;
    the weights only if they are not too many. What was fetched before needs no Hub."""
    with _asking_the_hub(name):
        try:
            config = Path(hf_hub_download(name, CONFIG_NAME, token=False))
        except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError) as error:
            raise ValueError(f"there is no checkpoint {name} on the Hub that everybody may read.") from error
        folder, commit = config.parent, config.parent.name
        _check_values(name, config)
        try:
            _check_size(name, load_config(str(folder), {}))
        except ValueError as error:
            raise ValueError(str(error).replace(str(folder), name)) from error
        for file in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME):
            found = try_to_load_from_cache(name, file, revision=commit)
            if found is None:  # neither fetched before, nor known not to be there
                try:
                    found = hf_hub_download(name, file, revision=commit, token=False)
                except RemoteEntryNotFoundError:  # it has one of them
                    continue
            if isinstance(found, str):
                _check_values(name, Path(found))
        try:
            if not isinstance(try_to_load_from_cache(name, SAFE_WEIGHTS_NAME, revision=commit), str):
                url = hf_hub_url(name, SAFE_WEIGHTS_NAME, revision=commit)
                size = get_hf_file_metadata(url, token=False).size
                if size is None or size > BYTES_PER_PARAMETER * MOST_PARAMETERS:
                    raise ValueError(f"the weights of {name} are too large for this page. {TOO_LARGE}")
            hf_hub_download(name, SAFE_WEIGHTS_NAME, revision=commit, token=False)
        except RemoteEntryNotFoundError as error:
            raise ValueError(f"{name} has no {SAFE_WEIGHTS_NAME}, the only weights that this page takes.") from error
    return str(folder)


def _check_values(name: str, file: Path) -> None:
    """Refuse a configuration, of a model or an image processor, that states more classes or pixels than the page takes, before
    anything is made of it."""
    if file.stat().st_size > MOST_TEXT_BYTES:
        raise ValueError(f"the {file.name} of {name} is too large for this page. {TOO_LARGE}")
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the {file.name} of {name} is not JSON.") from error
    if not isinstance(values, dict):
        raise ValueError(f"the {file.name} of {name} must hold a JSON object.")
    labels = values.get("num_labels", 0), *(len(values.get(key) or ()) for key in ("id2label", "label2id"))
    sizes = [values.get("image_size"), *_sizes(values)]
    if any(_is_over(count, MOST_CLASSES) for count in labels) or any(
        _is_over(_area(s), MOST_INPUT_PIXELS) for s in sizes
    ):
        raise ValueError(f"{name} is too large for this page. {TOO_LARGE}")


def _sizes(values: Mapping[str, Any]) -> Iterator[Any]:
    """The sizes that an image processor states, also one inside another object; `size` as it is before the crop to a share."""
    stated = values.get("crop_pct")
    shares = [s for s in (stated if isinstance(stated, list) else [stated]) if isinstance(s, (int, float))]
    for key, value in values.items():
        if key == "size" and shares:
            yield [_area(value) / max(min(shares) ** 2, 1e-300), 1]
        elif key in ("size", "crop_size", "pad_size"):
            yield value
        elif isinstance(value, Mapping):
            yield from _sizes(value)


def _area(size: Any) -> Any:
    """Pixels of a size in any of the forms that processors take: one side, two, or sides by name."""
    if isinstance(size, Mapping):
        if set(size) == {"shortest_edge"}:
            return _area(size["shortest_edge"]) * MOST_ELONGATED
        size = list(size.values())
    sides = [side for side in (size if isinstance(size, Sequence) else [size]) if isinstance(side, (int, float))]
    return abs(sides[0]) * abs(sides[-1]) if sides else 0


def _is_over(value: Any, most: int) -> bool:
    return isinstance(value, (int, float)) and not value <= most


def _check_size(name: str, config: CLCAViTConfig) -> None:
    """Refuse a model that is too large, from its configuration alone."""
    width, layers = config.hidden_size, config.num_hidden_layers
    least = layers * width * (4 * width + 2 * config.intermediate_size)  # before a network of that many layers is made
    if layers > MOST_LAYERS or config.num_patches > MOST_PATCHES or least > MOST_PARAMETERS:
        raise ValueError(f"{name} is too large for this page. {TOO_LARGE}")
    if sum(value.numel() for value in on_meta(config).state_dict().values()) > MOST_PARAMETERS:
        raise ValueError(f"{name} is too large for this page. {TOO_LARGE}")


class Checkpoint(NamedTuple):
    """A model with what is needed to show it.

    Attributes:
        model, image_processor: as saved.
        setting: as saved.
        methods: names that its weights can serve; the first is None.
        reasons: name -> why its weights cannot serve that method.
        fixed_rate: methods whose keep rate cannot be changed on these weights.
        cache: whether the cross-layer cache can be switched on and off.
    """

    model: CLCAViTForImageClassification
    image_processor: Any
    setting: Setting
    methods: list[str | None]
    reasons: dict[str, str]
    fixed_rate: set[str]
    cache: bool

    @property
    def config(self) -> CLCAViTConfig:
        """As saved."""
        return self.model.config


def load_checkpoint(name: str, trusted: bool = True) -> Checkpoint:
    """Load a model and find out which settings its weights can serve. No code of the checkpoint is run.

    Args:
        name: folder or Hub repository.
        trusted: whether it is the owner of this machine who names it. Strangers may name public repositories of the Hub with
            models of up to `MOST_PARAMETERS`, in safetensors.

    Raises:
        ValueError: no such checkpoint, another kind of model, or one that is not whole, or too large; the Hub is not reached.
    """
    name = name.strip()
    if not name:
        raise ValueError("`MODEL` is empty: give a folder, or a repository on the Hub such as you/leaves.")
    if not trusted and name.startswith(
        (".", "/", "~")
    ):  # by its look alone: strangers do not learn which folders there are
        raise ValueError(f"{name} looks like a folder of this machine. This page takes models of the Hub only.")
    if trusted and Path(name).is_dir() and not Path(name, "config.json").is_file():
        raise ValueError(f"there is no checkpoint in the folder {name}: it has no config.json.")
    source = name if trusted else _fetch(name)
    config = load_config(source, {})
    try:
        image_processor = load_image_processor(source)
    except ValueError as error:
        raise ValueError(str(error).replace(source, name)) from error
    except OSError as error:
        raise ValueError(f"{name} has no image processor (preprocessor_config.json).") from error
    try:
        model = load_model(source, config, use_safetensors=None if trusted else True).model
    except ValueError as error:
        raise ValueError(str(error).replace(source, name)) from error
    except OSError as error:
        raise ValueError(f"the weights of {name} cannot be loaded: {one_sentence(error)}") from error

    setting, methods, reasons, fixed_rate = own_setting(config), [None], {}, set()
    for method in sorted(REDUCTIONS):
        own = method == config.reduction
        try:
            here = setting_config(config, setting if own else Setting(method, 0.5, setting.cache))
            other = setting_config(config, Setting(method, 0.25 if setting.keep_rate > 0.3 else 0.75, setting.cache))
        except ValueError as error:
            reasons[method] = one_sentence(error)
            continue
        if not own and (missing := lacking(model, here)):
            reasons[method] = _why_lacking(here, missing)
            continue
        methods.append(method)
        if lacking(model, other):
            fixed_rate.add(method)
    try:
        switched = setting_config(config, setting._replace(cache=not setting.cache))
        cache = not lacking(model, switched)
    except ValueError:
        cache = False
    return Checkpoint(model, image_processor, setting, methods, reasons, fixed_rate, cache)


# What is seen


class Shown(NamedTuple):
    """A picture, what it shows, and a note on it."""

    name: str
    picture: Image.Image
    note: str = ""


class Look(NamedTuple):
    """What a model makes of a leaf.

    Attributes:
        classes: name and probability of the best ones, best first.
        independent: whether a leaf may have several classes, so that the probabilities do not sum to one.
        tokens: that enter each layer, and last the final norm.
        seconds: that the forward pass took, once, unwarmed.
    """

    classes: list[tuple[str, float]]
    independent: bool
    tokens: tuple[int, ...]
    seconds: float


class Cost(NamedTuple):
    """Multiply-adds of one image, None where they differ by image, and latency in seconds, None where not measured."""

    macs: int | None
    dense_macs: int
    time: Quartiles | None = None
    dense_time: Quartiles | None = None


class Viewer:
    """Loads models, and remembers the last answers. One thread at a time may use it.

    Args:
        folders: whether its users own this machine: models may come from folders, and be private or large.
        trusted: a checkpoint that may be so in any case.
    """

    def __init__(self, folders: bool = True, trusted: str | None = None) -> None:
        self.folders = folders
        self.trusted = trusted
        self.model = lru_cache(SETTINGS)(self._model)
        self.look = lru_cache(PREDICTIONS)(self._look)
        self.stages = lru_cache(DRAWINGS)(self._stages)
        self.macs = lru_cache(COSTS)(self._macs)
        self._checkpoints: dict[str, Checkpoint] = {}
        self._times: dict[Any, dict[Setting | str, Quartiles]] = {}

    def load(self, name: str) -> Checkpoint:
        """Load a checkpoint, also one that is loaded already: it may have been trained again. The last `CHECKPOINTS` are kept.

        Raises:
            ValueError: as of `load_checkpoint`; nothing changes.
        """
        checkpoint = load_checkpoint(name, trusted=self.folders or name == self.trusted)
        self._checkpoints.pop(name, None)
        self._checkpoints = dict([*self._checkpoints.items(), (name, checkpoint)][-CHECKPOINTS:])
        for cache in (self.model, self.look, self.stages, self.macs):
            cache.cache_clear()
        self._times.clear()
        return checkpoint

    def checkpoint(self, name: str) -> Checkpoint:
        """A checkpoint, loaded unless it is."""
        return self._checkpoints.get(name) or self.load(name)

    def _model(self, name: str, setting: Setting) -> CLCAViTForImageClassification:
        checkpoint = self.checkpoint(name)
        return with_weights(checkpoint.model, setting_config(checkpoint.config, setting))

    def forget_leaves(self) -> None:
        """Drop the answers about images, and with them the images."""
        self.look.cache_clear()
        self.stages.cache_clear()

    def view(self, name: str, leaf: Leaf, setting: Setting | None = None) -> View:
        """The leaf as the model sees it."""
        checkpoint = self.checkpoint(name)
        model = checkpoint.model if setting is None else self.model(name, setting)
        return make_view(model, checkpoint.image_processor, [leaf.picture])

    def _look(self, name: str, leaf: Leaf, setting: Setting) -> Look:
        view = self.view(name, leaf, setting)
        config = view.model.config
        start = time.perf_counter()
        with torch.no_grad():
            output = view.model(view.pixels)
        seconds = time.perf_counter() - start
        independent = config.problem_type == "multi_label_classification"
        logits = output.logits[0].float()
        shares = logits.sigmoid() if independent else logits.softmax(dim=0)
        best = shares.topk(min(TOP_CLASSES, len(shares)))
        classes = [(config.id2label[int(i)], float(p)) for p, i in zip(best.values, best.indices, strict=True)]
        return Look(classes, independent, output.token_counts, seconds)

    def unmet(self, name: str, setting: Setting, kind: str) -> Need | None:
        """What a kind of picture needs and the model lacks under a setting, or None."""
        return KINDS[kind].unmet(setting_config(self.checkpoint(name).config, setting))

    def _stages(self, name: str, leaf: Leaf, setting: Setting, kind: str) -> list[Shown]:
        return self._draw(name, leaf, setting, kind)

    def trace(
        self, name: str, leaf: Leaf, setting: Setting, patch: tuple[int, int], kind: str = "trace"
    ) -> list[Shown]:
        """A kind of picture that follows a patch (row, column), by default the token that holds it after each stage, and what
        it is made of. The patch is framed.

        Raises:
            ValueError: no such patch, or a setting without what the picture needs.
        """
        grid, shown = self.grid(name), self._draw(name, leaf, setting, kind, patch=patch)
        for one in shown:
            frame_patch(one.picture, grid, patch)
        return shown

    def _draw(self, name: str, leaf: Leaf, setting: Setting, kind: str, **options: Any) -> list[Shown]:
        view, record = self.view(name, leaf, setting), KINDS[kind]
        return _shown(partial(record, **record.page.options(view.model.config), **options), view)

    def leaf_with_grid(self, name: str, leaf: Leaf, patch: tuple[int, int] | None) -> Image.Image:
        """What the model sees, with a frame around a patch."""
        view = self.view(name, leaf)
        (shown,) = _shown(input_columns, view)
        if patch is not None and all(0 <= place < count for place, count in zip(patch, view.grid, strict=True)):
            frame_patch(shown.picture, view.grid, patch)
        return shown.picture

    def grid(self, name: str) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.checkpoint(name).config.image_grid

    def _macs(self, name: str, setting: Setting) -> tuple[int | None, int]:
        config = self.checkpoint(name).config
        return macs_in_advance(setting_config(config, setting)), count_macs(on_meta(dense_config(config)))

    def cost(self, name: str, setting: Setting, settings: Sequence[Setting]) -> Cost:
        """What a setting costs; its latency if `measure` has measured it together with all `settings`."""
        times = self._times.get((name, frozenset(settings)), {})
        return Cost(*self.macs(name, setting), times.get(setting), times.get("dense"))

    def measure(self, name: str, leaf: Leaf, settings: Sequence[Setting]) -> None:
        """Measure the latency of settings, and of the dense model, in turn: one image, medians of a few warmed runs."""
        checkpoint = self.checkpoint(name)
        models: Mapping[Any, CLCAViTForImageClassification] = {
            "dense": with_weights(checkpoint.model, dense_config(checkpoint.config), fill=True)
        } | {setting: self.model(name, setting) for setting in settings}
        pixels = self.view(name, leaf).pixels
        with torch.no_grad(), steady():
            timing = InterleavedTiming({key: partial(model, pixels) for key, model in models.items()}, pixels.device)
            timing.warm_up()
            start = time.perf_counter()
            for number in range(MOST_ROUNDS):
                if number >= FEWEST_ROUNDS and time.perf_counter() - start > TIMING_SECONDS:
                    break
                timing.run(1)
        for error in timing.failures.values():
            raise error
        if len(self._times) >= LATENCIES:
            self._times.clear()
        self._times[name, frozenset(settings)] = {key: quartiles(values) for key, values in timing.seconds.items()}


def frame_patch(picture: Image.Image, grid: tuple[int, int], patch: tuple[int, int]) -> None:
    """Draw a frame around a patch (row, column) of a picture: dark and light, to be seen on any ground."""
    (rows, columns), (row, column) = grid, patch
    width, height = picture.width / columns, picture.height / rows
    draw = ImageDraw.Draw(picture)
    for inset, colour, line in ((-3, "black", 6), (-2, "#ffd21e", 4)):
        box = (column * width + inset, row * height + inset, (column + 1) * width - inset, (row + 1) * height - inset)
        draw.rectangle(box, outline=colour, width=line)


def _shown(kind: Draw, view: View) -> list[Shown]:
    """The pictures that a kind makes of the only leaf of a view."""
    return [
        Shown(column.name, draw_cell(cell, cell_size(cell.image, PICTURE_SIDE)), cell.caption)
        for column in kind(view)
        for cell in column.cells
    ]
