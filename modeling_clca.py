"""The CLCA ViT models, importable from the top level."""

from clca.modeling_clca import (  # noqa: F401
    CLCAViTBackbone,
    CLCAViTForImageClassification,
    CLCAViTModel,
    CLCAViTPreTrainedModel,
)
