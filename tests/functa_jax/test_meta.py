"""The outer step against closed forms: microbatches, rate bounds, scan, donation, several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from functa_reference import tiny_network, tiny_problem
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from functa_jax import MetaParams, MetaState, init_meta, meta_loss, meta_step, relative_adam

STEP = 0.1


def ramp_loss(params, coords, targets):
    """Mean over images and points of (model * rates * x - y)^2, each image with its own x or all with the same."""
    prediction = params.model["slope"] * params.rates * coords
    return jnp.mean(jnp.square((prediction[None] if coords.ndim < targets.ndim else prediction) - targets))


def ramp_problem(own_points=False, batch=8):
    rng = np.random.default_rng(0)
    coords = rng.normal(size=(batch, 6, 1) if own_points else (6, 1)).astype(np.float32)
    return coords, rng.normal(size=(batch, 6, 1)).astype(np.float32)


def ramp_gradient(coords, targets, slope=2.0, rate=0.5):
    """Loss and its derivatives in slope and rate, in float64."""
    x, y = coords.astype(np.float64), targets.astype(np.float64)
    error = slope * rate * x - y
    product = 2 * np.mean(error * x)
    return np.mean(error**2), product * rate, product * slope


def ramp_state(optimizer=None):
    return init_meta({"slope": jnp.float32(2.0)}, jnp.float32(0.5), optimizer or optax.sgd(STEP))


@pytest.mark.parametrize("own_points", [False, True])
@pytest.mark.parametrize("microbatch", [None, 1, 2, 4, 8, 100])
def test_one_step_of_gradient_descent(own_points, microbatch):
    coords, targets = ramp_problem(own_points)
    loss, of_slope, of_rate = ramp_gradient(coords, targets)
    step = jax.jit(meta_step(ramp_loss, optax.sgd(STEP), microbatch=microbatch))
    state, metrics = step(ramp_state(), coords, targets)
    assert isinstance(state, MetaState)
    assert (int(state.step), state.step.dtype) == (1, jnp.int32)
    assert float(state.params.model["slope"]) == pytest.approx(2.0 - STEP * of_slope, rel=1e-5)
    assert float(state.params.rates) == pytest.approx(0.5 - STEP * of_rate, rel=1e-5)
    assert set(metrics) == {"loss", "grad_norm"}
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(np.hypot(of_slope, of_rate), rel=1e-5)


def test_a_microbatch_that_does_not_divide_the_batch_is_an_error():
    step = meta_step(ramp_loss, optax.sgd(STEP), microbatch=3)
    with pytest.raises(ValueError, match="a batch of 8 images is not a multiple of microbatch=3"):
        step(ramp_state(), *ramp_problem())


@pytest.mark.parametrize("microbatch", [0, -2])
def test_an_impossible_microbatch_is_an_error(microbatch):
    with pytest.raises(ValueError, match=f"microbatch must be at least 1, got {microbatch}"):
        meta_step(ramp_loss, optax.sgd(STEP), microbatch=microbatch)(ramp_state(), *ramp_problem())


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.bfloat16])
def test_microbatches_of_targets_of_another_dtype(dtype):
    coords, targets = ramp_problem()
    targets = jnp.asarray(np.abs(targets) * 3).astype(dtype)
    _, of_slope, _ = ramp_gradient(coords, np.asarray(targets, np.float64))
    state, _ = meta_step(ramp_loss, optax.sgd(STEP), microbatch=2)(ramp_state(), coords, targets)
    assert float(state.params.model["slope"]) == pytest.approx(2.0 - STEP * of_slope, rel=1e-2)


def test_rates_are_held_in_their_bounds_and_nothing_else_is():
    def loss(params, coords, targets):  # wants the first rate down, the second up, the third where it is
        return params.rates["a"][0] - params.rates["a"][1] + 0 * params.rates["b"] + params.model

    state = init_meta(jnp.float32(0.2), {"a": jnp.array([0.2, 0.7]), "b": jnp.float32(0.3)}, optax.sgd(5.0))
    step = jax.jit(meta_step(loss, optax.sgd(5.0), rate_bounds=(0.1, 0.8)))
    for _ in range(2):
        state, _ = step(state, jnp.zeros((1, 1)), jnp.zeros((1, 1, 1)))
        np.testing.assert_allclose(state.params.rates["a"], [0.1, 0.8], rtol=1e-6)
        np.testing.assert_allclose(state.params.rates["b"], 0.3, rtol=1e-6)
    np.testing.assert_allclose(state.params.model, 0.2 - 10.0, rtol=1e-6)
    free, _ = meta_step(loss, optax.sgd(5.0))(state, jnp.zeros((1, 1)), jnp.zeros((1, 1, 1)))
    np.testing.assert_allclose(free.params.rates["a"], [0.1 - 5.0, 0.8 + 5.0], rtol=1e-6)


# --- with a real loss -------------------------------------------------------------------------------------------------


def functa_loss(params, coords, targets):
    def tiny(p, x, z):
        return tiny_network(p, x, z, sin=jnp.sin)

    latent = {"gain": jnp.zeros(3), "shift": jnp.zeros(2)}
    return meta_loss(tiny, params.model, coords, targets, latent, steps=2, learning_rate=params.rates)


def functa_problem(own_points=False):
    params, coords, targets, _ = jax.tree.map(np.float32, tiny_problem(8, 5, own_points))
    rates = {"gain": np.full(3, 0.1, np.float32), "shift": np.full(2, 0.1, np.float32)}
    return params, rates, coords, targets


def assert_same(found, expected, tolerance=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, expected)


def test_microbatches_give_the_update_of_the_whole_batch():
    params, rates, coords, targets = functa_problem()
    optimizer = optax.sgd(0.1, momentum=0.9)
    whole, *parts = (
        jax.jit(meta_step(functa_loss, optimizer, microbatch=size))(
            init_meta(params, rates, optimizer), coords, targets
        )
        for size in (None, 2, 1)
    )
    for part in parts:
        assert_same(part, whole)


def test_outer_steps_learn_and_the_state_is_stable_under_scan():
    params, _, coords, targets = functa_problem()
    optimizer = optax.adam(1e-2)
    state = init_meta(params, 0.1, optimizer)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    step = meta_step(functa_loss, optimizer, rate_bounds=(0.0, 1.0))
    many = jax.jit(lambda s: jax.lax.scan(lambda s, _: step(s, coords, targets), s, length=200))
    after, metrics = many(state)
    assert int(after.step) == 200
    assert metrics["loss"].shape == (200,)
    assert metrics["loss"][-1] < 0.7 * metrics["loss"][0]
    assert 0 <= float(after.params.rates) <= 1
    assert after.params.rates != state.params.rates
    described = [[(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(s)] for s in (state, after)]
    assert described[0] == described[1]
    one_by_one = jax.jit(step)
    for k in range(3):
        state, single = one_by_one(state, coords, targets)
        assert float(single["loss"]) == pytest.approx(float(metrics["loss"][k]), rel=1e-4)
    assert one_by_one._cache_size() == 1  # a rate given as a Python number does not compile twice


def test_the_state_can_be_donated_and_is_its_own():
    params, rates, coords, targets = functa_problem()
    params = jax.tree.map(jnp.asarray, params)
    optimizer = optax.adam(1e-2)
    state = init_meta(params, rates, optimizer)
    step = jax.jit(meta_step(functa_loss, optimizer, microbatch=4), donate_argnums=0)
    after, _ = step(state, coords, targets)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert not any(x.is_deleted() for x in jax.tree.leaves((after, params)))


@pytest.mark.parametrize(("own_points", "microbatch"), [(False, None), (True, 4)])
def test_four_devices_give_the_training_of_one(own_points, microbatch):
    params, rates, coords, targets = functa_problem(own_points)
    optimizer = optax.sgd(0.1, momentum=0.9)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    assert mesh.size == 4
    everywhere, by_image = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    step = jax.jit(meta_step(functa_loss, optimizer, microbatch=microbatch))
    state = init_meta(params, rates, optimizer)
    inputs = (
        jax.device_put(state, everywhere),
        jax.device_put(coords, by_image if own_points else everywhere),
        jax.device_put(targets, by_image),
    )
    found = step(*inputs)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(found))
    assert_same(found, step(state, coords, targets))
    text = step.lower(*inputs).compile().as_text()
    assert "all-reduce" in text
    for exchange in ("all-gather", "all-to-all", "collective-permute"):  # images stay where they are
        assert exchange not in text


def test_what_is_trained_has_names():
    state = init_meta({"w": jnp.ones(2)}, {"z": 0.1}, optax.adam(1e-3))
    assert isinstance(state.params, MetaParams)
    assert state.params.rates["z"].dtype == jnp.float32
    assert jax.tree.structure(state.opt_state[0].mu) == jax.tree.structure(state.params)
    assert (int(state.step), state.step.dtype) == (0, jnp.int32)


def test_rates_are_held_below_the_limit_that_the_updated_network_sets():
    def loss(params, coords, targets):  # one step moves the model from 0.5 to 0.4 and the rates up by 0.1
        return params.model - jnp.sum(params.rates)

    def limit(model, coords):
        return model * coords[0, 0]

    state = init_meta(jnp.float32(0.5), jnp.array([0.05, 0.6]), optax.sgd(STEP))
    step = jax.jit(meta_step(loss, optax.sgd(STEP), rate_limit=limit))
    state, _ = step(state, jnp.full((1, 1), 1.5), jnp.zeros((1, 1, 1)))
    np.testing.assert_allclose(state.params.rates, [0.15, 0.4 * 1.5], rtol=1e-6)


# --- relative Adam ----------------------------------------------------------------------------------------------------


def test_relative_adam_against_numpy():
    rng = np.random.default_rng(0)
    params = {
        "wide": 0.01 * rng.normal(size=(256, 3)),  # unit: size times sqrt(64 / 256)
        "narrow": 5.0 * rng.normal(size=(4, 3)),
        "bias": np.full(3, 0.2),
        "zero": np.zeros((2, 2)),  # unit: the floor
        "scalar": np.array(-3.0),
    }
    unit = {
        "wide": np.sqrt(np.mean(params["wide"] ** 2)) / 2,
        "narrow": np.sqrt(np.mean(params["narrow"] ** 2)),
        "bias": 0.2,
        "zero": 1e-3,
        "scalar": 3.0,
    }
    rates, b1, b2, max_norm = [0.1, 0.05, 0.02], 0.8, 0.9, 0.5
    transform = relative_adam(lambda step: jnp.array(rates)[step], b1=b1, b2=b2, max_norm=max_norm)
    narrow = jax.tree.map(jnp.float32, params)
    state = transform.init(narrow)
    m, v = (jax.tree.map(np.zeros_like, params) for _ in range(2))
    update = jax.jit(transform.update)
    for t, scale in enumerate([1.0, 1e-3, 10.0], start=1):
        gradients = jax.tree.map(lambda p, s=scale: s * rng.normal(size=p.shape), params)
        norm = np.sqrt(sum(np.sum(g**2) for g in gradients.values()))
        clipped = jax.tree.map(lambda g, n=norm: g * min(1.0, max_norm / n), gradients)
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, clipped)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, v, clipped)
        updates, state = update(jax.tree.map(jnp.float32, gradients), state, narrow)
        for name in params:
            expected = -rates[t - 1] * unit[name] * (m[name] / (1 - b1**t)) / np.sqrt(v[name] / (1 - b2**t))
            np.testing.assert_allclose(updates[name], expected, rtol=1e-4, err_msg=f"{name}, step {t}")


def test_relative_adam_survives_gradients_of_zero():
    transform = relative_adam(0.1)
    params = jnp.ones(3)
    updates, _ = transform.update(jnp.zeros(3), transform.init(params), params)
    np.testing.assert_array_equal(updates, np.zeros(3))
