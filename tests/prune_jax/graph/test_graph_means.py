"""Means: what counts entries counts the cut number, in a mean and in its gradient, and other numbers stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_architectures import data, weights
from graph_zeroing import check, zeroed

from prune_jax.graph import prune

X = data(4, 3)


def normalised(h):
    h = h - h.mean(-1, keepdims=True)
    return h / jnp.sqrt(h.var(-1, keepdims=True) + 1e-3)


def energy(p, x):
    return (jnp.tanh(normalised(x @ p["a"])) @ p["b"]).sum()


@jax.custom_vjp
def mean(h):
    return h.mean(-1, keepdims=True)


mean.defvjp(lambda h: (mean(h), h), lambda h, g: (jnp.broadcast_to(g / h.shape[-1], h.shape),))


def test_a_gradient_inside_of_the_function_is_that_of_the_smaller_function() -> None:
    force = jax.grad(energy, 1)
    small = prune(force, weights(a=(3, 8), b=(8, 1)), X, ratio=0.5)
    assert small.params["a"].shape == (3, 4)
    np.testing.assert_allclose(small.fn(small.params, X), force(small.params, X), atol=1e-6)


def test_a_backward_rule_of_a_mean_is_that_of_the_smaller_mean() -> None:
    def loss(params, x):
        h = x @ params["a"]
        return ((h * mean(h)) @ params["b"]).sum()

    small = prune(loss, weights(a=(3, 8), b=(8, 1)), X, ratio=0.5)
    found, expected = (jax.grad(f)(small.params, X) for f in (small.fn, loss))
    for name, g in expected.items():
        np.testing.assert_allclose(found[name], g, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("copied", [jnp.broadcast_to, lambda s, shape: jnp.repeat(s, shape[1], 1)])
@pytest.mark.parametrize("activation", [jnp.tanh, normalised])
def test_what_is_divided_by_the_width_but_no_mean_stays(activation, copied) -> None:
    """Eight is a temperature here, and the number of units only by chance, also where they have a mean elsewhere."""

    def net(p, x):
        h = activation(x @ p["a"])
        return (h * copied((x @ p["s"]) / 8, h.shape)) @ p["b"]

    small = prune(net, weights(a=(3, 8), b=(8, 2), s=(3, 1)), X, ratio=0.5)
    assert small.params["a"].shape == (3, 4)
    np.testing.assert_allclose(small.fn(small.params, X), net(small.params, X), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_one_less_than_the_number_stays(dtype) -> None:
    """A corrected variance divides by n - 1, which nearly is n in half precision."""

    def net(p, x):
        h = x @ p["a"]
        return (h * ((h * h).sum(-1, keepdims=True, dtype=dtype) / jnp.asarray(127, dtype))) @ p["b"]

    params = {name: 0.1 * jnp.asarray(w, dtype) for name, w in weights(a=(3, 128), b=(128, 2)).items()}
    check(net, params, jnp.asarray(X, dtype), ratio=0.5, tolerance=1e-6 if dtype == jnp.float32 else 0.02)


def test_a_batch_as_large_as_the_width_is_no_mean() -> None:
    def net(p, x):
        h = jnp.tanh(x @ p["a"])
        return h.sum(-1, keepdims=True) / x.shape[0] * p["c"][None] + h @ p["b"]

    params = weights(a=(3, 8), b=(8, 2), c=(2,))
    small = prune(net, params, X, ratio=0.5)
    for batch in (7, 8, 9):
        x = data(batch, 3)
        np.testing.assert_allclose(small.fn(small.params, x), net(zeroed(small.plan, params), x), atol=1e-5)
