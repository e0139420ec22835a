"""SIRENs modulated by a latent grid: against numpy, cell by cell, at every resolution, single and in batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functa_reference import check_batch_gradients, random_params, siren
from scipy import interpolate, signal

from functa_jax import SpatialModulatedSiren, coordinate_grid, curvature, fit_latents, meta_loss, render, subsample

SMALL = {"width": 12, "depth": 3, "out_features": 2, "w0": (6.0, 4.0), "offset": 0.25}
SHAPE = (3, 4, 2)  # not square: transposed grids would show


def inputs(batch=3, points=40, shape=SHAPE, limit=1.0, seed=0):
    rng = np.random.default_rng(seed)
    coords = rng.uniform(-limit, limit, (points, 2)).astype(np.float32)
    own_coords = rng.uniform(-limit, limit, (batch, points, 2)).astype(np.float32)
    return coords, own_coords, rng.normal(size=(batch, *shape)).astype(np.float32)


def reference(params, coords, latent, model):
    """One image at coords (N, 2), point by point: scipy's convolution, and its interpolation between cell centres."""
    last = params["latent_to_modulation"]["modulations"]
    size, (height, width, channels) = model.kernel_size, latent.shape
    kernel = np.asarray(last["kernel"], np.float64).reshape(size, size, channels, -1)
    grid = np.stack(
        [
            sum(signal.correlate2d(latent[..., c], kernel[:, :, c, o], mode="same") for c in range(channels))
            for o in range(kernel.shape[-1])
        ],
        axis=-1,
    )
    grid = grid + last["bias"]
    centres = [-1 + (2 * np.arange(n) + 1) / n for n in (height, width)]
    method = "linear" if model.interpolation == "bilinear" else "nearest"
    at = interpolate.RegularGridInterpolator(centres, grid, method=method)
    inside = np.stack([np.clip(coords[:, i], centres[i][0], centres[i][-1]) for i in (0, 1)], axis=-1)
    found = []
    if model.coordinates == "cell":
        cell = np.stack([np.abs(coords[:, i, None] - centres[i]).argmin(axis=1) for i in (0, 1)], axis=-1)
        middle = np.stack([centres[i][cell[:, i]] for i in (0, 1)], axis=-1)
        coords = (coords - middle) * latent.shape[:2]
    for x, m in zip(coords, at(inside), strict=True):
        kinds = m.reshape(2 if model.modulate == "both" else 1, model.depth - 1, -1)
        scale = None if model.modulate == "shift" else 1 + kinds[0]
        found.append(siren(params, x, model.w0, model.offset, scale, None if model.modulate == "scale" else kinds[-1]))
    return np.stack(found)


@pytest.mark.parametrize("modulate", ["shift", "scale", "both"])
@pytest.mark.parametrize(
    ("interpolation", "kernel_size", "coordinates"),
    [("nearest", 1, "image"), ("nearest", 3, "cell"), ("bilinear", 3, "image")],
)
def test_agrees_with_numpy_for_one_image_and_for_batches(modulate, interpolation, kernel_size, coordinates):
    options = {"interpolation": interpolation, "kernel_size": kernel_size, "coordinates": coordinates}
    model = SpatialModulatedSiren(**SMALL, modulate=modulate, **options)
    coords, own_coords, latents = inputs(limit=1.3)
    params = random_params(model, coords, latents[0])

    @jax.jit
    def all_forms(params):
        def apply(coords, latent):
            return model.apply({"params": params}, coords, latent)

        return (
            apply(coords, latents),
            apply(own_coords, latents),
            apply(coords.reshape(8, 5, 2), latents[0]),
            apply(coords[0], latents[0]),
        )

    shared, own, image, pixel = all_forms(params)
    assert (image.shape, pixel.shape) == ((8, 5, 2), (2,))
    for b, z in enumerate(latents):
        expected = reference(params, coords, z, model)
        np.testing.assert_allclose(shared[b], expected, atol=2e-5)
        np.testing.assert_allclose(own[b], reference(params, own_coords[b], z, model), atol=2e-5)
        if b == 0:
            np.testing.assert_allclose(image.reshape(-1, 2), expected, atol=2e-5)
            np.testing.assert_allclose(pixel, expected[0], atol=2e-5)
    assert np.std(shared - shared[:1]) > 0.01


