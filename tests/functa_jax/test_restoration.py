"""Restoration from poor observations: against closed forms of linear networks, and against its parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from functa_jax import (
    ModulatedSiren,
    continued_rates,
    coordinate_grid,
    denoise,
    fit_latents,
    inpaint,
    pixel_average,
    render,
    super_resolve,
)


def quadratic(params, coords, latent):
    """Signal latent . (1, y, x, y^2, x y) times params; for one latent (5,) or a batch (B, 5) with points (N, 2)."""
    y, x = coords[..., 0], coords[..., 1]
    basis = jnp.stack([jnp.ones_like(y), y, x, y**2, x * y], axis=-1)
    return (
        params * (basis @ latent)[..., None]
        if latent.ndim == 1
        else params * jnp.einsum("nk,bk->bn", basis, latent)[..., None]
    )


@pytest.mark.parametrize("samples", [2, 3])
def test_the_average_over_a_pixel_is_that_of_the_finer_image(samples):
    latent = jnp.array([0.3, -1.0, 2.0, 0.7, 1.3])
    fine = np.asarray(quadratic(2.0, coordinate_grid((4 * samples, 3 * samples)), latent))
    blocks = fine.reshape(4, samples, 3, samples, 1).mean(axis=(1, 3))
    seen = pixel_average(quadratic, (4, 3), samples)
    np.testing.assert_allclose(seen(2.0, coordinate_grid((4, 3)), latent), blocks, atol=1e-6)
    batch = seen(2.0, coordinate_grid((4, 3)).reshape(-1, 2), jnp.stack([latent, -latent]))
    np.testing.assert_allclose(batch, np.stack([blocks, -blocks]).reshape(2, 12, 1), atol=1e-6)


def test_one_sample_is_the_network_itself():
    assert pixel_average(quadratic, (4, 3), 1) is quadratic
    with pytest.raises(ValueError, match="samples must be at least 1 point per dimension, got 0"):
        pixel_average(quadratic, (4, 3), 0)


@pytest.mark.parametrize("batched", [False, True])
def test_super_resolution_recovers_a_signal_from_its_block_means(batched):
    truth = jax.random.normal(jax.random.key(0), (3, 5))
    fine = render(quadratic, 1.0, truth, (8, 8))
    small = fine.reshape(3, 4, 2, 4, 2, 1).mean(axis=(2, 4))
    found = super_resolve(
        quadratic, 1.0, small, jnp.zeros(5), (8, 8), steps=400, learning_rate=0.6, samples=2, batched=batched
    )
    np.testing.assert_allclose(found, fine, atol=1e-3)
    # Taking block means for values at the centres is another problem, with another answer.
    wrong = super_resolve(quadratic, 1.0, small, jnp.zeros(5), (8, 8), steps=400, learning_rate=0.6, batched=batched)
    assert float(jnp.abs(wrong - fine).max()) > 5e-3


def test_denoising_projects_on_what_the_network_can_say():
    rng = np.random.default_rng(0)
    noisy = rng.normal(size=(2, 6, 6, 1)).astype(np.float32)
    found = denoise(quadratic, 1.0, jnp.asarray(noisy), jnp.zeros(5), steps=500, learning_rate=0.6, batched=True)
    basis = np.stack([np.asarray(quadratic(1.0, coordinate_grid((6, 6)), unit)).ravel() for unit in jnp.eye(5)], 1)
    for image, fitted in zip(noisy, found, strict=True):
        weights, *_ = np.linalg.lstsq(basis.astype(np.float64), image.ravel().astype(np.float64))
        np.testing.assert_allclose(np.ravel(fitted), basis @ weights, atol=2e-3)


def test_a_penalty_shrinks_the_latent():
    noisy = jnp.ones((1, 4, 4, 1))
    flat = lambda params, coords, latent: latent + 0 * coords[..., :1]  # noqa: E731
    found = denoise(flat, None, noisy, jnp.zeros(()), steps=100, learning_rate=0.2, latent_penalty=0.5)
    np.testing.assert_allclose(found, 1 / 1.5, rtol=1e-5)  # the minimum of (z - 1)^2 + z^2 / 2


def test_inpainting_reads_the_known_pixels_only_and_keeps_them():
    truth = jax.random.normal(jax.random.key(1), (2, 5))
    whole = render(quadratic, 1.0, truth, (5, 6))
    rng = np.random.default_rng(2)
    known = np.stack([rng.choice(30, 18, replace=False) for _ in range(2)])
    flat = np.full((2, 30, 1), np.nan, np.float32)
    for b in range(2):
        flat[b, known[b]] = np.asarray(whole).reshape(2, 30, 1)[b, known[b]]
    found = inpaint(
        quadratic,
        1.0,
        jnp.asarray(flat).reshape(2, 5, 6, 1),
        jnp.asarray(known),
        jnp.zeros(5),
        steps=800,
        learning_rate=0.5,
    )
    np.testing.assert_allclose(found, whole, atol=5e-3)
    for b in range(2):
        np.testing.assert_array_equal(np.asarray(found)[b].reshape(30, 1)[known[b]], flat[b, known[b]])


@pytest.mark.slow
def test_a_network_is_fitted_as_fit_latents_does():
    model = ModulatedSiren(width=16, depth=3, out_features=3, w0=5.0)
    coords, latent = coordinate_grid((6, 6)), jnp.zeros(4)
    variables = jax.jit(model.init)(jax.random.key(0), coords, latent)
    images = jax.random.uniform(jax.random.key(1), (2, 6, 6, 3))
    options = {"steps": 3, "learning_rate": 0.5, "latent_penalty": 0.01}

    @jax.jit
    def by_hand(variables):
        latents, _ = fit_latents(model.apply, variables, coords, images, latent, **options)
        return render(model.apply, variables, latents, (9, 9))

    expected = by_hand(variables)
    found = super_resolve(model.apply, variables, images, latent, (9, 9), batched=True, **options)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_continued_rates():
    rates = {"a": jnp.array([[3.0, 1.0], [2.0, 4.0]]), "b": jnp.array([1.0, 2.0])}
    more = continued_rates(rates, 4, tail=0.5)
    np.testing.assert_array_equal(more["a"], [[3, 1], [2, 4], [1, 0.5], [1, 0.5]])
    np.testing.assert_array_equal(more["b"], [1, 2, 0.5, 0.5])
    np.testing.assert_array_equal(continued_rates(rates, 1)["a"], [[3, 1]])
    assert continued_rates(rates, 0)["b"].shape == (0,)
