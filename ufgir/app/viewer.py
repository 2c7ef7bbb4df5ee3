"""Models, predictions, pictures and costs for the web page, usable without it.

A setting is a method, a keep rate and the cross-layer cache on or off. A checkpoint can be used with every setting that adds no
parameters; the models of its settings share the weights.
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


# Images


@dataclass(frozen=True)
class Leaf:
    """An image, with a hash that is the key of cached results.

    Attributes:
        key: SHA-256 of the pixels.
        image: RGB, the longer side at most `LONGEST_SIDE` pixels.
    """

    key: str
    image: Image.Image = field(compare=False, repr=False)


def make_leaf(image: Image.Image) -> Leaf:
    """Convert an image to RGB, rotate it according to its EXIF orientation, and shrink it if it is large."""
    image.draft(None, (2 * LONGEST_SIDE, 2 * LONGEST_SIDE))  # JPEG files are decoded at a smaller size
    image = to_rgb(image)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    checksum = hashlib.sha256(f"{image.size}".encode() + image.tobytes())
    return Leaf(checksum.hexdigest(), image)


def open_leaf(path: str | os.PathLike[str]) -> Leaf:
    """Read an image file that may come from an untrusted visitor, as `make_leaf`.

    Raises:
        ValueError: if the file is not an image of `FORMATS` or is damaged, or the image has more than `MOST_PIXELS` pixels or a
            ratio of its sides above `MOST_ELONGATED`.
    """
    name = Path(path).name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise Image.DecompressionBombError
                elongated = max(image.size) > MOST_ELONGATED * min(image.size)
                leaf = None if elongated else make_leaf(image)
    except Image.DecompressionBombError as error:
        most = MOST_PIXELS // 10**6
        raise ValueError(f"{name} has more than {most} million pixels: make it smaller and try again.") from error
    except Exception as error:  # Pillow's decoders raise many kinds of errors for damaged files
        raise ValueError(f"{name} is not an image that can be read. Try another JPEG or PNG file.") from error
    if leaf is None:
        raise ValueError(f"{name} is more than {MOST_ELONGATED} times as long as wide: crop it and try again.")
    return leaf


def drawn_examples(config: CLCAViTConfig, count: int = DRAWN_EXAMPLES) -> list[tuple[str, Leaf]]:
    """Draw one leaf of each of the first classes of `synthetic_leaves`, if the model was trained on that data set.

    Args:
        config: the model's configuration; the leaves have its image size.
        count: maximal number of leaves.

    Returns:
        Class name and leaf of each example; empty for a model of other classes.
    """
    names = [config.id2label[i] for i in range(config.num_labels)]
    size = max(*as_pair(config.image_size), SMALLEST_DRAWN)
    data = SyntheticLeavesConfig(num_classes=len(names), image_size=size) if names else None
    if data is None or data.class_names != names:
        return []
    return [(name, make_leaf(data.draw("test", i, 0))) for i, name in enumerate(data.class_names[:count])]


def folder_examples(folder: str | os.PathLike[str], count: int = FOLDER_EXAMPLES) -> list[tuple[str, Leaf]]:
    """Read the first `count` images below a folder, with their file names.

    Raises:
        ValueError: if there is no such folder, or it contains no readable image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`--examples` must be a folder of images, got {folder}.")
    endings, examples = Image.registered_extensions(), []
    for path in sorted(folder.rglob("*")):
        if len(examples) < count and path.suffix.lower() in endings and path.is_file():
            try:
                examples.append((path.stem, open_leaf(path)))
            except ValueError as error:
                logger.warning("%s", error)
    if not examples:
        raise ValueError(f"`--examples` {folder} contains no readable image.")
    return examples


# Settings


class Setting(NamedTuple):
    """Token reduction of a model.

    Attributes:
        method: a name of `clca.REDUCTIONS`, or None.
        keep_rate: keep rate of each stage; 1 without a method.
        cache: whether the cross-layer cache is used.
    """

    method: str | None
    keep_rate: float
    cache: bool