@pytest.mark.parametrize("size", [(12, 16), (9, 20), (3, 4)])
def test_under_nearest_a_cell_changes_its_own_pixels_and_no_others(size):
    model = SpatialModulatedSiren(**SMALL)
    coords = coordinate_grid(size)
    latents = jnp.asarray(inputs(batch=1)[2])
    params = {"params": random_params(model, coords, latents[0])}
    draw = jax.jit(model.apply)
    before = draw(params, coords, latents[0])
    rows, columns = np.arange(size[0]) * SHAPE[0] // size[0], np.arange(size[1]) * SHAPE[1] // size[1]
    for row in range(SHAPE[0]):
        for column in range(SHAPE[1]):
            changed = np.any(draw(params, coords, latents[0].at[row, column].add(1.0)) != before, axis=-1)
            np.testing.assert_array_equal(changed, np.outer(rows == row, columns == column))


@pytest.mark.parametrize(("interpolation", "kernel_size", "reach"), [("bilinear", 1, 1.0), ("nearest", 3, 1.5)])
def test_a_cell_reaches_no_further_than_its_neighbourhood(interpolation, kernel_size, reach):
    """Reach: distance from the cell's centre in cells, along both axes."""
    model = SpatialModulatedSiren(**SMALL, interpolation=interpolation, kernel_size=kernel_size)
    coords = coordinate_grid((30, 40))
    latent = jnp.asarray(inputs(batch=1)[2][0])
    params = {"params": random_params(model, coords, latent)}
    draw = jax.jit(model.apply)
    before = draw(params, coords, latent)
    cells = (coords + 1) / 2 * np.array(SHAPE[:2]).reshape(1, 1, 2) - 0.5
    for row, column in [(0, 0), (1, 2), (2, 3)]:
        changed = np.any(draw(params, coords, latent.at[row, column].add(1.0)) != before, axis=-1)
        distance = np.abs(cells - np.array([row, column]).reshape(1, 1, 2)).max(axis=-1)
        border = np.abs(cells - np.array([row, column]).reshape(1, 1, 2))
        assert not changed[distance > reach + 1e-4].any()
        assert changed[(border < reach - 0.05).all(axis=-1)].all()


def test_with_coordinates_of_the_cell_equal_latents_draw_equal_cells():
    model = SpatialModulatedSiren(**SMALL, coordinates="cell")
    coords = coordinate_grid((12, 16))
    latent = jnp.broadcast_to(inputs(batch=1)[2][0][:1, :1], SHAPE)
    params = {"params": random_params(model, coords, latent)}
    cells = jax.jit(model.apply)(params, coords, latent).reshape(3, 4, 4, 4, 2).swapaxes(1, 2).reshape(12, 4, 4, 2)
    assert np.std(cells[0]) > 0.01
    np.testing.assert_allclose(cells, np.broadcast_to(cells[:1], cells.shape), atol=1e-5)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_any_size_renders_the_same_function(interpolation):
    """Pixels that two grids have in common agree, and what lies outside has the border's latents."""
    model = SpatialModulatedSiren(**SMALL, interpolation=interpolation)
    latents = inputs(batch=2)[2]
    variables = {"params": random_params(model, np.zeros((1, 2), np.float32), latents[0])}
    small, large = (render(model.apply, variables, latents, size) for size in ((7, 5), (21, 15)))
    np.testing.assert_allclose(large[:, 1::3, 1::3], small, atol=1e-5)
    assert render(model.apply, variables, latents, (11, 13), limit=1.5).shape == (2, 11, 13, 2)
    outside = jnp.array([[-1.4, 2.0]])
    corner = jnp.broadcast_to(latents[0][:1, -1:], latents[0].shape)
    np.testing.assert_allclose(
        model.apply(variables, outside, latents[0]), model.apply(variables, outside, corner), atol=1e-6
    )


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("points", ["shared", "own"])
def test_gradients_of_a_batch_are_those_of_single_images(points, interpolation):
    model = SpatialModulatedSiren(**SMALL, modulate="both", interpolation=interpolation, kernel_size=3)
    shared, own, latents = inputs()
    params = random_params(model, shared, latents[0])
    check_batch_gradients(model, params, shared if points == "shared" else own, latents)


