"""A shared SIREN modulated by a grid of latents: each part of the image has its own.

Reference: Bauer et al., "Spatial Functa: Scaling Functa to ImageNet Classification and Generation", 2023,
arXiv:2302.03130, section 3.1.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from functa_jax.modulation import LatentToModulation, Modulate, as_batch, modulated_sines
from functa_jax.siren import Dense, frequencies

Interpolation = Literal["nearest", "bilinear"]
Coordinates = Literal["image", "cell"]


class SpatialModulatedSiren(nn.Module):
    """SIREN modulated by a latent grid (h, w, c), whose cells divide [-1, 1] x [-1, 1] evenly.

    A convolution makes the modulations of each cell from the latents there (kernel size 1) or from those of its
    neighbours too (3). They are interpolated at the points, and the layers are those of `ModulatedSiren`:
    a = h W_l + b_l; a = scale_l(x) * a + shift_l(x); h = sin(w0 a).

    Attributes:
      width: units in each hidden layer.
      depth: number of linear layers, the output layer included (depth - 1 sines).
      out_features: channels of the signal.
      w0: frequency factor, one number or one a sine layer.
      modulate: which modulations the latents give: "shift", "scale" or "both".
      hidden: hidden widths of the map from a latent to the modulations, an MLP in each cell; () is a linear map.
      modulation_scale: factor on the initialisation of the map to the modulations.
      interpolation: "nearest" (the paper): a point has the modulations of its cell; "bilinear": between those of the
        four nearest centres of cells. Points outside the square have those of the border.
      kernel_size: 1 or 3, of the convolution; beyond the border latents count as 0.
      coordinates: what the network reads: "image", a point's position in the image, or "cell", that in its cell,
        [-1, 1] across each, so that all cells are drawn by one function and a latent means the same everywhere.
      offset: constant added to the output (0.5 centres images in [0, 1]).
      compute_dtype: dtype of the big matmuls (e.g. jnp.bfloat16); None keeps float32.

    Example:
      >>> model = SpatialModulatedSiren(width=32, depth=3, out_features=1)
      >>> coords, latent = jnp.zeros((28, 28, 2)), jnp.zeros((7, 7, 4))
      >>> variables = jax.jit(model.init)(jax.random.key(0), coords, latent)
      >>> jax.jit(model.apply)(variables, coords, latent).shape
      (28, 28, 1)
      >>> jax.jit(model.apply)(variables, coords.reshape(-1, 2), jnp.zeros((5, 7, 7, 4))).shape  # five images at once
      (5, 784, 1)

    Reference: Bauer et al. 2023, arXiv:2302.03130, section 3.1.
    """

    width: int = 256
    depth: int = 6
    out_features: int = 3
    w0: float | Sequence[float] = 10.0
    modulate: Modulate = "shift"
    hidden: Sequence[int] = ()
    modulation_scale: float = 1.0
    interpolation: Interpolation = "nearest"
    kernel_size: int = 1
    coordinates: Coordinates = "image"
    offset: float = 0.5
    compute_dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, coords: Array, latent: Array) -> Array:
        """Evaluates one image at any coordinates, or a batch of images at flat lists of points.

        Args:
          coords: (..., 2), (row, column) in [-1, 1], for one latent; (N, 2), shared, or (B, N, 2), each image its own,
            for a batch.
          latent: (h, w, c) for one image, (B, h, w, c) for a batch.

        Returns:
          (..., out_features) for one latent, (B, N, out_features) for a batch.

        Raises:
          ValueError: a batch of latents with coordinates of another shape than those; an unknown option.
        """
        if self.interpolation not in ("nearest", "bilinear"):
            raise ValueError(f"interpolation must be 'nearest' or 'bilinear', got {self.interpolation!r}")
        if self.coordinates not in ("image", "cell"):
            raise ValueError(f"coordinates must be 'image' or 'cell', got {self.coordinates!r}")
        if self.kernel_size not in (1, 3):
            raise ValueError(f"kernel_size must be 1 or 3, got {self.kernel_size}")
        points, latents = as_batch(coords, latent, ("h", "w", "c"))
        if points.shape[-1] != 2:
            raise ValueError(f"coords must be (..., 2), as a latent grid has two dimensions, got {coords.shape}")
        w0s = frequencies(self.w0, self.depth)
        to_modulation = LatentToModulation(
            self.width, self.depth - 1, self.modulate, self.hidden, self.modulation_scale, name="latent_to_modulation"
        )
        scale, shift = to_modulation(latents if self.kernel_size == 1 else neighbours(latents))
        interpolate = _nearest if self.interpolation == "nearest" else _bilinear
        at_points = interpolate(points, latents.shape[1:3])
        if self.coordinates == "cell":
            cells = _cells(points, latents.shape[1:3])
            points = (points + 1) * _sizes(points, latents.shape[1:3]) - 2 * cells - 1
        h = modulated_sines(points, w0s, self.width, scale, shift, at_points, self.compute_dtype)
        y = Dense(self.out_features, w0s[-1], compute_dtype=self.compute_dtype, name="output")(h) + self.offset
        return y.reshape(*coords.shape[:-1], self.out_features) if latent.ndim == 3 else y


def neighbours(latents: Array) -> Array:
    """Latents of each cell and its eight neighbours side by side, (B, h, w, 9 c): a map of these is a convolution."""
    _, height, width, _ = latents.shape
    padded = jnp.pad(latents, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=-1)


def _sizes(points: Array, shape: tuple[int, ...]) -> Array:
    return jnp.asarray(shape, points.dtype).reshape((1,) * (points.ndim - 1) + (2,))


def _cells(points: Array, shape: tuple[int, ...]) -> Array:
    """Row and column of the cell of each point, of the nearest one for points outside; whole numbers as floats."""
    sizes = _sizes(points, shape)
    return jnp.clip(jnp.floor((points + 1) * (sizes / 2)), 0, sizes - 1)


def _nearest(points: Array, shape: tuple[int, ...]) -> Callable[[Array], Array]:
    """Takes values (B, h, w, C) of the cells to those of the points (1 or B, N, 2) in them, (B, N, C)."""
    row, column = jnp.moveaxis(_cells(points, shape).astype(jnp.int32), -1, 0)
    index = row * shape[1] + column

    def at_points(values: Array) -> Array:
        flat = values.reshape(values.shape[0], -1, values.shape[-1])
        if index.shape[0] == 1:
            return flat.at[:, index[0]].get(mode="clip")
        return jax.vmap(lambda one, i: one.at[i].get(mode="clip"))(flat, index)

    return at_points


def _bilinear(points: Array, shape: tuple[int, ...]) -> Callable[[Array], Array]:
    """As `_nearest`, but between the centres of cells.

    As one matrix (N, h w) for each image: of the grids in use it is small, and its transpose, which the gradients need,
    is again a product where that of four gathers would be four scatters.
    """

    def weights(x: Array, n: int) -> Array:  # a hat of height 1 over each centre
        position = jnp.clip((x + 1) * (n / 2) - 0.5, 0, n - 1)
        distance = position[..., None] - jnp.arange(n, dtype=x.dtype).reshape((1,) * x.ndim + (n,))
        return jnp.maximum(0, 1 - jnp.abs(distance))

    row, column = weights(points[..., 0], shape[0]), weights(points[..., 1], shape[1])
    matrix = (row[..., :, None] * column[..., None, :]).reshape(*points.shape[:2], -1)

    def at_points(values: Array) -> Array:
        flat = values.reshape(values.shape[0], -1, values.shape[-1])
        return jnp.matmul(jnp.broadcast_to(matrix, (flat.shape[0], *matrix.shape[1:])), flat)

    return at_points
