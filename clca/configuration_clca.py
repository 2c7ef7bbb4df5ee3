"""Configuration of a CLCA ViT: all fields of transformers' `ViTConfig`, and those of token reduction, the cross-layer
cache (CLC), the cross-layer aggregation head (CLA) and the backbones of https://huggingface.co/papers/2501.00243.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.models.vit.configuration_vit import ViTConfig


from .versions_clca import check_transformers  # noqa: F401  # isort: skip
from .budget_clca import Budget, as_pair, check_rates
from .heads_clca import HEADS, VQTProbe, heads_reading
from .reductions_clca import checked_budget, get_reduction


if TYPE_CHECKING:
    # From a local folder, transformers below 5.10 copies only the files that this file imports. All files are listed here, so
    # that `versions_clca` is copied, too, and its error names the version that is needed.
    from .attention_clca import AttentionContext  # noqa: F401
    from .cache_clca import CrossLayerCache  # noqa: F401
    from .fast_paths_clca import set_fast_paths  # noqa: F401
    from .hooks_clca import HookWatch  # noqa: F401
    from .layers_clca import CLCAViTAttentionPooling  # noqa: F401
    from .linear_clca import linear  # noqa: F401
    from .loss_clca import classification_loss  # noqa: F401
    from .reduction_atc import ATCReduction  # noqa: F401
    from .reduction_ats import ATSReduction  # noqa: F401
    from .reduction_base import TokenReduction  # noqa: F401
    from .reduction_dmaws import DMAWSReduction  # noqa: F401
    from .reduction_dpcknn import DPCKNNReduction  # noqa: F401
    from .reduction_dyvit import DyViTReduction  # noqa: F401
    from .reduction_edar import EDARReduction  # noqa: F401
    from .reduction_evit import EViTReduction  # noqa: F401
    from .reduction_glsf import GLSFReduction  # noqa: F401
    from .reduction_heuristic import HeuristicReduction  # noqa: F401
    from .reduction_kmedoids import KMedoidsReduction  # noqa: F401
    from .reduction_maws import MAWSReduction  # noqa: F401
    from .reduction_mctf import MCTFReduction  # noqa: F401
    from .reduction_nfedar import NFEDARReduction  # noqa: F401
    from .reduction_patchmerger import PatchMergerReduction  # noqa: F401
    from .reduction_pitome import PiToMeReduction  # noqa: F401
    from .reduction_sinkhorn import SinkhornReduction  # noqa: F401
    from .reduction_sit import SiTReduction  # noqa: F401
    from .reduction_tofu import ToFuReduction  # noqa: F401
    from .reduction_tome import ToMeReduction  # noqa: F401
    from .reduction_topk import TopKReduction  # noqa: F401


__version__ = "0.1.0"

logger = logging.getLogger(__name__)

POOLINGS = ("cls", "mean", "normed_mean", "map", "map_then_norm")
FEATURE_FILLS = ("last", "nearest", "zero")
MULTI_LABEL_LOSSES = ("bce", "asymmetric")

# Largest accepted sizes, several times those of any published ViT: a number in a file must not fill the memory.
LARGEST = {
    "num_labels": 100_000,
    "num_hidden_layers": 1000,
    "hidden_size": 65_536,
    "intermediate_size": 1_048_576,
    "num_attention_heads": 4096,
    "image_size": 8192,  # pixels
    "patch_size": 8192,
    "num_channels": 4096,
    "num_register_tokens": 4096,
    "num_clr_tokens": 4096,
    "num_query_tokens": 4096,
    "cla_multiplier": 4096,
    "num_selected_features": 100_000_000,
}

# Keys besides the fields that transformers writes into a config.json or passes to the constructor.
_TRANSFORMERS_KEYS = frozenset(
    [
        "_attn_implementation",
        "_commit_hash",
        "_name_or_path",
        "_output_attentions",
        "_experts_implementation",
        "attn_implementation",
        "auto_map",
        "base_model_name_or_path",
        "custom_pipelines",
        "experts_implementation",
        "hub_revision",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "per_layer_config",
        "quantization_config",
        "tie_last_hidden_states",
        "torch_dtype",
        "trust_remote_code",
    ]
)
# Keys in files that older versions of transformers wrote. They have no effect today and are dropped from files silently. In a
# call they are errors: `top_k` instead of `keep_tokens`, for example.
_LEGACY_KEYS = frozenset(
    [
        "_num_labels",
        "add_cross_attention",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "is_decoder",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "pad_token_id",
        "prefix",
        "problem_type",
        "pruned_heads",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tie_word_embeddings",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torchscript",
        "typical_p",
        "use_bfloat16",
        "use_cache",
    ]
)


# Fields that only backbones use, under the names in files and calls, with their defaults. Defaults are not written to files.
_BACKBONE_KEYS: dict[str, Any] = {
    "out_features": None,
    "out_indices": None,
    "feature_fill": "last",
    "apply_layernorm": True,
}


_Config = TypeVar("_Config", bound=ViTConfig)


def _with_value_errors(cls: type[_Config]) -> type[_Config]:
    """Make a strict dataclass raise `ValueError` for a wrong type instead of the error class of `huggingface_hub`."""
    strict_setattr = cls.__setattr__

    def __setattr__(self: ViTConfig, name: str, value: Any) -> None:
        try:
            strict_setattr(self, name, value)
        except StrictDataclassError as error:
            expected = {f.name: f.type for f in fields(self)}[name]
            expected = getattr(expected, "__name__", str(expected)) if isinstance(expected, type) else str(expected)
            raise ValueError(f"`{name.removeprefix('_')}` must be {expected}, got {value!r}.") from error

    cls.__setattr__ = __setattr__  # ty: ignore[invalid-assignment]  # replaces the method of the class
    return cls


@_with_value_errors
@strict
class CLCAViTConfig(BackboneConfigMixin, ViTConfig):
    r"""Configuration of `CLCAViTModel`, `CLCAViTForImageClassification` and `CLCAViTBackbone`.

    Args (and the other fields of `ViTConfig`):
        image_size (`int`, defaults to 224): Height and width of the input in pixels.
        patch_size (`int`, defaults to 16): Height and width of a patch in pixels.
        hidden_size (`int`, defaults to 768): Width of the tokens.
        num_hidden_layers (`int`, defaults to 12): Number of layers.
        num_attention_heads (`int`, defaults to 12): Number of attention heads per layer.
        intermediate_size (`int`, defaults to 3072): Width of the hidden layer of the MLP.
        layer_norm_eps (`float`, defaults to 1e-12): Epsilon of every LayerNorm.
        qkv_bias (`bool`, defaults to `True`): Add a bias to queries, keys and values.
        hidden_dropout_prob (`float`, defaults to 0.0): Dropout probability.
        attention_probs_dropout_prob (`float`, defaults to 0.0): Dropout probability of the attention weights.
        reduction (`str`, *optional*): Token reduction method: none, or a name of `clca.REDUCTIONS`.
        reduction_layers (`str` or `list[int]`, defaults to `[3, 6, 9]`):
            Layers, counted from 0, at which tokens are reduced, strictly increasing, or "all". The other parts of the
            model use them as well, with or without a reduction: the cache is retrieved after them, the CLA and IFA
            heads read CLS after them, and the H2T and VQT heads probe them (or all layers if the list is empty).
            Stored as a list.
        keep_rate (`float` or `list[float]`, defaults to `1.0`):
            Share of tokens that a stage keeps, in (0, 1]: one rate for all stages or one per stage. Rates compound.
            Stored as a list.
        keep_tokens (`list[int]`, *optional*):
            Number of tokens that each stage keeps, one count per stage, instead of `keep_rate`.
        train_keep_rates (`list[float]`, *optional*):
            Keep rates to train one model for. `run_ufgir.py` draws one per training step. In a loop of your own, pass
            `keep_rate=draw_keep_rate(...)` (of `ufgir.training`) to the model. The model then works at these rates and
            those in between. A CLA head keeps separate BatchNorm statistics for each rate. Stored in ascending order.
        reduction_kwargs (`dict`, *optional*):
            Options of the method, checked against its signature.
        cross_layer_cache (`bool`, defaults to `False`):
            Cache a summary of each layer and append the cached tokens after every reduction (CLC).
        num_clr_tokens (`int`, defaults to 0):
            Number of cross-layer registers (CLR): learned tokens at the end of the sequence, cached with each layer.
        cache_gap (`bool`, defaults to `True`): Cache the mean of the tokens (GAP).
        cache_pool_cls (`bool`, defaults to `False`): Include CLS in the GAP.
        cache_pool_clr (`bool`, defaults to `False`): Include CLR in the GAP also before the first retrieval.
        cache_recover_at_last (`bool`, defaults to `True`):
            Retrieve the remaining cached tokens before the last layer.
        head (`str`, defaults to `"linear"`): Classification head: a name of `clca.heads_clca.HEADS`.
        cla_multiplier (`int`, defaults to 2): Output channels per input channel of the depth-wise convolution of the
            CLA head.
        num_query_tokens (`int`, defaults to 5): Number of queries per layer of the VQT head.
        vqt_original_slicing (`bool`, defaults to `False`):
            Compute VQT as the original CLCA code does: append the queries to the tokens, and remove as many tokens at
            the front instead of the queries. The published baseline was trained this way. Not available with a
            reduction or the cache.
        first_patch_as_cls (`bool`, defaults to `False`):
            Let the heads cla, ifa and vqt read the first patch in a model without a CLS token, as the original CLCA
            code does.
        num_selected_features (`int`, *optional*):
            Number of features that `select_features` kept for the H2T or VQT head.
        multi_label_loss (`str`, defaults to `"bce"`):
            Loss for images with several classes, `problem_type` multi_label_classification: `bce` or `asymmetric`.
            `bce` is binary cross-entropy, averaged over classes and images. The asymmetric loss
            (https://huggingface.co/papers/2009.14119) is summed over classes and averaged over images.
        label_smoothing (`float`, defaults to 0.0):
            Share of the target that is spread evenly over all classes in the training loss, in [0, 1); evaluation is
            not smoothed. Use it instead of `label_smoothing_factor` of transformers' Trainer, which computes its own
            loss, without the terms of reductions and heads. Do not combine it with `run_ufgir.py --label_smoothing`,
            which smooths the labels.
        group_lasso_weight (`float`, defaults to 0.0):
            Weight of a group lasso on the head in training, with one group per input feature.
        layerscale_value (`float`, *optional*): Initial value of LayerScale; none for no LayerScale.
        pre_norm (`bool`, defaults to `False`):
            Add a LayerNorm before the first layer, as in CLIP. The patch projection then has no bias.
        num_register_tokens (`int`, defaults to 0): Number of register tokens after CLS, as in DINOv2.
        prefix_position_embeddings (`bool`, defaults to `True`): Add position embeddings to CLS, registers and CLR.
        use_class_token (`bool`, defaults to `True`): Begin the sequence with a CLS token.
        pooling (`str`, defaults to `"cls"`):
            What a linear head reads: `cls`, `mean`, `normed_mean`, `map` or `map_then_norm`. `mean` is the mean of all
            tokens after the prefix, followed by the final norm; `normed_mean` applies the norm first. `map` is
            attention pooling with a learned query after the final norm; `map_then_norm` applies the norm after the
            pooling.
        use_qk_norm (`bool`, defaults to `False`): Apply LayerNorm to queries and keys.
        use_swiglu_ffn (`bool`, defaults to `False`): Use SwiGLU instead of GELU in the MLP.
        drop_path_rate (`float`, defaults to 0.0):
            Probability of stochastic depth in the last layer; it increases linearly from 0 in the first layer.
        out_features (`list[str]`, *optional*):
            Stages whose feature maps `CLCAViTBackbone` returns, in this order: `stem` (the embeddings), `stage1`
            (after the first layer), `stage2` and so on. The default is the last stage.
        out_indices (`list[int]`, *optional*): The same by number: 0 for `stem`, 1 for `stage1`. Negative numbers count
            from the end.
        feature_fill (`str`, defaults to `"last"`):
            Value of a feature map at a patch that no token holds: `last`, the value in the last layer in which a token
            held the patch; `nearest`, the value of the nearest patch that a token holds; `zero`, zeros.
        apply_layernorm (`bool`, defaults to `True`): Apply the final norm to the tokens of feature maps.
        clca_version (`str`): Version of this code that wrote the configuration.

    Raises:
        ValueError: if a name is unknown, a value is out of range, or options exclude each other.

    Example:

    ```python
    >>> from clca import CLCAViTConfig
    >>> config = CLCAViTConfig(reduction="evit", keep_rate=0.1, cross_layer_cache=True, num_clr_tokens=1, head="cla")
    >>> config.keep_rate
    [0.1]

    ```
    """

    model_type: ClassVar[str] = "clca_vit"
    # Trainer cannot gather outputs whose length differs between batches.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "loss_terms",
        "auxiliary_loss",
        "assignments",
        "reports",
        "hidden_states",
        "attentions",
    ]

    reduction: str | None = None
    if TYPE_CHECKING:  # always read as a list; may also be set to "all"
        reduction_layers: Any = field(default_factory=lambda: [3, 6, 9])
    else:
        reduction_layers: list[int] | tuple[int, ...] | str = field(default_factory=lambda: [3, 6, 9])
    keep_rate: float | int | list[float | int] | tuple[float | int, ...] = field(default_factory=lambda: [1.0])
    keep_tokens: int | list[int] | tuple[int, ...] | None = None
    train_keep_rates: list[float | int] | tuple[float | int, ...] | None = None
    reduction_kwargs: dict[str, Any] | None = None

    cross_layer_cache: bool = False
    num_clr_tokens: int = 0
    cache_gap: bool = True
    cache_pool_cls: bool = False
    cache_pool_clr: bool = False
    cache_recover_at_last: bool = True

    head: str = "linear"
    cla_multiplier: int = 2
    num_query_tokens: int = 5
    vqt_original_slicing: bool = False
    first_patch_as_cls: bool = False
    num_selected_features: int | None = None
    multi_label_loss: str = "bce"
    label_smoothing: float | int = 0.0
    group_lasso_weight: float | int = 0.0

    layerscale_value: float | int | None = None
    pre_norm: bool = False
    num_register_tokens: int = 0
    prefix_position_embeddings: bool = True
    use_class_token: bool = True
    pooling: str = "cls"
    use_qk_norm: bool = False
    use_swiglu_ffn: bool = False
    drop_path_rate: float | int = 0.0

    # None stands for the last stage, whatever the number of layers is when it is read. See `out_features`, `out_indices`.
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None
    feature_fill: str = "last"
    apply_layernorm: bool = True

    clca_version: str = __version__

    if TYPE_CHECKING:  # an argument of every configuration that transformers does not keep as a field
        num_labels: int = 2

    def __post_init__(self, **kwargs: Any) -> None:
        features, indices = (kwargs.pop(name, None) for name in ("out_features", "out_indices"))
        unknown = sorted(set(kwargs) - _TRANSFORMERS_KEYS)
        if unknown:
            raise ValueError(_unknown_names(unknown, [f.name.removeprefix("_") for f in fields(self)]))
        if (kwargs.get("num_labels") or 0) < 0:
            raise ValueError(f"`num_labels` must be at least 0, got {kwargs['num_labels']}.")
        _check_largest(kwargs)  # transformers makes a name for each class
        if features is not None or indices is not None:
            self.set_output_features_output_indices(features, indices)
        super().__post_init__(**kwargs)
        check_config(self)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the contents of a config.json.

        A file of a stock ViT or DeiT gets our model type; otherwise transformers would warn of a different model type
        at every load."""
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if config_dict.get("model_type") in ("vit", "deit"):
            registers = (
                {"num_register_tokens": 1} if config_dict["model_type"] == "deit" else {}
            )  # the distillation token
            config_dict = registers | config_dict | {"model_type": cls.model_type}
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """Build a configuration from the contents of a config.json.

        Keys that this version does not know are dropped with a warning, so that files of newer versions load. (In a
        constructor call an unknown argument is an error.) Three fields are reset by overrides of others: `keep_rate`
        and `keep_tokens` by each other, `reduction_kwargs` by another `reduction`, and its `ratio_targets` by another
        keep rate or other `reduction_layers`.

        Args:
            config_dict: contents of the file.
            kwargs: fields to override.

        Raises:
            ValueError: if the file describes another type of model, or a value is refused.
        """
        model_type = config_dict.get("model_type")
        if model_type not in (None, "", cls.model_type):
            raise ValueError(
                f"`model_type` {model_type!r} is not supported: it must be 'vit', 'deit' or 'clca_vit'. Convert other kinds of ViT "
                "with `ufgir.checkpoints.load_transformers`."
            )
        config_dict = dict(config_dict)
        _check_largest(config_dict | kwargs)
        # An override replaces what the file says about the same thing under another name.
        if kwargs.get("keep_tokens") is not None and "keep_rate" not in kwargs:
            config_dict.pop("keep_rate", None)
        if kwargs.get("keep_rate") is not None and "keep_tokens" not in kwargs:
            config_dict.pop("keep_tokens", None)
        switched = "reduction" in kwargs and kwargs["reduction"] != config_dict.get("reduction")
        if switched and "reduction_kwargs" not in kwargs:
            config_dict.pop("reduction_kwargs", None)
        rebudgeted = any(kwargs.get(name) is not None for name in ("keep_rate", "keep_tokens", "reduction_layers"))
        if rebudgeted and "reduction_kwargs" not in kwargs:
            config_dict["reduction_kwargs"] = without_targets(config_dict.get("reduction_kwargs"))
        if config_dict.get("layerscale_value") == 0:  # earlier versions wrote 0 for none
            config_dict["layerscale_value"] = None
        if "reduction_layers" in kwargs:
            depth = kwargs.get("num_hidden_layers", config_dict.get("num_hidden_layers", cls.num_hidden_layers))
            kwargs["reduction_layers"] = listed_layers(kwargs["reduction_layers"], depth)
        known = {f.name for f in fields(cls)} | _TRANSFORMERS_KEYS | set(_BACKBONE_KEYS)
        unknown = sorted(set(config_dict) - known - _LEGACY_KEYS)
        if unknown:
            logger.warning("Ignored unknown keys of the configuration file: %s.", ", ".join(unknown))
        return super().from_dict({k: v for k, v in config_dict.items() if k in known}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return all values by name, without the fields of backbones that have their default."""
        contents = super().to_dict()
        for name, default in _BACKBONE_KEYS.items():
            if contents.get(name) == default:
                contents.pop(name, None)
        return contents

    def set_output_features_output_indices(self, out_features: list | None, out_indices: list | None) -> None:
        """Choose the stages that a backbone returns, see transformers' `BackboneConfigMixin`. If both are None, this
        is the last stage."""
        if out_features is None and out_indices is None:
            self._out_features = self._out_indices = None
        else:
            super().set_output_features_output_indices(out_features, out_indices)

    @property
    def stage_names(self) -> list[str]:
        """Names of the stages that a backbone can return, in order: `stem` for the embeddings, `stage1` after the
        first layer."""
        return ["stem", *(f"stage{number}" for number in range(1, self.num_hidden_layers + 1))]

    @property
    def out_features(self) -> list[str]:
        """Names of the stages that a backbone returns."""
        return self.stage_names[-1:] if self._out_features is None else self._out_features

    @out_features.setter
    def out_features(self, names: list[str] | None) -> None:
        self.set_output_features_output_indices(names, None)

    @property
    def out_indices(self) -> list[int]:
        """Numbers of the stages that a backbone returns."""
        return [self.num_hidden_layers] if self._out_indices is None else self._out_indices

    @out_indices.setter
    def out_indices(self, indices: list[int] | tuple[int, ...] | None) -> None:
        self.set_output_features_output_indices(None, None if indices is None else list(indices))

    @property
    def image_grid(self) -> tuple[int, int]:
        """Number of patches along height and width: (rows, columns)."""
        (height, width), (patch_height, patch_width) = as_pair(self.image_size), as_pair(self.patch_size)
        return height // patch_height, width // patch_width

    @property
    def num_patches(self) -> int:
        """Number of patches of one image at `image_size`."""
        return math.prod(self.image_grid)

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the patches: CLS and registers."""
        return int(self.use_class_token) + self.num_register_tokens

    @property
    def pools_by_attention(self) -> bool:
        """Whether the tokens are pooled by attention with a learned query."""
        return self.pooling in ("map", "map_then_norm")

    @property
    def aggregation_layers(self) -> list[int]:
        """Layers after which the CLA and IFA heads read CLS: the reduction layers and the last one."""
        return sorted({*self.reduction_layers, self.num_hidden_layers - 1})

    @property
    def probe_layers(self) -> list[int]:
        """Layers that the H2T and VQT heads take features from."""
        if HEADS[self.head].reads != "probes":
            return []
        return list(self.reduction_layers) or list(range(self.num_hidden_layers))

    @property
    def uses_reduction_layers(self) -> bool:
        """Whether `reduction_layers` has an effect on this model."""
        return self.reduction is not None or self.cross_layer_cache or HEADS[self.head].reads_layers()


def without_targets(reduction_kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the options of a method without `ratio_targets` of DynamicViT, which are only valid for the keep rates
    they were set for."""
    return {name: value for name, value in (reduction_kwargs or {}).items() if name != "ratio_targets"} or None


def listed_layers(layers: Any, num_hidden_layers: int) -> Any:
    """Return `reduction_layers`, with "all" expanded to a list of all layers."""
    return list(range(num_hidden_layers)) if layers == "all" else layers


def check_config(config: CLCAViTConfig) -> None:
    """Check every value of a configuration and store sequences as lists.

    This is called when a configuration is made, and again when a model is built from it, because transformers does not
    validate values that `from_pretrained` overrides.

    Raises:
        ValueError: if a value is refused. The message names the argument, its value and what is allowed.
    """
    _check_largest(vars(config))
    config.reduction_layers = listed_layers(config.reduction_layers, config.num_hidden_layers)
    if isinstance(config.reduction_layers, str):
        raise ValueError(f"`reduction_layers` must be 'all' or a list of layers, got {config.reduction_layers!r}.")
    for name in ("reduction_layers", "keep_rate", "keep_tokens"):
        value = getattr(config, name)
        if isinstance(value, int | float):
            setattr(config, name, [value])
        elif value is not None:
            setattr(config, name, list(value))
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(config, name), int):
            setattr(config, name, list(getattr(config, name)))
    _check_choices(config)
    _check_sizes(config)
    if config._out_features is not None or config._out_indices is not None:  # otherwise there is nothing to verify
        config.verify_out_features_out_indices()
    _check_reduction(config)
    if config.train_keep_rates is not None:
        _check_train_keep_rates(config, config.train_keep_rates)
    _check_cache(config)
    _check_head(config)
    _check_without_class_token(config)


def _check_largest(values: Mapping[str, Any]) -> None:
    for name, most in LARGEST.items():
        value = values.get(name)
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and number > most:
                raise ValueError(f"`{name}` must be at most {most}, got {value}.")


def _check_choices(config: CLCAViTConfig) -> None:
    for name, choices in (
        ("head", HEADS),
        ("pooling", POOLINGS),
        ("multi_label_loss", MULTI_LABEL_LOSSES),
        ("feature_fill", FEATURE_FILLS),
    ):
        value = getattr(config, name)
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")


def _check_sizes(config: CLCAViTConfig) -> None:
    for name in ("image_size", "patch_size"):
        value = as_pair(getattr(config, name))
        if len(value) != 2 or min(value) < 1:
            raise ValueError(f"`{name}` must be a positive integer or two of them, got {getattr(config, name)}.")
    for side, patch in zip(as_pair(config.image_size), as_pair(config.patch_size), strict=True):
        if side % patch:
            raise ValueError(
                f"`image_size` must be a multiple of `patch_size`, got {config.image_size} and {config.patch_size}. "
                f"The nearest sizes are {max(side // patch, 1) * patch} and {(side // patch + 1) * patch}."
            )
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels"):
        _check_minimum(config, name, 1)
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"`hidden_size` must be a multiple of `num_attention_heads`, got {config.hidden_size} and "
            f"{config.num_attention_heads}."
        )
    for name in ("num_clr_tokens", "num_register_tokens"):
        _check_minimum(config, name, 0)
    for name in ("cla_multiplier", "num_query_tokens"):
        _check_minimum(config, name, 1)
    if not 0 < config.initializer_range < math.inf:
        raise ValueError(f"`initializer_range` must be a positive number, got {config.initializer_range}.")
    if config.layerscale_value is not None and not 0 < config.layerscale_value < math.inf:
        raise ValueError(
            f"`layerscale_value` must be a positive number, or None for no LayerScale, got {config.layerscale_value}."
        )
    if not config.layer_norm_eps > 0:
        raise ValueError(f"`layer_norm_eps` must be positive, got {config.layer_norm_eps}.")
    if config.hidden_act not in ACT2FN:
        close = get_close_matches(config.hidden_act, ACT2FN, n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"`hidden_act` must be an activation of transformers, got {config.hidden_act!r}.{hint}")
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"`{name}` must be in [0, 1), got {getattr(config, name)}.")


def _check_reduction(config: CLCAViTConfig) -> None:
    budget = Budget.of(config)
    check_rates(budget.keep_rate)
    layers = config.reduction_layers
    if any(not isinstance(i, int) or isinstance(i, bool) for i in layers):
        raise ValueError(f"`reduction_layers` must be integers, got {layers}.")
    if layers != sorted(set(layers)):
        raise ValueError(f"`reduction_layers` must be strictly increasing, got {layers}.")
    if config.uses_reduction_layers and any(not 0 <= i < config.num_hidden_layers for i in layers):
        raise ValueError(
            f"`reduction_layers` must lie in 0 .. {config.num_hidden_layers - 1} with "
            f"`num_hidden_layers`={config.num_hidden_layers}, got {layers}."
        )
    if budget.keep_tokens is not None:
        _check_keep_tokens(config, budget.keep_tokens)
    if config.reduction is None:
        if config.reduction_kwargs:
            raise ValueError(
                f"`reduction_kwargs` {config.reduction_kwargs} requires `reduction`, which is None. Set a method, or remove "
                "the options."
            )
        return
    if not layers:
        raise ValueError("`reduction_layers` must name at least one layer when `reduction` is set, got [].")
    for name in ("keep_rate", "keep_tokens"):
        value = getattr(config, name)
        if value is not None and len(value) not in (1, len(layers)):
            raise ValueError(
                f"`{name}` must hold one value for all stages or one per stage, {len(layers)} for `reduction_layers` {layers}; "
                f"got {value}."
            )
    get_reduction(config.reduction).check(config)


def _check_keep_tokens(config: CLCAViTConfig, counts: Sequence[int]) -> None:
    if config.keep_rate != [1.0]:
        raise ValueError(
            f"`keep_tokens` {config.keep_tokens} and `keep_rate` {config.keep_rate} exclude each other. Set only one of them."
        )
    for count in counts:
        if isinstance(count, bool) or not 1 <= count <= config.num_patches:
            raise ValueError(
                f"`keep_tokens` must be integers in 1 .. {config.num_patches}, the patches of an image, got "
                f"{config.keep_tokens}."
            )


def _check_train_keep_rates(config: CLCAViTConfig, rates: Sequence[float]) -> None:
    rates = config.train_keep_rates = sorted(set(rates))
    if not rates:
        raise ValueError(
            "`train_keep_rates` must hold at least one keep rate, got []. Remove it to train for a single keep rate."
        )
    if config.keep_tokens is not None:
        raise ValueError(
            f"`train_keep_rates` {rates} and `keep_tokens` {config.keep_tokens} exclude each other. Use `keep_rate` instead of the latter."
        )
    try:
        for rate in rates:
            checked_budget(config, rate)
    except ValueError as error:
        raise ValueError(f"`train_keep_rates` {rates} is not valid: {error}") from error


def _check_cache(config: CLCAViTConfig) -> None:
    if config.cross_layer_cache and not config.cache_gap and config.num_clr_tokens == 0:
        raise ValueError(
            "`cross_layer_cache` has nothing to cache: `cache_gap` is False and `num_clr_tokens` is 0. Change one of them."
        )


def _check_head(config: CLCAViTConfig) -> None:
    head = HEADS[config.head]
    if head.reads == "probes" and config.pooling != "cls":
        raise ValueError(
            f"`pooling` must be 'cls' with `head`={config.head!r}, which does not use it, got {config.pooling!r}."
        )
    if config.vqt_original_slicing and (head.probe is not VQTProbe or config.reduction or config.cross_layer_cache):
        raise ValueError("`vqt_original_slicing` requires `head`='vqt' without `reduction` and `cross_layer_cache`.")
    if config.num_selected_features is not None:
        if head.reads != "probes":
            names = " or ".join(heads_reading("probes"))
            raise ValueError(f"`num_selected_features` requires the head {names}, got `head`={config.head!r}.")
        _check_minimum(config, "num_selected_features", 1)
    if not 0 <= config.label_smoothing < 1:
        raise ValueError(f"`label_smoothing` must be in [0, 1), got {config.label_smoothing}.")
    if not 0 <= config.group_lasso_weight < math.inf:
        raise ValueError(f"`group_lasso_weight` must be a number of at least 0, got {config.group_lasso_weight}.")
    if config.num_labels == 0 and (head.reads == "cls_tokens" or config.group_lasso_weight):
        *names, last = (name for name in HEADS if name not in heads_reading("cls_tokens"))
        raise ValueError(
            f"`num_labels`=0, features without a classifier, requires the head {', '.join(names)} or {last} without "
            f"`group_lasso_weight`, got `head`={config.head!r}."
        )
    head.check(config)


def _check_without_class_token(config: CLCAViTConfig) -> None:
    head = HEADS[config.head]
    if config.first_patch_as_cls and (config.use_class_token or not head.before_norm):
        names = ", ".join(name for name, one in HEADS.items() if one.before_norm)
        raise ValueError(
            f"`first_patch_as_cls` requires one of the heads {names} without `use_class_token`, got `head`={config.head!r} "
            f"and `use_class_token`={config.use_class_token}. Remove it."
        )
    if config.use_class_token:
        return
    for name, needs_cls in (
        ("head", head.before_norm and not config.first_patch_as_cls),
        ("num_clr_tokens", config.num_clr_tokens > 0),
        ("pooling", config.pooling == "cls" and head.reads != "probes"),
    ):
        if needs_cls:
            raise ValueError(
                f"`{name}`={getattr(config, name)!r} needs a CLS token, and `use_class_token` is False. "
                'Use `pooling="mean"` or `pooling="map"` with a linear head and no CLR.'
            )


def _check_minimum(config: CLCAViTConfig, name: str, minimum: int) -> None:
    if getattr(config, name) < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {getattr(config, name)}.")


def _unknown_names(names: list[str], known: list[str]) -> str:
    hints = []
    for name in names:
        close = get_close_matches(name, known, n=1)
        hints.append(f"`{name}`" + (f" (did you mean `{close[0]}`?)" if close else ""))
    return f"CLCAViTConfig has no argument {', '.join(hints)}."


__all__ = ["CLCAViTConfig"]