def own_setting(config: CLCAViTConfig) -> Setting:
    """Return the setting of a checkpoint. Several rates, or token counts, are converted to the single rate that keeps the same number of
    tokens after the last stage."""
    if config.reduction is None:
        return Setting(None, 1.0, config.cross_layer_cache)
    stages = len(config.reduction_layers)
    budget = Budget.of(config)
    rate = math.prod(rate ** (1 / len(budget.keep_rate)) for rate in budget.keep_rate)
    if budget.keep_tokens is not None:
        rate = min(1.0, budget.keep_tokens[-1] / config.num_patches) ** (1 / stages)
    return Setting(config.reduction, max(round(rate, 2), SMALLEST_KEEP_RATE), config.cross_layer_cache)


def setting_config(config: CLCAViTConfig, setting: Setting) -> CLCAViTConfig:
    """Return the configuration of a checkpoint with another setting; unchanged for its own setting.

    Raises:
        ValueError: if the configuration is invalid, see `CLCAViTConfig`.
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
    """Return the state dict of a model for another configuration, without copying tensors. For a model with `train_keep_rates` and a
    configuration without, batch norm statistics are those of one rate."""
    rates = model.config.train_keep_rates
    if rates and not config.train_keep_rates:
        return at_one_rate(model.state_dict(), rates, rate_of(config))
    return model.state_dict()


def missing_weights(model: CLCAViTForImageClassification, config: CLCAViTConfig) -> list[str]:
    """Return the names of weights of a configuration that a model does not have, or has in another shape."""
    have = {name: value.shape for name, value in weights_for(model, config).items()}
    return [name for name, value in on_meta(config).state_dict().items() if have.get(name) != value.shape]


def with_weights(
    model: CLCAViTForImageClassification, config: CLCAViTConfig, fill: bool = False
) -> CLCAViTForImageClassification:
    """Build a model of another configuration that shares the weights of `model`.

    Args:
        model: the model with the weights.
        config: configuration of the new model.
        fill: use zeros for missing weights, for a model that is only timed.

    Raises:
        ValueError: if weights are missing and `fill` is not set.
    """
    missing = missing_weights(model, config)
    if missing and not fill:
        raise ValueError(_missing_message(config, missing))
    other, weights = on_meta(config), weights_for(model, config)
    zeros = {name: torch.zeros(value.shape) for name, value in other.state_dict().items() if name in missing}
    other.load_state_dict(
        {name: zeros.get(name, weights.get(name)) for name in other.state_dict()}, strict=True, assign=True
    )
    return other.eval()


def _missing_message(config: CLCAViTConfig, missing: Sequence[str]) -> str:
    rates = ", ".join(f"{rate:g}" for rate in Budget.of(config).keep_rate)
    return (
        f"{config.reduction or 'This setting'} has parameters that this checkpoint does not contain at keep rate {rates} "
        f"({len(missing)} tensors): train a model with it first."
    )


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Convert connection and file errors to a ValueError, so that a lost connection is not reported as a missing file.

    Raises:
        ValueError: if the Hub does not answer, or files cannot be written to the cache.
    """
    try:
        yield
    # `LocalEntryNotFoundError`: not in the cache, and the Hub cannot be reached. Errors of the HTTP client are not OSErrors.
    except (LocalEntryNotFoundError, HTTPError, ConnectionError, TimeoutError) as error:
        raise ValueError(f"could not download {name} from the Hub: check the connection and try again.") from error
    except OSError as error:  # `strerror` has no path, which visitors must not see
        raise ValueError(f"{name} cannot be loaded: {error.strerror or one_sentence(error)}") from error


