"""Vision transformers in plain Linen, NHWC, with every width an argument, and their published weights."""

from prune_jax.models.swin import Swin, swin
from prune_jax.models.vit import ViT, vit
from prune_jax.models.weights import load_weights
from prune_jax.models.widths import narrow

__all__ = ["Swin", "ViT", "load_weights", "narrow", "swin", "vit"]
