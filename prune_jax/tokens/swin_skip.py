"""Patch skipping for Swin: the one token method that leaves its windows whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array, lax

from prune_jax.models.layers import each_layer, plain
from prune_jax.models.swin import Swin, WindowBlock
from prune_jax.tokens import state
from prune_jax.tokens.patch_skip import check, compute_some, keep_above, owners
from prune_jax.tokens.protocol import TokenMethod, Trace, check_model
from prune_jax.tokens.scorers import Observed, Scorer, Skipping, scaled_cosine
from prune_jax.tree import check_count


class SwinPatchSkip(TokenMethod):
    """A Swin whose blocks compute only the patches that they are expected to change; modes as of `PatchSkip`.

    Computed patches attend to all of their window. A fixed capacity is one for each window. Its parameters are
    ``{"model": ..., "scorers_i": ...}``, scorers counted through all stages. A patch of a block is a position of its
    feature map, row by row; what is said of patches is a tuple of an array a block, as stages have fewer and fewer.

    Attributes:
      model: the Swin.
      capacity: fraction of its patches that each window computes, one number or one a block, counted through all
        stages; None computes what scores above `threshold`. Where it is 1 the block is the dense one exactly.
      threshold: of the score, a probability; without `capacity`.
      image_size: height and width, or one number for both, of the images that `tokens`, `wrap` and `token_costs` are to
        go by; it runs on any.

    Raises:
      ValueError: a capacity outside (0, 1], a wrong number of them, a threshold outside (0, 1), or an image size that
        is not of whole numbers.
      TypeError: a model that is not a Swin.

    Example:
      >>> import jax
      >>> swin = Swin(num_classes=10, patch=2, window=4, width=24, depths=(2, 2), heads=(2, 4))
      >>> method = SwinPatchSkip(swin, capacity=(1, 1, 0.5, 0.5), image_size=(32, 32))
      >>> method.tokens
      (256, 256, 32, 32)
      >>> images = jnp.zeros((5, 32, 32, 3))
      >>> variables = jax.eval_shape(method.init, jax.random.key(0), images)
      >>> trace = jax.eval_shape(lambda v, x: method.apply(v, x, method="trace"), variables, images)
      >>> [owner.shape for owner in trace.owner]
      [(5, 256), (5, 256), (5, 64), (5, 64)]
    """

    model: Swin
    capacity: float | Sequence[float] | None = None
    threshold: float = 0.5
    image_size: Any = (224, 224)  # is made a pair

    def __post_init__(self) -> None:
        self.capacity = plain(self.capacity)
        size = each_layer("image_size", self.image_size, 2)
        self.image_size = tuple(check_count("image_size", length, 1) for length in size)
        super().__post_init__()
        check_model(self, Swin)
        check(self.capacity, self.threshold)
        _ = self.capacities  # says now what is wrong

    @property
    def capacities(self) -> tuple[float | None, ...]:
        """Capacity of each block, through all stages."""
        return each_layer("capacity", self.capacity, sum(self.model.depths))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens that the MLP of each block computes, of images of `image_size`; padding of windows is among them."""
        size = tuple(-(-length // self.model.patch) for length in self.image_size)
        counts: list[int] = []
        for stage, depth in enumerate(self.model.depths):
            size = tuple(-(-length // 2) for length in size) if stage else size
            sides = [min(length, self.model.windows[stage]) for length in size]
            windows = math.prod(-(-length // side) for length, side in zip(size, sides, strict=True))
            for capacity in self.capacities[len(counts) : len(counts) + depth]:
                (count,) = state.counts((1.0 if capacity is None else capacity,), math.prod(sides))
                counts.append(math.prod(size) if count == math.prod(sides) else windows * count)
        return tuple(counts)

    def setup(self) -> None:
        """Declares the scorers."""
        widths = np.repeat(self.model.widths, self.model.depths)
        self.scorers = [Scorer(max(int(width) // 12, 1), self.model.compute_dtype) for width in widths]

    def trace(self, images: Array, *, train: bool = False) -> Trace:
        """Images (B, H, W, C) -> logits, and which patches each block computed."""
        return self._run(images, self.capacities, None, train)

    def masked(self, images: Array, *, decisions: Sequence[Array] | None = None, train: bool = False) -> Trace:
        """All patches are computed, and those to be skipped keep their tokens.

        Args:
          images: (B, H, W, C).
          decisions: for each block which patches it computes (B, patches) bool; None asks the scorers.
          train: whether the Swin drops units and branches.

        Returns:
          As `trace`.

        Raises:
          ValueError: decisions for another number of blocks, or of another shape.
        """
        if decisions is not None and len(decisions) != len(self.capacities):
            raise ValueError(f"decisions must be a sequence of {len(self.capacities)}, got {len(decisions)}")
        return self._run(images, (None,) * len(self.capacities), decisions, train)

    def observe(self, images: Array) -> Observed:
        """Runs the dense model: what the scorers read, and how similar each block leaves each patch; as of `PatchSkip`.

        Tuples of tokens (B, patches, D) and similarities (B, patches), for each block.
        """
        x = self.model.embed(images)
        tokens, similarity = [], []
        for stage, blocks in enumerate(self.model.blocks):
            x = self.model.merging[stage - 1](x) if stage else x
            for block in blocks:
                tokens.append(flat(block.norm1(x)))
                before, x = x, block(x)
                similarity.append(flat(scaled_cosine(before, x)))
        return Observed(tuple(tokens), tuple(x.mean(axis=1) for x in tokens), tuple(similarity))

    def score(self, tokens: Sequence[Array], means: Sequence[Array]) -> tuple[Array, ...]:
        """For each block logits that patches are to be kept (B, patches), of tokens and means as of `Observed`."""
        return tuple(scorer(x, mean) for scorer, x, mean in zip(self.scorers, tokens, means, strict=True))

    def watch(self, images: Array) -> Skipping:
        """Runs the dense model: what the scorers say, and what is true; `skip_loss` trains the scorers on it."""
        seen = lax.stop_gradient(self.observe(images))  # what trains the scorers leaves the Swin alone
        return Skipping(self.score(seen.tokens, seen.means), seen.similarity)

    def _run(
        self, images: Array, capacities: Sequence[float | None], decisions: Sequence[Array] | None, train: bool
    ) -> Trace:
        """The blocks by capacity, where that is None by these decisions, and where there are none by the scorers."""
        x = self.model.embed(images, train=train)
        kept: list[Array] = []
        for stage, blocks in enumerate(self.model.blocks):
            x = self.model.merging[stage - 1](x) if stage else x
            for block in blocks:
                i = len(kept)
                if self.is_initializing():
                    self.scorers[i].of_all(flat(x))
                capacity = capacities[i]
                if capacity is None:
                    x, now = self._selected(i, block, x, None if decisions is None else decisions[i], train)
                else:
                    x, now = self._gathered(i, block, x, capacity, train)
                kept.append(flat(now))
        return Trace(self.model.head(x), tuple(owners(now) for now in kept))

    def _selected(
        self, i: int, block: WindowBlock, x: Array, decision: Array | None, train: bool
    ) -> tuple[Array, Array]:
        """The whole map computed, of which those patches are taken that are to be; and which those are."""
        if decision is None:
            now = keep_above(self._asked(i, block.norm1(x)), self.threshold)
        else:
            shape = (x.shape[0], x.shape[1] * x.shape[2])
            state.check_decisions(f"decisions[{i}]", decision, shape, "(images, patches)")
            now = decision.reshape(x.shape[:3]).astype(bool)
        return jnp.where(now[..., None], block(x, train=train), x), now

    def _asked(self, i: int, normed: Array) -> Array:
        """What scorer i says of a map (B, height, width, D): (B, height, width)."""
        return self.scorers[i].of_all(flat(normed)).reshape(normed.shape[:3])

    def _gathered(self, i: int, block: WindowBlock, x: Array, capacity: float, train: bool) -> tuple[Array, Array]:
        """Of each window as many patches computed as the capacity says; and which of the map those are."""
        size = x.shape[1:3]
        normed = block.norm1(x)
        windows = block.to_windows(normed)
        (count,) = state.counts((capacity,), windows.shape[1])
        if count == windows.shape[1]:
            return block(x, train=train), jnp.ones(x.shape[:3], bool)
        inside = block.to_windows(jnp.ones_like(x[..., :1]))[..., 0] > 0  # padding is computed last
        scores = jnp.where(inside, block.to_windows(self._asked(i, normed)[..., None])[..., 0], -jnp.inf)
        index, _ = state.split(scores, count)
        bias = block.bias(size)
        bias = jnp.broadcast_to(bias[None], (len(windows) // len(bias), *bias.shape))
        bias = state.take(rearrange(bias, "b w h n m -> (b w) n h m"), index)
        bias = rearrange(bias, "b k h m -> b h k m")
        of_each = len(windows) // len(x)
        y = compute_some(block, block.to_windows(x), windows, index, "all", bias=bias, windows=of_each, train=train)
        kept = block.from_windows(state.chosen(index, windows.shape[1])[..., None], size)[..., 0]
        return block.from_windows(y, size), kept


def flat(x: Array) -> Array:
    """Feature map (B, height, width, ...) -> (B, patches, ...)."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])
