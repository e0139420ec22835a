"""Cutting trained networks: what is cut, and that it stays cut."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import classification, cut, data, optimizers
from experiments.models.lenet import LeNet
from optim_jax import NEVER, activation_order, dessilbi, sparse_params

MODEL = LeNet(features=(4, 6, 8), hidden=12, kernel_size=3, padding="SAME")


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", "train")


@pytest.fixture(scope="module")
def trained(digits):
    """A small LeNet after DessiLBI's few first steps, by when some filters have come alive."""
    optimizer = dessilbi(optax.trace(0.9), 0.2, kappa=0.25, mu=10.0)
    prepare = classification.standardise(digits.images)
    images, labels = jnp.asarray(digits.images[:256]), jnp.asarray(digits.labels[:256])
    state = classification.initialise(MODEL, optimizer, prepare(images[:2]), jax.random.key(0))
    step = classification.train_step(MODEL, optimizer, prepare)
    body = lambda state, key: step(state, {"image": images, "label": labels}, key)  # noqa: E731
    state, metrics = jax.jit(lambda s: jax.lax.scan(body, s, jax.random.split(jax.random.key(1), 200)))(state)
    assert metrics["loss"][-1] < metrics["loss"][0]
    return prepare, state


def test_layers_are_named_in_the_order_of_the_network(trained) -> None:
    assert list(cut.layers_of(trained[1].params)) == ["conv1", "conv2", "conv3", "fc1", "fc2"]


def test_the_path_cuts_what_came_alive_last(trained) -> None:
    _, state = trained
    order = np.asarray(activation_order(state.opt_state)["conv3"]["kernel"]).ravel()
    assert (order < NEVER).any()
    masks = cut.path_cut(state.params, state.opt_state, ["conv3"], 0.5)
    kept = np.asarray(masks["conv3"]["kernel"]).all((0, 1, 2))
    assert kept.sum() == 4
    assert order[kept].max() <= order[~kept].min()
    assert masks["fc1"]["kernel"] is None


def test_magnitude_cuts_the_weakest_filters_and_weights(trained) -> None:
    _, state = trained
    masks = cut.magnitude_cut(state.params, ["conv3", "fc1"], 0.5)
    for layer, axes in (("conv3", (0, 1, 2)), ("fc1", ())):
        kernel, mask = np.asarray(state.params[layer]["kernel"]), np.asarray(masks[layer]["kernel"])
        size = np.sqrt(np.square(kernel).sum(axes)) if axes else np.abs(kernel)
        kept = mask.all(axes) if axes else mask
        np.testing.assert_array_equal(mask.any(axes) if axes else mask, kept)
        assert kept.sum() == kept.size - kept.size // 2
        assert size[kept].min() > size[~kept].max()
    assert masks["fc2"]["kernel"] is None


def test_fraction_of_all_parameters(trained) -> None:
    params = trained[1].params
    fraction = cut.fraction_of_all(params, ["conv3", "fc1"], 0.4)
    masks = cut.magnitude_cut(params, ["conv3", "fc1"], fraction)
    everything = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert 0.4 <= cut.removed(params, masks) < 0.4 + 24 / everything  # a filter of conv3 has 24 weights
    with pytest.raises(ValueError, match=r"total=0.99: conv3, fc1 hold 0\.\d+ of all parameters"):
        cut.fraction_of_all(params, ["conv3", "fc1"], 0.99)


@pytest.mark.parametrize("adam", [True, False])
def test_what_is_cut_stays_zero_while_the_rest_learns(trained, digits, adam) -> None:
    prepare, state = trained
    masks = cut.path_cut(state.params, state.opt_state, ["conv3"], 0.5)
    plan = cut.Retraining(MODEL, prepare, None, adam, 0.01, 5, 32)
    variables = cut.retrain(plan, state.variables, masks, digits.images, digits.labels, jax.random.key(0))
    kernel, keep = variables["params"]["conv3"]["kernel"], masks["conv3"]["kernel"]
    assert not np.any(np.where(keep, 0, kernel))
    assert np.any(kernel != np.where(keep, state.params["conv3"]["kernel"], 0))


