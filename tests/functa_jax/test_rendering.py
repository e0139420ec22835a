"""Rendering of latents on grids of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functa_reference import modulated_siren, random_params

from functa_jax import ModulatedSiren, render


def polynomial(params, coords, latent):
    y, x = coords[..., 0], coords[..., 1]
    return jnp.stack([latent["a"] * y + x, params * latent["b"] * x], axis=-1)


def test_values_at_the_pixel_centres_of_a_known_function():
    latents = {"a": jnp.array([1.0, 2.0, 3.0]), "b": jnp.array([0.0, 1.0, -1.0])}
    images = render(polynomial, 10.0, latents, (2, 4), limit=2.0)
    assert images.shape == (3, 2, 4, 2)
    y, x = np.array([-1.0, 1.0])[:, None], np.array([-1.5, -0.5, 0.5, 1.5])[None, :]
    for b in range(3):
        a, c = float(latents["a"][b]), float(latents["b"][b])
        np.testing.assert_allclose(images[b, ..., 0], a * y + x, atol=1e-6)
        np.testing.assert_allclose(images[b, ..., 1], 10 * c * x + 0 * y, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 4), (6, 8)])
def test_a_network_at_two_resolutions(shape):
    model = ModulatedSiren(width=12, depth=3, out_features=2, w0=10.0)
    latents = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    params = random_params(model, np.zeros((1, 2), np.float32), latents[0])
    images = jax.jit(lambda p, z: render(model.apply, {"params": p}, z, shape))(params, latents)
    rows, columns = ((2 * np.arange(n) + 1) / n - 1 for n in shape)
    grid = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1)
    for image, latent in zip(images, latents, strict=True):
        np.testing.assert_allclose(image, modulated_siren(params, grid, latent, (10.0, 10.0), 0.5, "shift"), atol=2e-5)


def test_values_are_not_clipped():
    image = render(lambda params, coords, latent: latent + 0 * coords[..., :1], None, jnp.array([7.0]), (2, 2))
    np.testing.assert_array_equal(image, np.full((1, 2, 2, 1), 7.0))
