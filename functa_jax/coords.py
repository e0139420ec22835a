"""Coordinates of pixels, and random subsets of them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array


def coordinate_grid(shape: Sequence[int], *, limit: float = 1.0) -> Array:
    """Coordinates of the pixel centres of an image that covers [-limit, limit] in every dimension.

    Along an axis of n pixels: -limit + (2 i + 1) limit / n, i = 0 ... n - 1. Images of any size cover the same square,
    so that rendering at another resolution needs no more than another grid.

    Args:
      shape: pixels per dimension, (height, width) for an image.
      limit: half the side of the square; above 1 it extends beyond the image that was fitted.

    Returns:
      (*shape, len(shape)), float32.

    Raises:
      ValueError: an empty shape or one with a dimension below 1.

    Example:
      >>> coordinate_grid((2, 2))[:, :, 0].tolist()
      [[-0.5, -0.5], [0.5, 0.5]]
    """
    shape = tuple(shape)
    if not shape or min(shape) < 1:
        raise ValueError(f"shape must name one or more dimensions of at least one pixel, got {shape}")
    axes = [limit * (2 * jnp.arange(n, dtype=jnp.float32) + 1 - n) / n for n in shape]
    return jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1)


def subsample(key: Array, coords: Array, targets: Array, count: int) -> tuple[Array, Array]:
    """The same random `count` points, without repetition, of every image of a batch.

    Args:
      key: typed PRNG key.
      coords: (..., d), shared by the images.
      targets: (B, ..., C).
      count: number of points.

    Returns:
      coords (count, d) and targets (B, count, C).

    Raises:
      ValueError: more points than there are, or coordinates of other pixels than the targets'.

    Example:
      >>> coords, targets = subsample(jax.random.key(0), coordinate_grid((4, 4)), jnp.zeros((2, 4, 4, 1)), 5)
      >>> coords.shape, targets.shape
      ((5, 2), (2, 5, 1))
    """
    if targets.shape[1:-1] != coords.shape[:-1]:
        raise ValueError(
            f"targets {targets.shape} do not go with coords {coords.shape}: targets must be (B, ..., C), "
            "coords (..., d) the same for every image"
        )
    flat = coords.reshape(-1, coords.shape[-1])
    if not 1 <= count <= flat.shape[0]:
        raise ValueError(f"count must be between 1 and the {flat.shape[0]} points there are, got {count}")
    index = jax.random.choice(key, flat.shape[0], (count,), replace=False)
    return flat[index], targets.reshape(targets.shape[0], -1, targets.shape[-1])[:, index]
