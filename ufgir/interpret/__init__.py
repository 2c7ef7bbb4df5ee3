"""What a model does with its tokens, as numbers: trace tokens back to patches, attention maps and rollout, feature maps, patterns of kept
patches, similarity of features, class activation maps, saliency. `ufgir.visualization` draws them."""

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
