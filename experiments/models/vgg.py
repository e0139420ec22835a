"""VGG-A and VGG-19 for images of 32x32, with and without batch normalisation.

Reference: Simonyan and Zisserman 2015, arXiv:1409.1556, configurations A and E; report B, Appendix 3.1.
"""

from typing import Any

import flax.linen as nn
from jax import Array

from experiments.models.conv import Conv, Method, max_pool

CONFIGURATIONS = {
    "A": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    "E": ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}
"""Channels of the convolutions between the poolings: A has 8 convolutions (VGG-A, or VGG-11), E has 16 (VGG-19)."""


class VGG(nn.Module):
    """Layers `conv1`, `conv2`, ... (each with its `norm1`, ... if normalised), then `fc1`, `fc2`, `fc3`.

    Attributes:
      configuration: channels of the convolutions, one tuple between two poolings, as in `CONFIGURATIONS`.
      classes: number of logits.
      norm: batch normalisation after each convolution.
      hidden: units of the dense layers before the last; report B's classifier has two (its `classifier.0` and `.3`).
      dropout: rate after each of them, in training.
      method: how convolutions are computed, see `convolve`.
    """

    configuration: tuple[tuple[int, ...], ...]
    classes: int = 10
    norm: bool = True
    hidden: tuple[int, ...] = (512, 512)
    dropout: float = 0.0
    method: Method = "auto"

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """(B, H, W, C) -> (B, classes); a side is halved, rounding down, once for each tuple of the configuration."""
        number = 0
        for block in self.configuration:
            for features in block:
                number += 1
                x = Conv(features, method=self.method, name=f"conv{number}")(x)
                if self.norm:
                    x = nn.BatchNorm(not train, momentum=0.9, name=f"norm{number}")(x)
                x = nn.relu(x)
            x = max_pool(x)
        x = x.reshape(len(x), -1)
        for number, units in enumerate(self.hidden, start=1):
            x = nn.relu(nn.Dense(units, kernel_init=nn.initializers.he_normal(), name=f"fc{number}")(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, name=f"fc{len(self.hidden) + 1}")(x)


def vgg_a(width: float = 1.0, **options: Any) -> VGG:
    """VGG-A; `width` is a share of all channels and hidden units, options are `VGG`'s attributes."""
    return _scaled("A", width, options)


def vgg19(width: float = 1.0, **options: Any) -> VGG:
    """VGG-19, as `vgg_a`."""
    return _scaled("E", width, options)


def scale(numbers: tuple[int, ...], width: float) -> tuple[int, ...]:
    """The same share of each number, at least 1."""
    return tuple(max(1, round(width * number)) for number in numbers)


def _scaled(name: str, width: float, options: dict[str, Any]) -> VGG:
    configuration = tuple(scale(block, width) for block in CONFIGURATIONS[name])
    return VGG(configuration, **{"hidden": scale(VGG.hidden, width), **options})
