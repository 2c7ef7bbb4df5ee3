"""peft adapters (LoRA and others, https://huggingface.co/docs/peft) on a CLCA model: which of its parts are new to a
pretrained ViT, so that they must be trained and saved whole beside the adapter. Needs the extra `peft`.

```python
from peft import LoraConfig
from ufgir.adapters import ATTENTION, MLP, adapt, merge

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
from ..utils.options import OptionGroup, Requirement


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

ATTENTION = ("q_proj", "v_proj")  # `target_modules` of most papers; k_proj and o_proj are there, too
MLP = ("fc1", "fc2")
SWIGLU_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass
class AdapterArguments(OptionGroup):
    """A LoRA adapter instead of training all weights.

    Raises:
        ValueError: numbers out of range, or unknown parts.
    """

    _argument_group_name = "adapter (extra `peft`)"

    lora_rank: int | None = option("train a LoRA adapter of that rank, and what is new to the model [none]")
    lora_alpha: float | None = option("scale of the adapter [2 x lora_rank]")
    lora_dropout: float = option("dropout before the adapter, probability", 0.0)
    lora_targets: list[str] = field(
        default_factory=lambda: ["attention", "mlp"], metadata={"help": "parts that get adapters: attention, mlp"}
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
        """Names of the linear layers that get an adapter."""
        mlp = SWIGLU_MLP if config.use_swiglu_ffn else MLP
        parts = {"attention": ATTENTION, "mlp": mlp}
        return [name for part in parts if part in self.lora_targets for name in parts[part]]

    def adapt(self, model: CLCAViTForImageClassification) -> nn.Module:
        """`model` with the adapter, or `model` itself without a rank.

        Raises:
            ValueError: peft is not installed.
        """
        if self.lora_rank is None:
            return model
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ValueError("`lora_rank` needs peft: pip install 'clca-vit[peft]'.") from error
        alpha = 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        lora = LoraConfig(
            r=self.lora_rank,
            lora_alpha=alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.targets(model.config),
        )
        return adapt(model, lora)


def new_modules(model: CLCAViTForImageClassification) -> list[str]:
    """Names of the modules that no pretrained ViT has weights for: the head, reductions with parameters of their own, VQT's
    queries, and the embeddings if there are CLR tokens among them.

    The head goes as a whole: the statistics of a CLA head's BatchNorms change in training, and would be lost otherwise.
    """
    names = ["vit.embeddings"] if model.config.num_clr_tokens else []
    for index, layer in enumerate(model.vit.layers):
        for name in ("reduction", "probe"):
            part = getattr(layer, name)
            if part is not None and any(True for _ in part.parameters()):
                names.append(f"vit.layers.{index}.{name}")
    return [*names, "classifier"]


def adapt(model: CLCAViTForImageClassification, config: "PeftConfig") -> "PeftModel":
    """Put an adapter on `model`. Trained are the adapter and what is new to the model (see `new_modules`); all else is frozen.

    Args:
        model: is changed in place.
        config: of any adapter of peft; its `modules_to_save` is filled in where it is not set.
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
            parameter.requires_grad_(False)  # saved with the adapter, since CLR tokens are no module, but not trained
    return adapted


def merge(adapted: "PeftModel") -> PreTrainedModel:
    """The model with the adapter merged into its weights, without peft. peft's own `merge_and_unload` does the same, but
    fails on saved modules made of several, as the CLA head is, for adapters other than LoRA (0.21)."""
    from peft.utils import ModulesToSaveWrapper

    wrappers = [name for name, module in adapted.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    for name in wrappers:
        wrapper = adapted.get_submodule(name)
        parent, _, child = name.rpartition(".")
        setattr(adapted.get_submodule(parent), child, wrapper.modules_to_save[wrapper.active_adapter])
    return adapted.merge_and_unload()
