"""A structurally pruned ViT or Swin as an ordinary module: the widths that a plan of `prune_jax.graph` leaves."""

from __future__ import annotations

from typing import Any

import numpy as np

from prune_jax.models.swin import Swin
from prune_jax.models.vit import ViT


def narrow(model: ViT | Swin, plan: dict[str, Any]) -> ViT | Swin:
    """The module whose parameters are those that a plan leaves.

    ``narrow(model, pruned.plan).apply(pruned.params, images)`` is ``pruned.fn(pruned.params, images)``; and a module
    has blocks to run one by one, trains with dropout, and takes a compute dtype.

    Args:
      model: the module that was pruned.
      plan: ``prune_jax.graph.prune(model.apply, variables, images, ...).plan``; whole heads may be cut as well.

    Returns:
      A module like ``model`` with its widths, head counts and head dims set for each block; the attention scales are
      those of ``model``.

    Raises:
      ValueError: a plan of another function.

    Example:
      >>> import jax
      >>> from prune_jax.graph import prune
      >>> model = ViT(num_classes=3, image_size=8, patch=4, width=8, depth=1, heads=2)
      >>> images = np.zeros((1, 8, 8, 3), np.float32)
      >>> variables = jax.jit(model.init)(jax.random.key(0), images)
      >>> pruned = prune(model.apply, variables, images, ratio=0.5, scope="local")
      >>> small = narrow(model, pruned.plan)
      >>> small.width, small.qk_dim, small.mlp_hidden, small.scale
      (4, (2,), (16,), (0.5,))
    """
    leaves = {tuple(entry["path"]): entry for entry in plan["leaves"]}
    root = ("params",) if ("params", "class_head", "kernel") in leaves else ()

    def kept(axis: int, *path: str) -> np.ndarray:
        """Positions left along an axis of a leaf."""
        if (*root, *path) not in leaves:
            raise ValueError(f"plan is not one of this model: it lists no leaf {'/'.join((*root, *path))!r}")
        entry = leaves[(*root, *path)]
        cuts = {keep["axis"]: keep["positions"] for keep in entry["keep"]}
        return np.asarray(cuts.get(axis, range(entry["shape"][axis])))

    def block(name: str, dense: dict[str, Any]) -> dict[str, Any]:
        values = kept(0, name, "attention", "proj", "kernel")
        heads = len(np.unique(values // dense["v_dim"]))
        v_dim = len(values) // heads
        columns = len(kept(1, name, "attention", "qkv", "kernel")) // heads
        return {
            "heads": heads,
            "qk_dim": (columns - v_dim) // 2,
            "v_dim": v_dim,
            "mlp_hidden": len(kept(1, name, "mlp", "fc1", "kernel")),
            "scale": dense["scale"],
        }

    if isinstance(model, ViT):
        blocks = [block(f"blocks_{i}", dense) for i, dense in enumerate(model.block_widths)]
        settings: dict[str, Any] = {name: tuple(b[name] for b in blocks) for name in blocks[0]}
        if model.pre_logits is not None:
            settings["pre_logits"] = len(kept(1, "pre_logits_dense", "kernel"))
        return model.clone(width=len(kept(0, "norm", "scale")), **settings)
    stages = [
        [block(f"blocks_{s}_{b}", dense) for b, dense in enumerate(stage)] for s, stage in enumerate(model.block_widths)
    ]
    settings = {name: tuple(tuple(b[name] for b in stage) for stage in stages) for name in stages[0][0]}
    widths = tuple(len(kept(0, f"blocks_{s}_0", "norm1", "scale")) for s in range(len(stages)))
    return model.clone(width=widths, **settings)
