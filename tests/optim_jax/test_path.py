"""The path's results against brute force over sorted lists."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim_jax import (
    NEVER,
    GroupLasso,
    PenaltyRule,
    SparseGroup,
    activation_order,
    dessilbi,
    layer_sparsity,
    path_masks,
    prune_by_path,
    restrict_to_support,
    sparse_params,
    support_masks,
)


def trained(seed=0, steps=60, penalty=None):
    """Weights held by a quadratic loss, of filters and elements of very different sizes, and their states."""
    rng = np.random.default_rng(seed)
    minima = {
        "conv": {"kernel": rng.standard_normal((2, 2, 3, 10)) * np.geomspace(0.02, 1, 10), "bias": np.ones(10)},
        "dense": {"kernel": rng.standard_normal((7, 5)), "bias": np.full(5, 0.5)},
    }
    minima = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), minima)
    optimizer = dessilbi(optax.sgd(1.0), 0.1, mu=1.0, **({"penalty": penalty} if penalty else {}))

    def body(carry, _):
        params, state = carry
        updates, state = optimizer.update(optax.tree.sub(params, minima), state, params)
        return (optax.apply_updates(params, updates), state), (layer_sparsity(state), sparse_params(state))

    (params, state), path = jax.lax.scan(body, (minima, optimizer.init(minima)), length=steps)
    return params, state, path


def test_path_recorded_in_a_scan_is_the_fraction_of_zeros():
    for penalty in (None, SparseGroup()):
        _, _, (sparsity, gammas) = trained(penalty=penalty)
        for layer in ("conv", "dense"):
            gamma = np.asarray(gammas[layer]["kernel"])
            zeros = (gamma == 0).reshape(len(gamma), -1).mean(1)
            assert len(set(zeros)) > 3
            np.testing.assert_allclose(sparsity[layer]["kernel"], zeros, rtol=1e-6)
        assert sparsity["conv"]["bias"] is None


def test_support_masks_and_restricted_weights():
    params, state, _ = trained()
    gamma, masks, kept = sparse_params(state), support_masks(state), restrict_to_support(params, state)
    for layer in ("conv", "dense"):
        w, g = np.asarray(params[layer]["kernel"]), np.asarray(gamma[layer]["kernel"])
        assert masks[layer]["kernel"].dtype == bool
        assert 0 < np.count_nonzero(g) < g.size
        np.testing.assert_array_equal(masks[layer]["kernel"], g != 0)
        np.testing.assert_array_equal(kept[layer]["kernel"], np.where(g != 0, w, 0))
    assert masks["conv"]["bias"] is None
    assert kept["conv"]["bias"] is params["conv"]["bias"]


def ranked(params, state, resolution):
    """(norm - record, size, layer, index) of every group, the lowest first, in exact arithmetic."""
    order = activation_order(state)
    places = []
    for layer in ("conv", "dense"):
        w, record = np.asarray(params[layer]["kernel"], np.float64), np.asarray(order[layer]["kernel"], np.int64)
        for index in np.ndindex(record.shape):
            group = w[..., index[-1]] if layer == "conv" else w[index]
            place = np.linalg.norm(group) - (record[index] - 1) // resolution
            places.append((place, np.size(group), layer, index))
    return sorted(places, key=lambda place: place[0])


@pytest.mark.parametrize("resolution", [1, 7])
@pytest.mark.parametrize("fraction", [0, 0.2, 0.5, 0.83, 1.0])
def test_prunes_the_groups_lowest_on_the_path(fraction, resolution):
    params, state, _ = trained()
    places = ranked(params, state, resolution)
    assert len(set(np.asarray(activation_order(state)["conv"]["kernel"]).ravel())) > 4
    for scope in ("local", "global"):
        cut = []
        if scope == "local":
            for layer in ("conv", "dense"):
                mine = [place for place in places if place[2] == layer]
                cut += mine[: int(fraction * len(mine))]
        else:
            budget = int(fraction * sum(place[1] for place in places))
            cut = [place for i, place in enumerate(places) if sum(p[1] for p in places[: i + 1]) <= budget]
        expected = jax.tree.map(np.array, params)
        for _, _, layer, index in cut:
            expected[layer]["kernel"][(..., index[-1]) if layer == "conv" else index] = 0
        pruned = prune_by_path(params, state, fraction, scope=scope, resolution=resolution)
        masks = path_masks(params, state, fraction, scope=scope, resolution=resolution)
        for layer in ("conv", "dense"):
            np.testing.assert_array_equal(pruned[layer]["kernel"], expected[layer]["kernel"])
            np.testing.assert_array_equal(masks[layer]["kernel"], expected[layer]["kernel"] != 0)
        np.testing.assert_array_equal(pruned["conv"]["bias"], params["conv"]["bias"])
        assert masks["conv"]["bias"] is None


def test_prunes_only_the_layers_asked_for():
    params, state, _ = trained()
    pruned = prune_by_path(params, state, 0.5, layers=lambda path: path == "conv/kernel")
    assert np.count_nonzero(np.any(np.asarray(pruned["conv"]["kernel"]) != 0, axis=(0, 1, 2))) == 5
    np.testing.assert_array_equal(pruned["dense"]["kernel"], params["dense"]["kernel"])
    with pytest.raises(ValueError, match=r"layers picks no structured leaf.*'conv/kernel', 'dense/kernel'"):
        prune_by_path(params, state, 0.5, layers=lambda path: path == "conv/bias")


def test_units_that_are_cut_lose_their_bias_if_asked():
    """A convolution and a dense layer, both cut by output units: what is cut puts out 0 exactly."""
    params, state, _ = trained(penalty=PenaltyRule(lambda path, shape: GroupLasso() if len(shape) > 1 else None))
    images = jax.random.normal(jax.random.key(0), (4, 6, 6, 3))

    def outputs(params):
        conv = jax.lax.conv_general_dilated(
            images, params["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ) + params["conv"]["bias"].reshape(1, 1, 1, -1)
        features = jnp.ones((3, 7))
        return conv, features @ params["dense"]["kernel"] + params["dense"]["bias"].reshape(1, -1)

    for scope in ("local", "global"):
        masks = path_masks(params, state, 0.6, scope=scope, biases=True)
        plain = path_masks(params, state, 0.6, scope=scope)
        pruned = prune_by_path(params, state, 0.6, scope=scope, biases=True)
        assert plain["conv"]["bias"] is None
        for layer, found in zip(("conv", "dense"), outputs(pruned), strict=True):
            kernel = np.asarray(masks[layer]["kernel"])
            np.testing.assert_array_equal(kernel, plain[layer]["kernel"])
            alive = kernel.reshape(-1, kernel.shape[-1]).any(0)
            assert alive.sum() < alive.size or (scope, layer) == ("global", "dense")
            np.testing.assert_array_equal(masks[layer]["bias"], alive)
            np.testing.assert_array_equal(np.any(np.asarray(found) != 0, axis=tuple(range(found.ndim - 1))), alive)


def test_units_with_a_weight_left_keep_their_bias():
    params = {"kernel": jnp.array([[3.0, 2.0], [0.1, 2.5]]), "bias": jnp.ones(2), "scale": jnp.ones(2)}
    state = dessilbi(optax.sgd(1.0), 0.1).init(params)
    cut = [path_masks(params, state, fraction, biases=True)["bias"].tolist() for fraction in (0.25, 0.75, 1.0)]
    assert cut == [[True, True], [True, False], [False, False]]
    assert path_masks(params, state, 1.0, biases=True)["scale"] is None
    without = {"kernel": params["kernel"]}
    assert path_masks(without, dessilbi(optax.sgd(1.0), 0.1).init(without), 1.0, biases=True)["kernel"].sum() == 0


def test_the_norm_still_decides_after_millions_of_steps():
    """In float32, norm - 30,000,000 would forget norms below 2."""
    params = {"kernel": jnp.array([[0.3, 0.1, 0.4, 0.2]])}
    state = dessilbi(optax.sgd(1.0), 0.1, penalty=GroupLasso()).init(params)
    state = state._replace(first_active={"kernel": jnp.array([[30_000_000, 30_000_000, 30_000_001, NEVER]], jnp.int32)})
    np.testing.assert_allclose(prune_by_path(params, state, 0.25)["kernel"], [[0.3, 0.1, 0.4, 0.0]])
    np.testing.assert_allclose(prune_by_path(params, state, 0.5)["kernel"], [[0.3, 0.1, 0.0, 0.0]])
    np.testing.assert_allclose(prune_by_path(params, state, 0.75)["kernel"], [[0.3, 0.0, 0.0, 0.0]])


def test_works_under_jit_and_inside_other_states():
    params, state, _ = trained()
    masks = jax.jit(lambda params, state: path_masks(params, state, 0.5, scope="global"))(params, state)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, masks, path_masks(params, state, 0.5, scope="global")))

    base = dessilbi(optax.sgd(1.0), 0.1, mu=0.1)
    for optimizer in (
        optax.chain(optax.clip_by_global_norm(1.0), base),
        optax.MultiSteps(base, 2),
        optax.inject_hyperparams(dessilbi)(optax.sgd(1.0), 0.1),
    ):
        assert sparse_params(optimizer.init(params))["conv"]["kernel"].shape == (2, 2, 3, 10)
    only_conv = jax.tree.map_with_path(lambda path, _: path[0].key == "conv", params)
    parts = jax.tree.map(lambda mine: "sparse" if mine else "dense", only_conv)
    for optimizer in (
        optax.masked(base, only_conv),
        optax.partition({"sparse": base, "dense": optax.sgd(0.1)}, parts),
    ):
        pruned = prune_by_path(params, optimizer.init(params), 0.5)
        assert np.count_nonzero(np.any(np.asarray(pruned["conv"]["kernel"]) != 0, axis=(0, 1, 2))) == 5
        np.testing.assert_array_equal(pruned["dense"]["kernel"], params["dense"]["kernel"])
        np.testing.assert_array_equal(restrict_to_support(params, optimizer.init(params))["conv"]["kernel"], 0)
    for optimizer, found in ((optax.adam(0.1), 0), (optax.chain(base, base), 2)):
        with pytest.raises(ValueError, match=f"exactly one DessiLBIState, got {found}"):
            sparse_params(optimizer.init(params))


def test_bad_input_is_named():
    params, state, _ = trained(steps=1)
    for fraction in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\]"):
            prune_by_path(params, state, fraction)
    with pytest.raises(ValueError, match="scope must be 'local' or 'global', got 'layer'"):
        prune_by_path(params, state, 0.5, scope="layer")
    with pytest.raises(ValueError, match="resolution must be"):
        prune_by_path(params, state, 0.5, resolution=0)
