"""Parts of a model by name: which of them have no pretrained weights, and freezing of parts."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

from torch import nn


# Part -> names of its parameters, without the wrappers around the model.
PARTS = {
    "head": r"classifier\..+",
    "clr_tokens": r"embeddings\.clr_\w+",
    "reductions": r"layers\.\d+\.reduction\..+",
    "query_tokens": r"layers\.\d+\.probe\..+",
    "cls_token": r"embeddings\.cls_token",
    "register_tokens": r"embeddings\.register_tokens",
    "position_embeddings": r"embeddings\.(clr_)?position_embeddings",  # those of CLR tokens are new, except in the original
    "patch_embeddings": r"embeddings\.patch_embeddings\..+",
    "attention": r"layers\.\d+\.attention\..+",
    "mlp": r"layers\.\d+\.mlp\..+",
    "norms": r"(.+\.)?(layernorm(_before|_after)?|[qk]_norm)\.(weight|bias)",
    "layer_scale": r"layers\.\d+\.layer_scale[12]\.lambda1",
    "attention_pooling": r"attention_pooling\..+",
}
NEW_PARTS = ("head", "clr_tokens", "reductions", "query_tokens")  # no pretrained ViT has weights for them

# Prefixes that DistributedDataParallel, torch.compile, FSDP and peft add to parameter names.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model\.model|base_layer"
    r"|modules_to_save\.[^.]+)\."
)


def own_name(name: str) -> str:
    """Return a parameter's name in `CLCAViTModel` or the head, without the prefixes of wrappers around the model."""
    return _WRAPPERS.sub("", name).removeprefix("vit.")


def part_names(model: nn.Module) -> dict[str, str]:
    """Return parameter name -> the new part it belongs to, `adapter` (added by peft), or `backbone`."""
    prefixes, parts = _adapter_prefixes(model), {}
    for name, _ in model.named_parameters():
        own = own_name(name)
        if any(word.startswith(prefixes) for word in own.split(".")):
            parts[name] = "adapter"
        else:
            parts[name] = next((part for part in NEW_PARTS if re.fullmatch(PARTS[part], own)), "backbone")
    return parts


def _adapter_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of the parameters that peft adds to the model."""
    configs = [config for m in model.modules() for config in getattr(m, "peft_config", {}).values()]
    if not configs:
        return ()
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING  # installed, since the model has an adapter

    return tuple({PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type] for config in configs})


def check_parts(option: str, parts: Iterable[str]) -> None:
    """Check that all names are parts of a model.

    Args:
        option: name of the option, for the message.
        parts: names to check.

    Raises:
        ValueError: if a name is unknown.
    """
    known = ["backbone", *PARTS]
    for part in parts:
        if part not in known and not re.fullmatch(r"layers\.\d+", part):
            close = get_close_matches(part, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"`{option}` must be one of {', '.join(known)} or layers.<number>, got {part}{hint}")


def freeze(
    model: nn.Module, parts: Iterable[str], unfreeze: Iterable[str] = (), *, as_original: bool = False
) -> list[str]:
    """Freeze parts of a model: no gradients, no updates, no weight decay.

    `backbone` and `layers.3` do not include what no pretrained ViT has weights for: the head, CLR tokens, parameters
    of reductions, VQT's query tokens and peft's adapters. These are frozen only if named. Parameters that are already
    frozen stay frozen.

    Args:
        model: changed in place; it may be wrapped, e.g. by peft.
        parts: keys of `PARTS`, `layers.<number>`, or `backbone` for all parameters that are not new (a linear probe).
        unfreeze: names of parts that are not frozen.
        as_original: treat the position embeddings of CLR tokens as part of the other position embeddings and of
            `backbone`, as the original CLCA code does, where they are one tensor. By default they belong to the CLR
            tokens.

    Returns:
        names of the frozen parameters.

    Raises:
        ValueError: if a part is unknown or missing in the model, or if no trainable parameter would be left.
    """
    frozen = _members(model, "freeze", parts, as_original) - _members(model, "unfreeze", unfreeze, as_original)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if frozen and not parameters.keys() - frozen:
        raise ValueError(
            f"`freeze` {' '.join(parts)} leaves no trainable parameters. Freeze fewer parts, or `unfreeze` a part"
        )
    chosen = [name for name in parameters if name in frozen]
    for name in chosen:
        parameters[name].requires_grad_(False)
    return chosen


def freeze_statistics(model: nn.Module) -> None:
    """Put frozen BatchNorms into evaluation mode; in training mode their statistics would still change.

    Call this after each `model.train()`.
    """
    for module in model.modules():
        statistics = {name for name, _ in module.named_buffers(recurse=False)} & {"running_mean", "rate_mean"}
        own = list(module.parameters(recurse=False))
        if statistics and own and not any(parameter.requires_grad for parameter in own):
            module.eval()


def _members(model: nn.Module, option: str, parts: Iterable[str], as_original: bool) -> set[str]:
    """Return the names of the parameters in `parts`."""
    check_parts(option, parts)
    by_part, members = part_names(model), set()
    if as_original:
        by_part |= {name: "backbone" for name in by_part if own_name(name) == "embeddings.clr_position_embeddings"}
    for part in parts:
        if part in NEW_PARTS:
            found = {name for name, own in by_part.items() if own == part}
        else:
            pattern = re.escape(part) + r"\..+" if part.startswith("layers.") else PARTS.get(part, ".+")
            backbone = (name for name, own in by_part.items() if own == "backbone")
            found = {name for name in backbone if re.fullmatch(pattern, own_name(name))}
        if not found:
            raise ValueError(f"`{option}`: the model has no {part}")
        members |= found
    return members
