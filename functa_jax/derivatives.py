"""Derivatives of a network in its coordinates: the gradient and the Laplacian of the image that it is."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from functa_jax.inner_loop import Apply


class Derivatives(NamedTuple):
    """Value (..., C), gradient (..., C, d) and Laplacian (..., C) of a signal at points."""

    value: Array
    gradient: Array
    laplacian: Array


def derivatives(apply_fn: Apply, params: Any, coords: Array, *latent: Any, chunk: int = 4096) -> Derivatives:
    """Value, gradient and Laplacian of f(x) = apply_fn(params, x, *latent) at every point, by jvp of jvp.

    For each of the d directions e_i one pass forward over forward gives f, e_i . grad f and the second derivative
    along e_i together; the Laplacian is the sum of the latter. Nothing is differenced: the derivatives are those of
    the network, between the pixels too.

    Args:
      apply_fn: (params, coords) or (params, coords, latent) -> prediction, each point for itself, twice
        differentiable in the coordinates (where it is not, as at the cell borders of a nearest-neighbour grid, jax's
        one-sided answer is returned).
      params: its parameters.
      coords: (..., d), any points.
      *latent: one latent, if the network takes one.
      chunk: points computed at once, which bounds the memory.

    Returns:
      value (..., C); gradient (..., C, d), per unit of coordinate; Laplacian (..., C), per unit of coordinate squared.
      With `coordinate_grid((h, w))`, where a pixel measures 2 / h by 2 / w, multiply by those to get them per pixel.

    Raises:
      ValueError: `chunk` below 1.

    Example:
      >>> wave = lambda params, coords: jnp.sin(params * coords[..., :1]) + coords[..., 1:] ** 2
      >>> found = derivatives(wave, 2.0, jnp.array([[0.0, 3.0]]))  # sin(2 y) + x^2 at y = 0, x = 3
      >>> found.gradient[0, 0].tolist(), found.laplacian[0].tolist()
      ([2.0, 6.0], [2.0])

    Reference: Sitzmann et al. 2020, arXiv:2006.09661, section 3: derivatives of a SIREN are SIRENs.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 point, got {chunk}")
    *shape, dimensions = coords.shape
    points = coords.reshape(-1, dimensions)
    count = len(points)
    chunk = min(chunk, max(count, 1))
    blocks = jnp.pad(points, ((0, -count % chunk), (0, 0)), mode="edge").reshape(-1, chunk, dimensions)

    def along(axis: int, x: Array) -> tuple[Array, Array, Array]:
        direction = jnp.zeros_like(x).at[:, axis].set(1)

        def first(x: Array) -> tuple[Array, Array]:
            return jax.jvp(lambda x: apply_fn(params, x, *latent), (x,), (direction,))

        (value, slope), (_, second) = jax.jvp(first, (x,), (direction,))
        return value, slope, second

    def block(x: Array) -> Derivatives:
        values, slopes, seconds = zip(*(along(axis, x) for axis in range(dimensions)), strict=True)
        return Derivatives(values[0], jnp.stack(slopes, axis=-1), sum(seconds[1:], seconds[0]))

    # One program, however large the network: called operation by operation it would compile each of them.
    found = jax.jit(lambda blocks: lax.map(block, blocks))(blocks)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count].reshape(*shape, *x.shape[2:]), found)
