"""Quantize models for inference: int8 weights by torchao, saved and loaded by transformers. Requires the extra `quantization`.

```python
model = quantize_model(CLCAViTForImageClassification.from_pretrained("outputs/mine"))
model.save_pretrained("outputs/mine-int8")
model = CLCAViTForImageClassification.from_pretrained("outputs/mine-int8")  # config.json has the scheme
```
"""

from torch import nn

from clca import CLCAViTForImageClassification

from .utils.extras import install_command


SCHEMES = ("int8",)
# Small layers; rounding errors in a score would drop other tokens.
NOT_QUANTIZED = (r"vit\.layers\.\d+\.reduction", "classifier")
_REFUSED = {
    "int4": "the int4 weights of torchao require GPU kernels of the package mslk, so they fail on a CPU",
}


def quantize_model(model: CLCAViTForImageClassification, scheme: str = "int8") -> CLCAViTForImageClassification:
    """Convert the weights of the linear layers of `model` to int8, with one scale per output channel. Activations, reductions, head,
    embeddings and norms keep their precision.

    Args:
        model: is changed in place, and cannot be trained afterwards.
        scheme: "int8", the only scheme that runs on all devices.

    Returns:
        `model`; `save_pretrained` and `from_pretrained` work as for other models.

    Raises:
        ValueError: if `scheme` is unknown, or the model is already quantized.
        ImportError: if torchao is not installed.
    """
    if scheme not in SCHEMES:
        why = f": {_REFUSED[scheme]}" if scheme in _REFUSED else ""
        raise ValueError(f"`scheme` must be {' or '.join(map(repr, SCHEMES))}, got {scheme!r}{why}.")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("`model` is already quantized.")
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ImportError(f"Quantization requires torchao: {install_command('quantization')}") from error
    from transformers import TorchAoConfig
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(NOT_QUANTIZED))
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model)
    quantize_(
        model.requires_grad_(False),
        config.get_apply_tensor_subclass(),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and should_convert_module(name, NOT_QUANTIZED),
    )
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return model.eval()
