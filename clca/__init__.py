"""CLCA: a ViT with token reduction, cross-layer cache and cross-layer aggregation (https://huggingface.co/papers/2501.00243).

Importing this package registers the model with transformers' Auto classes.
"""

from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_clca import CLCAViTConfig, __version__
from .fast_paths_clca import set_fast_paths
from .image_processing_clca import CLCAImageProcessor
from .modeling_clca import CLCAViTBackbone, CLCAViTForImageClassification, CLCAViTModel, CLCAViTPreTrainedModel
from .reduction_base import TokenReduction
from .reductions_clca import REDUCTIONS, register_reduction, token_schedule


AutoConfig.register("clca_vit", CLCAViTConfig, exist_ok=True)
AutoModel.register(CLCAViTConfig, CLCAViTModel, exist_ok=True)
AutoBackbone.register(CLCAViTConfig, CLCAViTBackbone, exist_ok=True)
AutoModelForImageClassification.register(CLCAViTConfig, CLCAViTForImageClassification, exist_ok=True)

# save_pretrained and push_to_hub copy this code into the folder of a model and record there which classes to load.
CLCAViTConfig.register_for_auto_class()
CLCAImageProcessor.register_for_auto_class("AutoImageProcessor")
CLCAViTBackbone.register_for_auto_class("AutoBackbone")
CLCAViTModel.register_for_auto_class("AutoModel")
CLCAViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = [
    "REDUCTIONS",
    "CLCAImageProcessor",
    "CLCAViTBackbone",
    "CLCAViTConfig",
    "CLCAViTForImageClassification",
    "CLCAViTModel",
    "CLCAViTPreTrainedModel",
    "TokenReduction",
    "__version__",
    "register_reduction",
    "set_fast_paths",
    "token_schedule",
]
