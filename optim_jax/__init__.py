"""Optimisation that finds structure while it trains: DessiLBI, its path, and probes of the loss landscape."""

from optim_jax.dessilbi import NEVER, DessiLBIState, dessilbi
from optim_jax.path import (
    activation_order,
    layer_sparsity,
    restrict_to_support,
    sparse_params,
    support_masks,
)
from optim_jax.penalties import L1, GroupLasso, Penalty, PenaltyRule, SparseGroup, assign_penalties, default_penalty
from optim_jax.probes import GradientProbe, probe_gradients
from optim_jax.pruning import path_masks, prune_by_path

__all__ = [
    "L1",
    "NEVER",
    "DessiLBIState",
    "GradientProbe",
    "GroupLasso",
    "Penalty",
    "PenaltyRule",
    "SparseGroup",
    "activation_order",
    "assign_penalties",
    "default_penalty",
    "dessilbi",
    "layer_sparsity",
    "path_masks",
    "probe_gradients",
    "prune_by_path",
    "restrict_to_support",
    "sparse_params",
    "support_masks",
]
