"""Masks: exact counts, deterministic ties, scopes, patterns; against NumPy's stable sort."""

import math
from fractions import Fraction

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from prune_jax import apply_masks, layer_statistics, make_masks, make_nm_masks, sparsity
from prune_jax.selection import keep_largest

VALUES = np.array([-np.inf, -3.5, -1.0, -1e-30, -0.0, 0.0, 1e-30, 0.25, 1.0, 1.0, 2.0, 7.0, np.inf], np.float32)


def stable_cut(scores, k):
    """The rule in NumPy: the k smallest, earlier ones first among equals."""
    flat = np.concatenate([np.ravel(s) for s in scores]) if scores else np.zeros(0)
    keep = np.ones(flat.size, bool)
    keep[np.argsort(flat, kind="stable")[:k]] = False
    edges = np.cumsum([0, *(np.size(s) for s in scores)])
    return [keep[a:b].reshape(np.shape(s)) for a, b, s in zip(edges, edges[1:], scores, strict=False)]


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 10**6), st.booleans())
def test_global_masks_equal_a_stable_sort(seed, millionths, many_ties):
    fraction = millionths / 10**6
    rng = np.random.default_rng(seed)
    shapes = [(3, 4), (5,), (2, 2, 2)]  # the same shapes each time: one compilation
    draw = (lambda s: rng.choice(VALUES[rng.integers(0, 13, 3)], s)) if many_ties else (lambda s: rng.normal(size=s))
    scores = [draw(shape).astype(np.float32) for shape in shapes]
    masks = make_masks([jnp.asarray(s) for s in scores], fraction)
    for mask, expected in zip(masks, stable_cut(scores, math.floor(Fraction(repr(fraction)) * 25)), strict=True):
        np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_every_dtype_is_ranked_exactly(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        rng = np.random.default_rng(0)
        # In float64 neighbours differ by less than float32 can tell.
        base = 1 + np.arange(200) * 1e-12 if dtype == jnp.float64 else np.linspace(-3, 3, 200)
        scores = jnp.asarray(rng.permutation(base), dtype)
        for k in (0, 1, 57, 199, 200):
            (mask,) = keep_largest([scores], jnp.uint32(k))
            np.testing.assert_array_equal(mask, stable_cut([np.asarray(scores).astype(np.float64)], k)[0])


@pytest.mark.parametrize("n", [1, 7, 10, 100])
def test_counts_are_exact_in_decimals(n):
    scores = {"w": jnp.zeros(n)}  # all tied
    for percent in range(0, 101):
        for number in (percent / 100, 1 - (100 - percent) / 100, np.float32(percent / 100), jnp.float32(percent / 100)):
            mask = make_masks(scores, number)["w"]
            np.testing.assert_array_equal(mask, np.arange(n) >= percent * n // 100)


def test_nearly_all_is_not_all():
    assert make_masks({"w": jnp.zeros(10)}, 1 - 1e-12)["w"].sum() == 1


def test_blocks_are_summed_in_float32():
    score = jnp.full((2, 4), 1.0, jnp.float16).at[:, :2].set(60000.0)
    mask = make_masks({"w": score}, 0.5, block=(2, 2))["w"]
    np.testing.assert_array_equal(mask, score > 1)
    with pytest.raises(ValueError, match="scores are NaN in \\['w'\\]"):
        make_masks({"w": jnp.array([[jnp.inf, -jnp.inf]])}, 0.5, block=(1, 2))


@pytest.mark.parametrize("block", [2, (2,), (2, 2, 2), (0, 2), (2, 1.5)])
def test_a_block_is_two_whole_numbers(block):
    with pytest.raises(ValueError, match="block"):
        make_masks({"w": jnp.ones((4, 4))}, 0.5, block=block)


def test_masks_are_bool():
    params = {"w": jnp.ones(3)}
    for function in (lambda m: apply_masks(params, m), sparsity, jax.jit(sparsity), layer_statistics):
        for dtype in (jnp.float32, jnp.uint8):
            with pytest.raises(TypeError, match=f"'w' has dtype {jnp.dtype(dtype)}, masks are bool"):
                function({"w": jnp.ones(3, dtype)})


def test_containers_of_other_types_do_not_match():
    with pytest.raises(ValueError, match="masks do not match params"):
        apply_masks(flax.core.freeze({"w": jnp.ones(3)}), {"w": jnp.ones(3, bool)})


def test_scopes_decide_what_competes():
    scores = {"a": jnp.arange(10.0), "b": 100 + jnp.arange(10.0), "c": 200 + jnp.arange(20.0), "skip": None}

    def kept(masks):
        return {path: layer.kept for path, layer in layer_statistics(masks).items()}

    assert kept(make_masks(scores, 0.5)) == {"a": 0, "b": 0, "c": 20}
    assert kept(make_masks(scores, 0.5, scope="local")) == {"a": 5, "b": 5, "c": 10}
    by_module = make_masks(scores, 0.5, scope={"a": "x", "b": "x", "c": None}.get)
    assert kept(by_module) == {"a": 0, "b": 10}
    assert by_module["c"] is None
    assert by_module["skip"] is None


def test_exclude_by_pattern_or_predicate_leaves_the_rest_exact():
    scores = {"block": {"kernel": jnp.arange(10.0)}, "head": {"kernel": jnp.zeros(10)}}
    for exclude in ("^head/", lambda path: path.startswith("head")):
        masks = make_masks(scores, 0.3, exclude=exclude)
        assert masks["head"]["kernel"] is None
        assert sparsity(masks) == pytest.approx(0.3)
    assert make_nm_masks({"w": jnp.ones((4, 1)), "odd": jnp.ones((3, 1))}, exclude="odd")["odd"] is None


def test_blocks_are_cut_whole_by_their_sums():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 4, 6)).astype(np.float32)
    sums = scores.reshape(3, 2, 2, 2, 3).sum((2, 4))
    mask = np.asarray(make_masks({"w": jnp.asarray(scores)}, 0.5, block=(2, 3))["w"])
    (expected,) = stable_cut([sums], int(0.5 * sums.size))
    np.testing.assert_array_equal(mask, np.repeat(np.repeat(expected, 2, 1), 3, 2))


