"""Fewer tokens: drop, skip or merge the patches of a ViT that a class can be told without."""

from prune_jax.tokens.attention import AttentionProfile, attention_profile, attention_range
from prune_jax.tokens.cp_vit import CPViT, layer_ratios
from prune_jax.tokens.dynamic_vit import DynamicViT, Masked, gumbel_keep, teach
from prune_jax.tokens.heads import cut_heads, least_heads
from prune_jax.tokens.losses import dynamic_vit_loss, ratio_loss, token_distillation
from prune_jax.tokens.merging import ToMe, merge_counts
from prune_jax.tokens.patch_skip import PatchSkip
from prune_jax.tokens.protocol import TokenCosts, TokenMethod, Trace, token_costs, wrap
from prune_jax.tokens.scorers import (
    Observed,
    Skipping,
    balanced_skip_accuracy,
    capacities,
    keep_share,
    skip_accuracy,
    skip_loss,
    start_at_shares,
)
from prune_jax.tokens.swin_skip import SwinPatchSkip

__all__ = [
    "AttentionProfile",
    "CPViT",
    "DynamicViT",
    "Masked",
    "Observed",
    "PatchSkip",
    "Skipping",
    "SwinPatchSkip",
    "ToMe",
    "TokenCosts",
    "TokenMethod",
    "Trace",
    "attention_profile",
    "attention_range",
    "balanced_skip_accuracy",
    "capacities",
    "cut_heads",
    "dynamic_vit_loss",
    "gumbel_keep",
    "keep_share",
    "layer_ratios",
    "least_heads",
    "merge_counts",
    "ratio_loss",
    "skip_accuracy",
    "skip_loss",
    "start_at_shares",
    "teach",
    "token_costs",
    "token_distillation",
    "wrap",
]
