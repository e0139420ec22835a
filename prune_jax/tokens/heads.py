"""Heads that a trained ViT can do without, and the ViT without them.

Reference: Song et al. 2022, CP-ViT: Cascade Vision Transformer Pruning via Progressive Sparsity Prediction
(2203.04570).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from einops import rearrange
from jax import Array

from prune_jax.models.layers import each_layer
from prune_jax.models.vit import ViT
from prune_jax.tokens.protocol import params_of
from prune_jax.tokens.state import check_ratios


def least_heads(heads: Sequence[Array], ratios: float | Sequence[float]) -> tuple[tuple[int, ...], ...]:
    """The heads that each block keeps: those with the least informativeness so far go, from all later blocks.

    Args:
      heads: informativeness of each block's heads, `AttentionProfile.heads`; every block has as many.
      ratios: fraction of the heads that goes after each block, one number or one a block; they add up, and what adds
        up to less than a whole head waits.

    Returns:
      For each block the heads it keeps, ascending; the first block keeps all.

    Raises:
      ValueError: blocks with different numbers of heads, negative ratios, or ratios that leave no head.

    Example:
      >>> import jax.numpy as jnp
      >>> least_heads([jnp.array([3.0, 1.0]), jnp.array([0.0, 3.0]), jnp.array([1.0, 1.0])], (0, 0.5, 0))
      ((0, 1), (0, 1), (1,))
    """
    numbers = [len(h) for h in heads]
    if len(set(numbers)) != 1:
        raise ValueError(f"heads must be as many in every block to add up over blocks, got {numbers or 'no block'}")
    ratios = each_layer("ratios", ratios, len(heads))
    check_ratios(ratios)
    if int(sum(ratios) * numbers[0] + 1e-6) >= numbers[0]:
        raise ValueError(f"ratios must sum to less than 1, so that one of {numbers[0]} heads is left, got {ratios}")
    alive, kept = list(range(numbers[0])), []
    scores, gone = np.zeros(numbers[0]), 0.0
    for informativeness, ratio in zip(heads, ratios, strict=True):
        kept.append(tuple(alive))
        scores, gone = scores + np.asarray(informativeness), gone + ratio
        left = numbers[0] - int(gone * numbers[0] + 1e-6)
        alive = sorted(sorted(alive, key=lambda head: -scores[head])[:left])
    return tuple(kept)


def cut_heads(model: ViT, variables: Any, kept: Sequence[Sequence[int]]) -> tuple[ViT, dict[str, Any]]:
    """The ViT that has only these heads, and its variables: ordinary narrower matrices, so that nothing is computed.

    CP-ViT chooses heads for each image. In a batch, that would take each image's own slices of the weights, which
    costs more than it saves; here all images share the choice, made on calibration images.

    Args:
      model: the ViT.
      variables: its ``{"params": ...}``.
      kept: for each block the heads it keeps, at least one.

    Returns:
      The narrower ViT and its variables.

    Raises:
      ValueError: a block without heads, heads that a block does not have, or the same head twice; variables that are
        not the model's.
      TypeError: a model that is not a ViT.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = ViT(num_classes=3, image_size=8, patch=2, width=8, depth=2, heads=2)
      >>> variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
      >>> small, cut = cut_heads(model, variables, ((0, 1), (1,)))
      >>> small.heads, cut["params"]["blocks_1"]["attention"]["qkv"]["kernel"].shape
      ((2, 1), (8, 12))
    """
    if not isinstance(model, ViT):
        raise TypeError(f"heads are cut out of a ViT, got {type(model).__name__}")
    widths = model.block_widths
    if len(kept) != model.depth:
        raise ValueError(f"kept must list the heads of {model.depth} blocks, got {len(kept)}")
    params = dict(params_of(variables))
    for i, (heads, width) in enumerate(zip(kept, widths, strict=True)):
        index = np.asarray(heads)
        if index.size == 0 or index.dtype.kind not in "iu" or not set(index.tolist()) <= set(range(width["heads"])):
            raise ValueError(f"kept[{i}] must name one or more of {width['heads']} heads, got {tuple(heads)}")
        if len(set(index.tolist())) < index.size:
            raise ValueError(f"kept[{i}] must name each head once, got {tuple(heads)}")
        block = params.get(f"blocks_{i}")
        if block is None:
            raise ValueError(f"variables must be those of the ViT, which have blocks_{i}, got params of {[*params]}")
        expected = width["width"], width["heads"] * (2 * width["qk_dim"] + width["v_dim"])
        found = block["attention"]["qkv"]["kernel"].shape
        if found != expected:
            raise ValueError(
                f"variables are not the model's: the qkv kernel of block {i} must be {expected}, got {found}"
            )
        qkv, proj = block["attention"]["qkv"], block["attention"]["proj"]
        ours = {n: rearrange(x, "... (h c) -> ... h c", h=width["heads"])[..., index, :] for n, x in qkv.items()}
        rows = rearrange(proj["kernel"], "(h c) d -> h c d", h=width["heads"])[index]
        attention = {
            "qkv": {name: rearrange(x, "... h c -> ... (h c)") for name, x in ours.items()},
            "proj": {**proj, "kernel": rearrange(rows, "h c d -> (h c) d")},
        }
        params[f"blocks_{i}"] = {**block, "attention": attention}
    settings: dict[str, Any] = {
        name: tuple(w[name] for w in widths) for name in ("qk_dim", "v_dim", "mlp_hidden", "scale")
    }
    return model.clone(heads=tuple(len(h) for h in kept), **settings), {"params": params}
