"""Parts of a model by name: which of them are new to a pretrained ViT, and which keep their weights while the rest trains."""

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
    "position_embeddings": r"embeddings\.(clr_)?position_embeddings",  # those of CLR are new, but in the original
    "patch_embeddings": r"embeddings\.patch_embeddings\..+",
    "attention": r"layers\.\d+\.attention\..+",
    "mlp": r"layers\.\d+\.mlp\..+",
    "norms": r"(.+\.)?(layernorm(_before|_after)?|[qk]_norm)\.(weight|bias)",
    "layer_scale": r"layers\.\d+\.layer_scale[12]\.lambda1",
    "attention_pooling": r"attention_pooling\..+",
}
NEW_PARTS = ("head", "clr_tokens", "reductions", "query_tokens")  # no pretrained ViT has weights for them

# What DistributedDataParallel, torch.compile, FSDP and peft put into a parameter's name.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model\.model|base_layer"
    r"|modules_to_save\.[^.]+)\."
)


def own_name(name: str) -> str:
    """A parameter's name in `CLCAViTModel` or the head, without what wraps the model."""
    return _WRAPPERS.sub("", name).removeprefix("vit.")


def part_names(model: nn.Module) -> dict[str, str]:
    """Parameter name -> the new part that it belongs to, `adapter` for those that peft added, or `backbone`."""
    prefixes, parts = _adapter_prefixes(model), {}
    for name, _ in model.named_parameters():
        own = own_name(name)
        if any(word.startswith(prefixes) for word in own.split(".")):
            parts[name] = "adapter"
        else:
            parts[name] = next((part for part in NEW_PARTS if re.fullmatch(PARTS[part], own)), "backbone")
    return parts


def _adapter_prefixes(model: nn.Module) -> tuple[str, ...]:
    """How the names of the parameters begin that peft put into a model."""
    configs = [config for m in model.modules() for config in getattr(m, "peft_config", {}).values()]
    if not configs:
        return ()
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING  # it is there, since the model has an adapter

    return tuple({PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type] for config in configs})


def check_parts(option: str, parts: Iterable[str]) -> None:
    """Raises ValueError for a name that is no part of a model; `option` is what the user gave it to."""
    known = ["backbone", *PARTS]
    for part in parts:
        if part not in known and not re.fullmatch(r"layers\.\d+", part):
            close = get_close_matches(part, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"`{option}` must name {', '.join(known)} or layers.<number>, got {part}{hint}")


def freeze(
    model: nn.Module, parts: Iterable[str], unfreeze: Iterable[str] = (), *, as_original: bool = False
) -> list[str]:
    """Let parts of a model keep their weights: no gradients, no steps, no weight decay.

    What is new to a pretrained ViT (the head, CLR tokens, parameters of reductions, VQT's queries, peft's adapters) trains
    unless it is named itself: `backbone` and `layers.3` leave it out. Nothing that is frozen already starts to train.

    Args:
        model: is changed in place; peft's and other wrappers may be around it.
        parts: keys of `PARTS`, `layers.<number>`, or `backbone` for all that is not new, which is a linear probe.
        unfreeze: the same names; their parameters stay as they are.
        as_original: position embeddings of CLR belong to the others, and to `backbone`, as in the original CLCA code, where all
            are one tensor. By default they are new, with CLR.

    Returns:
        names of the parameters that were frozen.

    Raises:
        ValueError: a part that is unknown or that the model does not have, or nothing would be left to train.
    """
    frozen = _members(model, "freeze", parts, as_original) - _members(model, "unfreeze", unfreeze, as_original)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if frozen and not parameters.keys() - frozen:
        raise ValueError(f"`freeze` {' '.join(parts)} leaves nothing to train: name less, or `unfreeze` a part")
    chosen = [name for name in parameters if name in frozen]
    for name in chosen:
        parameters[name].requires_grad_(False)
    return chosen


def hold_statistics(model: nn.Module) -> None:
    """Put frozen BatchNorms into evaluation mode: in training mode their statistics would move although nothing trains them.

    Call it after each `model.train()`.
    """
    for module in model.modules():
        statistics = {name for name, _ in module.named_buffers(recurse=False)} & {"running_mean", "rate_mean"}
        own = list(module.parameters(recurse=False))
        if statistics and own and not any(parameter.requires_grad for parameter in own):
            module.eval()


def _members(model: nn.Module, option: str, parts: Iterable[str], as_original: bool) -> set[str]:
    """Names of the parameters in `parts`."""
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
