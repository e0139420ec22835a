"""Plans: JSON, other checkpoints, optimizer states, other functions."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from graph_architectures import ARCHITECTURES, data, weights
from graph_zeroing import check, zeroed

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


HEAD = [{"axis": 0, "rows": [], "positions": [0, 2]}, {"axis": 1, "rows": [0], "positions": [[0, 1], [1, 3]]}]


def damaged(*changes):
    """A plan for {"a": (3, 4), "b": (2,)} with entries replaced at paths into it, or left out."""
    leaves = [{"path": ["a"], "shape": [3, 4], "keep": HEAD}, {"path": ["b"], "shape": [2], "keep": []}]
    plan = json.loads(json.dumps({"format": "prune_jax.graph plan", "version": 1, "leaves": leaves}))
    for *way, last, value in changes:
        node = plan
        for key in way:
            node = node[key]
        if value is ...:
            del node[last]
        else:
            node[last] = value
    return plan


@pytest.mark.parametrize(
    "positions", [[0, 3], [-1, 2], [2, 1], [1, 1], [], [[0, 1]], [0.5, 1.0], [[0], [1, 2]], "0", 0]
)
def test_damaged_positions_are_refused(positions):
    with pytest.raises(ValueError, match=r"plan is damaged: leaf 'a' of shape \(3, 4\) must be told"):
        apply_plan(damaged(("leaves", 0, "keep", 0, "positions", positions)), {})


KEEP = ("leaves", 0, "keep")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (("leaves", ...), "'leaves' must be a list of dicts, got None"),
        (("leaves", None), "'leaves' must be"),
        (("leaves", [3]), "'leaves' must be"),
        (("leaves", 1, "path", ...), "'path' of leaf 1 must be"),
        (("leaves", 1, "path", ["a"]), "leaf 'a' must be listed once"),
        (("leaves", 1, "shape", ...), "'shape' of leaf 'b' must be"),
        (("leaves", 1, "shape", [-2]), "'shape' of leaf 'b' must be"),
        (("leaves", 1, "keep", ...), "'keep' of leaf 'b' of shape"),
        ((*KEEP, 0, "axis", ...), r"leaf 'a' of shape \(3, 4\) must be told .* once for each axis cut, got axis None"),
        ((*KEEP, 0, "axis", "1"), "got axis '1'"),
        ((*KEEP, 0, "axis", 1.0), "got axis 1.0"),
        ((*KEEP, 0, "axis", True), "got axis True"),
        ((*KEEP, 0, "axis", 2), "got axis 2"),
        ((*KEEP, 0, "axis", 1), "once for each axis cut, got axis 1"),
        ((*KEEP, 1, "rows", ...), r"'rows' for axis 1 of leaf 'a' .* must be rising, among the other axes \[0\]"),
        ((*KEEP, 1, "rows", [2]), "'rows' for axis 1"),
        ((*KEEP, 1, "rows", []), r"positions along axis 1 for \(\) rows of axes \(\), got \(2,\)"),
        ((*KEEP, 1, "positions", ...), "rising positions along axis 1"),
        ((*KEEP, 1, "positions", [[0, 1]] * 3), r"positions along axis 1 for \(2,\) rows of axes \(0,\), got \(3,\)"),
    ],
)
def test_damaged_plans_are_refused(change, where):
    assert apply_plan(damaged(), {"a": np.ones((3, 4)), "b": np.ones(2)})["a"].shape == (2, 2)
    with pytest.raises(ValueError, match=f"plan is damaged: .*{where}"):
        apply_plan(damaged(change), {"a": np.ones((3, 4)), "b": np.ones(2)})


def test_some_of_the_parameters_are_no_checkpoint():
    a, b = np.ones((3, 4)), np.ones(2)
    with pytest.raises(ValueError, match=r"some of the plan's parameters but not all: \['b'\] are missing"):
        apply_plan(damaged(), {"a": a, "step": np.ones(5)})
    assert apply_plan(damaged(), {"mu": {"a": a}, "step": np.ones(5)})["mu"]["a"].shape == (2, 2)  # a mirror may
    assert apply_plan(damaged(), {"a": a, "b": b, "mu": {"a": a}})["mu"]["a"].shape == (2, 2)


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


def test_rows_of_rows():
    """A kernel of groups of heads of dims: which heads go differs from group to group, which dims from head to head."""

    def net(p, x):
        return jnp.einsum("bkgd,kgdo->bo", jnp.tanh(jnp.einsum("bc,ckgd->bkgd", x, p["w"])), p["o"])

    params, x = weights(w=(5, 2, 3, 4), o=(2, 3, 4, 2)), data(6, 5)
    for kinds, shape in ((("width",), (5, 2, 3, 2)), (("width", "block"), (5, 1, 1, 2))):
        pruned = check(net, params, x, ratio=0.5, scope="local", kinds=kinds)
        assert pruned.params["w"].shape == shape
        dense = net(zeroed(pruned.plan, params), x[:4])
        np.testing.assert_allclose(pruned.fn(pruned.params, x[:4]), dense, atol=1e-5)
    other, small = weights(w=(5, 2, 3, 4), o=(3, 2, 4, 2)), prune(net, params, x, ratio=0.5, scope="local")
    with pytest.raises(ValueError, match="leaf 'o' has shape"):
        apply_plan(small.plan, other)


@pytest.mark.parametrize("base", [optax.sgd(0.1), optax.sgd(optax.cosine_decay_schedule(0.1, 10))])
def test_an_optimizer_without_arrays_has_nothing_to_cut(base):
    fn, params, args = ARCHITECTURES["mlp"]()
    state = base.init(params)
    assert apply_plan(prune(fn, params, *args, ratio=0.5).plan, state) == state


def test_parameters_called_as_an_optimizer_calls_its_moments():
    """``mu/l/w`` is the first moment of ``l/w``, though there is a parameter ``mu/l/w`` of the same shape."""

    def net(p, x):
        return jnp.tanh(x @ p["l"]["w"]) @ p["o"] + jnp.tanh(x @ p["mu"]["l"]["w"]) @ p["o2"]

    flat = weights(l=(3, 6), mu=(3, 6), o=(6, 2), o2=(6, 2))
    params = {"l": {"w": flat["l"]}, "mu": {"l": {"w": flat["mu"]}}, "o": flat["o"], "o2": flat["o2"]}
    plan = prune(net, params, data(4, 3), ratio=0.5).plan
    state = optax.adam(1e-2).init(params)
    state = (state[0]._replace(mu=params, nu=params), *state[1:])
    cut = apply_plan(plan, state)
    for moments in (cut[0].mu, cut[0].nu):
        jax.tree.map(np.testing.assert_array_equal, moments, apply_plan(plan, params))
