"""Images from poor observations: fit the latent to what was seen, and render what was not."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from functa_jax.coords import coordinate_grid
from functa_jax.inner_loop import Apply, fit_latents
from functa_jax.rendering import render

PyTree = Any


def pixel_average(apply_fn: Apply, shape: Sequence[int], samples: int) -> Apply:
    """The network seen by a sensor: each pixel is the mean of the signal over its area, not the value at its centre.

    A pixel at x of an image of n_1 x ... x n_d pixels on [-1, 1]^d covers x +- 1 / n; the mean is taken over
    `samples`^d points on a regular grid in it. If images were shrunk by averaging blocks of `samples` pixels aside,
    these points are the centres of the pixels before.

    Args:
      apply_fn: (params, coords, latent) -> prediction, each point for itself.
      shape: pixels per dimension of the images that are observed.
      samples: points per dimension in each pixel; 1 is the value at the centre.

    Returns:
      A function like `apply_fn`, of the same arguments and result, batches of latents included.

    Raises:
      ValueError: `samples` below 1.

    Example:
      >>> square = lambda params, coords, latent: coords**2
      >>> float(pixel_average(square, (1,), 2)(None, jnp.array([[0.0]]), None)[0, 0])  # at -1/2 and 1/2
      0.25
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1 point per dimension, got {samples}")
    if samples == 1:
        return apply_fn
    dimensions = len(shape)
    inside = coordinate_grid((samples,) * dimensions).reshape(1, -1, dimensions)
    inside = inside / jnp.array(shape, inside.dtype).reshape(1, 1, dimensions)

    def averaged(params: PyTree, coords: Array, latent: PyTree) -> Array:
        points = coords.reshape(-1, 1, dimensions) + inside
        y = apply_fn(params, points.reshape(-1, dimensions), latent)
        y = y.reshape(*y.shape[:-2], -1, samples**dimensions, y.shape[-1]).mean(axis=-2)
        return y.reshape(*y.shape[:-2], *coords.shape[:-1], y.shape[-1])

    return averaged


def super_resolve(
    apply_fn: Apply,
    params: PyTree,
    images: Array,
    latent_init: PyTree,
    shape: Sequence[int],
    *,
    steps: int,
    learning_rate: PyTree,
    samples: int = 1,
    **options: Any,
) -> Array:
    """Fits latents to small images and renders them large.

    z = argmin mean (average of f(x; z) over each pixel - y)^2, by `steps` gradient steps; then f on the finer grid.

    Args:
      apply_fn: (params, coords, latent) -> prediction.
      params: its parameters.
      images: (B, h, w, C), what was seen.
      latent_init: one latent, where every image starts.
      shape: (height, width) to render.
      steps, learning_rate: as in `fit_latents`.
      samples: points per dimension that a pixel seen is the mean of (see `pixel_average`); 1 is its centre.
      **options: the other options of `fit_latents`.

    Returns:
      (B, height, width, C), not clipped.

    Raises:
      ValueError: as `fit_latents` and `pixel_average`.

    Example:
      >>> ramp = lambda params, coords, latent: latent * coords[..., :1]
      >>> small = jnp.array([-0.5, 0.5]).reshape(1, 2, 1, 1)  # one image, 2 x 1 pixels
      >>> large = super_resolve(ramp, None, small, jnp.zeros(()), (4, 1), steps=30, learning_rate=1.0)
      >>> [round(v, 3) for v in large[0, :, 0, 0].tolist()]
      [-0.75, -0.25, 0.25, 0.75]
    """
    seen = images.shape[1:-1]
    return _restore(
        pixel_average(apply_fn, seen, samples),
        apply_fn,
        params,
        coordinate_grid(seen).reshape(-1, len(seen)),
        images.reshape(images.shape[0], -1, images.shape[-1]),
        latent_init,
        shape,
        steps=steps,
        learning_rate=learning_rate,
        **options,
    )


