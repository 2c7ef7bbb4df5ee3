"""Interpretation of a model: traces of tokens to patches, attention maps and rollout, feature similarity, patterns of kept patches,
class activation maps, saliency metrics. `ufgir.visualization` draws the results."""

from .attention_maps import cls_attention_of_patches, rollout_of_patches
from .class_maps import LogitsOnly, PatchGrid, class_activation_maps
from .feature_maps import feature_similarity
from .patterns import cluster_maps
from .tracing import trace_patches, unmerge


__all__ = [
    "LogitsOnly",
    "PatchGrid",
    "class_activation_maps",
    "cls_attention_of_patches",
    "cluster_maps",
    "feature_similarity",
    "rollout_of_patches",
    "trace_patches",
    "unmerge",
]
