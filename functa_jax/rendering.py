"""Latents back to pixels, at any resolution."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import Array

from functa_jax.coords import coordinate_grid
from functa_jax.inner_loop import Apply


def render(apply_fn: Apply, params: Any, latents: Any, shape: Sequence[int], *, limit: float = 1.0) -> Array:
    """Renders a batch of latents on a grid of pixel centres.

    Args:
      apply_fn: (params, coords, latent) -> prediction, for one latent.
      params: its parameters.
      latents: latents with a leading axis B.
      shape: (height, width) of the images to make; any size.
      limit: half the side of the square to render; 1 is the image, above 1 shows what lies around it.

    Returns:
      (B, height, width, C), not clipped to the range of the images.

    Example:
      >>> import jax.numpy as jnp
      >>> ramp = lambda params, coords, latent: latent * coords[..., :1]
      >>> render(ramp, None, jnp.ones(3), (4, 4)).shape
      (3, 4, 4, 1)
    """
    coords = coordinate_grid(shape, limit=limit)
    # One program, however large the network: called operation by operation it would compile each of them.
    return jax.jit(jax.vmap(apply_fn, in_axes=(None, None, 0)))(params, coords, latents)
