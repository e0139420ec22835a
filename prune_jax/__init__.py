"""Smaller networks: what to remove, and removing it."""

from prune_jax import graph, models, scores, tokens
from prune_jax.costs import count_parameters, flops
from prune_jax.distillation import distillation_loss
from prune_jax.l1 import L1State, l1_penalty, l1_proximal
from prune_jax.masks import LayerStatistics, apply_masks, layer_statistics, make_masks, make_nm_masks, sparsity
from prune_jax.ntk import ntk, ntk_spectrum, ntk_trace
from prune_jax.schedules import cubic, exponential, iterative_masks, one_shot
from prune_jax.timing import Latency, latencies, latency, speed_up
from prune_jax.transform import GradualPruningState, KeepMasksState, gradual_pruning, keep_masks
from prune_jax.tree import is_kernel

__all__ = [
    "GradualPruningState",
    "KeepMasksState",
    "L1State",
    "Latency",
    "LayerStatistics",
    "apply_masks",
    "count_parameters",
    "cubic",
    "distillation_loss",
    "exponential",
    "flops",
    "gradual_pruning",
    "graph",
    "is_kernel",
    "iterative_masks",
    "keep_masks",
    "l1_penalty",
    "l1_proximal",
    "latencies",
    "latency",
    "layer_statistics",
    "make_masks",
    "make_nm_masks",
    "models",
    "ntk",
    "ntk_spectrum",
    "ntk_trace",
    "one_shot",
    "scores",
    "sparsity",
    "speed_up",
    "tokens",
]
