"""Token merging (ToMe): similar tokens become one, by bipartite soft matching; no training."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from prune_jax.models.layers import each_layer, plain
from prune_jax.models.vit import ViT
from prune_jax.tokens.protocol import TokenMethod, Trace, check_model, patches_of
from prune_jax.tokens.state import Tokens, absorb, cosines, hand_over, split, start, take
from prune_jax.tree import check_count, widen


class ToMe(TokenMethod):
    """A ViT in which every block merges `r` pairs of patch tokens, between attention and MLP.

    Patch tokens take turns in two sets, a and b. Each token of a finds the one of b that it is most similar to, by the
    cosine of keys averaged over heads; the r most similar pairs are merged::

        x_b <- (s_b x_b + sum_a s_a x_a) / (s_b + sum_a s_a),   s_b <- s_b + sum_a s_a

    over the a that go into b, where s counts the patches that a token stands for. Attention is proportional:
    softmax(q k^T / sqrt(d) + log s). Class, distillation and register tokens neither merge nor are merged into.
    Unlike the other methods, which tokens merge depends on their order, as the two sets do.

    Attributes:
      model: the ViT.
      r: tokens that each block merges away, one number or one a block; at most half of the patch tokens it gets.
      proportional: whether attention weighs tokens by size.

    Raises:
      ValueError: r is not a whole number, negative, or larger than half of the patch tokens of some block.
      TypeError: a model that is not a ViT.

    Example:
      >>> from prune_jax.models import vit
      >>> ToMe(vit("S", num_classes=1000), r=13).tokens
      (184, 171, 158, 145, 132, 119, 106, 93, 80, 67, 54, 41)

    Reference: Bolya et al. 2023, Token Merging: Your ViT But Faster (2210.09461).
    """

    model: ViT
    r: int | Sequence[int] = 8
    proportional: bool = True

    def __post_init__(self) -> None:
        self.r = plain(self.r)
        super().__post_init__()
        check_model(self, ViT)
        _ = self.tokens  # says now what is wrong

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens, prefix included, that the MLP of each block computes."""
        left, counts = patches_of(self.model), []
        for i, r in enumerate(self.merged):
            if r > left // 2:
                raise ValueError(f"r must be at most half of the {left} patch tokens of block {i}, got {r}")
            left -= r
            counts.append(self.model.prefix + left)
        return tuple(counts)

    @property
    def merged(self) -> tuple[int, ...]:
        """Tokens that each block merges away."""
        return tuple(check_count("r", r, 0) for r in each_layer("r", self.r, self.model.depth))

    def trace(self, images: Array, *, train: bool = False) -> Trace:
        """Images (B, H, W, C) -> logits, and which patch's token carries each patch."""
        tokens = start(self.model.embed(images, train=train), self.model.prefix)
        owners = []
        for block, r in zip(self.model.blocks, self.merged, strict=True):
            q, k, v = block.attention.project(block.norm1(tokens.x))
            weights = tokens.weights if self.proportional else None
            mixed = block.attention.combine(block.attention.exponentials(q, k, weights=weights), v)
            tokens = tokens._replace(x=block.add(tokens.x, mixed, train=train))
            if r > 0:
                tokens = match_and_merge(tokens, widen(k).mean(axis=1), r)
            tokens = tokens._replace(x=block.feed_forward(tokens.x, train=train))
            owners.append(tokens.owner)
        return Trace(self.model.head(tokens.x, weights=tokens.size), jnp.stack(owners, axis=1))


def merge_counts(patches: int, depth: int, keep: float) -> tuple[int, ...]:
    """How many tokens each block merges away, evenly, so that on average over blocks a fraction `keep` is left.

    Args:
      patches: tokens before the first block, without the prefix.
      depth: number of blocks.
      keep: mean over blocks of the fraction of tokens left after a block's merging.

    Returns:
      `ToMe.r`: as even as whole numbers and halves allow.

    Raises:
      ValueError: no patches or blocks; a fraction above 1, or below what halving the tokens in every block leaves.

    Example:
      >>> merge_counts(196, 12, 0.6)
      (12, 12, 12, 12, 12, 12, 12, 13, 12, 12, 12, 12)
    """

    check_count("patches", patches, 1)
    check_count("depth", depth, 1)

    def merged(pace: float) -> tuple[int, ...]:
        left, counts = patches, []
        for block in range(depth):
            wanted = patches - round(pace * (block + 1))
            counts.append(min(max(left - wanted, 0), left // 2))
            left -= counts[-1]
        return tuple(counts)

    def kept(pace: float) -> float:
        return 1 - sum(n * (depth - block) for block, n in enumerate(merged(pace))) / (depth * patches)

    least = kept(patches)
    if not least <= keep <= 1:
        raise ValueError(f"keep must be from {least:.2f} to 1 with {depth} blocks, got {keep}")
    low, high = 0.0, float(patches)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) > keep else (low, middle)
    return merged(low if abs(kept(low) - keep) < abs(kept(high) - keep) else high)


def match_and_merge(tokens: Tokens, metric: Array, r: int) -> Tokens:
    """Merges the r most similar pairs of patch tokens, by bipartite soft matching.

    Args:
      tokens: with T patch tokens.
      metric: what similarity is measured on (B, prefix + T, C).
      r: at most T // 2.

    Returns:
      T - r patch tokens: those of the first set that are left, then the second set.
    """
    prefix = tokens.prefix
    size = jnp.ones(tokens.patch.shape, jnp.float32) if tokens.size is None else tokens.size
    similarity = cosines(metric[:, prefix::2], metric[:, prefix + 1 :: 2])
    gone, kept = split(similarity.max(axis=-1), r)
    target = take(similarity.argmax(axis=-1), gone)
    a, b = ([part[:, first::2] for part in (tokens.x[:, prefix:], size, tokens.patch)] for first in (0, 1))
    x, total = absorb(b[0], b[1], take(a[0], gone), take(a[1], gone), target)
    return Tokens(
        jnp.concatenate([tokens.x[:, :prefix], take(a[0], kept), x], axis=1),
        jnp.concatenate([take(a[2], kept), b[2]], axis=1),
        hand_over(tokens.owner, take(a[2], gone), take(b[2], target)),
        jnp.concatenate([take(a[1], kept), total], axis=1),
    )
