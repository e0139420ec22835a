"""Heads: shapes, and each against arithmetic of its own in NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from functa_jax import heads

GRID = (4, 4, 3)


def silu(x):
    return x / (1 + np.exp(-x))


def variables_of(head, shape, key=0):
    """Random variables, so that biases and statistics count too."""
    variables = head.init(jax.random.key(key), jnp.zeros((1, *shape)))
    rng = np.random.default_rng(key)
    return jax.tree.map(
        lambda x: np.abs(rng.normal(0.5, 0.2, x.shape)).astype(np.float32) - 0.2 * (x.ndim > 1), variables
    )


@pytest.mark.parametrize(
    ("head", "shape"),
    [
        (heads.MLPHead(7), (5,)),
        (heads.MLPHead(7, hidden=(6, 4), activation=nn.relu), GRID),
        (heads.ConvHead(7, (4, 6)), GRID),
        (heads.ConvHead(7, (4,)), (5, 3, 2)),
        (heads.ResidualHead(7, (4, 6), blocks=2, cell_dropout=0.2), GRID),
        (heads.ResidualHead(7, (4,)), (5, 3, 2)),
    ],
)
def test_shapes_dropout_and_statistics(head, shape):
    variables = head.init(jax.random.key(0), jnp.zeros((1, *shape)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(9, *shape)), jnp.float32)
    assert head.apply(variables, x).shape == (9, 7)

    def trained(key):
        return head.apply(variables, x, train=True, rngs={"dropout": jax.random.key(key)}, mutable=["batch_stats"])

    (one, statistics), (other, _) = trained(0), trained(1)
    assert one.shape == (9, 7)
    drops = not isinstance(head, heads.ConvHead)
    assert bool(jnp.any(one != other)) == drops
    if "batch_stats" in variables:
        changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), variables["batch_stats"], statistics["batch_stats"])
        assert any(jax.tree.leaves(changed))


def test_mlp_against_numpy():
    head = heads.MLPHead(3, hidden=(6, 5))
    variables = variables_of(head, (4,))
    x = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)
    p = variables["params"]
    h = x
    for name in ("hidden_0", "hidden_1"):
        h = silu(h @ p[name]["kernel"] + p[name]["bias"])
    expected = h @ p["logits"]["kernel"] + p["logits"]["bias"]
    np.testing.assert_allclose(head.apply(variables, x), expected, rtol=1e-4, atol=1e-5)


def conv(x, kernel):
    hwio = kernel.reshape(3, 3, x.shape[-1], -1)
    return np.asarray(lax.conv_general_dilated(x, hwio, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))


def normed(x, variables, name):
    p, s = variables["params"][name], variables["batch_stats"][name]
    return (x - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]


def test_conv_head_against_a_true_convolution():
    head = heads.ConvHead(3, (5, 6))
    variables = variables_of(head, GRID)
    h = x = np.random.default_rng(1).normal(size=(4, *GRID)).astype(np.float32)
    p = variables["params"]
    for i in range(2):
        h = silu(normed(conv(h, p[f"conv_{i}"]["Dense_0"]["kernel"]), variables, f"norm_{i}"))
    h = h.reshape(4, 2, 2, 2, 2, 6).max(axis=(2, 4)).reshape(4, -1)
    expected = h @ p["logits"]["kernel"] + p["logits"]["bias"]
    np.testing.assert_allclose(head.apply(variables, x), expected, rtol=1e-3, atol=1e-4)


def test_residual_head_against_a_true_convolution():
    head = heads.ResidualHead(3, (4, 6))
    variables = variables_of(head, GRID)
    x = np.random.default_rng(1).normal(size=(4, *GRID)).astype(np.float32)
    p = variables["params"]

    def c(name, h):
        return conv(h, p[name]["Dense_0"]["kernel"])

    def a(name, h):
        return silu(normed(h, variables, name))

    h = c("stem", x)
    h = h + c("conv_0_0_b", a("norm_0_0_b", c("conv_0_0_a", a("norm_0_0_a", h))))
    h = h.reshape(4, 2, 2, 2, 2, 4).mean(axis=(2, 4)) @ p["widen_1"]["kernel"]
    h = h + c("conv_1_0_b", a("norm_1_0_b", c("conv_1_0_a", a("norm_1_0_a", h))))
    h = a("norm_last", h).mean(axis=(1, 2))
    expected = h @ p["logits"]["kernel"] + p["logits"]["bias"]
    np.testing.assert_allclose(head.apply(variables, x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("head", [heads.ConvHead(), heads.ResidualHead()])
def test_vectors_are_refused_by_heads_of_grids(head):
    with pytest.raises(ValueError, match=r"latents of shape \(1, 5\) are no grids; this head needs \(B, h, w, c\)"):
        head.init(jax.random.key(0), jnp.zeros((1, 5)))
