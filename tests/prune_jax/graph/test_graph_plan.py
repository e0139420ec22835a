"""Plans: JSON, other checkpoints, optimizer states, other functions."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from graph_architectures import ARCHITECTURES, data, weights
from graph_zeroing import zeroed

from prune_jax.graph import apply_plan, prune, smaller_function


@pytest.mark.parametrize("name", ["mlp", "vit_linen"])
def test_plan_replays_on_another_checkpoint_after_json(name):
    fn, params, args = ARCHITECTURES[name]()
    plan = json.loads(json.dumps(prune(fn, params, *args, ratio=0.4, kinds=("width", "block")).plan))
    other = jax.tree.map(lambda x: jnp.flip(x) + 0.1, params)
    small = jax.jit(smaller_function(fn, params, plan))(apply_plan(plan, other), *args)
    expected = jax.jit(fn)(zeroed(plan, other), *args)
    np.testing.assert_allclose(small, expected, atol=1e-5 * float(jnp.abs(expected).max() + 1))


@pytest.mark.parametrize("make", [optax.adam, lambda rate: optax.chain(optax.clip(1.0), optax.sgd(rate, momentum=0.9))])
def test_optimizer_state_is_cut_and_goes_on_as_the_masked_one(make):
    fn, params, args = ARCHITECTURES["mlp"]()
    optimizer = make(1e-2)

    @partial(jax.jit, static_argnums=0)
    def step(fn, params, state):
        updates, state = optimizer.update(jax.grad(lambda p: (fn(p, *args) ** 2).mean())(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(fn, params, optimizer.init(params))
    pruned = prune(fn, params, *args, ratio=0.5)
    small = step(pruned.fn, pruned.params, apply_plan(pruned.plan, state))
    whole = step(fn, zeroed(pruned.plan, params), state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), small, apply_plan(pruned.plan, whole)
    )


def test_plan_for_another_function():
    fn, params, args = ARCHITECTURES["mlp"]()
    plan = prune(fn, params, *args, ratio=0.5).plan
    with pytest.raises(ValueError, match="no leaf of this tree"):
        apply_plan(plan, {"other": data(3)})
    with pytest.raises(ValueError, match=r"leaf 'w0' has shape \(3, 9\); the plan cuts arrays of shape \(3, 8\)"):
        apply_plan(plan, {**params, "w0": data(3, 9)})
    with pytest.raises(ValueError, match="has version 99"):
        apply_plan({**plan, "version": 99}, params)
    with pytest.raises(ValueError, match="plan must be a dict with format"):
        apply_plan([], params)

    def residual(p, x):  # the same shapes, other dependencies
        h = jax.nn.relu(x @ p["w0"] + p["b0"][None])
        h = jnp.concatenate([h[:, :6] + p["b1"][None], h[:, 6:]], 1)
        return jax.nn.relu(h @ p["w1"] + p["b1"][None]) @ p["w2"]

    cut = apply_plan(plan, params)
    with pytest.raises(ValueError, match="plan is for another function"):
        smaller_function(residual, params, plan)(cut, *args)
    with pytest.raises(ValueError, match="plan is for another function: leaf"):
        smaller_function(lambda p, x: x, {"w0": data(3, 8)}, plan)({"w0": cut["w0"]}, *args)


@pytest.mark.parametrize("positions", [[0, 8], [-1, 2], [2, 1], [1, 1], [], [[0, 1]], [0.5, 1.0]])
def test_damaged_positions_are_refused(positions):
    plan = prune(*ARCHITECTURES["mlp"]()[:2], *ARCHITECTURES["mlp"]()[2], ratio=0.5).plan
    plan["leaves"][2]["keep"][0]["positions"] = positions
    with pytest.raises(ValueError, match="plan is damaged: leaf"):
        apply_plan(plan, {})


def test_plan_that_cuts_what_must_stay():
    fn, params, args = ARCHITECTURES["mlp"]()
    plan = prune(fn, params, *args, ratio=0.5).plan
    with pytest.raises(ValueError, match="must keep its size"):
        smaller_function(fn, params, plan, pin=lambda path: path == "w1")(apply_plan(plan, params), *args)


def test_rows_that_die_as_a_whole():
    params = weights(q=(3, 2, 8), k=(3, 2, 8), v=(3, 2, 8), o=(2, 8, 3))

    def net(p, x):
        q, k, v = (jnp.einsum("btc,chd->bthd", x, p[n]) for n in "qkv")
        a = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k), -1)
        return jnp.einsum("bhts,bshd,hdo->bto", a, v, p["o"])

    pruned = prune(net, params, data(2, 5, 3), ratio=0.5, scope="local", kinds=("width", "block"))
    assert jax.tree.map(jnp.shape, pruned.params) == {"q": (3, 1, 4), "k": (3, 1, 4), "v": (3, 1, 4), "o": (1, 4, 3)}