@pytest.mark.slow
def test_grids_are_fitted_like_vectors():
    """The inner loop, batched or not, lowers the error at rates well below 2 / curvature."""
    model = SpatialModulatedSiren(**SMALL | {"out_features": 1}, modulate="both")
    coords = coordinate_grid((12, 12)).reshape(-1, 2)
    images = jnp.asarray(np.random.default_rng(1).uniform(size=(3, 144, 1)), jnp.float32)
    points, targets = subsample(jax.random.key(2), coords, images, 100)
    zero = jnp.zeros(SHAPE)
    variables = {"params": random_params(model, coords, zero)}
    sharpness = jax.jit(lambda v: curvature(model.apply, v, points, zero, jax.random.key(0)))(variables)
    jacobian = jax.jit(jax.jacobian(lambda z: model.apply(variables, points, z).ravel()))(zero).reshape(100, -1)
    assert sharpness == pytest.approx(2 / 100 * np.linalg.norm(jacobian, 2) ** 2, rel=0.02)
    options = {"steps": 4, "learning_rate": jnp.full(SHAPE, 0.3) / sharpness}

    @jax.jit
    def fitted(variables):
        batched = fit_latents(model.apply, variables, points, targets, zero, batched=True, **options)
        single = fit_latents(model.apply, variables, points, targets, zero, **options)
        return batched, single, meta_loss(model.apply, variables, points, targets, zero, batched=True, **options)

    (latents, losses), (alone, _), outer = fitted(variables)
    assert latents.shape == (3, *SHAPE)
    np.testing.assert_allclose(latents, alone, atol=1e-5)
    assert (np.diff(losses, axis=1) < 0).all()
    assert float(outer) == pytest.approx(float(losses[:, -1].mean()), rel=1e-5)


def test_bfloat16_matmuls_stay_close_in_float32():
    coords, _, latents = inputs(points=100)
    models = [SpatialModulatedSiren(**SMALL, compute_dtype=dtype) for dtype in (None, jnp.bfloat16)]
    params = random_params(models[1], coords, latents[0])  # asserts that parameters are float32
    full, narrow = (jax.jit(model.apply)({"params": params}, coords, latents) for model in models)
    assert narrow.dtype == jnp.float32
    assert 1e-5 < np.abs(full - narrow).max() < 0.3 * np.std(full)


@pytest.mark.parametrize(
    ("coords", "latent", "arguments", "message"),
    [
        (
            (4, 4, 2),
            (3, 2, 2, 5),
            {},
            r"coords \(4, 4, 2\) do not go with latent .* use latent \(h, w, c\) with",
        ),
        ((4, 2), (5,), {}, r"coords \(4, 2\) do not go with latent \(5,\)"),
        ((4, 3), (2, 2, 5), {}, r"coords must be \(..., 2\), .* got \(4, 3\)"),
        ((4, 2), (2, 2, 5), {"interpolation": "cubic"}, "interpolation must be 'nearest' or 'bilinear', got 'cubic'"),
        ((4, 2), (2, 2, 5), {"coordinates": "global"}, "coordinates must be 'image' or 'cell', got 'global'"),
        ((4, 2), (2, 2, 5), {"kernel_size": 2}, "kernel_size must be 1 or 3, got 2"),
        ((4, 2), (2, 2, 5), {"modulate": "shfit"}, "modulate must be 'shift', 'scale' or 'both', got 'shfit'"),
    ],
)
def test_errors_name_argument_value_and_remedy(coords, latent, arguments, message):
    model = SpatialModulatedSiren(**SMALL | arguments)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(coords), jnp.zeros(latent))
