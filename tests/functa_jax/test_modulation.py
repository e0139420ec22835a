"""The modulated SIREN against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functa_reference import check_batch_gradients, directional, modulated_siren, random_params

from functa_jax import ModulatedSiren

W0S = (12.0, 8.0)
SMALL = {"width": 12, "depth": 3, "out_features": 2, "w0": W0S, "offset": 0.25}


def inputs(batch=3, points=7, size=5, seed=0):
    rng = np.random.default_rng(seed)
    coords = rng.uniform(-1, 1, (points, 2)).astype(np.float32)
    own_coords = rng.uniform(-1, 1, (batch, points, 2)).astype(np.float32)
    return coords, own_coords, rng.normal(size=(batch, size)).astype(np.float32)


@pytest.mark.parametrize(("modulate", "hidden"), [("shift", ()), ("scale", ()), ("both", ()), ("both", (6, 4))])
def test_agrees_with_numpy_for_one_image_and_for_batches(modulate, hidden):
    model = ModulatedSiren(**SMALL, modulate=modulate, hidden=hidden)
    coords, own_coords, latents = inputs()
    params = random_params(model, coords, latents[0])
    kinds = 2 if modulate == "both" else 1
    last = params["latent_to_modulation"]["modulations"]["kernel"]
    assert last.shape == (hidden[-1] if hidden else 5, kinds * 2 * 12)

    @jax.jit
    def all_forms(params):
        def apply(coords, latent):
            return model.apply({"params": params}, coords, latent)

        image = coords[:6].reshape(2, 3, 2)
        return (
            apply(coords, latents),
            apply(own_coords, latents),
            apply(image, latents[0]),
            apply(coords[0], latents[0]),
        )

    shared, own, image, pixel = all_forms(params)
    assert image.shape == (2, 3, 2)
    assert pixel.shape == (2,)
    for b, z in enumerate(latents):
        expected = modulated_siren(params, coords, z, W0S, 0.25, modulate)
        np.testing.assert_allclose(shared[b], expected, atol=2e-5)
        np.testing.assert_allclose(own[b], modulated_siren(params, own_coords[b], z, W0S, 0.25, modulate), atol=2e-5)
        if b == 0:
            np.testing.assert_allclose(image.reshape(6, 2), expected[:6], atol=2e-5)
            np.testing.assert_allclose(pixel, expected[0], atol=2e-5)
        assert np.abs(expected - modulated_siren(params, coords, 0 * z, W0S, 0.25, modulate)).max() > 0.01


@pytest.mark.parametrize("points", ["shared", "own"])
def test_gradients_of_a_batch_are_those_of_single_images(points):
    model = ModulatedSiren(**SMALL, modulate="both")
    shared, own, latents = inputs()
    params = random_params(model, shared, latents[0])
    check_batch_gradients(model, params, shared if points == "shared" else own, latents)


def test_gradient_in_latents_and_parameters_against_finite_differences():
    model = ModulatedSiren(**SMALL, modulate="both")
    coords, _, latents = inputs(batch=1)
    params = random_params(model, coords, latents[0])

    def loss(params, z):
        return jnp.mean(jnp.square(model.apply({"params": params}, coords, z)))

    def reference(params, z):
        return np.mean(np.square(modulated_siren(params, coords, z, W0S, 0.25, "both")))

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, latents[0])
    double = jax.tree.map(lambda p: p.astype(np.float64), (params, latents[0]))
    rng = np.random.default_rng(1)
    for _ in range(5):  # along random directions of all arguments at once
        direction = jax.tree.map(lambda p: rng.normal(size=p.shape), double)
        expected = directional(lambda arguments: reference(*arguments), double, direction)
        terms = [np.vdot(g, d) for g, d in zip(jax.tree.leaves(gradients), jax.tree.leaves(direction), strict=True)]
        assert sum(terms) == pytest.approx(expected, abs=1e-3 * np.linalg.norm(terms))


def test_bfloat16_matmuls_stay_close_in_float32():
    coords, _, latents = inputs(points=100)
    models = [ModulatedSiren(**SMALL, compute_dtype=dtype) for dtype in (None, jnp.bfloat16)]
    params = random_params(models[1], coords, latents[0])  # asserts that parameters are float32
    full, narrow = (jax.jit(model.apply)({"params": params}, coords, latents) for model in models)
    assert narrow.dtype == jnp.float32
    assert 1e-5 < np.abs(full - narrow).max() < 0.3 * np.std(full)


def test_a_zero_latent_starts_from_the_unmodulated_network():
    """At initialisation: the latent map has no bias, scale starts at 1, so every image starts alike."""
    model = ModulatedSiren(**SMALL, modulate="both")
    coords, _, latents = inputs()
    params = jax.jit(model.init)(jax.random.key(0), coords, latents[0])["params"]
    assert not np.any(params["latent_to_modulation"]["modulations"]["bias"])
    y = jax.jit(model.apply)({"params": params}, coords, 0 * latents)
    without = {**params, "latent_to_modulation": jax.tree.map(jnp.zeros_like, params["latent_to_modulation"])}
    np.testing.assert_allclose(y[0], modulated_siren(without, coords, latents[0], W0S, 0.25, "both"), atol=2e-5)
    np.testing.assert_array_equal(y[0], y[1])


@pytest.mark.parametrize(
    ("coords", "latent", "arguments", "message"),
    [
        ((4, 4, 2), (3, 5), {}, r"coords \(4, 4, 2\) do not go with latent \(3, 5\): use latent \(L,\) with"),
        ((4, 2), (3, 5, 1), {}, r"coords \(4, 2\) do not go with latent \(3, 5, 1\)"),
        ((4, 2), (), {}, r"coords \(4, 2\) do not go with latent \(\)"),
        ((4, 2), (5,), {"modulate": "shfit"}, "modulate must be 'shift', 'scale' or 'both', got 'shfit'"),
        ((4, 2), (5,), {"depth": 1, "w0": 30.0}, "depth must be at least 2 .* got 1"),
        ((4, 2), (5,), {"w0": (30.0,)}, r"w0 must be one number or 2 .* got 1: \(30.0,\)"),
    ],
)
def test_errors_name_argument_value_and_remedy(coords, latent, arguments, message):
    model = ModulatedSiren(**SMALL | arguments)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(coords), jnp.zeros(latent))


def test_modulation_scale_scales_the_initial_map_alone():
    coords, _, latents = inputs()
    plain, small = (
        jax.jit(ModulatedSiren(**SMALL, modulation_scale=scale).init)(jax.random.key(0), coords, latents[0])["params"]
        for scale in (1.0, 0.25)
    )
    kernel = plain["latent_to_modulation"]["modulations"]["kernel"]
    assert np.std(kernel) == pytest.approx(5**-0.5, rel=0.2)  # LeCun: variance 1 / inputs
    plain["latent_to_modulation"]["modulations"]["kernel"] = 0.25 * kernel
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), small, plain)
