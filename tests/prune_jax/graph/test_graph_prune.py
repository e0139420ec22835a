"""How many and which units go."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_architectures import ARCHITECTURES, data, weights
from graph_zeroing import check, size

from prune_jax.graph import dependency_groups, prune, squared_magnitude, unit_scores


def two_layers(scale=1.0):
    def net(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

    params = weights(a=(3, 10), b=(10, 20), c=(20, 2))
    return net, {**params, "c": scale * params["c"]}, (data(4, 3),)


def test_unit_scores_by_hand():
    fn, params, args = two_layers()
    groups = dependency_groups(fn, params, *args)
    a, b, c = (np.asarray(params[n], np.float64) for n in "abc")
    scores = {n: np.abs(p) for n, p in params.items()}
    into, out = np.abs(a).sum(0), np.abs(b).sum(1)
    np.testing.assert_allclose(unit_scores(groups, scores, normalise="none")[0], into + out, rtol=1e-6)
    np.testing.assert_allclose(
        unit_scores(groups, scores, aggregate="mean", normalise="none")[0], (into + out) / 2, rtol=1e-6
    )
    np.testing.assert_allclose(
        unit_scores(groups, scores, aggregate="max", normalise="none")[0], np.maximum(into, out), rtol=1e-6
    )
    np.testing.assert_allclose(unit_scores(groups, scores)[0], (into + out) / (into + out).mean(), rtol=1e-6)
    raw = np.abs(b).sum(0) + np.abs(c).sum(1)
    top = np.sort(raw)[-4:]
    np.testing.assert_allclose(unit_scores(groups, scores, normalise="top", top=0.2)[1], 4 * raw / top.sum(), rtol=1e-6)
    partial = unit_scores(groups, {**scores, "b": None}, normalise="none")
    np.testing.assert_allclose(partial[0], into, rtol=1e-6)


@pytest.mark.parametrize("normalise", ["mean", "top", "none"])
def test_scores_of_both_signs_keep_their_order(normalise):
    fn, params, args = two_layers()
    groups = dependency_groups(fn, params, *args)
    scores = {"a": params["a"] - 3, "b": None, "c": params["c"]}
    found = unit_scores(groups, scores, normalise=normalise)
    raw = np.asarray(scores["a"]).sum(0)
    assert raw.max() < 0
    np.testing.assert_array_equal(np.argsort(found[0]), np.argsort(raw))


def test_the_lowest_units_go():
    fn, params, args = two_layers()
    pruned = prune(fn, params, *args, ratio=0.3, scope="local")
    importance = (np.asarray(params["a"]) ** 2).sum(0) + (np.asarray(params["b"]) ** 2).sum(1)
    kept = np.sort(np.argsort(importance)[3:])
    assert pruned.plan["leaves"][0]["keep"][0]["positions"] == kept.tolist()


def test_local_cuts_every_tie_alike_and_global_the_weakest():
    fn, params, args = two_layers(scale=1e-3)
    local = prune(fn, params, *args, ratio=0.5, scope="local").params
    assert (local["a"].shape[1], local["c"].shape[0]) == (5, 10)
    raw = prune(fn, params, *args, ratio=0.5, normalise="none", importance=lambda p: {**p, "b": None, "a": p["a"] ** 2})
    assert raw.params["a"].shape[1] > 8  # c is tiny, so almost all 15 go from its layer
    assert raw.params["a"].shape[1] + raw.params["c"].shape[0] == 15
    by_name = prune(fn, params, *args, ratio=0.5, scope=lambda group: group.members[0].path).params
    assert jax.tree.map(jnp.shape, by_name) == jax.tree.map(jnp.shape, local)


def test_kind_scope_shares_a_budget_among_like_layers_only():
    def net(p, x):  # two layers of one form, then one with a bias
        h = jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"])
        return jnp.tanh(h @ p["c"] + p["bias"][None]) @ p["d"]

    params = weights(a=(3, 10), b=(10, 20), c=(20, 8), bias=(8,), d=(8, 2))
    args = (data(4, 3),)
    small, large = 1e-3 * (1 + np.arange(20)), 1.0 + np.arange(10)
    # the units of each layer, told by one leaf: those of b's outputs are far below a's, and c's below both
    scores = {
        "a": jnp.broadcast_to(large, (3, 10)),
        "b": None,
        "c": None,
        "bias": jnp.asarray(1e-6 * (1 + np.arange(8))),
        "d": None,
    }
    scores["b"] = jnp.zeros((10, 20)).at[0].set(small)
    widths = {}
    for scope in ("global", "kind", "local"):
        left = prune(net, params, *args, ratio=0.5, scope=scope, importance=scores, normalise="none").params
        widths[scope] = (left["a"].shape[1], left["b"].shape[1], left["c"].shape[1])
    # of 38 units 19: all but one of c's, then b's. Of the 30 alike 15, all b's, and of c's 8 its own half
    assert widths == {"global": (10, 8, 1), "kind": (10, 5, 4), "local": (5, 10, 4)}


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.9])
def test_ratio_counts_units(ratio):
    fn, params, args = two_layers()
    pruned = prune(fn, params, *args, ratio=ratio).params
    assert 30 - pruned["a"].shape[1] - pruned["c"].shape[0] == round(30 * ratio)


def test_ratio_by_tie_round_to_and_minimum():
    fn, params, args = two_layers()
    pruned = prune(fn, params, *args, ratio={1: 0.5}).params
    assert (pruned["a"].shape[1], pruned["c"].shape[0]) == (10, 10)
    pruned = prune(fn, params, *args, ratio=0.4, round_to=4, scope="local").params
    assert (pruned["a"].shape[1], pruned["c"].shape[0]) == (8, 12)
    pruned = prune(fn, params, *args, ratio=0.95, minimum=3).params
    assert (pruned["a"].shape[1], pruned["c"].shape[0]) == (3, 3)
    for options, widths in (
        ({"ratio": 0.1, "round_to": 4}, (8, 16)),  # never up beyond the size
        ({"ratio": 0.95, "round_to": 4, "minimum": 5}, (8, 8)),
        ({"ratio": 0.1, "round_to": 8, "minimum": 9}, (10, 16)),  # 8 would be too few, and 16 are not there
        ({"ratio": 0.0, "round_to": 8}, (10, 20)),
    ):
        pruned = prune(fn, params, *args, **options, scope="local").params
        assert (pruned["a"].shape[1], pruned["c"].shape[0]) == widths


@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_a_ratio_of_parameters_is_met(ratio):
    fn, _, args = two_layers()
    params = weights(a=(3, 100), b=(100, 200), c=(200, 2))
    pruned = check(fn, params, *args, ratio=ratio, of="parameters", tolerance=1e-4)
    assert 1 - size(pruned.params) / size(params) == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize("name", ["resnet", "scan_over_layers"])
def test_a_ratio_of_flops_is_met(name):
    fn, params, args = ARCHITECTURES[name]()
    dense = prune(fn, params, *args, ratio=0.0)
    pruned = prune(fn, params, *args, ratio=0.5, of="flops")

    def flops(fn, params):  # by XLA, from the compiled program without its loop
        with jax.disable_jit(False):
            return jax.jit(fn).lower(params, *args).cost_analysis()["flops"]

    if name == "resnet":
        assert flops(pruned.fn, pruned.params) / flops(dense.fn, dense.params) == pytest.approx(0.5, abs=0.08)
    width = {n: p.shape for n, p in pruned.params.items()} if name == "scan_over_layers" else None
    if width:
        d, h = width["embed"][1], width["w1"][2]
        assert (3 * d + 4 * 2 * d * h + 2 * d) / (3 * 6 + 4 * 2 * 6 * 8 + 2 * 6) == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, r"ratio must be in \[0, 1\), got 1.0"),
        ({"ratio": -0.1, "of": "flops"}, r"ratio must be in \[0, 1\), got -0.1"),
        ({"ratio": {7: 0.5}}, "ratio names tie 7, which cannot be cut"),
        ({"ratio": {0: 0.5}, "of": "flops"}, "with of='flops' give one number"),
        ({"ratio": 0.5, "of": "latency"}, "of must be 'units', 'parameters' or 'flops'"),
        ({"ratio": 0.5, "scope": "layer"}, "scope must be 'global'"),
        ({"ratio": 0.5, "kinds": ("heads",)}, "kinds must be among"),
        ({"ratio": 0.5, "round_to": 0}, "round_to must be a whole number of at least 1, got 0"),
        ({"ratio": 0.5, "minimum": 0}, "minimum must be a whole number of at least 1"),
        ({"ratio": 0.5, "aggregate": "median"}, "aggregate must be"),
        ({"ratio": 0.5, "normalise": "max"}, "normalise must be"),
        ({}, "give either ratio or target_latency"),
        ({"ratio": 0.5, "target_latency": 1.0}, "give either ratio or target_latency"),
        ({"target_latency": 1.0}, "measure says how long a network takes"),
        ({"ratio": 0.5, "rounds": 0}, "rounds must be a whole number of at least 1, got 0"),
        ({"ratio": 0.5, "rounds": 1.5}, "rounds must be a whole number of at least 1, got 1.5"),
        ({"ratio": 0.5, "round_to": 2.5}, "round_to must be a whole number"),
        ({"ratio": "0.5"}, "ratio must be a number in .*, got '0.5'"),
        ({"ratio": [0.5]}, r"ratio must be a number in .*, got \[0.5\]"),
        ({"ratio": {0: None}}, "ratio must be a number in .*, got {0: None}"),
        ({"ratio": {}}, "ratio is an empty dict, which cuts nothing"),
        ({"ratio": 0.5, "kinds": ()}, r"kinds must be a sequence of .*, got \(\)"),
        ({"ratio": 0.5, "kinds": "width"}, "kinds must be a sequence of .*, got 'width'"),
        ({"ratio": {0: 0.5}, "scope": "layer"}, "scope must be 'global'"),
        ({"target_latency": 0.0, "measure": lambda p: 1.0}, "target_latency must be a finite number above 0, got 0.0"),
        ({"target_latency": -1, "measure": lambda p: 1.0}, "target_latency must be a finite number above 0, got -1"),
        ({"target_latency": jnp.nan, "measure": lambda p: 1.0}, "target_latency must be a finite number above 0"),
        ({"target_latency": 1.0, "measure": lambda p: 0}, "what measure returns must be a finite .*, got 0"),
        ({"target_latency": 1.0, "measure": lambda p: None}, "what measure returns must be a finite .*, got None"),
        ({"target_latency": 1.0, "measure": lambda p: 1.0, "of": "flops"}, "of='flops' goes with ratio"),
        ({"ratio": 0.5, "rounds": 2, "between": lambda p: {"a": p.params["a"]}}, r"returned by between .*\['b', 'c'\]"),
        (
            {"ratio": 0.5, "rounds": 2, "between": lambda p: two_layers()[1]},
            r"parameter '[ac]' returned by between must have shape",
        ),
        ({"ratio": 0.5, "importance": {"a": jnp.full((3, 10), -jnp.inf), "b": None, "c": None}}, "hold -inf"),
        ({"ratio": 0.5, "importance": {"a": jnp.ones((3, 10)), "b": None, "c": None}}, "'b' axis 1 .* have no score"),
        ({"ratio": 0.5, "importance": lambda p: jax.tree.map(lambda w: jnp.inf + w, p)}, "score of .inf protects"),
        ({"ratio": 0.5, "importance": {"a": None}}, "scores must have the 3 leaves"),
        ({"ratio": 0.5, "importance": {"a": None, "b": None, "d": None}}, r"in one of them only: \['c', 'd'\]"),
        ({"ratio": 0.9, "of": "parameters", "minimum": 5}, r"cannot be removed: 0\.\d+ at most, .* minimum=5"),
        ({"ratio": 0.5, "importance": {"a": jnp.ones(3), "b": None, "c": None}}, r"'a' must have shape \(3, 10\)"),
        ({"ratio": 0.5, "importance": {"a": jnp.full((3, 10), jnp.nan), "b": None, "c": None}}, "hold NaN"),
    ],
)
def test_bad_input_is_named(options, message):
    fn, params, args = two_layers()
    with pytest.raises(ValueError, match=message):
        prune(fn, params, *args, **options)


@pytest.mark.parametrize("result", [lambda pruned: None, lambda pruned: pruned])
def test_between_must_return_parameters(result):
    fn, params, args = two_layers()
    with pytest.raises(TypeError, match=r"between must return parameters, .* got <class"):
        prune(fn, params, *args, ratio=0.5, rounds=2, between=result)


def test_values_must_be_known():
    fn, params, args = two_layers()
    with pytest.raises(TypeError, match="params must be arrays, but 'a' is a shape"):
        prune(fn, jax.eval_shape(lambda: params), *args, ratio=0.5)
    with pytest.raises(TypeError, match=r"scores of 'a' are traced: .* prune outside jax\.jit"):
        jax.jit(lambda p: prune(fn, p, *args, ratio=0.5).params)(params)
    known = prune(fn, params, *args, ratio=0.5)  # scores may be known where parameters are not
    cut = jax.jit(lambda p: prune(fn, p, *args, ratio=0.5, importance=jax.tree.map(np.square, params)).params)(params)
    assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, known.params)


@pytest.mark.parametrize("aggregate", ["sum", "mean", "max"])
@pytest.mark.parametrize("normalise", ["mean", "top", "none"])
def test_infinite_scores_protect(aggregate, normalise):
    fn, params, args = two_layers()
    protected = np.argsort((np.asarray(params["a"]) ** 2).sum(0) + (np.asarray(params["b"]) ** 2).sum(1))[:3]
    scores = {**jax.tree.map(jnp.square, params), "a": jnp.square(params["a"]).at[1, protected].set(jnp.inf)}
    options = {"aggregate": aggregate, "normalise": normalise}
    found, usual = (unit_scores(dependency_groups(fn, params, *args), s, **options)[0] for s in (scores, params))
    finite = np.isfinite(found)
    assert set(np.flatnonzero(~finite)) == set(protected)
    assert np.isfinite(usual).all()
    if (aggregate, normalise) == ("sum", "mean"):
        assert np.abs(found[finite]).mean() == pytest.approx(1)
    for scope in ("local", "global"):
        pruned = prune(fn, params, *args, ratio=0.6, scope=scope, importance=scores, rounds=2, **options)
        assert set(protected) <= set(pruned.plan["leaves"][0]["keep"][0]["positions"])


def test_ties_without_a_score():
    fn, params, args = two_layers()
    scores = {"a": jnp.square(params["a"]), "b": None, "c": None}
    units = unit_scores(dependency_groups(fn, params, *args), scores)
    assert np.isnan(units[1]).all()
    assert not np.isnan(units[0]).any()

    def widths(**options):
        cut = prune(fn, params, *args, **options)
        return cut.params["a"].shape[1], cut.params["c"].shape[0], cut.plan["leaves"][2]["keep"]

    assert widths(ratio=0.3, importance=scores)[:2] == (1, 20)
    assert widths(ratio=0.2, of="parameters", importance=scores)[1] == 20
    first = [{"axis": 0, "rows": [], "positions": list(range(10, 20))}]
    assert widths(ratio=0.5, scope="local", importance=scores) == (5, 10, first)
    assert widths(ratio={1: 0.5}, importance=scores) == (10, 10, first)
    assert widths(ratio=0.5, scope="local", importance=dict.fromkeys("abc")) == (5, 10, first)
    assert sum(widths(ratio=0.5, importance=dict.fromkeys("abc"))[:2]) == 15


@pytest.mark.parametrize("other", [{"bias": None}, {"scale": 0.5}, {"empty": jnp.zeros(0)}])
def test_leaves_of_other_kinds_stay(other):
    fn, params, args = two_layers()
    pruned = prune(
        lambda p, x: fn(p, x) * p.get("scale", 1.0) + jnp.sum(p.get("empty", 0)), {**params, **other}, *args, ratio=0.5
    )
    jax.tree.map(np.testing.assert_array_equal, {n: pruned.params[n] for n in other}, other)
    usual = prune(fn, params, *args, ratio=0.5).params
    jax.tree.map(np.testing.assert_array_equal, {n: pruned.params[n] for n in usual}, usual)
    assert pruned.fn(pruned.params, *args).shape == (4, 2)


def test_small_half_precision_parameters_are_told_apart():
    _, params, _ = two_layers()
    small = jax.tree.map(lambda p: (1e-5 * p).astype(jnp.float16), params)
    scores = squared_magnitude(small)
    assert {x.dtype for x in jax.tree.leaves(scores)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(scores["c"], np.square(np.asarray(small["c"], np.float64)), rtol=1e-5)


@pytest.mark.parametrize(
    ("pin", "error", "message"),
    [
        (["a"], TypeError, r"pin must be a function of a path, or a dict .*, got \['a'\]"),
        ("a", TypeError, "pin must be a function of a path, or a dict .*, got 'a'"),
        (None, TypeError, "pin must be a function of a path, or a dict .*, got None"),
        ({"a": 1.0}, TypeError, "pin must give 'a' an axis or a sequence of axes, which are integers, got 1.0"),
        ({"a": None}, TypeError, "pin must give 'a' an axis .*, got None"),
        ({"a": True}, TypeError, "pin must give 'a' an axis .*, got True"),
        ({"a": [0, "1"]}, TypeError, r"pin must give 'a' an axis .*, got \[0, '1'\]"),
        ({"d/e": 0}, ValueError, "pin names 'd/e', which is more than one parameter"),
    ],
)
def test_a_pin_of_the_wrong_type(pin, error, message):
    fn, params, args = two_layers()
    params = {**params, "d/e": jnp.ones(3), "d": {"e": jnp.ones((3, 4))}}
    with pytest.raises(error, match=message):
        dependency_groups(fn, params, *args, pin=pin)
    assert len(dependency_groups(fn, params, *args, pin={"a": np.array([0, -1])})) == 1


@pytest.mark.parametrize("pin", [lambda path: path == "c", {"c": 0}, {"b": 1}])
def test_a_pinned_axis_cannot_be_asked_for(pin):
    fn, params, args = two_layers()
    message = r"ratio names tie 1, which cannot be cut; ties that can, with what is pinned .*: \[0\]"
    with pytest.raises(ValueError, match=message):
        prune(fn, params, *args, ratio={1: 0.5}, pin=pin)


def test_arguments_of_the_wrong_shape():
    fn, params, _ = two_layers()
    wrong = r"fn itself fails .* arguments of shapes args\[0\] float32\[4, 5\]: TypeError: dot_general requires"
    for call in (dependency_groups, partial(prune, ratio=0.5)):
        with pytest.raises(ValueError, match=wrong) as error:
            call(fn, params, data(4, 5))
        assert isinstance(error.value.__cause__, TypeError)
    convolution, variables, _ = ARCHITECTURES["lenet"]()
    with pytest.raises(ValueError, match=r"args\[0\] float32\[2, 8, 8, 3\]: ScopeParamShapeError"):
        prune(convolution, variables, data(2, 8, 8, 3), ratio=0.5)  # of three channels instead of one


def test_a_ratio_of_flops_is_met_to_one_percent():
    fn, _, args = two_layers()
    params = weights(a=(3, 100), b=(100, 200), c=(200, 2))
    pruned = prune(fn, params, *args, ratio=0.5, of="flops").params

    def flops(p):  # of the three products
        return sum(p[n].size for n in "abc")

    assert flops(pruned) / flops(params) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_latency_is_met(rounds):
    fn, _, args = two_layers()
    params = jax.tree.map(np.asarray, weights(a=(3, 100), b=(100, 200), c=(200, 2)))  # cut without compiling
    asked = []

    def milliseconds(candidate):  # of a machine whose time is overhead and work
        asked.append(1)
        return 2.0 + 1e-4 * sum(x.size for x in jax.tree.leaves(candidate.params))

    whole = milliseconds(prune(fn, params, *args, ratio=0.0))
    options = {"target_latency": 0.75 * whole, "measure": milliseconds, "rounds": rounds}
    pruned = prune(fn, params, *args, **options)
    assert milliseconds(pruned) == pytest.approx(0.75 * whole, rel=0.01)
    assert len(asked) < 20 * rounds
    # nothing is cut where the network is fast enough
    assert prune(fn, params, *args, **{**options, "target_latency": 2 * whole}).params["a"].shape == (3, 100)
    with pytest.raises(ValueError, match=r"target_latency=1 cannot be reached: .* takes 2\.\d+, the whole one 4\.\d+"):
        prune(fn, params, *args, **{**options, "target_latency": 1.0})


def test_rounds_score_anew_and_reach_the_same_size():
    fn, params, args = two_layers()
    seen = []

    def importance(p):
        seen.append(p)
        return jax.tree.map(jnp.square, p)

    def reverse_what_is_left(pruned):  # what was large becomes small
        return {n: 1 / p for n, p in pruned.params.items()}

    options = {"ratio": 0.6, "scope": "local", "importance": importance}
    pruned = prune(fn, params, *args, rounds=2, between=reverse_what_is_left, **options)
    assert jax.tree.map(jnp.shape, pruned.params) == {"a": (3, 4), "b": (4, 8), "c": (8, 2)}
    dense, once = seen
    np.testing.assert_array_equal(dense["a"], params["a"])
    lost = np.asarray((once["a"] == 0).all(0))
    assert once["a"].shape == (3, 10)
    assert lost.sum() == round(10 * (1 - 0.4**0.5))  # each round keeps the same fraction
    np.testing.assert_allclose(once["a"][:, ~lost], 1 / params["a"][:, ~lost], rtol=1e-6)
    kept = pruned.plan["leaves"][0]["keep"][0]["positions"]
    assert not set(kept) & set(np.flatnonzero(lost))
    np.testing.assert_allclose(pruned.params["a"], once["a"][:, np.array(kept)], rtol=1e-6)
    everything = prune(fn, params, *args, **options).plan
    assert everything["leaves"][0]["keep"][0]["positions"] != kept
    check(fn, params, *args, ratio=0.6, rounds=3)


@pytest.mark.slow
def test_rounds_of_rows_and_blocks():
    fn, params, args = ARCHITECTURES["vit_linen"]()
    check(fn, params, *args, ratio=0.6, rounds=3, scope="local", kinds=("width", "block"))
