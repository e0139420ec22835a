"""Peak signal-to-noise ratio."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def psnr(prediction: Array, target: Array, *, data_range: float = 1.0) -> Array:
    """Peak signal-to-noise ratio of each image: 10 log10(data_range^2 / mean squared error), in dB.

    Average it for the mean of per-image PSNR; the other figure in use, the PSNR of the mean error, is
    `psnr_from_mse(jnp.mean(mse))`, and is the lower of the two (Jensen).

    Args:
      prediction: (..., H, W, C), or (N, C) for a list of points.
      target: the same shape.
      data_range: largest possible value minus smallest, 1 for images in [0, 1].

    Returns:
      (...,), dB; infinite for equal images.

    Raises:
      ValueError: different shapes.

    Example:
      >>> round(float(psnr(jnp.full((4, 4, 1), 0.6), jnp.full((4, 4, 1), 0.5))), 3)
      20.0
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {prediction.shape} and target {target.shape} must have the same shape")
    axes = tuple(range(-min(3, prediction.ndim), 0))
    error = 1.0 * prediction - target  # 1.0: the difference of two bytes would wrap around
    return psnr_from_mse(jnp.mean(jnp.square(error), axis=axes), data_range=data_range)


def psnr_from_mse(mse: ArrayLike, *, data_range: float = 1.0) -> Array:
    """10 log10(data_range^2 / mse), in dB.

    Args:
      mse: mean squared errors, any shape.
      data_range: largest possible value minus smallest.

    Returns:
      the same shape, dB.

    Example:
      >>> float(psnr_from_mse(jnp.float32(0.01)))
      20.0
    """
    return 10 * jnp.log10(data_range**2 / jnp.asarray(mse))