@pytest.mark.parametrize(("n", "m", "axis"), [(2, 4, -2), (1, 4, -1), (0, 2, 0), (3, 3, -2), (4, 8, 0)])
def test_nm_keeps_n_of_every_m_along_the_axis(n, m, axis):
    rng = np.random.default_rng(0)
    shape = [3, 3, 3]
    shape[axis] = 2 * m
    scores = rng.choice([1.0, 2.0, 3.0, 4.0], shape).astype(np.float32)
    mask = np.moveaxis(np.asarray(make_nm_masks({"w": jnp.asarray(scores)}, n, m, axis=axis)["w"]), axis, -1)
    rows = np.moveaxis(scores, axis, -1).reshape(-1, m)
    expected = np.stack([stable_cut([row], m - n)[0] for row in rows])
    np.testing.assert_array_equal(mask.reshape(-1, m), expected)


def test_apply_masks_gives_exact_zeros_whatever_was_there():
    params = {"w": jnp.array([jnp.nan, jnp.inf, -1.0, 2.0], jnp.bfloat16), "bias": jnp.ones(2)}
    masks = {"w": jnp.array([False, False, False, True]), "bias": None}
    result = apply_masks(params, masks)
    np.testing.assert_array_equal(result["w"].astype(jnp.float32), [0, 0, 0, 2])
    assert result["w"].dtype == jnp.bfloat16
    assert result["bias"] is params["bias"]
    gradient = jax.grad(lambda p: apply_masks(p, {"w": masks["w"], "bias": None})["w"].astype(jnp.float32).sum())(
        params
    )
    np.testing.assert_array_equal(gradient["w"].astype(jnp.float32), [0, 0, 0, 1])  # cut weights get no gradient