def test_proximal_is_the_prox_of_the_step() -> None:
    """Against the closed forms of group lasso and L1, with a learning rate that changes."""
    params = {
        "conv": jax.random.normal(jax.random.key(0), (2, 2, 3, 4)),
        "dense": jax.random.normal(jax.random.key(1), (5, 3)),
        "bias": jnp.ones(3),
    }
    rate = optax.linear_schedule(0.3, 0.1, 2)
    optimizer = optimizers.proximal(optax.sgd(rate), rate, 2.0, optimizers.penalty(1.0))
    state = optimizer.init(params)
    found, expected = params, jax.tree.map(np.asarray, params)
    for lr in (0.3, 0.2):
        updates, state = optimizer.update(found, state, found)  # the gradient of |w|^2 / 2
        found = optax.apply_updates(found, updates)
        moved = jax.tree.map(lambda w: (1 - lr) * w, expected)  # noqa: B023
        norm = np.sqrt(np.square(moved["conv"]).sum((0, 1, 2)))
        expected = {
            "conv": moved["conv"] * np.maximum(0, 1 - lr * 2 / norm),
            "dense": np.sign(moved["dense"]) * np.maximum(0, np.abs(moved["dense"]) - lr * 2),
            "bias": moved["bias"],
        }
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)
    assert np.any(expected["dense"] == 0)
    with pytest.raises(ValueError, match="params must be given"):
        optimizer.update(params, state)


@pytest.mark.parametrize(("kind", "expected"), [("linear", [0, 1, 0]), ("step", [1, 1, 0.01]), ("constant", [1, 1, 1])])
def test_schedules(kind, expected) -> None:
    """At the start, after a twentieth, and at the end of 40 epochs of 10 steps."""
    rate = optimizers.schedule(kind, 1.0, steps=400, steps_per_epoch=10)
    np.testing.assert_allclose([rate(0), rate(20), rate(400)], expected, rtol=1e-6, atol=1e-7)


def test_adamw_decays_kernels_and_nothing_else() -> None:
    shapes = {"conv/kernel": (3, 3, 2, 4), "dense/kernel": (4, 3), "bias": (3,), "relative_position_bias": (9, 2)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    optimizer = optimizers.adamw(optax.constant_schedule(0.1), 0.5)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    found = {name: float(u.mean()) for name, u in updates.items()}
    assert found == pytest.approx({"conv/kernel": -0.05, "dense/kernel": -0.05, "bias": 0, "relative_position_bias": 0})


def test_arms_are_what_they_are_called() -> None:
    params = {"conv": jnp.ones((1, 1, 1, 2)), "bias": jnp.ones(2)}
    gradients = jax.tree.map(lambda w: 3 * w, params)
    options = {"momentum": 0.0, "weight_decay": 0.0, "kappa": 1.0, "mu": 2.0, "strength": 0.1}
    options |= {"dense": 1.0, "filters": 1.0}

    def update(arm):
        optimizer = optimizers.make(arm, optax.constant_schedule(0.1), **options)
        state = optimizer.init(params)
        updates, state = optimizer.update(gradients, state, params)
        return updates, state

    np.testing.assert_allclose(update("sgd")[0]["conv"], -0.3, rtol=1e-6)
    np.testing.assert_allclose(update("adam")[0]["conv"], -0.1, rtol=1e-4)
    np.testing.assert_allclose(update("proximal")[0]["conv"], -0.3 - 0.01, rtol=1e-5)
    updates, state = update("dessilbi")
    np.testing.assert_allclose(updates["conv"], -0.3 - 0.1 / 2, rtol=1e-6)
    np.testing.assert_allclose(updates["bias"], -0.3, rtol=1e-6)
    assert sparse_params(state)["bias"] is None
    np.testing.assert_allclose(update("dessilbi-adam")[0]["conv"], -0.1 - 0.1 / 2, rtol=1e-4)
