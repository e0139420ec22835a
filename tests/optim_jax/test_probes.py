"""The probe against closed forms and a float64 finite-difference brute force."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim_jax import probe_gradients

STEP_SIZES = np.array([0.05, 0.2, 0.6])


def test_on_a_quadratic_beta_is_the_largest_eigenvalue_met():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    eigenvalues = np.array([0.1, 0.5, 1.0, 2.0, 5.0, 9.0])
    matrix = basis @ np.diag(eigenvalues) @ basis.T

    def quadratic(w, a):
        return 0.5 * w @ a @ w

    for met in ([5], [2], [0, 3], range(6)):
        with jax.enable_x64(True):
            w = jnp.asarray(basis[:, list(met)].sum(1))
            probe = probe_gradients(quadratic, w, jnp.asarray(matrix), STEP_SIZES)
            effective_beta = probe.effective_beta
        gradient = matrix @ basis[:, list(met)].sum(1)
        curvature = np.linalg.norm(matrix @ gradient) / np.linalg.norm(gradient)
        np.testing.assert_allclose(probe.beta, curvature, rtol=1e-8)
        assert curvature <= eigenvalues[max(met)] * (1 + 1e-12)
        if len(met) == 1:
            np.testing.assert_allclose(effective_beta, eigenvalues[met[0]], rtol=1e-8)
            # Past the minimum, at eta > 1 / eigenvalue, the gradient has turned around.
            np.testing.assert_allclose(probe.cosine, np.sign(1 - STEP_SIZES * eigenvalues[met[0]]), rtol=1e-8)


def network(w, x, y, xp):
    """Dense, BatchNorm on the batch's statistics, tanh, dense, squared error: for NumPy and JAX alike."""
    h = x @ w["first"]
    h = w["scale"] * (h - h.mean(0, keepdims=True)) / xp.sqrt(h.var(0, keepdims=True) + 1e-5)
    return xp.mean((xp.tanh(h) @ w["last"] - y) ** 2)


def brute_force(w, x, y, step_sizes):
    """Loss, gradient distance, beta and cosine by central differences over every weight, in float64."""

    def gradient(w):
        result = {}
        for name, leaf in w.items():
            result[name] = np.zeros_like(leaf)
            for index in np.ndindex(leaf.shape):
                bump = np.zeros_like(leaf)
                bump[index] = 1e-5
                ends = [network({**w, name: leaf + sign * bump}, x, y, np) for sign in (1, -1)]
                result[name][index] = (ends[0] - ends[1]) / 2e-5
        return result

    def flat(tree):
        return np.concatenate([leaf.ravel() for leaf in tree.values()])

    g = gradient(w)
    rows = []
    for eta in step_sizes:
        there = {name: w[name] - eta * g[name] for name in w}
        h = gradient(there)
        distance = np.linalg.norm(flat(h) - flat(g))
        cosine = flat(h) @ flat(g) / np.linalg.norm(flat(h)) / np.linalg.norm(flat(g))
        rows.append((network(there, x, y, np), distance, distance / (eta * np.linalg.norm(flat(g))), cosine))
    return np.array(rows).T, np.linalg.norm(flat(g))


def test_on_a_small_network_with_batchnorm_it_agrees_with_brute_force():
    rng = np.random.default_rng(1)
    w = {"first": rng.standard_normal((3, 4)), "scale": np.ones((1, 4)), "last": rng.standard_normal((4, 2))}
    x, y = rng.standard_normal((8, 3)), rng.standard_normal((8, 2))
    (loss, distance, beta, cosine), norm = brute_force(w, x, y, STEP_SIZES)

    def loss_fn(w, batch):
        return network(w, *batch, jnp)

    def as_float32(tree):
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)

    probe = probe_gradients(loss_fn, as_float32(w), as_float32((x, y)), STEP_SIZES)
    np.testing.assert_allclose(probe.loss, loss, rtol=1e-4)
    np.testing.assert_allclose(probe.gradient_distance, distance, rtol=1e-3)
    np.testing.assert_allclose(probe.beta, beta, rtol=1e-3)
    np.testing.assert_allclose(probe.cosine, cosine, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(probe.start_loss, network(w, x, y, np), rtol=1e-5)
    np.testing.assert_allclose(probe.gradient_norm, norm, rtol=1e-4)
    np.testing.assert_allclose(probe.loss_range, (loss.min(), loss.max()), rtol=1e-4)
    np.testing.assert_allclose(probe.predictiveness_range, (distance.min(), distance.max()), rtol=1e-3)
    np.testing.assert_allclose(probe.effective_beta, beta.max(), rtol=1e-3)


def test_probing_leaves_running_statistics_alone_and_does_not_read_them():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x)))
            return nn.Dense(3)(x)

    model = Net()
    batch = {"image": jax.random.normal(jax.random.key(0), (6, 5)), "label": jnp.arange(6) % 3}
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(1), batch["image"])

    def loss_with(stats):
        def loss_fn(params, batch):
            logits, _ = model.apply(
                {"params": params, "batch_stats": stats}, batch["image"], train=True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

        return loss_fn

    stats = variables["batch_stats"]
    before = jax.tree.map(np.array, variables)
    probe = probe_gradients(loss_with(stats), variables["params"], batch, STEP_SIZES)
    elsewhere = probe_gradients(loss_with(optax.tree.scale(7.0, stats)), variables["params"], batch, STEP_SIZES)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, jax.tree.map(np.array, variables)))
    np.testing.assert_array_equal(probe.loss, elsewhere.loss)
    np.testing.assert_array_equal(probe.beta, elsewhere.beta)
    # In evaluation mode the running statistics would give another loss: the probe's is the batch's.
    logits = model.apply(variables, batch["image"], train=False)
    evaluated = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    assert abs(float(evaluated) - float(probe.start_loss)) > 1e-2


