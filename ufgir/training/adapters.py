"""peft adapters (LoRA and others, https://huggingface.co/docs/peft) on a CLCA model. Needs the extra `peft`.

Modules that no pretrained ViT has weights for are trained and saved in full, next to the adapter.

```python
from peft import LoraConfig
from ufgir.training.adapters import ATTENTION, MLP, adapt, merge

model = adapt(model, LoraConfig(r=8, target_modules=[*ATTENTION, *MLP]))
...  # train
model.save_pretrained("adapter")
model = merge(PeftModel.from_pretrained(base, "adapter"))  # a model without peft again
```
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from clca import CLCAViTConfig, CLCAViTForImageClassification

from ..utils.arguments import option
from ..utils.extras import install_command
from ..utils.options import OptionGroup, Requirement


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

ATTENTION = ("q_proj", "v_proj")  # `target_modules` of most papers; k_proj and o_proj also exist
MLP = ("fc1", "fc2")
SWIGLU_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass
class AdapterArguments(OptionGroup):
    """Options of a LoRA adapter that is trained instead of all weights.

    Raises:
        ValueError: if a number is out of range or a part is unknown.
    """

    _argument_group_name = "adapter (extra `peft`)"

    lora_rank: int | None = option(
        "rank of a LoRA adapter; only the adapter and modules without pretrained weights are trained [none]"
    )
    lora_alpha: float | None = option("scale of the adapter [2 x lora_rank]")
    lora_dropout: float = option("dropout probability before the adapter", 0.0)
    lora_targets: list[str] = field(
        default_factory=lambda: ["attention", "mlp"],
        metadata={"help": "parts of each layer that get an adapter: attention, mlp"},
    )

    requirements = (
        Requirement(("lora_alpha", "lora_dropout", "lora_targets"), "a `lora_rank`", lambda group: group.lora_rank),
    )

    def __post_init__(self) -> None:
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"`lora_rank` must be at least 1, got {self.lora_rank}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` must be in [0, 1), got {self.lora_dropout}.")
        if not self.lora_targets or set(self.lora_targets) - {"attention", "mlp"}:
            raise ValueError(f"`lora_targets` must be attention, mlp or both, got {self.lora_targets}.")
        super().__post_init__()

    def targets(self, config: CLCAViTConfig) -> list[str]:
        """Return the names of the linear layers that get an adapter."""
        mlp = SWIGLU_MLP if config.use_swiglu_ffn else MLP
        parts = {"attention": ATTENTION, "mlp": mlp}
        return [name for part in parts if part in self.lora_targets for name in parts[part]]

    def adapt(self, model: CLCAViTForImageClassification) -> nn.Module:
        """Return `model` with a LoRA adapter; `model` itself if `lora_rank` is None.

        Raises:
            ValueError: if peft is not installed.
        """
        if self.lora_rank is None:
            return model
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ValueError(f"`lora_rank` needs peft: {install_command('peft')}") from error
        alpha = 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        lora = LoraConfig(
            r=self.lora_rank,
            lora_alpha=alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.targets(model.config),
        )
        return adapt(model, lora)


def new_modules(model: CLCAViTForImageClassification) -> list[str]:
    """Return the names of the modules that no pretrained ViT has weights for.

    These are the head, reductions with parameters, VQT's query tokens, and the embeddings if they include CLR tokens.
    The head is always included in full: training changes the BatchNorm statistics of a CLA head, which must be saved.
    """
    names = ["vit.embeddings"] if model.config.num_clr_tokens else []
    for index, layer in enumerate(model.vit.layers):
        for name in ("reduction", "probe"):
            part = getattr(layer, name)
            if part is not None and any(True for _ in part.parameters()):
                names.append(f"vit.layers.{index}.{name}")
    return [*names, "classifier"]


def adapt(model: CLCAViTForImageClassification, config: "PeftConfig") -> "PeftModel":
    """Add an adapter to `model`. Only the adapter and the new modules (see `new_modules`) are trained.

    Args:
        model: changed in place.
        config: configuration of any peft adapter; `modules_to_save` is set if it is None.
    """
    from peft import get_peft_model

    if config.modules_to_save is None:
        config.modules_to_save = new_modules(model)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if ".embeddings.modules_to_save." in name and name.rpartition(".")[2] not in (
            "clr_tokens",
            "clr_position_embeddings",
        ):
            parameter.requires_grad_(False)  # saved because CLR tokens are not a module of their own, but not trained
    return adapted


def merge(adapted: "PeftModel") -> PreTrainedModel:
    """Return the model with the adapter merged into its weights, without peft.

    Like peft's `merge_and_unload`, which fails for adapters other than LoRA if a saved module has submodules, such as
    the CLA head (peft 0.21).
    """
    from peft.utils import ModulesToSaveWrapper

    wrappers = [name for name, module in adapted.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    for name in wrappers:
        wrapper = adapted.get_submodule(name)
        parent, _, child = name.rpartition(".")
        setattr(adapted.get_submodule(parent), child, wrapper.modules_to_save[wrapper.active_adapter])
    return adapted.merge_and_unload()
