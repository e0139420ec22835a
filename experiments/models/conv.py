"""The convolution of all CNNs here: the parameters of `flax.linen.Conv`, computed the fast way on each platform."""

import functools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

Method = Literal["auto", "no-loop", "im2col", "xla"]
Padding = Literal["SAME", "VALID"]


class Conv(nn.Module):
    """Two-dimensional convolution, NHWC with an HWIO kernel; a drop-in for `nn.Conv` with the same parameters.

    Attributes:
      features: output channels.
      kernel_size: height and width.
      strides: along height and width.
      padding: "SAME" or "VALID", as in XLA.
      use_bias: add a bias to each output channel.
      kernel_init: initialiser of the kernel; He's by default, since ReLU follows all convolutions here.
      method: see `convolve`.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: Padding = "SAME"
    use_bias: bool = True
    kernel_init: Any = nn.initializers.he_normal()
    method: Method = "auto"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(B, H, W, C) -> (B, H', W', features)."""
        kernel = self.param("kernel", self.kernel_init, (*self.kernel_size, x.shape[-1], self.features))
        y = convolve(x, kernel, self.strides, self.padding, method=self.method)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros_init(), (self.features,))[None, None, None]
        return y


def convolve(x: Array, kernel: Array, strides: Sequence[int], padding: Padding, *, method: Method = "auto") -> Array:
    """Convolves (B, H, W, C) with an HWIO kernel.

    Args:
      x: images.
      kernel: (kernel height, kernel width, C, features).
      strides: along height and width.
      padding: "SAME" or "VALID".
      method: "xla" is `lax.conv_general_dilated`; "im2col" copies the patches of x into the rows of a matrix, and is
        one matrix product in each direction. "auto" is XLA's, but im2col on a CPU, where XLA's are up to a hundred
        times slower inside of loops (`lax.scan`, `lax.map`). "no-loop" promises that there is no loop, where XLA's
        take half to nine tenths of im2col's time, but for two cases: outputs with a side below 3, whose gradients XLA
        computes tens of times slower, and layers so thin that copying costs less. To count FLOPs take "xla": im2col's
        include products with padding.

    Raises:
      ValueError: unknown method.
    """
    if method not in (methods := get_args(Method)):
        raise ValueError(f"method must be one of {', '.join(methods)}, got {method!r}")
    height, width, channels, features = kernel.shape
    pads = lax.padtype_to_pads(x.shape[1:3], (height, width), strides, padding)
    if jax.default_backend() != "cpu" and method in ("auto", "no-loop"):
        method = "xla"
    if method == "no-loop":
        sides = [
            (side + sum(pad) - size) // stride + 1
            for side, pad, size, stride in zip(x.shape[1:3], pads, (height, width), strides, strict=True)
        ]
        method = "im2col" if min(sides) < 3 or (channels < 8 and features < 32) else "xla"
    if method == "xla":
        return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    if x.shape[1:3] == (height, width):  # the kernel covers the whole image
        return (x.reshape(len(x), -1) @ kernel.reshape(-1, features))[:, None, None]
    columns = (x.shape[2] - width) // strides[1] + 1
    tile = _tile(columns, channels, features)
    if tile == 1:
        rows = _shifts(x, 1, height, strides[0])
        patches = [patch for row in rows for patch in _shifts(row, 2, width, strides[1])]
        return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, features)
    # One row of the matrix for `tile` neighbouring outputs, which share their patch; each has the kernel at its place.
    span = (tile - 1) * strides[1] + width
    places = [((0, 0), (t * strides[1], span - width - t * strides[1]), (0, 0), (0, 0)) for t in range(tile)]
    banded = jnp.stack([jnp.pad(kernel, place) for place in places], axis=3)  # (height, span, channels, tile, features)
    starts = range(0, columns * strides[1], tile * strides[1])
    flat = x.reshape(*x.shape[:2], -1)
    pieces = jnp.stack([flat[:, :, start * channels : (start + span) * channels] for start in starts], axis=2)
    y = jnp.concatenate(_shifts(pieces, 1, height, strides[0]), axis=-1) @ banded.reshape(-1, tile * features)
    return y.reshape(*y.shape[:2], columns, features)


def _tile(columns: int, channels: int, features: int) -> int:
    """How many neighbouring outputs share a row: in thin layers copying costs more than the wasted products."""
    return max(t for t in range(1, 6) if columns % t == 0) if channels <= 16 and features <= 32 else 1


def _shifts(x: Array, axis: int, size: int, stride: int) -> list[Array]:
    """All `size` shifts of x along an axis, each cut to the positions of the window."""
    last = x.shape[axis] - size
    return [lax.slice_in_dim(x, shift, last + shift + 1, stride, axis) for shift in range(size)]


def for_steps(model: nn.Module, steps_per_call: int) -> nn.Module:
    """The CNN with its convolutions computed the fastest way for so many training steps in one compiled call."""
    return model.clone(method="no-loop") if steps_per_call == 1 else model


def max_pool(x: Array, window: int = 2) -> Array:
    """Largest value of each `window` x `window` tile of (B, H, W, C); a remainder at the far edges is dropped.

    Its gradient goes to the first of equals. A choice between entries, two at a time: the gradient of `nn.max_pool` is
    much slower on CPU, and that of `max` divides by the number of entries that equal the maximum, which is none where
    XLA computes them twice and rounds differently.
    """
    tiles = _tiles(x, window)
    entries = [tiles[:, :, row, :, column] for row in range(window) for column in range(window)]
    return functools.reduce(_larger, entries)


def _larger(a: Array, b: Array) -> Array:
    return jnp.where((a >= b) | jnp.isnan(a), a, b)


def mean_pool(x: Array) -> Array:
    """Mean over the pixels: (B, H, W, C) -> (B, C)."""
    return x.mean((1, 2))


def _tiles(x: Array, window: int) -> Array:
    batch, height, width, channels = x.shape
    x = x[:, : height // window * window, : width // window * window]
    return x.reshape(batch, height // window, window, width // window, window, channels)
