"""Schedules in closed form, and the iterative loop against a plain Python loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prune_jax import cubic, exponential, iterative_masks, layer_statistics, one_shot, scores, sparsity


def test_one_shot_is_the_sparsity():
    np.testing.assert_array_equal(one_shot(0.7), [0.7])


@pytest.mark.parametrize("rounds", [1, 3, 100])
def test_exponential_removes_the_same_fraction_of_the_rest_each_round(rounds):
    left = 1 - np.concatenate([[0], exponential(0.99, rounds)])
    np.testing.assert_allclose(left[1:] / left[:-1], 0.01 ** (1 / rounds))
    assert exponential(0.99, rounds)[-1] == 0.99


def test_cubic_starts_fast_and_ends_flat():
    values = np.concatenate([[0.2], cubic(0.9, 50, initial=0.2)])
    i = np.arange(51)
    np.testing.assert_allclose(values, 0.9 - 0.7 * (1 - i / 50) ** 3)
    assert values[-1] == 0.9
    steps = np.diff(values)
    assert (np.diff(steps) < 0).all()


@pytest.mark.parametrize("final", [0.0, 1.0])
def test_ends_of_the_range(final):
    assert exponential(final, 4)[-1] == final
    assert cubic(final, 4)[-1] == final


def product_net_scores(params):
    """SynFlow's score of a two-layer linear net, in closed form: it changes as weights go."""
    a, b = jnp.abs(params["a"]), jnp.abs(params["b"])
    return {"a": a * b.sum(1)[None, :], "b": b * a.sum(0)[:, None]}


def test_iterative_masks_equal_a_python_loop():
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(6, 8)), "b": rng.normal(size=(8, 5))}
    masks = {key: np.ones_like(value, bool) for key, value in params.items()}
    for s in exponential(0.8, 7):
        kept = {key: np.where(masks[key], params[key], 0) for key in params}
        a, b = np.abs(kept["a"]), np.abs(kept["b"])
        score = np.concatenate([(a * b.sum(1)).ravel(), (b * a.sum(0)[:, None]).ravel()])
        score[~np.concatenate([masks["a"].ravel(), masks["b"].ravel()])] = -np.inf
        keep = np.ones(88, bool)
        keep[np.argsort(score, kind="stable")[: int(s * 88)]] = False
        masks = {"a": keep[:48].reshape(6, 8), "b": keep[48:].reshape(8, 5)}
    result = iterative_masks(
        product_net_scores, jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params), exponential(0.8, 7)
    )
    for key in params:
        np.testing.assert_array_equal(result[key], masks[key])


def test_what_is_cut_stays_cut_even_if_scores_are_negative():
    # Scores rise as weights vanish: without the rule a cut weight (score 0) would come back.
    params = {"w": jnp.arange(1.0, 11.0)}
    masks = iterative_masks(lambda p: {"w": -p["w"]}, params, [0.3, 0.6])
    np.testing.assert_array_equal(masks["w"], jnp.arange(10) < 4)


def test_scope_and_exclusion_reach_the_loop():
    params = {"a": jnp.ones((4, 5)), "b": 9 * jnp.ones((4, 5)), "head": jnp.zeros((2, 2))}
    masks = iterative_masks(scores.magnitude, params, cubic(0.5, 3), scope="local", exclude="head")
    assert [layer.kept for layer in layer_statistics(masks).values()] == [10, 10]
    assert masks["head"] is None
    assert sparsity(jax.jit(lambda p: iterative_masks(scores.magnitude, p, one_shot(0.25)))(params)) == 0.25


def test_wrong_arguments_are_refused():
    params = {"w": jnp.ones((2, 2))}
    for bad in (lambda: exponential(1.5), lambda: cubic(-0.1, 3), lambda: one_shot(2)):
        with pytest.raises(ValueError, match="must be in"):
            bad()
    with pytest.raises(ValueError, match="rounds must be a whole number of at least 1, got 0"):
        exponential(0.5, 0)
    with pytest.raises(ValueError, match=r"rounds must be a whole number of at least 1, got 2\.5"):
        exponential(0.9, rounds=2.5)
    with pytest.raises(ValueError, match="sparsities must be a sequence"):
        iterative_masks(scores.magnitude, params, 0.5)
    with pytest.raises(TypeError, match="'w' has dtype int32"):
        iterative_masks(lambda p: {"w": jnp.ones((2, 2), jnp.int32)}, params, [0.5])
    with pytest.raises(ValueError, match=r"initial=0.6 is above sparsity=0.5"):
        cubic(0.5, 3, initial=0.6)
    with pytest.raises(ValueError, match=r"0.5 \(round 2\) is followed by 0.4"):
        iterative_masks(scores.magnitude, params, [0.1, 0.5, 0.4])
    with pytest.raises(ValueError, match="sparsities is empty"):
        iterative_masks(scores.magnitude, params, [])
    with pytest.raises(ValueError, match="NaN in 'w' from round 2 on"):
        iterative_masks(lambda p: {"w": jnp.where(p["w"].min() == 0, jnp.nan, p["w"])}, params, [0.5, 0.75])