def _fetch(name: str) -> str:
    """Download the configuration, image processor and weights of a Hub repository, without the token of this machine, and return their
    folder. Sizes are checked before the download. Cached files need no connection."""
    with _hub_errors(name):
        try:
            config = Path(hf_hub_download(name, CONFIG_NAME, token=False))
        except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError) as error:
            raise ValueError(f"there is no public checkpoint {name} on the Hub.") from error
        folder, commit = config.parent, config.parent.name
        _check_values(name, config)
        try:
            _check_size(name, load_config(str(folder), {}))
        except ValueError as error:
            raise ValueError(str(error).replace(str(folder), name)) from error
        for file in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME):
            found = try_to_load_from_cache(name, file, revision=commit)
            if found is None:  # neither cached nor known to be missing
                try:
                    found = hf_hub_download(name, file, revision=commit, token=False)
                except RemoteEntryNotFoundError:  # a repository has one of the two files
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
            raise ValueError(f"{name} has no {SAFE_WEIGHTS_NAME}, the only supported format of weights.") from error
    return str(folder)


def _check_values(name: str, file: Path) -> None:
    """Check the numbers of classes and pixels in the configuration of a model or image processor, before it is used.

    Raises:
        ValueError: if a number is above its limit, or the file is not a JSON object.
    """
    if file.stat().st_size > MOST_TEXT_BYTES:
        raise ValueError(f"the {file.name} of {name} is too large for this page. {TOO_LARGE}")
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the {file.name} of {name} is not JSON.") from error
    if not isinstance(values, dict):
        raise ValueError(f"the {file.name} of {name} must contain a JSON object.")
    labels = values.get("num_labels", 0), *(len(values.get(key) or ()) for key in ("id2label", "label2id"))
    sizes = [values.get("image_size"), *_sizes(values)]
    if any(_exceeds(count, MOST_CLASSES) for count in labels) or any(
        _exceeds(_area(s), MOST_INPUT_PIXELS) for s in sizes
    ):
        raise ValueError(f"{name} is too large for this page. {TOO_LARGE}")