def test_masks_jit_and_none_stands_for_a_subtree():
    params = {"a": {"x": jnp.ones((2, 2)), "y": jnp.ones(3)}, "b": jnp.ones((2, 2))}
    masks = jax.jit(lambda s: make_masks(s, 0.5))({"a": None, "b": jnp.arange(4.0).reshape(2, 2)})
    result = jax.jit(apply_masks)(params, masks)
    np.testing.assert_array_equal(result["b"], [[0, 0], [1, 1]])
    assert float(jax.jit(sparsity)(masks)) == 0.5


def test_sharded_scores_give_the_same_masks():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    scores = {"a": jnp.asarray(np.random.default_rng(0).integers(0, 9, (8, 6)), jnp.float32), "b": jnp.arange(16.0)}
    sharded = jax.device_put(scores, NamedSharding(mesh, PartitionSpec("data")))
    masks, expected = make_masks(sharded, 0.6), make_masks(scores, 0.6)
    for key in scores:
        np.testing.assert_array_equal(masks[key], expected[key])


def test_empty_trees_and_leaves():
    assert make_masks({}, 0.5) == {}
    assert make_masks({"a": None}, 0.5) == {"a": None}
    assert sparsity({"a": None}) == 0
    masks = make_masks({"a": jnp.zeros((0, 3)), "b": jnp.arange(4.0)}, 0.5)
    assert masks["a"].shape == (0, 3)
    assert sparsity(masks) == 0.5


def test_statistics_add_up():
    masks = make_masks({"a": jnp.arange(10.0), "b": jnp.arange(30.0)}, 0.25)
    layers = layer_statistics(masks)
    assert sum(layer.kept for layer in layers.values()) == 30
    assert all(layer.sparsity == pytest.approx(1 - layer.kept / layer.total) for layer in layers.values())


@pytest.mark.parametrize("bad", [-0.01, 1.01, float("nan"), float("inf")])
def test_sparsity_outside_the_unit_interval_is_refused(bad):
    with pytest.raises(ValueError, match="fraction removed and must be in"):
        make_masks({"w": jnp.ones(3)}, bad)


def test_wrong_arguments_are_refused():
    scores = {"layer": {"w": jnp.array([[1.0, jnp.nan]])}, "ok": jnp.ones((1, 2))}
    with pytest.raises(ValueError, match=r"NaN in \['layer/w'\]"):
        make_masks(scores, 0.5)
    with pytest.raises(ValueError, match=r"NaN in \['layer/w'\]"):
        make_nm_masks(scores, 1, 2, axis=-1)
    make_masks(scores, 0.5, exclude="layer")  # what is not used may be NaN
    with pytest.raises(TypeError, match="int32"):
        make_masks({"w": jnp.arange(3)}, 0.5)
    with pytest.raises(TypeError, match="number in"):
        make_masks({"w": jnp.ones(3)}, "half")
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda s: make_masks({"w": jnp.ones(3)}, s))(0.5)
    with pytest.raises(ValueError, match="'global', 'local' or a function"):
        make_masks({"w": jnp.ones(3)}, 0.5, scope="layer")
    with pytest.raises(ValueError, match="block"):
        make_masks({"w": jnp.ones((3, 4))}, 0.5, block=(2, 2))
    with pytest.raises(ValueError, match="m=4 does not divide axis -2 of 'w'"):
        make_nm_masks({"w": jnp.ones((3, 4))})
    with pytest.raises(ValueError, match="n=5, m=4"):
        make_nm_masks({"w": jnp.ones((4, 4))}, 5, 4)


def test_masks_of_another_tree_are_refused_by_path():
    params = {"a": jnp.ones(3), "b": {"c": jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"masks without a leaf \['d'\], leaves without a mask \['b/c'\]"):
        apply_masks(params, {"a": jnp.ones(3, bool), "d": jnp.ones(2, bool)})
    with pytest.raises(ValueError, match=r"'a' has shape \(4,\), params has \(3,\)"):
        apply_masks(params, {"a": jnp.ones(4, bool), "b": None})
