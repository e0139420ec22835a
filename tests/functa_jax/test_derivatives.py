"""Derivatives in the coordinates: against closed forms and against finite differences in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functa_reference import random_params, siren

from functa_jax import ModulatedSiren, Siren, coordinate_grid, derivatives


def wave(params, coords, latent):
    """Two channels of known derivatives: sin(a y) cos(b x) and latent x^2 y."""
    y, x = coords[..., 0], coords[..., 1]
    a, b = params
    return jnp.stack([jnp.sin(a * y) * jnp.cos(b * x), latent * x**2 * y], axis=-1)


@pytest.mark.parametrize("chunk", [1, 7, 35, 1000])
def test_closed_forms_at_every_pixel_whatever_the_chunk(chunk):
    a, b, z = 3.0, 2.0, 0.5
    coords = coordinate_grid((5, 7))
    found = derivatives(wave, (a, b), coords, z, chunk=chunk)
    y, x = np.asarray(coords[..., 0], np.float64), np.asarray(coords[..., 1], np.float64)
    assert [part.shape for part in found] == [(5, 7, 2), (5, 7, 2, 2), (5, 7, 2)]
    expected = (
        [np.sin(a * y) * np.cos(b * x), z * x**2 * y],
        [
            [a * np.cos(a * y) * np.cos(b * x), -b * np.sin(a * y) * np.sin(b * x)],
            [z * x**2, 2 * z * x * y],
        ],
        [-(a**2 + b**2) * np.sin(a * y) * np.cos(b * x), 2 * z * y],
    )
    np.testing.assert_allclose(found.value, np.stack(expected[0], -1), atol=1e-6)
    gradient = np.stack([np.stack(channel, -1) for channel in expected[1]], -2)
    np.testing.assert_allclose(found.gradient, gradient, atol=3e-6)
    np.testing.assert_allclose(found.laplacian, np.stack(expected[2], -1), atol=1e-5)


def finite_differences(f, points, h):
    """Gradient and Laplacian by central differences of fourth order, in float64."""
    gradient, laplacian = [], 0.0
    for axis in range(points.shape[-1]):
        step = h * np.eye(points.shape[-1])[axis]
        f2, f1, g1, g2 = (f(points + k * step) for k in (-2, -1, 1, 2))
        gradient.append((f2 - 8 * f1 + 8 * g1 - g2) / (12 * h))
        laplacian = laplacian + (-f2 + 16 * f1 - 30 * f(points) + 16 * g1 - g2) / (12 * h**2)
    return np.stack(gradient, -1), laplacian


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_siren_in_float64_against_finite_differences(dimensions):
    points = np.random.default_rng(0).uniform(-1, 1, (20, dimensions))
    model = Siren(width=16, depth=4, out_features=2, w0=8.0)
    params = random_params(model, np.zeros((1, dimensions), np.float32))
    gradient, laplacian = finite_differences(lambda x: siren(params, x, (8.0,) * 3, 0.0), points, 1e-3)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
        found = derivatives(model.apply, {"params": exact}, jnp.asarray(points, jnp.float64), chunk=8)
        assert found.laplacian.dtype == jnp.float64
        np.testing.assert_allclose(found.gradient, gradient, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found.laplacian, laplacian, rtol=1e-5, atol=1e-5)


def test_siren_in_float32_and_at_full_frequency_is_as_exact_as_float32_allows():
    points = np.random.default_rng(1).uniform(-1, 1, (64, 2)).astype(np.float32)
    model = Siren(width=32, depth=4, out_features=1, w0=30.0)
    variables = model.init(jax.random.key(0), points)
    found = derivatives(model.apply, variables, points)
    f = lambda x: siren(variables["params"], x, (30.0,) * 3, 0.0)  # noqa: E731
    gradient, laplacian = finite_differences(f, points.astype(np.float64), 1e-4)
    np.testing.assert_allclose(found.gradient, gradient, atol=1e-4 * np.abs(gradient).max())
    np.testing.assert_allclose(found.laplacian, laplacian, atol=1e-4 * np.abs(laplacian).max())


def test_a_latent_network_gives_the_derivatives_of_its_own_rendering():
    model = ModulatedSiren(width=16, depth=3, out_features=3, w0=5.0)
    latent = jnp.linspace(-1, 1, 4)
    coords = coordinate_grid((6, 6))
    variables = jax.jit(model.init)(jax.random.key(0), coords, latent)
    found = derivatives(model.apply, variables, coords, latent, chunk=10)
    np.testing.assert_allclose(found.value, jax.jit(model.apply)(variables, coords, latent), atol=1e-6)
    by_reverse = jax.jit(jax.vmap(jax.jacrev(lambda x: model.apply(variables, x[None], latent)[0])))(
        coords.reshape(-1, 2)
    )
    np.testing.assert_allclose(found.gradient.reshape(by_reverse.shape), by_reverse, rtol=1e-4, atol=1e-5)


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ValueError, match="chunk must be at least 1 point, got 0"):
        derivatives(wave, (1.0, 1.0), jnp.zeros((2, 2)), 1.0, chunk=0)
