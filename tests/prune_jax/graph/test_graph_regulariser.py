"""The group regulariser against equations 10 and 11 differentiated by finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from graph_architectures import ARCHITECTURES, data, weights

from prune_jax.graph import dependency_groups, group_regulariser


def test_gradient_of_equation_10():
    def net(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    params = weights(a=(3, 5), b=(5, 2))
    groups = dependency_groups(net, params, data(4, 3))
    a, b = (np.asarray(params[n], np.float64) for n in "ab")
    importance = (a**2).sum(0) + (b**2).sum(1)
    gamma = 2 ** (3.0 * (importance.max() - importance) / (importance.max() - importance.min()))

    def penalty(a):  # equation 10 with gamma held
        return 0.7 * (gamma * ((a**2).sum(0) + (b**2).sum(1))).sum()

    expected, h = np.zeros_like(a), 1e-6
    for i in np.ndindex(a.shape):
        e = np.zeros_like(a)
        e[i] = h
        expected[i] = (penalty(a + e) - penalty(a - e)) / (2 * h)
    push = group_regulariser(groups, strength=0.7, alpha=3.0)
    updates, _ = jax.jit(push.update)(jax.tree.map(jnp.zeros_like, params), push.init(params), params)
    np.testing.assert_allclose(updates["a"], expected, rtol=1e-4, atol=1e-5)


def test_training_with_it_spreads_importance_within_groups():
    fn, params, args = ARCHITECTURES["vit_linen"]()
    groups = dependency_groups(fn, params, *args)
    optimizer = optax.chain(group_regulariser(groups, strength=1e-2), optax.sgd(0.5))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return optax.apply_updates(params, updates), state

    state, kernel = optimizer.init(params), params["params"]["Dense_0"]["kernel"]
    before = np.asarray((kernel**2).sum(0))
    for _ in range(20):
        params, state = step(params, state)
    after = np.asarray((params["params"]["Dense_0"]["kernel"] ** 2).sum(0))
    assert after.max() / after.min() > 1.5 * before.max() / before.min()
    np.testing.assert_array_equal(
        params["params"]["Dense_2"]["bias"], ARCHITECTURES["vit_linen"]()[1]["params"]["Dense_2"]["bias"]
    )


def test_bad_input_is_named():
    fn, params, args = ARCHITECTURES["mlp"]()
    groups = dependency_groups(fn, params, *args)
    with pytest.raises(ValueError, match="strength must be at least 0"):
        group_regulariser(groups, strength=-1.0)
    push = group_regulariser(groups, strength=1.0)
    with pytest.raises(ValueError, match="needs params"):
        push.update(params, push.init(params))
    with pytest.raises(
        ValueError, match=r"updates must be like .* leaf 'w0' has shape \(3,\) where those have \(3, 8\)"
    ):
        push.update({**params, "w0": data(3)}, push.init(params), params)
    with pytest.raises(ValueError, match=r"params must be like .* leaf 'w9' has shape \(3,\) where those have None"):
        push.update(params, push.init(params), {**params, "w9": data(3)})
    with pytest.raises(ValueError, match=r"these are missing: \['w0'\]"):
        push.update(params, push.init(params), {n: p for n, p in params.items() if n != "w0"})


def test_integers_and_missing_updates_are_left_alone():
    def net(p, x):  # the integers have an axis of the same units
        return jnp.tanh(x @ p["a"] + p["table"][None]) @ p["b"]

    params = {**weights(a=(3, 5), b=(5, 2)), "table": 100 * jnp.arange(5)}
    push = group_regulariser(dependency_groups(net, params, data(4, 3)), strength=0.7)
    fixed = group_regulariser(
        dependency_groups(
            lambda p, x: net({**p, "table": params["table"]}, x), weights(a=(3, 5), b=(5, 2)), data(4, 3)
        ),
        strength=0.7,
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = push.update({**zeros, "b": None}, push.init(params), params)
    np.testing.assert_array_equal(updates["table"], zeros["table"])
    assert updates["b"] is None
    del params["table"], zeros["table"]
    np.testing.assert_allclose(updates["a"], fixed.update(zeros, fixed.init(params), params)[0]["a"], rtol=1e-6)


def test_a_position_of_two_units_is_pushed_for_both():
    def gram(p, x):
        h = x @ p["a"]
        return (h[:, :, None] * h[:, None]).reshape(len(x), -1) @ p["b"]

    params = weights(a=(3, 3), b=(9, 2))
    groups = dependency_groups(gram, params, data(4, 3))
    push = group_regulariser(groups, strength=0.5, alpha=1.0)
    updates, _ = push.update(jax.tree.map(jnp.zeros_like, params), push.init(params), params)
    squares = (np.asarray(params["b"]) ** 2).sum(1).reshape(3, 3)
    importance = (np.asarray(params["a"]) ** 2).sum(0)
    importance += squares.sum(0) + squares.sum(1) - np.diag(squares)  # row i and column i of the products
    gamma = 2 ** ((importance.max() - importance) / (importance.max() - importance.min()))
    pushed = gamma[:, None] + gamma[None] - np.diag(gamma)
    np.testing.assert_allclose(updates["a"], gamma[None] * params["a"], rtol=1e-5)
    np.testing.assert_allclose(updates["b"], pushed.reshape(9, 1) * params["b"], rtol=1e-5)