def denoise(apply_fn: Apply, params: PyTree, images: Array, latent_init: PyTree, **options: Any) -> Array:
    """Fits latents to noisy images and renders them: what the latents cannot express, most of the noise, is left out.

    How much of it comes back is decided by few `steps` (early stopping) and by `latent_penalty`.

    Args:
      apply_fn: (params, coords, latent) -> prediction.
      params: its parameters.
      images: (B, H, W, C), noisy; values outside of the range of images are better not clipped.
      latent_init: one latent, where every image starts.
      **options: as in `super_resolve`.

    Returns:
      (B, H, W, C), not clipped.

    Raises:
      ValueError: as `fit_latents`.

    Example:
      >>> flat = lambda params, coords, latent: latent + 0 * coords[..., :1]
      >>> noisy = jnp.array([0.4, 0.6]).reshape(1, 2, 1, 1)
      >>> [round(v, 3) for v in denoise(flat, None, noisy, jnp.zeros(()), steps=1, learning_rate=0.5).ravel().tolist()]
      [0.5, 0.5]
    """
    return super_resolve(apply_fn, params, images, latent_init, images.shape[1:-1], **options)


def inpaint(
    apply_fn: Apply,
    params: PyTree,
    images: Array,
    known: Array,
    latent_init: PyTree,
    *,
    steps: int,
    learning_rate: PyTree,
    **options: Any,
) -> Array:
    """Fits latents to the known pixels of images, and fills the others with what the latents render there.

    Args:
      apply_fn: (params, coords, latent) -> prediction.
      params: its parameters.
      images: (B, H, W, C); pixels that are not known are not read.
      known: (B, n), int, the flat indices of the known pixels of each image, n the same for all.
      latent_init: one latent, where every image starts.
      steps, learning_rate: as in `fit_latents`.
      **options: the other options of `fit_latents`.

    Returns:
      (B, H, W, C): the known pixels as they were, the others rendered and not clipped.

    Raises:
      ValueError: as `fit_latents`.

    Example:
      >>> ramp = lambda params, coords, latent: latent * coords[..., :1]
      >>> image = jnp.array([-0.75, jnp.nan, jnp.nan, 0.75]).reshape(1, 4, 1, 1)
      >>> filled = inpaint(ramp, None, image, jnp.array([[0, 3]]), jnp.zeros(()), steps=30, learning_rate=0.8)
      >>> [round(v, 3) for v in filled.ravel().tolist()]
      [-0.75, -0.25, 0.25, 0.75]
    """
    batch, *shape, channels = images.shape
    flat = images.reshape(batch, -1, channels)
    values = jnp.take_along_axis(flat, known[..., None], axis=1)
    rendered = _restore(
        apply_fn,
        apply_fn,
        params,
        coordinate_grid(shape).reshape(-1, len(shape))[known],
        values,
        latent_init,
        shape,
        steps=steps,
        learning_rate=learning_rate,
        **options,
    )
    filled = jax.vmap(lambda image, index, value: image.at[index].set(value))(
        rendered.reshape(batch, -1, channels), known, values
    )
    return filled.reshape(images.shape)


def _restore(
    observe: Apply,
    apply_fn: Apply,
    params: PyTree,
    coords: Array,
    targets: Array,
    latent_init: PyTree,
    shape: Sequence[int],
    **options: Any,
) -> Array:
    """Latents by which the observation at `coords` is `targets`, rendered on a grid of `shape`."""
    latents, _ = fit_latents(observe, params, coords, targets, latent_init, **options)
    return render(apply_fn, params, latents, shape)


def continued_rates(rates: PyTree, steps: int, *, tail: float = 1.0) -> PyTree:
    """Learned rates of each step, for fitting with another number of steps.

    Fewer steps take the first ones. More steps go on with `tail` times each dimension's smallest rate: what was
    learned for a few bold steps need not be stable for many.

    Args:
      rates: pytree of (K, ...), rates of K steps.
      steps: number of steps wanted.
      tail: factor on the rates after the first K steps.

    Returns:
      pytree of (steps, ...).

    Example:
      >>> continued_rates(jnp.array([4.0, 1.0, 2.0]), 5, tail=0.5).tolist()
      [4.0, 1.0, 2.0, 0.5, 0.5]
    """

    def continued(rate: Array) -> Array:
        rest = jnp.min(rate, axis=0, keepdims=True) * tail
        more = jnp.broadcast_to(rest, (max(0, steps - rate.shape[0]), *rate.shape[1:]))
        return jnp.concatenate([rate, more])[:steps]

    return jax.tree.map(continued, rates)
