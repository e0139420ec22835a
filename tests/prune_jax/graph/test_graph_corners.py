"""Small functions of unusual shape: what is cut is what was zeroed, and what nothing reads stays."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_zeroing import check
from jax import lax

from prune_jax.graph import dependency_groups, prune

X = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)


def weights(**shapes):
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def shapes(params):
    return {name: x.shape for name, x in params.items()}


def gram(p, x):
    h = x @ p["a"]
    return (h[:, :, None] * h[:, None]).reshape(len(x), -1) @ p["b"]


def channels_first(p, x):
    h = jax.nn.relu(x @ p["a"]).reshape(-1, 4, 2, 2)
    return lax.conv_general_dilated(h, p["b"], (1, 1), "SAME", dimension_numbers=("NCHW", "HWIO", "NCHW")).sum((2, 3))


def ensemble(p, x):
    def conv(image, kernel):
        return lax.conv_general_dilated(image[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    images = (x @ p["a"]).reshape(-1, 2, 2, 6)
    return jax.vmap(lambda kernel: jax.vmap(conv, (0, None))(images, kernel))(p["k"]).sum((0, 2, 3, 4)) @ p["b"]


CASES = {
    "roll by nothing": (lambda p, x: jnp.roll(x @ p["a"], 0, 1) @ p["b"], (3, 8), (8, 2)),
    "roll by all": (lambda p, x: jnp.roll(x @ p["a"], 8, 1) @ p["b"], (3, 8), (8, 2)),
    "roll heads by all": (
        lambda p, x: jnp.roll((x @ p["a"]).reshape(-1, 2, 4), 2, 1).reshape(-1, 8) @ p["b"],
        (3, 8),
        (8, 2),
    ),
    "empty slice": (lambda p, x: jnp.concatenate([(h := x @ p["a"])[:, 8:], h], 1) @ p["b"], (3, 8), (8, 2)),
    "empty piece": (lambda p, x: jnp.concatenate(jnp.split(x @ p["a"], [0, 4], 1), 1) @ p["b"], (3, 8), (8, 2)),
    "empty index": (lambda p, x: (h := x @ p["a"]) @ p["b"] + h[:, np.zeros(0, int)].sum(), (3, 8), (8, 2)),
    "an axis with itself": (gram, (3, 4), (16, 2)),
    "channels first": (channels_first, (3, 16), (3, 3, 4, 2)),
    "column order": (
        lambda p, x: jnp.tanh(jnp.reshape(x @ p["a"], (-1, 2, 4), order="F")).reshape(-1, 8, order="F") @ p["b"],
        (3, 8),
        (8, 2),
    ),
    "a table between": (
        lambda p, x: jnp.interp(x @ p["a"], jnp.arange(4.0), jnp.arange(4.0) ** 2) @ p["b"],
        (3, 8),
        (8, 2),
    ),
    "noise of a key in the program": (
        lambda p, x: jnp.tanh(x @ p["a"] + jax.random.normal(jax.random.key(0), (4, 8))) @ p["b"],
        (3, 8),
        (8, 2),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_half_is_cut_and_cutting_is_zeroing(name):
    fn, a, b = CASES[name]
    params = weights(a=a, b=b)
    small = check(fn, params, X, ratio=0.5, scope="local").params
    assert small["a"].shape == (3, a[1] // 2)
    assert small["b"].size < params["b"].size


def test_random_features_keep_their_values():
    def net(p, x):
        return jnp.tanh(x @ jax.random.normal(jax.random.key(0), (3, 16))) @ p["b"]

    assert check(net, weights(b=(16, 2)), X, ratio=0.5).params["b"].shape == (8, 2)


def test_kernels_that_are_mapped_over():
    params = weights(a=(3, 24), k=(5, 3, 3, 6, 4), b=(4, 2))
    small = check(ensemble, params, X, ratio=0.5, scope="local").params
    assert shapes(small) == {"a": (3, 12), "k": (5, 3, 3, 3, 2), "b": (2, 2)}


def test_noise_of_mapped_keys_has_the_size_of_its_neighbour():
    def dropped(p, x, key):
        h = jnp.tanh(x @ p["a"])
        return (h * jax.random.bernoulli(key, 0.5, h.shape)) @ p["b"]

    params, keys = weights(a=(3, 8), b=(8, 2)), jax.random.split(jax.random.key(0), 4)
    small = prune(jax.vmap(dropped, (None, 0, 0)), params, X, keys, ratio=0.5)
    assert small.params["a"].shape == (3, 4)
    assert small.fn(small.params, X, keys).shape == (4, 2)


@pytest.mark.parametrize("take", [lambda pos, t: pos[:t], lambda pos, t: jnp.take(pos, jnp.arange(t), axis=0)])
def test_positions_beyond_the_example_s_length_stay(take):
    def net(p, tokens):
        return jnp.tanh((p["table"][tokens] + take(p["pos"], tokens.shape[1])[None]) @ p["a"]) @ p["b"]

    params = weights(table=(11, 6), pos=(16, 6), a=(6, 8), b=(8, 2))
    small = prune(net, params, jnp.array([[1, 2, 3]]), ratio=0.5, scope="local")
    assert shapes(small.params) == {"table": (11, 3), "pos": (16, 3), "a": (3, 4), "b": (4, 2)}
    assert small.fn(small.params, jnp.array([[1, 2, 3, 4, 5]])).shape == (1, 5, 2)


def test_what_one_slice_leaves_another_may_read():
    def net(p, x):
        return jnp.tanh(x @ p["a"][:, :4]) @ p["b"][:4] + jnp.tanh(x @ p["a"][:, 4:]) @ p["b"][4:]

    small = check(net, weights(a=(3, 8), b=(8, 2)), X, ratio=0.5, scope="local").params
    assert shapes(small) == {"a": (3, 4), "b": (4, 2)}


@pytest.mark.parametrize("seed", range(4))
def test_groups_that_would_empty_an_axis_together_do_not(seed):
    def net(p, x):
        h = (jnp.tanh((x @ p["a"]).reshape(-1, 4, 2)) * p["s"][None, None]).reshape(len(x), -1)
        return h[:, 1:3] @ p["b"] + h @ p["c"]

    params = weights(a=(3, 8), s=(2,), b=(2, 2), c=(8, 2))
    rng = np.random.default_rng(seed)
    importance = jax.tree.map(lambda x: rng.random(x.shape), params)
    options = {"ratio": 0.5, "scope": "local", "kinds": ("width", "block"), "importance": importance}
    small = check(net, params, X, **options).params
    assert small["b"].shape[0] > 0
    assert small["a"].size < params["a"].size


def test_pixels_do_not_make_a_block_of_a_channel():
    (group,) = dependency_groups(channels_first, weights(a=(3, 16), b=(3, 3, 4, 2)), X)
    assert (group.kind, group.size) == ("width", 4)


def test_what_keeps_an_axis_is_named():
    def net(p, x):
        return jnp.sort(x @ p["a"]) @ p["b"]

    groups = dependency_groups(net, weights(a=(3, 8), b=(8, 2), unused=(5, 1)), X, pin={"b": 0})
    why = {(row["path"], row["axis"]): row["why"] for row in groups.frozen()}
    here = r"at test_graph_corners.py:\d+ \(.*net\)"
    for axis, reason in {
        ("a", 0): f"dot_general {here}",
        ("a", 1): f"sort {here}",
        ("b", 0): "it is pinned, or the function does not use it",
        ("b", 1): "an output has its size",
        ("unused", 0): "it is pinned, or the function does not use it",
    }.items():
        assert re.fullmatch(reason, why.pop(axis)), axis
    assert not why
    assert str(groups).startswith("nothing can be cut; what keeps each axis:\n    a axis 0: dot_general")


def test_what_goes_is_not_named_as_kept():
    rows = dependency_groups(gram, weights(a=(3, 4), b=(16, 2)), X).frozen()
    assert [(row["path"], row["axis"]) for row in rows] == [("a", 0), ("b", 1)]


def test_the_vocabulary_of_a_one_hot_embedding_stays():
    def net(p, tokens):
        return jnp.tanh(jax.nn.one_hot(tokens, 11) @ p["table"]) @ p["b"]

    small = check(net, weights(table=(11, 6), b=(6, 2)), jnp.array([[1, 2, 3]]), ratio=0.5, scope="local").params
    assert shapes(small) == {"table": (11, 3), "b": (3, 2)}


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        (lambda p, x: jnp.sort(x @ p["a"]) @ p["b"], {}, "no group of kinds=.'width',. to cut.*a axis 1: sort at"),
        (lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"kinds": ("block",)}, "no group of kinds=.'block',. .*width: 8"),
    ],
)
def test_nothing_to_cut_is_an_error_that_says_why(net, options, message):
    params = weights(a=(3, 8), b=(8, 2))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        prune(net, params, X, ratio=0.5, **options)
    assert shapes(prune(net, params, X, ratio=0.0, **options).params) == shapes(params)


def test_precision_is_that_of_the_call():
    params = weights(a=(3, 8), b=(8, 2))
    small = prune(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, X, ratio=0.5)
    with jax.default_matmul_precision("float32"):
        assert str(jax.make_jaxpr(small.fn)(small.params, X)).count("precision=(Precision.HIGHEST") == 2
    assert "Precision.HIGHEST" not in str(jax.make_jaxpr(small.fn)(small.params, X))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_parameters_that_only_dead_code_reads_stay(wrap) -> None:
    def both(p, x):
        h = jnp.tanh(x @ p["a"])
        return h @ p["b"], h @ p["aux"] + p["bias"][None]

    params = weights(a=(3, 8), b=(8, 2), aux=(8, 10), bias=(10,), unused=(4, 6))
    found = shapes(check(wrap(lambda p, x: both(p, x)[0]), params, X, ratio=0.5).params)
    assert found == {"a": (3, 4), "b": (4, 2), "aux": (8, 10), "bias": (10,), "unused": (4, 6)}


@pytest.mark.parametrize("start", [lambda p, x: p["s"][0], lambda p, x: x[:, :1]], ids=["parameter", "argument"])
def test_running_sums_of_copies_are_told_by_their_positions(start) -> None:
    """The third of eight copies adds up three of them, also where the second is gone."""

    def net(p, x):
        return (jnp.tanh(x @ p["a"]) * jnp.cumsum(jnp.broadcast_to(start(p, x), (len(x), 8)), 1)) @ p["b"]

    with pytest.raises(ValueError, match="a axis 1"):
        prune(net, weights(a=(3, 8), b=(8, 2), s=(1,)), X, ratio=0.5)


def test_running_maxima_of_copies_are_alike() -> None:
    def net(p, x):
        return (jnp.tanh(x @ p["a"]) * lax.cummax(jnp.broadcast_to(x[:, :1], (len(x), 8)), 1)) @ p["b"]

    assert check(net, weights(a=(3, 8), b=(8, 2)), X, ratio=0.5).params["a"].shape == (3, 4)


@pytest.mark.parametrize(("units", "read"), [(3, (2, 2)), (6, (2, 2)), (6, (4, 2))])
def test_rows_of_a_merged_axis_do_not_depend_on_what_depends_on_them(units, read) -> None:
    def net(p, x):
        h = (x @ p["a"]).reshape(4, 2, 2, units).transpose(0, 3, 1, 2)
        return h.reshape(4, 2 * units, 2) @ p["b"] if read[0] == 2 else h.reshape(4, units, 4) @ p["b"]

    check(net, weights(a=(3, 4 * units), b=read), X, ratio=0.5, scope="local", kinds=("width", "block"))


def test_the_gradient_of_a_grouped_convolution_inside_of_the_function() -> None:
    def energy(x, p):
        h = lax.conv_general_dilated(
            (x @ p["a"])[:, :, None].transpose(0, 2, 1), p["k"], (1,), "SAME", feature_group_count=2,
            dimension_numbers=("NWC", "WIO", "NWC"),
        )  # fmt: skip
        return (jnp.tanh(h) @ p["b"]).sum()

    params = weights(a=(3, 4), k=(3, 2, 6), b=(6, 2))
    check(lambda p, x: jax.grad(energy)(x, p), params, X, ratio=0.5, scope="local")


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda h, p: h.at[:, 2:5].set(0.0), id="slice"),
        pytest.param(lambda h, p: h.at[:, :3].add(X), id="argument"),
        pytest.param(lambda h, p: h.at[:, jnp.array([6, 1])].multiply(2.0), id="several"),
        pytest.param(lambda h, p: h.at[:, jnp.array([1, 1, 4])].add(jnp.ones((4, 3))), id="twice"),
        pytest.param(lambda h, p: h.at[:, 3].set(0.5), id="one"),
        pytest.param(lambda h, p: h.at[:, 1:7:2].min(p["d"][None]), id="parameter"),
        pytest.param(lambda h, p: h.at[:, :4].add(jnp.tanh(h[:, 4:])), id="itself"),
        pytest.param(lambda h, p: h.at[:, :4].set(jnp.concatenate([-h[:, 2:4], h[:, :2]], 1)), id="rotated"),
        pytest.param(lambda h, p: jnp.zeros((4, 16)).at[:, 4:12].set(h)[:, 2:10], id="padded"),
        pytest.param(lambda h, p: (h.T.at[:, 1:3].set(0.0)).T, id="rows"),
    ],
)
def test_writing_at_known_places(write) -> None:
    def net(p, x):
        return write(jnp.tanh(x @ p["a"]), p) @ p["b"]

    small = check(net, weights(a=(3, 8), b=(8, 2), d=(3,)), X, ratio=0.5)
    assert small.params["a"].shape[1] < 8


def test_writing_at_places_known_only_when_it_runs() -> None:
    def net(p, x, i):
        return jnp.tanh(x @ p["a"]).at[:, i].set(0.0) @ p["b"] @ p["c"]

    small = check(net, weights(a=(3, 8), b=(8, 6), c=(6, 2)), X, jnp.arange(2), ratio=0.5)
    assert jax.tree.map(jnp.shape, small.params) == {"a": (3, 8), "b": (8, 3), "c": (3, 2)}
