"""Load `CLCAViTForImageClassification` from CLCA checkpoints, ViTs of transformers and timm, and files of the original code; convert
folders; write model cards."""

from .. import _moved
from .from_original import load_original, load_original_file
from .from_timm import load_timm
from .from_transformers import load_transformers
from .loading import load, load_image_processor, load_model, load_pretrained


__all__ = [
    "load",
    "load_image_processor",
    "load_model",
    "load_original",
    "load_original_file",
    "load_pretrained",
    "load_timm",
    "load_transformers",
]

__getattr__ = _moved.names_of(__name__)
