"""Residual networks for images of 32x32: ResNet-20 and -56 as made for CIFAR, and ResNet-50 with a CIFAR stem.

Reference: He et al. 2016, arXiv:1512.03385, sections 3.3 and 4.2.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from experiments.models.conv import Conv, Method, mean_pool


class ResNet(nn.Module):
    """A 3x3 convolution, stages of residual blocks, the mean over the pixels, `fc`.

    Attributes:
      blocks: number of blocks in each stage; every stage but the first halves the image.
      features: channels of `conv1` and of the first stage; doubled in each further one.
      bottleneck: blocks of 1x1, 3x3 and 1x1 convolutions, the last four times as wide, instead of two 3x3 ones.
      projection: 1x1 convolutions where a shortcut changes shape; else it is subsampled and padded with zero channels.
      classes: number of logits.
      widths: for each block of each stage, the channels of its convolutions, as a pruned network has them (the last one
        of a block has those of its stage); None as `features` says.
      last_scale: where the scale of each block's last normalisation starts. At zero (Goyal et al. 2017,
        arXiv:1706.02677, section 5.1) a block starts as its shortcut. That needs `projection`: where the shortcut is
        padded, a zero scale leaves channels at zero, where ReLU passes no gradient, for ever.
      method: how convolutions are computed, see `convolve`.
    """

    blocks: tuple[int, ...]
    features: int
    bottleneck: bool = False
    projection: bool = False
    widths: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    classes: int = 10
    last_scale: float = 1.0
    method: Method = "auto"

    @property
    def block_widths(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """For each block of each stage, the channels of its convolutions.

        Raises:
          ValueError: `widths` are not those of `blocks`.
        """
        if self.widths is None:
            relative = (1, 1, 4) if self.bottleneck else (1, 1)
            stages = [tuple(self.features * 2**stage * r for r in relative) for stage in range(len(self.blocks))]
            return tuple((widths,) * count for widths, count in zip(stages, self.blocks, strict=True))
        layers = 3 if self.bottleneck else 2
        if tuple(map(len, self.widths)) != self.blocks or any(len(b) != layers for stage in self.widths for b in stage):
            raise ValueError(f"widths must name {layers} for each of blocks={self.blocks}, got {self.widths}")
        return self.widths

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """(B, H, W, C) -> (B, classes).

        Raises:
          ValueError: `widths` are not those of `blocks`, or `last_scale` is zero without `projection`.
        """
        if self.last_scale == 0 and not self.projection:
            raise ValueError("last_scale=0 needs projection=True: padded channels would stay zero for ever")
        conv = partial(Conv, use_bias=False, method=self.method)
        norm = partial(nn.BatchNorm, not train, momentum=0.9)
        x = nn.relu(norm(name="norm1")(conv(self.features, name="conv1")(x)))
        for stage, blocks in enumerate(self.block_widths):
            for block, widths in enumerate(blocks):
                x = Block(
                    widths,
                    2 if stage > 0 and block == 0 else 1,
                    block == 0 and (stage > 0 or self.bottleneck),
                    self.projection,
                    self.last_scale,
                    conv,
                    norm,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(x)
        return nn.Dense(self.classes, name="fc")(mean_pool(x))


class Block(nn.Module):
    """One residual block: two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1 ones.

    Attributes:
      widths: channels of its convolutions.
      stride: of the first 3x3 convolution.
      reshapes: whether the shortcut changes shape. Widths do not say it: a pruned block may take and give equally many
        channels that are not the same.
      projection: see `ResNet`, like
      last_scale.
      conv: makes a convolution without bias.
      norm: makes a batch normalisation.
    """

    widths: tuple[int, ...]
    stride: int
    reshapes: bool
    projection: bool
    last_scale: float
    conv: Callable[..., Any]
    norm: Callable[..., Any]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, C')."""
        strides = (self.stride, self.stride)
        layers = [(1, (1, 1)), (3, strides), (1, (1, 1))] if len(self.widths) == 3 else [(3, strides), (3, (1, 1))]
        y = x
        for number, (width, (size, step)) in enumerate(zip(self.widths, layers, strict=True), start=1):
            y = self.conv(width, (size, size), step, name=f"conv{number}")(y)
            if number < len(layers):
                y = nn.relu(self.norm(name=f"norm{number}")(y))
        y = self.norm(name=f"norm{len(layers)}", scale_init=nn.initializers.constant(self.last_scale))(y)
        return nn.relu(y + self._shortcut(x))

    def _shortcut(self, x: Array) -> Array:
        if not self.reshapes:
            return x
        strides, width = (self.stride, self.stride), self.widths[-1]
        if self.projection:
            return self.norm(name="norm_shortcut")(self.conv(width, (1, 1), strides, name="conv_shortcut")(x))
        x = x[:, :: self.stride, :: self.stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1])))


def resnet20(**options: Any) -> ResNet:
    """ResNet-20 for CIFAR; options are `ResNet`'s attributes."""
    return ResNet((3, 3, 3), 16, **options)


def resnet56(**options: Any) -> ResNet:
    """ResNet-56 for CIFAR; options are `ResNet`'s attributes."""
    return ResNet((9, 9, 9), 16, **options)


def resnet50(**options: Any) -> ResNet:
    """ResNet-50 with a 3x3 stem and no first pooling; options are `ResNet`'s attributes."""
    return ResNet((3, 4, 6, 3), 64, bottleneck=True, projection=True, **{"last_scale": 0.0, **options})