def _sizes(values: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the sizes in the configuration of an image processor, including nested ones. With `crop_pct`, `size` is that before the
    crop."""
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
    """Return the number of pixels of a size in any format of image processors: one side, two sides, or sides by name."""
    if isinstance(size, Mapping):
        if set(size) == {"shortest_edge"}:
            return _area(size["shortest_edge"]) * MOST_ELONGATED
        size = list(size.values())
    sides = [side for side in (size if isinstance(size, Sequence) else [size]) if isinstance(side, (int, float))]
    return abs(sides[0]) * abs(sides[-1]) if sides else 0


def _exceeds(value: Any, most: int) -> bool:
    return isinstance(value, (int, float)) and not value <= most


def _check_size(name: str, config: CLCAViTConfig) -> None:
    """Check the size of a model from its configuration.

    Raises:
        ValueError: if it is above a limit.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    least = layers * width * (4 * width + 2 * config.intermediate_size)  # a lower bound, before the network is built
    if layers > MOST_LAYERS or config.num_patches > MOST_PATCHES or least > MOST_PARAMETERS:
        raise ValueError(f"{name} is too large for this page. {TOO_LARGE}")
    if sum(value.numel() for value in on_meta(config).state_dict().values()) > MOST_PARAMETERS:
        raise ValueError(f"{name} is too large for this page. {TOO_LARGE}")


class Checkpoint(NamedTuple):
    """A loaded checkpoint, and the settings that can be used with it.

    Attributes:
        model, image_processor: as saved.
        setting: the saved setting.
        methods: names of methods that can be used with the weights; the first one is None.
        reasons: method -> why it cannot be used.
        fixed_rate: methods whose keep rate cannot be changed.
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
        """The saved configuration."""
        return self.model.config


def load_checkpoint(name: str, trusted: bool = True) -> Checkpoint:
    """Load a checkpoint, and determine which settings can be used with it. No code of the checkpoint is run.

    Args:
        name: folder or Hub repository.
        trusted: whether the owner of this machine named it. Visitors may only load public Hub repositories with models of up to
            `MOST_PARAMETERS`, in safetensors.

    Raises:
        ValueError: if there is no such checkpoint, it is not a CLCA model, is incomplete or too large, or the Hub cannot be
            reached.
    """
    name = name.strip()
    if not name:
        raise ValueError("`MODEL` is empty: give a folder, or a repository on the Hub such as you/leaves.")
    # only the name is checked, so that visitors do not learn which folders exist
    if not trusted and name.startswith((".", "/", "~")):
        raise ValueError(f"{name} looks like a folder of this machine. This page only loads models of the Hub.")
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
        if not own and (missing := missing_weights(model, here)):
            reasons[method] = _missing_message(here, missing)
            continue
        methods.append(method)
        if missing_weights(model, other):
            fixed_rate.add(method)
    try:
        switched = setting_config(config, setting._replace(cache=not setting.cache))
        cache = not missing_weights(model, switched)
    except ValueError:
        cache = False
    return Checkpoint(model, image_processor, setting, methods, reasons, fixed_rate, cache)


# Results


class Picture(NamedTuple):
    """A picture with its name and caption."""

    name: str
    image: Image.Image
    note: str = ""


class Prediction(NamedTuple):
    """Prediction of a model for a leaf.

    Attributes:
        classes: name and probability of the most probable classes, in descending order.
        independent: whether a leaf may have several classes, so that the probabilities do not sum to one.
        tokens: number of tokens that enter each layer, and finally the last norm.
        seconds: duration of the forward pass, measured once without warm-up.
    """

    classes: list[tuple[str, float]]
    independent: bool
    tokens: tuple[int, ...]
    seconds: float


class Cost(NamedTuple):
    """Cost of one image: multiply-adds (None if they depend on the image), and latency in seconds (None if not measured)."""

    macs: int | None
    dense_macs: int
    time: Quartiles | None = None
    dense_time: Quartiles | None = None


class Viewer:
    """Loads models and caches the latest results. Not thread-safe.

    Args:
        folders: whether its users own this machine, so that models may come from folders, be private, or be large.
        trusted: checkpoint to which no restrictions apply, even if `folders` is not set.
    """

    def __init__(self, folders: bool = True, trusted: str | None = None) -> None:
        self.folders = folders
        self.trusted = trusted
        self.model = lru_cache(SETTINGS)(self._model)
        self.predict = lru_cache(PREDICTIONS)(self._predict)
        self.stages = lru_cache(DRAWINGS)(self._stages)
        self.macs = lru_cache(COSTS)(self._macs)
        self._checkpoints: dict[str, Checkpoint] = {}
        self._times: dict[Any, dict[Setting | str, Quartiles]] = {}

    def load(self, name: str) -> Checkpoint:
        """Load a checkpoint, again if it is already loaded, because it may have been trained further. The last `CHECKPOINTS` are cached.

        Raises:
            ValueError: as `load_checkpoint`; the cache is unchanged.
        """
        checkpoint = load_checkpoint(name, trusted=self.folders or name == self.trusted)
        self._checkpoints.pop(name, None)
        self._checkpoints = dict([*self._checkpoints.items(), (name, checkpoint)][-CHECKPOINTS:])
        for cache in (self.model, self.predict, self.stages, self.macs):
            cache.cache_clear()
        self._times.clear()
        return checkpoint

    def checkpoint(self, name: str) -> Checkpoint:
        """Return a checkpoint, loading it if necessary."""
        return self._checkpoints.get(name) or self.load(name)

    def _model(self, name: str, setting: Setting) -> CLCAViTForImageClassification:
        checkpoint = self.checkpoint(name)
        return with_weights(checkpoint.model, setting_config(checkpoint.config, setting))

    def forget_leaves(self) -> None:
        """Clear cached results about images, including the images."""
        self.predict.cache_clear()
        self.stages.cache_clear()

    def view(self, name: str, leaf: Leaf, setting: Setting | None = None) -> View:
        """Return the leaf after preprocessing, with the model of a setting."""
        checkpoint = self.checkpoint(name)
        model = checkpoint.model if setting is None else self.model(name, setting)
        return make_view(model, checkpoint.image_processor, [leaf.image])

    def _predict(self, name: str, leaf: Leaf, setting: Setting) -> Prediction:
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
        return Prediction(classes, independent, output.token_counts, seconds)

    def unmet(self, name: str, setting: Setting, kind: str) -> Need | None:
        """Return the first requirement of a kind of picture that the model does not meet with a setting, or None."""
        return KINDS[kind].unmet(setting_config(self.checkpoint(name).config, setting))

    def _stages(self, name: str, leaf: Leaf, setting: Setting, kind: str) -> list[Picture]:
        return self._draw(name, leaf, setting, kind)

    def trace(
        self, name: str, leaf: Leaf, setting: Setting, patch: tuple[int, int], kind: str = "trace"
    ) -> list[Picture]:
        """Draw pictures about a patch (row, column), by default the patches merged into its token after each stage, with a frame around
        the patch.

        Raises:
            ValueError: if there is no such patch, or the setting does not meet the requirements of the picture.
        """
        grid, pictures = self.grid(name), self._draw(name, leaf, setting, kind, patch=patch)
        for picture in pictures:
            frame_patch(picture.image, grid, patch)
        return pictures

    def _draw(self, name: str, leaf: Leaf, setting: Setting, kind: str, **options: Any) -> list[Picture]:
        view, record = self.view(name, leaf, setting), KINDS[kind]
        return _pictures(partial(record, **record.page.options(view.model.config), **options), view)

    def leaf_with_grid(self, name: str, leaf: Leaf, patch: tuple[int, int] | None) -> Image.Image:
        """Return the leaf after preprocessing, with a frame around a patch."""
        view = self.view(name, leaf)
        (picture,) = _pictures(input_columns, view)
        if patch is not None and all(0 <= place < count for place, count in zip(patch, view.grid, strict=True)):
            frame_patch(picture.image, view.grid, patch)
        return picture.image

    def grid(self, name: str) -> tuple[int, int]:
        """Return the numbers of rows and columns of patches."""
        return self.checkpoint(name).config.image_grid

    def _macs(self, name: str, setting: Setting) -> tuple[int | None, int]:
        config = self.checkpoint(name).config
        return macs_in_advance(setting_config(config, setting)), count_macs(on_meta(dense_config(config)))

    def cost(self, name: str, setting: Setting, settings: Sequence[Setting]) -> Cost:
        """Return the cost of a setting, with its latency if `measure` has measured it together with all `settings`."""
        times = self._times.get((name, frozenset(settings)), {})
        return Cost(*self.macs(name, setting), times.get(setting), times.get("dense"))

    def measure(self, name: str, leaf: Leaf, settings: Sequence[Setting]) -> None:
        """Measure the latency of settings and of the dense model for one image, by interleaved timing after a warm-up."""
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


def frame_patch(image: Image.Image, grid: tuple[int, int], patch: tuple[int, int]) -> None:
    """Draw a frame around a patch (row, column) of an image, black and yellow, for contrast on any background."""
    (rows, columns), (row, column) = grid, patch
    width, height = image.width / columns, image.height / rows
    draw = ImageDraw.Draw(image)
    for inset, colour, line in ((-3, "black", 6), (-2, "#ffd21e", 4)):
        box = (column * width + inset, row * height + inset, (column + 1) * width - inset, (row + 1) * height - inset)
        draw.rectangle(box, outline=colour, width=line)


def _pictures(kind: Draw, view: View) -> list[Picture]:
    """Return the pictures of a kind for a view of one leaf."""
    return [
        Picture(column.name, draw_cell(cell, cell_size(cell.image, PICTURE_SIDE)), cell.caption)
        for column in kind(view)
        for cell in column.cells
    ]
