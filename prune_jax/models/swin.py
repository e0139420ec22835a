"""Swin transformers for any image size, whose every width is an argument, so that a pruned one is an ordinary one.

Reference: Liu et al. 2021, arXiv:2103.14030.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array

from prune_jax.models.layers import (
    BLOCK_WIDTHS,
    Block,
    Gelu,
    check_blocks,
    dense,
    drop_path_rates,
    each_layer,
    fill_widths,
    initialise,
    plain,
)
from prune_jax.tree import check_count, widen

SIZES: dict[str, dict[str, Any]] = {
    "T": {"width": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24)},
    "S": {"width": 96, "depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24)},
    "B": {"width": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)},
}
FAR = -100.0  # logit of a pair that shifting brought into one window but the image keeps apart


class WindowBlock(Block, kw_only=True):
    """One Swin block: attention inside windows, which every second block shifts by half a window; then the MLP.

    An axis no longer than the window is one window, unshifted. Otherwise the map is padded with zeros after the norm to
    whole windows, and the padding cut off again.

    Attributes:
      window: side of a window.
      shifted: whether this block shifts its windows.
      (and those of `layers.Block`)
    """

    window: int
    shifted: bool

    norm_epsilon = 1e-5
    token_axes = (1, 2, 3)

    def setup(self) -> None:
        """Declares the parts."""
        super().setup()
        offsets = (2 * self.window - 1) ** 2
        self.relative_position_bias = self.param("relative_position_bias", initialise, (offsets, self.heads))

    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Feature map (B, H, W, D) -> (B, H, W, D)."""
        x = self.add(x, self.windows(self.norm1(x)), train=train)
        return self.feed_forward(x, train=train)

    def windows(self, x: Array) -> Array:
        """Attention inside the windows of a feature map (B, H, W, D)."""
        size = x.shape[1:3]
        return self.from_windows(self.attention(self.to_windows(x), bias=self.bias(size)), size)

    def to_windows(self, x: Array) -> Array:
        """Feature map (B, H, W, D), padded with zeros and shifted -> windows of tokens (B * windows, tokens, D)."""
        sides, shifts, _ = self.layout(x.shape[1:3])
        x = pad(x, *sides)
        x = jnp.roll(x, [-s for s in shifts], (1, 2)) if any(shifts) else x
        return rearrange(x, "b (i p) (j q) d -> (b i j) (p q) d", p=sides[0], q=sides[1])

    def from_windows(self, windows: Array, size: Sequence[int]) -> Array:
        """Back to the feature map of height and width `size`."""
        (p, q), shifts, padded = self.layout(size)
        x = rearrange(windows, "(b i j) (p q) d -> b (i p) (j q) d", p=p, q=q, i=padded[0] // p, j=padded[1] // q)
        x = jnp.roll(x, shifts, (1, 2)) if any(shifts) else x
        return x[:, : size[0], : size[1]]

    def layout(self, size: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """For a map of height and width `size`: sides of a window, shifts, and the padded height and width."""
        sides, shifts = zip(*(self.side_and_shift(n) for n in size), strict=True)
        return sides, shifts, tuple(n + -n % side for n, side in zip(size, sides, strict=True))

    def side_and_shift(self, length: int) -> tuple[int, int]:
        """Window side and shift along an axis of this length."""
        if length <= self.window:
            return length, 0
        return self.window, self.window // 2 if self.shifted else 0

    def bias(self, size: Sequence[int]) -> Array:
        """Relative position bias, and far pairs masked: (1 or windows, heads, tokens, tokens)."""
        sides, shifts, padded = self.layout(size)
        index = relative_index(sides, self.window)
        bias = self.relative_position_bias[index.reshape(-1)]
        bias = rearrange(bias, "(n m) h -> 1 h n m", n=index.shape[0]).astype(jnp.float32)
        return bias + apart(sides, shifts, padded)[:, None] if any(shifts) else bias


class PatchMerging(nn.Module):
    """Four neighbouring tokens become one: concatenated, normalised, mapped to the next stage's width.

    Attributes:
      width: channels out.
      compute_dtype: dtype of the matmul; None keeps float32.
    """

    width: int
    compute_dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(B, H, W, C) -> (B, ceil(H/2), ceil(W/2), width); odd sides are padded with zeros."""
        # order as published: rows change fastest among the four
        x = rearrange(pad(x, 2, 2), "b (h p) (w q) c -> b h w (q p c)", p=2, q=2)
        x = nn.LayerNorm(epsilon=1e-5, dtype=self.compute_dtype, name="norm")(x)
        return widen(dense(self.width, self.compute_dtype, use_bias=False, name="reduction")(x))


class Swin(nn.Module):
    """Swin transformer. The same parameters take images of any size.

    Its parts are reached as those of `ViT`: ``embed``, then for every stage ``merging[stage - 1]`` (from the second on)
    and ``blocks[stage]``, then ``head``. For 32x32 images, ``patch=2, window=4`` and three or four stages do well.

    Attributes:
      num_classes: outputs.
      patch: side of a patch; images are padded with zeros to whole patches.
      window: side of a window, one number or one a stage.
      width: channels, of the first stage (each later one has twice as many) or of every stage.
      depths: blocks of each stage.
      heads: for each stage heads of its blocks, one number or one a block.
      qk_dim: query and key channels of a head, one number or for each stage as `heads`; None is width / heads.
      v_dim: value channels of a head, likewise.
      mlp_hidden: hidden channels of the MLP, likewise; None is 4 width.
      scale: factor on the attention logits, likewise; None is qk_dim ** -0.5. A pruned model keeps the dense one's.
      gelu: "exact" (as published) or "tanh".
      dropout: rate after embedding, attention and MLP layers, in training (rng "dropout").
      drop_path: stochastic depth; the rate of the last block, in training.
      compute_dtype: dtype of the matmuls, such as jnp.bfloat16; None keeps float32. Parameters and tokens stay float32.

    Example:
      >>> import jax
      >>> model = Swin(num_classes=10, patch=2, window=4, width=24, depths=(2, 2), heads=(2, 4))
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
      >>> jax.eval_shape(model.apply, variables, jnp.zeros((5, 36, 28, 3))).shape
      (5, 10)
    """

    num_classes: int
    patch: int = 4
    window: int | Sequence[int] = 7
    width: int | Sequence[int] = 96
    depths: Sequence[int] = (2, 2, 6, 2)
    heads: Sequence[int | Sequence[int]] = (3, 6, 12, 24)
    qk_dim: int | Sequence[int | Sequence[int]] | None = None
    v_dim: int | Sequence[int | Sequence[int]] | None = None
    mlp_hidden: int | Sequence[int | Sequence[int]] | None = None
    scale: float | Sequence[float | Sequence[float]] | None = None
    gelu: Gelu = "exact"
    dropout: float = 0.0
    drop_path: float = 0.0
    compute_dtype: Any = None

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        width = plain(self.width)
        if isinstance(width, Sequence):
            return each_layer("width", width, len(self.depths))
        return tuple(width * 2**stage for stage in range(len(self.depths)))

    @property
    def windows(self) -> tuple[int, ...]:
        """Window side of each stage."""
        return each_layer("window", self.window, len(self.depths))

    @property
    def block_widths(self) -> list[list[dict[str, Any]]]:
        """For each stage, each block's width, heads, qk_dim, v_dim, mlp_hidden and scale, defaults filled in."""
        stages = []
        for stage, width in enumerate(self.widths):
            settings = {name: self._in_stage(name, stage) for name in BLOCK_WIDTHS}
            blocks = ({name: x[b] for name, x in settings.items()} for b in range(self.depths[stage]))
            stages.append([fill_widths(width, **block) for block in blocks])
        return stages

    def setup(self) -> None:
        """Declares the parts."""
        check_blocks(self.gelu, self.dropout, self.drop_path)
        check_count("patch", self.patch, 1)
        dtype = self.compute_dtype
        self.embedding = dense(self.widths[0], dtype)
        self.embedding_norm = nn.LayerNorm(epsilon=1e-5, dtype=dtype)
        self.drop_units = nn.Dropout(self.dropout)
        self.blocks = self._blocks()
        self.merging = [PatchMerging(width, dtype) for width in self.widths[1:]]
        self.norm = nn.LayerNorm(epsilon=1e-5, dtype=dtype)
        self.class_head = dense(self.num_classes, dtype)

    def __call__(self, images: Array, *, train: bool = False) -> Array:
        """Images (B, H, W, C) -> logits (B, num_classes), float32."""
        x = self.embed(images, train=train)
        for stage, blocks in enumerate(self.blocks):
            if stage > 0:
                x = self.merging[stage - 1](x)
            for block in blocks:
                x = block(x, train=train)
        return self.head(x)

    def embed(self, images: Array, *, train: bool = False) -> Array:
        """Images (B, H, W, C) -> feature map of patches (B, ceil(H/patch), ceil(W/patch), D)."""
        x = pad(images, self.patch, self.patch)
        x = rearrange(x, "b (i p) (j q) c -> b i j (p q c)", p=self.patch, q=self.patch)
        x = widen(self.embedding_norm(self.embedding(x)))  # as in `ViT`
        return self.drop_units(x, deterministic=not train)

    def head(self, x: Array) -> Array:
        """Feature map after the last block (B, H, W, D) -> logits (B, num_classes), float32."""
        return self.class_head(self.norm(x).mean(axis=(1, 2))).astype(jnp.float32)

    def _blocks(self) -> list[list[WindowBlock]]:
        rates = iter(drop_path_rates(self.drop_path, sum(self.depths)))
        common = {"gelu": self.gelu, "dropout": self.dropout, "compute_dtype": self.compute_dtype}
        return [
            [
                WindowBlock(**widths, **common, window=window, shifted=b % 2 == 1, drop_path=next(rates))
                for b, widths in enumerate(stage)
            ]
            for stage, window in zip(self.block_widths, self.windows, strict=True)
        ]

    def _in_stage(self, name: str, stage: int) -> tuple:
        """A setting for every block of a stage."""
        of_stages = each_layer(name, getattr(self, name), len(self.depths))
        return each_layer(f"{name}[{stage}]", of_stages[stage], self.depths[stage])


def swin(size: str, *, num_classes: int, **settings: Any) -> Swin:
    """A Swin of a published size.

    Args:
      size: "T", "S" or "B".
      num_classes: outputs.
      **settings: any attribute of `Swin`.

    Returns:
      The module.

    Raises:
      ValueError: no such size.

    Example:
      >>> swin("B", num_classes=1000).widths
      (128, 256, 512, 1024)
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    return Swin(num_classes=num_classes, **(SIZES[size] | settings))


def pad(x: Array, rows: int, columns: int) -> Array:
    """A feature map padded with zeros, below and right, to multiples of these."""
    extra = (-x.shape[1] % rows, -x.shape[2] % columns)
    return jnp.pad(x, ((0, 0), (0, extra[0]), (0, extra[1]), (0, 0))) if any(extra) else x


def relative_index(sides: Sequence[int], window: int) -> np.ndarray:
    """Row of the bias table for each pair of tokens of a window, (n, n): offsets (dy, dx), dx fastest."""
    positions = np.stack(np.meshgrid(*map(np.arange, sides), indexing="ij"), -1).reshape(-1, 2)
    offsets = positions[:, None] - positions[None] + window - 1
    return offsets[..., 0] * (2 * window - 1) + offsets[..., 1]


def apart(sides: Sequence[int], shifts: Sequence[int], padded: Sequence[int]) -> np.ndarray:
    """`FAR` for pairs of tokens that shifting brought together from opposite borders, else 0: (windows, n, n)."""
    regions = [
        np.searchsorted([length - side, length - shift], np.arange(length), side="right") if shift else np.zeros(length)
        for side, shift, length in zip(sides, shifts, padded, strict=True)
    ]
    region = regions[0][:, None] * 3 + regions[1][None]
    region = rearrange(region, "(i p) (j q) -> (i j) (p q)", p=sides[0], q=sides[1])
    return np.where(region[:, :, None] == region[:, None], 0.0, FAR).astype(np.float32)
