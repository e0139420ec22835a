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
      features: channels of the first stage; doubled in each further one.
      bottleneck: blocks of 1x1, 3x3 and 1x1 convolutions, the last four times as wide, instead of two 3x3 ones.
      projection: 1x1 convolutions where a shortcut changes shape; else it is subsampled and padded with zero channels.
      classes: number of logits.
      last_scale: where the scale of each block's last normalisation starts; at zero a block starts as its shortcut, and
        no gradient reaches its convolutions in the first step.
      method: how convolutions are computed, see `convolve`.
    """

    blocks: tuple[int, ...]
    features: int
    bottleneck: bool = False
    projection: bool = False
    classes: int = 10
    last_scale: float = 0.0
    method: Method = "auto"

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """(B, H, W, C) -> (B, classes)."""
        conv = partial(Conv, use_bias=False, method=self.method)
        norm = partial(nn.BatchNorm, not train, momentum=0.9)
        x = nn.relu(norm(name="norm1")(conv(self.features, name="conv1")(x)))
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                x = Block(
                    self.features * 2**stage,
                    2 if stage > 0 and block == 0 else 1,
                    self.bottleneck,
                    self.projection,
                    self.last_scale,
                    conv,
                    norm,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(x)
        return nn.Dense(self.classes, name="fc")(mean_pool(x))


class Block(nn.Module):
    """One residual block.

    Attributes:
      features: channels of the 3x3 convolutions.
      stride: of the first 3x3 convolution.
      bottleneck: see `ResNet`, like `projection`.
      projection: see there, like
      last_scale.
      conv: makes a convolution without bias.
      norm: makes a batch normalisation.
    """

    features: int
    stride: int
    bottleneck: bool
    projection: bool
    last_scale: float
    conv: Callable[..., Any]
    norm: Callable[..., Any]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, C')."""
        strides = (self.stride, self.stride)
        width = self.features * (4 if self.bottleneck else 1)
        layers: list[tuple[int, int, tuple[int, int]]] = (
            [(self.features, 1, (1, 1)), (self.features, 3, strides), (width, 1, (1, 1))]
            if self.bottleneck
            else [(self.features, 3, strides), (width, 3, (1, 1))]
        )
        y = x
        for number, (features, size, step) in enumerate(layers, start=1):
            y = self.conv(features, (size, size), step, name=f"conv{number}")(y)
            if number < len(layers):
                y = nn.relu(self.norm(name=f"norm{number}")(y))
        y = self.norm(name=f"norm{len(layers)}", scale_init=nn.initializers.constant(self.last_scale))(y)
        return nn.relu(y + self._shortcut(x, y))

    def _shortcut(self, x: Array, y: Array) -> Array:
        if x.shape == y.shape:
            return x
        if self.projection:
            strides = (self.stride, self.stride)
            return self.norm(name="norm_shortcut")(self.conv(y.shape[-1], (1, 1), strides, name="conv_shortcut")(x))
        x = x[:, :: self.stride, :: self.stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, y.shape[-1] - x.shape[-1])))


def resnet20(**options: Any) -> ResNet:
    """ResNet-20 for CIFAR; options are `ResNet`'s attributes."""
    return ResNet((3, 3, 3), 16, **options)


def resnet56(**options: Any) -> ResNet:
    """ResNet-56 for CIFAR; options are `ResNet`'s attributes."""
    return ResNet((9, 9, 9), 16, **options)


def resnet50(**options: Any) -> ResNet:
    """ResNet-50 with a 3x3 stem and no first pooling; options are `ResNet`'s attributes."""
    return ResNet((3, 4, 6, 3), 64, bottleneck=True, projection=True, **options)
