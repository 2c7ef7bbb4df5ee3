"""The CLCA ViT models, importable from the top level."""

from clca.modeling_clca import CLCAViTForImageClassification, CLCAViTModel, CLCAViTPreTrainedModel  # noqa: F401
