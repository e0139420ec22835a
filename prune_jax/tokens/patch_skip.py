"""Patch skipping: patches that a block would hardly change bypass it, and may come back in the next.

A small MLP before each block foresees, from a patch's token and the mean of all, whether the block will change it. It
learns from what the dense model does: no labels, and no change to the model. The method is that of the report "Pruning
Vision Transformers"; close to it is dynamic token idling (Xu et al. 2023, 2310.05654).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from einops import rearrange
from jax import Array, lax

from prune_jax.models.layers import Block, each_layer, plain
from prune_jax.models.vit import ViT
from prune_jax.tokens import state
from prune_jax.tokens.protocol import TokenMethod, Trace, check_model, patches_of
from prune_jax.tokens.scorers import Observed, Scorer, Skipping, scaled_cosine
from prune_jax.tree import check_count

AttendTo = Literal["all", "kept"]


class PatchSkip(TokenMethod):
    """A ViT whose blocks compute only the patches that they are expected to change.

    Scorers read the normalised tokens that a block's attention reads, each beside the mean of all. Two modes:

    - `capacity`: each block computes a fixed number of patches, those with the highest scores. They are gathered, so
      that the block is truly smaller.
    - `capacity=None`: each block computes the patches whose score is above `threshold`, as published. How many differs
      from image to image; shapes are static, so that all are computed and then selected. This mode is for measuring
      accuracy, and which capacities to set; it saves nothing.

    Given the same decisions both compute the same.

    Attributes:
      model: the ViT.
      capacity: fraction of the patches that a block computes, one number or one a block; where it is 1 no scorer is
        needed and the block is the dense one exactly.
      threshold: of the score, a probability; without `capacity`.
      attend: what computed patches attend to: "all" patches, skipped ones with their unchanged tokens, or "kept" ones,
        which saves more.
      hidden: channels of the scorers; None is width / 12 (768 x 64 x 1).

    Raises:
      ValueError: a capacity outside (0, 1], a threshold outside (0, 1), another `attend`, or `hidden` below 1.
      TypeError: a model that is not a ViT.

    Example:
      >>> from prune_jax.models import vit
      >>> PatchSkip(vit("S", num_classes=1000), capacity=(1.0,) * 6 + (0.5,) * 6).tokens
      (197, 197, 197, 197, 197, 197, 99, 99, 99, 99, 99, 99)
    """

    model: ViT
    capacity: float | Sequence[float] | None = None
    threshold: float = 0.5
    attend: AttendTo = "all"
    hidden: int | None = None

    def __post_init__(self) -> None:
        self.capacity = plain(self.capacity)
        super().__post_init__()
        check_model(self, ViT)
        check(self.capacity, self.threshold)
        if self.attend not in ("all", "kept"):
            raise ValueError(f"attend must be 'all' or 'kept', got {self.attend!r}")
        if self.hidden is not None:
            check_count("hidden", self.hidden, 1)
        _ = self.counts  # says now what is wrong

    @property
    def counts(self) -> tuple[int, ...]:
        """Patches that each block computes; without `capacity` all."""
        fractions = each_layer("capacity", 1.0 if self.capacity is None else self.capacity, self.model.depth)
        return state.counts(fractions, patches_of(self.model))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens, prefix included, that the MLP of each block computes."""
        return tuple(self.model.prefix + n for n in self.counts)

    def setup(self) -> None:
        """Declares the scorers."""
        hidden = max(self.model.width // 12, 1) if self.hidden is None else self.hidden
        self.scorers = [Scorer(hidden, self.model.compute_dtype) for _ in range(self.model.depth)]

    def trace(self, images: Array, *, train: bool = False) -> Trace:
        """Images (B, H, W, C) -> logits, and which patches each block computed."""
        if self.capacity is None and not self.is_initializing():
            return self.masked(images, train=train)
        prefix, patches = self.model.prefix, patches_of(self.model)
        x = self.model.embed(images, train=train)
        kept = []
        for i, (block, count) in enumerate(zip(self.model.blocks, self.counts, strict=True)):
            normed = block.norm1(x)
            scores = self.scorers[i].of_all(normed[:, prefix:]) if count < patches or self.is_initializing() else None
            if scores is None or count == patches:
                x = block(x, train=train)
                kept.append(jnp.ones((x.shape[0], patches), bool))
            else:
                index, _ = state.split(scores, count)
                x = compute_some(block, x, normed, state.with_prefix(index, prefix), self.attend, train=train)
                kept.append(state.chosen(index, patches))
        return Trace(self.model.head(x), owners(jnp.stack(kept, axis=1)))

    def masked(self, images: Array, *, decisions: Array | None = None, train: bool = False) -> Trace:
        """All patches are computed, and those to be skipped keep their tokens.

        Args:
          images: (B, H, W, C).
          decisions: which patches each block computes (B, depth, patches) bool; None asks the scorers.
          train: whether the ViT drops units and branches.

        Returns:
          As `trace`.

        Raises:
          ValueError: decisions of another shape.
        """
        prefix = self.model.prefix
        x = self.model.embed(images, train=train)
        if decisions is not None:
            shape = (x.shape[0], self.model.depth, x.shape[1] - prefix)
            state.check_decisions("decisions", decisions, shape, "(images, blocks, patches)")
        kept = []
        for i, block in enumerate(self.model.blocks):
            if decisions is None:
                now = keep_above(self.scorers[i].of_all(block.norm1(x)[:, prefix:]), self.threshold)
            else:
                now = decisions[:, i].astype(bool)
            kept.append(now)
            computed = jnp.pad(now, ((0, 0), (prefix, 0)), constant_values=True)
            itself = jnp.eye(x.shape[1], dtype=bool)[None]  # so that no row is empty
            weights = (computed[:, None] | itself)[:, None].astype(jnp.float32) if self.attend == "kept" else None
            x = jnp.where(computed[..., None], block(x, weights=weights, train=train), x)
        return Trace(self.model.head(x), owners(jnp.stack(kept, axis=1)))

    def observe(self, images: Array) -> Observed:
        """Runs the dense model: what the scorers read, and how similar each block leaves each patch.

        It may be kept, and some of its patches scored again and again by `score`: scorers train without the model.
        """
        prefix = self.model.prefix
        x = self.model.embed(images)
        tokens, similarity = [], []
        for block in self.model.blocks:
            tokens.append(block.norm1(x)[:, prefix:])
            before, x = x, block(x)
            similarity.append(scaled_cosine(before[:, prefix:], x[:, prefix:]))
        seen = jnp.stack(tokens, axis=1)
        return Observed(seen, seen.mean(axis=2), jnp.stack(similarity, axis=1))

    def score(self, tokens: Array, means: Array) -> Array:
        """Logits that patches are to be kept (B, depth, patches), of tokens and means as of `Observed`."""
        scores = [scorer(tokens[:, i], means[:, i]) for i, scorer in enumerate(self.scorers)]
        return jnp.stack(scores, axis=1)

    def watch(self, images: Array) -> Skipping:
        """Runs the dense model; what the scorers say of each block, and how similar it leaves each patch.

        ``method.apply(variables, images, method="watch")``; `skip_loss` trains the scorers on it.
        """
        seen = lax.stop_gradient(self.observe(images))  # what trains the scorers leaves the ViT alone
        return Skipping(self.score(seen.tokens, seen.means), seen.similarity)


def compute_some(
    block: Block,
    x: Array,
    normed: Array,
    index: Array,
    attend: AttendTo,
    *,
    bias: Array | None = None,
    windows: int = 0,
    train: bool = False,
) -> Array:
    """A block on some of its tokens; the others stay as they are.

    Args:
      block: a bound block.
      x: tokens (B, N, D).
      normed: what its attention reads, norm1(x), (B, N, D).
      index: the tokens to compute, ascending (B, K).
      attend: whether they attend to all N or to the K.
      bias: of those queries on all keys, (B, heads, K, N).
      windows: of an example, where B counts windows, those of an example one after another: training drops the branch
        of an example in all of its windows. 0 where B counts examples.
      train: whether the block drops units and branches.

    Returns:
      (B, N, D).
    """
    if attend == "all":
        q, k, v = block.attention.project_apart(state.take(normed, index), normed)
    else:
        q, k, v = block.attention.project(state.take(normed, index))
    mixed = block.attention.combine(block.attention.exponentials(q, k, bias=bias), v)
    some, shape = state.take(x, index), mixed.shape
    if windows:
        some, mixed = (rearrange(t, "(b w) k d -> b w k d", w=windows) for t in (some, mixed))
    computed = block.feed_forward(block.add(some, mixed, train=train), train=train)
    return state.put(x, index, computed.reshape(shape))


def keep_above(scores: Array, threshold: float) -> Array:
    """Whether a logit's probability is above the threshold."""
    return scores > math.log(threshold / (1 - threshold))


def owners(kept: Array) -> Array:
    """Owners of a trace where patches carry themselves or nobody does: (..., patches) bool -> int32."""
    return jnp.where(kept, state.positions(kept), state.NOBODY)


def check(capacity: float | Sequence[float] | None, threshold: float) -> None:
    """Raises ValueError unless capacities are in (0, 1] and the threshold is between 0 and 1."""
    for fraction in capacity if isinstance(capacity, Sequence) else () if capacity is None else (capacity,):
        state.check_fraction("capacity", fraction)
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be between 0 and 1, got {threshold}")
