"""What a ViT attends to: how informative its patches and heads are, and how far its blocks look.

Reference: Song et al. 2022, CP-ViT: Cascade Vision Transformer Pruning via Progressive Sparsity Prediction
(2203.04570).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from prune_jax.models.layers import normalised
from prune_jax.models.vit import ViT


def patch_informativeness(probabilities: Array, prefix: int) -> Array:
    """Largest probability that each patch receives in each head: (B, heads, N, prefix + L) -> (B, heads, L)."""
    return probabilities[..., prefix:].max(axis=2)


class AttentionProfile(NamedTuple):
    """What a ViT attends to, on some images.

    Attributes:
      maps: attention among patches, rows normalised to 1, mean over images and heads (depth, L, L).
      ranges: `attention_range` of each block, mean over images and heads (depth,).
      patches: informativeness of each patch in each block, sum over heads (B, depth, L).
      heads: for each block informativeness of its heads, the sum over patches, mean over images (heads,).
    """

    maps: Array
    ranges: Array
    patches: Array
    heads: tuple[Array, ...]


def attention_profile(model: ViT, images: Array) -> AttentionProfile:
    """Runs a ViT and looks at its attention; a function of the bound module.

    Args:
      model: the bound ViT.
      images: (B, H, W, C); a few dozen calibrate the ratios well.

    Returns:
      The profile.

    Raises:
      ValueError: no images.

    Example:
      >>> import jax
      >>> model = ViT(num_classes=3, image_size=8, patch=2, width=8, depth=2, heads=2)
      >>> variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
      >>> profile = jax.jit(lambda v, x: model.apply(v, x, method=attention_profile))(variables, jnp.ones((5, 8, 8, 3)))
      >>> profile.maps.shape, profile.ranges.shape, profile.patches.shape, profile.heads[0].shape
      ((2, 16, 16), (2,), (5, 2, 16), (2,))
    """
    if images.shape[0] == 0:
        raise ValueError("images must be at least one, to be looked at, got none")
    prefix = model.prefix
    x = model.embed(images)
    maps, ranges, patches, heads = [], [], [], []
    for block in model.blocks:
        q, k, v = block.attention.project(block.norm1(x))
        e = block.attention.exponentials(q, k)
        x = block.feed_forward(block.add(x, block.attention.combine(e, v)))
        p = normalised(e)
        among = p[:, :, prefix:, prefix:]
        among = among / jnp.maximum(among.sum(axis=-1, keepdims=True), jnp.finfo(among.dtype).tiny)
        informativeness = patch_informativeness(p, prefix)
        maps.append(among.mean(axis=(0, 1)))
        ranges.append(attention_range(among, model.grid).mean())
        patches.append(informativeness.sum(axis=1))
        heads.append(informativeness.sum(axis=2).mean(axis=0))
    return AttentionProfile(jnp.stack(maps), jnp.stack(ranges), jnp.stack(patches, axis=1), tuple(heads))


def attention_range(attention: Array, grid: Sequence[int]) -> Array:
    """How far attention reaches: 0 if it stays near the diagonal, 1 if it lies on vertical stripes.

    With c_j = mean_i A_ij, the attention that patch j gets from all, of L patches::

        stripes  = 1/2 sum_j |c_j - 1/L|                             how unlike the patches are in what they get
        diagonal = max(0, mean_i sum over j near i of (A_ij - c_j))  what near patches get beyond that
        range    = stripes / (stripes + diagonal)                    1/2 where both are 0

    Near are the patch itself and its up to eight neighbours on the grid. The published method looks at a picture of the
    attention: a bright diagonal says that informative patches cannot be told yet, bright vertical lines say which they
    are. This is that look as a number.

    Args:
      attention: probabilities among patches, rows sum to 1 (..., L, L).
      grid: rows and columns of patches.

    Returns:
      (...).

    Raises:
      ValueError: attention of another number of patches.

    Example:
      >>> diagonal, stripe = jnp.eye(16), jnp.zeros((16, 16)).at[:, 5].set(1.0)
      >>> [round(float(attention_range(a, (4, 4))), 2) for a in (diagonal, stripe, (diagonal + stripe) / 2)]
      [0.0, 1.0, 0.61]
    """
    patches = grid[0] * grid[1]
    if attention.shape[-2:] != (patches, patches):
        raise ValueError(f"attention must be (..., {patches}, {patches}) on this grid, got {attention.shape}")
    rows, columns = np.divmod(np.arange(patches), grid[1])
    near = (abs(rows[:, None] - rows) <= 1) & (abs(columns[:, None] - columns) <= 1)
    received = attention.mean(axis=-2)
    stripes = 0.5 * jnp.abs(received - 1 / len(rows)).sum(axis=-1)
    beyond = (
        jnp.where(jnp.broadcast_to(near, attention.shape), attention - received[..., None, :], 0)
        .sum(axis=-1)
        .mean(axis=-1)
    )
    diagonal = jnp.maximum(beyond, 0)
    total = stripes + diagonal
    return jnp.where(total > 1e-6, stripes / jnp.maximum(total, 1e-6), 0.5)