def test_compiles_once_a_loss_and_works_inside_jit():
    traces = []

    def loss_fn(w, batch):
        traces.append(None)
        return jnp.sum((w - batch) ** 4)

    w, batch = jnp.ones(3), jnp.arange(3.0)
    first = probe_gradients(loss_fn, w, batch, [0.1, 0.2])
    compiled = len(traces)
    probe_gradients(loss_fn, w + 1, batch, [0.1, 0.3])
    assert len(traces) <= compiled + 1  # the shape check traces anew, the compiled program does not
    inside = jax.jit(lambda w, sizes: probe_gradients(loss_fn, w, batch, sizes))(w, jnp.array([0.1, 0.2]))
    np.testing.assert_allclose(inside.beta, first.beta, rtol=1e-6)


def test_costs_one_gradient_more_than_there_are_step_sizes():
    evaluations = []

    @jax.custom_vjp
    def counted(w):
        return jnp.sum(w**2)

    def backward(w, cotangent):
        jax.debug.callback(lambda: evaluations.append(None))
        return (2 * w * cotangent,)

    counted.defvjp(lambda w: (counted(w), w), backward)
    jax.block_until_ready(probe_gradients(lambda w, _: counted(w), jnp.ones(3), None, [0.1, 0.2, 0.3, 0.4]))
    jax.effects_barrier()
    assert len(evaluations) == 5


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_norms_do_not_overflow_in_half_precision(dtype):
    """A gradient of norm 600, whose square is beyond float16, along an eigenvector of eigenvalue 2."""

    def loss_fn(w, _):
        return jnp.sum((w.astype(jnp.promote_types(dtype, jnp.float32)) - 150) ** 2)

    with jax.enable_x64(dtype == jnp.float64):
        probe = probe_gradients(loss_fn, jnp.zeros(4, dtype), None, np.array([0.125, 0.25]))
        wide = jnp.promote_types(dtype, jnp.float32)
        assert {probe.gradient_norm.dtype, probe.gradient_distance.dtype, probe.beta.dtype} == {wide}
    np.testing.assert_allclose(probe.gradient_norm, 600, rtol=1e-2)
    np.testing.assert_allclose(probe.gradient_distance, [150, 300], rtol=1e-2)
    np.testing.assert_allclose(probe.beta, 2, rtol=1e-2)
    np.testing.assert_allclose(probe.cosine, 1, rtol=1e-2)


def test_a_stationary_point_has_no_beta():
    probe = probe_gradients(lambda w, _: jnp.sum(w**2), jnp.zeros(2), None, [0.1])
    assert np.isnan(probe.beta).all()
    assert np.isnan(probe.cosine).all()
    np.testing.assert_array_equal(probe.gradient_distance, 0)


def test_bad_input_is_named():
    def loss_fn(w, batch):
        return jnp.sum(w)

    for step_sizes in ([0.1, 0.0], [-1.0]):
        with pytest.raises(ValueError, match="step_sizes must be > 0"):
            probe_gradients(loss_fn, jnp.ones(2), None, step_sizes)
    for step_sizes in (0.1, [], [[0.1]]):
        with pytest.raises(ValueError, match="step_sizes must be a vector"):
            probe_gradients(loss_fn, jnp.ones(2), None, step_sizes)
    for bad in (lambda w, batch: w, lambda w, batch: (jnp.sum(w), {})):
        with pytest.raises(ValueError, match="loss_fn must return a scalar loss alone"):
            probe_gradients(bad, jnp.ones(2), None, [0.1])
