"""Recovery without training: exact where it can be, never worse, and for every kind of layer."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from graph_architectures import ARCHITECTURES, attention, data, randomised, weights
from jax import lax

from prune_jax.graph import prune, recover


def batches(*shape, count=4):
    return [data(*shape, seed=20 + i) for i in range(count)]


def pruned_to(fn, params, x, names, axis_keep):
    """Prune by scores that are 0 exactly where ``axis_keep`` says so."""
    scores = {n: jnp.ones(p.shape) for n, p in params.items()}
    for name in names:
        scores[name] = jnp.zeros(params[name].shape) + axis_keep
    return prune(fn, params, x, ratio=0.5, scope="local", importance=scores)


def agree(fn, params, small, recovered, xs, tolerance=2e-3):
    dense = np.concatenate([np.asarray(jax.jit(fn)(params, x)) for x in xs])
    before, after = (
        np.concatenate([np.asarray(jax.jit(small.fn)(p, x)) for x in xs]) for p in (small.params, recovered)
    )
    scale = np.abs(dense).max()
    assert np.abs(before - dense).max() > 0.05 * scale
    np.testing.assert_allclose(after, dense, atol=tolerance * scale, rtol=0)


def test_dense_layer_takes_over_linear_combinations():
    def net(p, x):
        return (x @ p["a"] + p["c"][None]) @ p["b"] + p["d"][None]

    params = weights(a=(4, 8), c=(8,), b=(8, 3), d=(3,))
    mix = data(4, 4, seed=3)
    params["a"] = params["a"].at[:, 4:].set(params["a"][:, :4] @ mix)  # up to a constant, which the bias must take
    small = prune(
        net, params, data(5, 4), ratio=0.5, importance={"a": None, "d": None, "b": None, "c": 1.0 * (jnp.arange(8) < 4)}
    )
    assert small.params["a"].shape == (4, 4)
    agree(net, params, small, recover(small, net, params, batches(16, 4), ridge=1e-7), batches(5, 4))


def test_attention_output_projection_takes_over_value_dims():
    def net(p, x):
        v = jnp.einsum("btc,chd->bthd", x, p["v"])
        return jnp.einsum("bthd,hdo->bto", attention(*(jnp.einsum("btc,chd->bthd", x, p[n]) for n in "qk"), v), p["o"])

    params = weights(q=(6, 2, 4), k=(6, 2, 4), v=(6, 2, 4), o=(2, 4, 3))
    params["v"] = params["v"].at[..., 2:].set(jnp.einsum("chd,hde->che", params["v"][..., :2], data(2, 2, 2, seed=4)))
    keep = jnp.broadcast_to(1.0 * (jnp.arange(4) < 2), (6, 2, 4))
    small = prune(
        net,
        params,
        data(2, 5, 6),
        ratio=dict.fromkeys(_ties(net, params, data(2, 5, 6), "v"), 0.5),
        importance={"q": None, "k": None, "v": keep, "o": None},
    )
    assert small.params["v"].shape == (6, 2, 2)
    agree(net, params, small, recover(small, net, params, batches(8, 5, 6), ridge=1e-7), batches(2, 5, 6))


def _ties(net, params, x, name):
    from prune_jax.graph import dependency_groups

    return {g.tie for g in dependency_groups(net, params, x) if g.kind == "width" and g.members[0].path in (name, "o")}


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (2, 1), "padding": ((1, 2), (0, 1)), "rhs_dilation": (1, 2)},
        {"window_strides": (1, 1), "padding": ((1, 1), (1, 1)), "lhs_dilation": (2, 1)},
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_takes_over_linear_combinations(options, groups):
    numbers = ("NHWC", "HWIO", "NHWC")

    def net(p, x):
        h = x @ p["a"]
        y = lax.conv_general_dilated(h, p["k"], dimension_numbers=numbers, feature_group_count=groups, **options)
        return y @ p["b"]

    params = weights(a=(4, 8), k=(3, 2, 8 // groups, 6), b=(6, 2))
    a, mix = np.array(params["a"]), data(2, 2, seed=3)
    lost = [2, 3, 6, 7] if groups == 2 else [4, 5, 6, 7]
    kept = sorted({*range(8)} - {*lost})
    a[:, lost[:2]], a[:, lost[2:]] = a[:, kept[:2]] @ mix, a[:, kept[2:]] @ mix
    params["a"] = jnp.asarray(a)
    scores = {"a": jnp.where(np.isin(np.arange(8), lost), 0.0, 1.0)[None] * jnp.ones((4, 1)), "k": None, "b": None}
    small = prune(
        net, params, data(2, 5, 5, 4), ratio=0.5, scope="local", importance=scores, pin=lambda path: path == "b"
    )
    assert small.params["a"].shape == (4, 4)
    agree(net, params, small, recover(small, net, params, batches(3, 5, 5, 4), ridge=1e-7), batches(2, 5, 5, 4))


def test_the_layer_solves_numpys_least_squares():
    def net(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"] + p["c"][None]

    params, ridge = weights(a=(4, 8), b=(8, 3), c=(3,)), 0.1
    small = prune(net, params, data(5, 4), ratio=0.4)
    xs = batches(16, 4)
    got = recover(small, net, params, xs, ridge=ridge)
    x = np.concatenate(xs).astype(np.float64)
    a, b, cut_a = (np.asarray(p, np.float64) for p in (params["a"], params["b"], small.params["a"]))
    inputs, wanted = np.tanh(x @ cut_a), np.tanh(x @ a) @ b
    centred = inputs - inputs.mean(0)
    k = inputs.shape[1]
    pull = np.sqrt(ridge * np.trace(centred.T @ centred) / k)  # the ridge as k more rows
    rows = np.concatenate([centred, pull * np.eye(k)])
    targets = np.concatenate([wanted - wanted.mean(0), pull * np.asarray(small.params["b"], np.float64)])
    solution = np.linalg.lstsq(rows, targets, rcond=None)[0]
    np.testing.assert_allclose(got["b"], solution, atol=1e-4)
    bias = np.asarray(small.params["c"]) + wanted.mean(0) - inputs.mean(0) @ solution
    np.testing.assert_allclose(got["c"], bias, atol=1e-4)
    np.testing.assert_array_equal(got["a"], small.params["a"])


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("lenet", "unet", "scan_over_layers", "swin")]


@pytest.mark.parametrize("name", ["vit_fused", "gqa", "mixer", "lstm", "nnx_mlp", *SLOW])
def test_every_network_comes_nearer_on_its_calibration_data(name):
    fn, params, args = ARCHITECTURES[name]()
    small = prune(fn, params, *args, ratio=0.4)
    xs = batches(*args[0].shape, count=6)
    recovered = recover(small, fn, params, xs)
    dense, ours = jax.jit(fn), jax.jit(small.fn)

    def error(p):
        return sum(float(jnp.square(dense(params, x) - ours(p, x)).mean()) for x in xs)

    assert error(recovered) < 0.5 * error(small.params)


def test_a_running_mean_takes_the_place_of_the_bias():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(8)(x))
            x = nn.BatchNorm(use_running_average=True)(nn.Dense(5, use_bias=False)(x))
            return nn.relu(x).sum(1)

    model = Net()
    params = randomised(model.init(jax.random.key(0), data(2, 3)))
    small = prune(model.apply, params, data(2, 3), ratio=0.3, pin=lambda path: "BatchNorm" in path)
    got = recover(small, model.apply, params, batches(32, 3))
    assert (
        np.abs(got["batch_stats"]["BatchNorm_0"]["mean"] - small.params["batch_stats"]["BatchNorm_0"]["mean"]).max()
        > 0.01
    )
    np.testing.assert_array_equal(
        got["batch_stats"]["BatchNorm_0"]["var"], small.params["batch_stats"]["BatchNorm_0"]["var"]
    )


def test_shared_weights_stay():
    fn, params, args = ARCHITECTURES["recurrent"]()
    small = prune(fn, params, *args, ratio=0.4)
    got = recover(small, fn, params, batches(2, 5, 3))
    np.testing.assert_array_equal(got["wh"], small.params["wh"])


def test_bad_input_is_named():
    fn, params, args = ARCHITECTURES["mlp"]()
    small = prune(fn, params, *args, ratio=0.4)
    for ridge in (0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"ridge must be above 0 and finite, got {ridge}"):
            recover(small, fn, params, [args], ridge=ridge)
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        recover(small, fn, params, [])
    with pytest.raises(ValueError, match=r"batches must all have the shapes .* batch 1 has"):
        recover(small, fn, params, [data(4, 3), data(5, 3)])
    with pytest.raises(ValueError, match="plan is for another function"):
        recover(small, fn, {**params, "w3": data(3)}, [args])
    with pytest.raises(
        ValueError, match=r"parameter 'b0' of pruned must have shape \(\d,\) after this cut, got \(8,\)"
    ):
        recover(dataclasses.replace(small, params=params), fn, params, [args])


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_calibration_data_that_are_not_finite(bad):
    fn, params, _ = ARCHITECTURES["mlp"]()
    small = prune(fn, params, data(4, 3), ratio=0.4)
    with pytest.raises(
        ValueError, match=r"NaN or infinity of batch 1 reaches the layer of 'w1', .* leave such data out"
    ):
        recover(small, fn, params, [data(4, 3), data(4, 3).at[1, 1].set(bad)])


def test_a_named_tuple_is_one_argument():
    class Batch(NamedTuple):
        x: jax.Array
        y: jax.Array

    def net(p, batch):
        return jnp.tanh((batch.x + batch.y) @ p["a"]) @ p["b"]

    params, batch = weights(a=(3, 8), b=(8, 2)), Batch(data(9, 3), data(9, 3, seed=5))
    small = prune(net, params, batch, ratio=0.4)
    got, same = (recover(small, net, params, [b])["b"] for b in (batch, (batch,)))
    np.testing.assert_array_equal(got, same)


def test_recovering_again_is_no_worse_and_a_trained_bias_does_not_matter():
    """The bias that a layer is given depends on the dense one, not on what the smaller network had."""

    def net(p, x):
        return jnp.tanh(x @ p["a"] + p["c"][None]) @ p["b"] + p["d"][None]

    params, xs = weights(a=(4, 12), c=(12,), b=(12, 3), d=(3,)), batches(64, 4)
    small = prune(net, params, xs[0], ratio=0.5)
    once = recover(small, net, params, xs)
    again = recover(dataclasses.replace(small, params=once), net, params, xs)
    moved = recover(dataclasses.replace(small, params=small.params | {"d": small.params["d"] + 1}), net, params, xs)

    def error(recovered):
        return np.mean([jnp.square(small.fn(recovered, x) - net(params, x)).mean() for x in xs])

    assert error(small.params) > 2 * error(once)
    assert error(again) <= 1.001 * error(once)
    np.testing.assert_allclose(moved["d"], once["d"], atol=1e-4)
