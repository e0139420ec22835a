"""Patch skipping for Swin: the one token method that leaves its windows whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array

from prune_jax.models.layers import each_layer
from prune_jax.models.swin import Swin, WindowBlock
from prune_jax.tokens import state
from prune_jax.tokens.patch_skip import Scorer, check, compute_some, keep_above, scaled_cosine


class SwinTrace(NamedTuple):
    """Logits (B, num_classes), and for each block which patches it computed, (B, height, width) bool."""

    logits: Array
    kept: tuple[Array, ...]


class SwinPatchSkip(nn.Module):
    """A Swin whose blocks compute only the patches that they are expected to change; modes as of `PatchSkip`.

    Computed patches attend to all of their window. A fixed capacity is one for each window. Its parameters are
    ``{"model": ..., "scorers_i": ...}``, scorers counted through all stages.

    Attributes:
      model: the Swin.
      capacity: fraction of its patches that each window computes, one number or one a block, counted through all
        stages; None computes what scores above `threshold`.
      threshold: of the score, a probability; without `capacity`.

    Raises:
      ValueError: a capacity outside (0, 1], a wrong number of them, a threshold outside (0, 1).

    Example:
      >>> import jax
      >>> swin = Swin(num_classes=10, patch=2, window=4, width=24, depths=(2, 2), heads=(2, 4))
      >>> method, images = SwinPatchSkip(swin, capacity=(1, 1, 0.5, 0.5)), jnp.zeros((5, 32, 32, 3))
      >>> variables = jax.eval_shape(method.init, jax.random.key(0), images)
      >>> trace = jax.eval_shape(lambda v, x: method.apply(v, x, method="trace"), variables, images)
      >>> [kept.shape for kept in trace.kept]
      [(5, 16, 16), (5, 16, 16), (5, 8, 8), (5, 8, 8)]
    """

    model: Swin
    capacity: float | Sequence[float] | None = None
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.capacity, self.threshold)
        each_layer("capacity", self.capacity, sum(self.model.depths))

    def setup(self) -> None:
        """Declares the scorers."""
        widths = np.repeat(self.model.widths, self.model.depths)
        self.scorers = [Scorer(max(int(width) // 12, 1), self.model.compute_dtype) for width in widths]

    def __call__(self, images: Array) -> Array:
        """Images (B, H, W, C) -> logits (B, num_classes), float32."""
        return self.trace(images).logits

    def trace(self, images: Array, *, decisions: Sequence[Array] | None = None) -> SwinTrace:
        """Images (B, H, W, C) -> logits, and which patches each block computed.

        With `decisions`, maps (B, height, width) bool for each block, those are computed and the others selected away.
        """
        x = self.model.embed(images)
        kept: list[Array] = []
        for stage, blocks in enumerate(self.model.blocks):
            x = self.model.merging[stage - 1](x) if stage else x
            for block in blocks:
                x, now = self._block(len(kept), block, x, None if decisions is None else decisions[len(kept)])
                kept.append(now)
        return SwinTrace(self.model.head(x), tuple(kept))

    def watch(self, images: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Runs the dense model: for each block the scores and the similarity of its patches, (B, height, width)."""
        x = self.model.embed(images)
        scores: list[Array] = []
        similarity = []
        for stage, blocks in enumerate(self.model.blocks):
            x = self.model.merging[stage - 1](x) if stage else x
            for block in blocks:
                scores.append(self.scorers[len(scores)](block.norm1(x)))
                before, x = x, block(x)
                similarity.append(scaled_cosine(before, x))
        return tuple(scores), tuple(similarity)

    def _block(self, i: int, block: WindowBlock, x: Array, decision: Array | None) -> tuple[Array, Array]:
        """A block, and which patches of the map it computed."""
        size = x.shape[1:3]
        capacity = each_layer("capacity", self.capacity, sum(self.model.depths))[i]
        if self.is_initializing():
            self.scorers[i](x)
        if decision is None and capacity is None:
            decision = keep_above(self.scorers[i](block.norm1(x)), self.threshold)
        if decision is not None:
            return jnp.where(decision[..., None], block(x), x), decision
        normed = block.norm1(x)
        windows = block.to_windows(normed)
        (count,) = state.counts((capacity,), windows.shape[1])
        if count == windows.shape[1]:
            return block(x), jnp.ones(x.shape[:3], bool)
        inside = block.to_windows(jnp.ones_like(x[..., :1]))[..., 0] > 0  # padding is computed last
        scores = jnp.where(inside, block.to_windows(self.scorers[i](normed)[..., None])[..., 0], -jnp.inf)
        index, _ = state.split(scores, count)
        bias = block.bias(size)
        bias = jnp.broadcast_to(bias[None], (len(windows) // len(bias), *bias.shape))
        bias = state.take(rearrange(bias, "b w h n m -> (b w) n h m"), index)
        y = compute_some(block, block.to_windows(x), windows, index, "all", bias=rearrange(bias, "b k h m -> b h k m"))
        kept = block.from_windows(state.chosen(index, windows.shape[1])[..., None], size)[..., 0]
        return block.from_windows(y, size), kept
