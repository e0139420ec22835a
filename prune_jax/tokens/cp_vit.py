"""CP-ViT: cascade pruning of patches by how much attention they have received so far; no training.

`attention_profile` (attention.py) looks at a trained ViT, `layer_ratios` spreads a pruning ratio over its blocks,
`CPViT` drops patches, and `cut_heads` (heads.py) cuts heads.

Reference: Song et al. 2022, CP-ViT: Cascade Vision Transformer Pruning via Progressive Sparsity Prediction
(2203.04570).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prune_jax.models.layers import each_layer, normalised, plain
from prune_jax.models.vit import ViT
from prune_jax.tokens import state
from prune_jax.tokens.attention import patch_informativeness
from prune_jax.tokens.protocol import TokenMethod, Trace, check_model, patches_of

Queries = Literal["all", "prefix"]


class CPViT(TokenMethod):
    """A ViT that drops, in each block, the patches that have received the least attention in all blocks so far.

    Informativeness of patch p in head h of a block is the largest attention probability that any query gives it,
    max_j A_h[j, p]; that of the block is the sum over heads. (Rows of A sum to 1, so that what p itself attends to says
    nothing about p when it is summed up, and the maximum over the column is what is left of the sum criterion.) Scores
    add up over blocks. After the attention of block l, the L r_l patches with the smallest sums are dropped, and no
    later computation sees them: neither the MLP of block l nor any block after it. No gradient flows through the
    choice, so that fine-tuning trains the model that is left, at its price.

    Attributes:
      model: the ViT.
      ratios: r_l, the fraction of all L patches that each block drops, one number or one a block; 0 drops nothing.
        `layer_ratios` finds them.
      merge: whether what is to be dropped is merged into the kept tokens most similar to it instead; attention is then
        proportional to the patches a token stands for.
      queries: whose attention counts: "all" tokens' (as published) or only that of the "prefix" (class token).

    Raises:
      ValueError: a negative ratio, ratios that leave no patch, or "prefix" without prefix tokens.
      TypeError: a model that is not a ViT.

    Example:
      >>> from prune_jax.models import vit
      >>> CPViT(vit("S", num_classes=1000), ratios=(0, 0, 0, 0.3, 0, 0, 0.2, 0, 0, 0.1, 0, 0)).tokens
      (197, 197, 197, 138, 138, 138, 99, 99, 99, 79, 79, 79)
    """

    model: ViT
    ratios: float | Sequence[float] = 0.0
    merge: bool = False
    queries: Queries = "all"

    def __post_init__(self) -> None:
        self.ratios = plain(self.ratios)
        super().__post_init__()
        check_model(self, ViT)
        _ = self.counts  # says now what is wrong
        if self.queries not in ("all", "prefix"):
            raise ValueError(f"queries must be 'all' or 'prefix', got {self.queries!r}")
        if self.queries == "prefix" and self.model.prefix == 0:
            raise ValueError("queries='prefix' needs a model with a class token or registers")

    @property
    def counts(self) -> tuple[int, ...]:
        """Patch tokens left after each block's cut."""
        ratios = each_layer("ratios", self.ratios, self.model.depth)
        state.check_ratios(ratios)
        return state.counts([float(1 - fraction) for fraction in np.cumsum(ratios)], patches_of(self.model))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens, prefix included, that the MLP of each block computes."""
        return tuple(self.model.prefix + n for n in self.counts)

    def trace(self, images: Array, *, train: bool = False) -> Trace:
        """Images (B, H, W, C) -> logits, and which patches each block computed."""
        tokens = state.start(self.model.embed(images, train=train), self.model.prefix)
        scores: Array = jnp.zeros(tokens.patch.shape)
        owners = []
        for block, count in zip(self.model.blocks, self.counts, strict=True):
            q, k, v = block.attention.project(block.norm1(tokens.x))
            e = block.attention.exponentials(q, k, weights=tokens.weights)
            tokens = tokens._replace(x=block.add(tokens.x, block.attention.combine(e, v), train=train))
            scores = scores + self._informativeness(normalised(e))
            if count < tokens.patch.shape[1]:
                kept, _ = state.split(scores, count)
                tokens, scores = state.keep(tokens, scores, count, merge=self.merge), state.take(scores, kept)
            tokens = tokens._replace(x=block.feed_forward(tokens.x, train=train))
            owners.append(tokens.owner)
        return Trace(self.model.head(tokens.x, weights=tokens.size), jnp.stack(owners, axis=1))

    def _informativeness(self, p: Array) -> Array:
        """Of each patch in a block, from its probabilities (B, heads, N, N): (B, patches)."""
        prefix = self.model.prefix
        seen = p[:, :, :prefix] if self.queries == "prefix" else p
        return patch_informativeness(jax.lax.stop_gradient(seen), prefix).sum(axis=1)


def layer_ratios(ranges: Sequence[float] | Array, ratio: float, *, sharpness: float = 1.0) -> tuple[float, ...]:
    """Spreads a pruning ratio over the blocks, by attention range: long-range blocks drop more, short-range ones less.

    r_l is proportional to a power of the range of block l, as long as patches are left: at most 95 % are dropped in
    all. The scale is such that the fraction of patches gone, averaged over blocks, is the ratio.

    Args:
      ranges: of each block, not negative.
      ratio: mean over blocks of the fraction of patches gone after a block's cut, the share of patch computations
        saved.
      sharpness: the power. Ranges of a trained ViT lie close together; the larger it is, the more they tell apart.

    Returns:
      r_l of each block, for `CPViT` (and, with heads in place of patches, for `least_heads`).

    Raises:
      ValueError: a ratio that is negative or that dropping nearly all patches in the first blocks cannot reach;
        ranges that are negative, infinite or NaN; a sharpness that is not above 0 and finite.

    Example:
      >>> [round(r, 3) for r in layer_ratios([0.1, 0.1, 0.4, 0.4], 0.3)]
      [0.063, 0.063, 0.253, 0.253]
    """
    most = 0.95
    if not 0 < sharpness < math.inf:
        raise ValueError(f"sharpness must be above 0 and finite, got {sharpness}")
    found = np.asarray(ranges, float)
    if found.ndim != 1 or not found.size or not all(0 <= r < math.inf for r in found.tolist()):
        raise ValueError(f"ranges must be one of each block, finite and not negative, got {found.tolist()}")
    shape = np.cumsum((found / (found.max() or 1.0)) ** sharpness)
    limit = float((most * (shape > 0)).mean())
    if not 0 <= ratio <= limit:
        raise ValueError(f"ratio must be from 0 to {limit:.2f} with these ranges, got {ratio}")
    gone = np.zeros_like(shape)
    for full in range(len(shape) if ratio else 0):  # blocks, the last ones, after which all are gone that may go
        free = shape[: len(shape) - full]
        gone = np.full_like(shape, most)
        gone[: len(free)] = (ratio * len(shape) - most * full) * free / free.sum()
        if gone[len(free) - 1] <= most * (1 + 1e-9):
            break
    return tuple(np.diff(np.minimum(gone, most), prepend=0.0).tolist())
