"""ViT: its parts put together by hand are the model, attention weights mean what they say, widths are free."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prune_jax.models import ViT, vit
from prune_jax.models.layers import exact_gelu, normalised

MODEL = ViT(num_classes=3, image_size=(8, 12), patch=4, width=12, depth=2, heads=3)
IMAGES = np.random.default_rng(1).standard_normal((2, 8, 12, 3)).astype(np.float32)


def start(model):
    """Random variables, made without compiling anything."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    return jax.tree.map(lambda x: 0.4 * rng.standard_normal(x.shape).astype(np.float32), shapes)


def run(model, variables, *args, method="__call__", **options):
    return jax.jit(lambda v, *a: model.apply(v, *a, method=method, **options))(variables, *args)


VARIABLES = start(MODEL)


def test_parts_by_hand_are_the_model():
    def forward(model, images):
        x = model.embed(images)
        for block in model.blocks:
            q, k, v = block.attention.project(block.norm1(x))
            x = block.add(x, block.attention.combine(block.attention.exponentials(q, k), v))
            x = block.feed_forward(x)
        return model.head(x)

    np.testing.assert_allclose(run(MODEL, VARIABLES, IMAGES, method=forward), run(MODEL, VARIABLES, IMAGES), atol=1e-6)


def test_a_module_may_hold_a_vit_and_run_its_blocks():
    class Half(nn.Module):
        backbone: ViT

        def __call__(self, images):
            return first_block(self.backbone, images)

    def first_block(model, images):
        return model.head(model.blocks[0](model.embed(images)))

    y = run(Half(MODEL), {"params": {"backbone": VARIABLES["params"]}}, IMAGES)
    np.testing.assert_allclose(y, run(MODEL, VARIABLES, IMAGES, method=first_block), atol=1e-6)


def test_attention_is_the_softmax_of_its_scaled_products_times_the_values():
    """Values and gradients, at logits far beyond what exp holds."""
    x = jnp.asarray(np.random.default_rng(5).standard_normal((2, 5, 12)), jnp.float32)
    attention = MODEL.bind(VARIABLES).blocks[0].attention
    parts = {"qkv": attention.qkv.variables["params"], "proj": attention.proj.variables["params"]}

    def linear(x, layer):
        return x @ layer["kernel"] + layer["bias"][None, None]

    def by_hand(x, bias):
        q, k, v = jnp.split(linear(x, parts["qkv"]).reshape(2, 5, attention.heads, -1), 3, -1)
        logits = jnp.einsum("bnhd,bmhd->bhnm", q, k) * attention.scale + bias
        mixed = jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(logits), v).reshape(2, 5, -1)
        return linear(mixed, parts["proj"])

    def ours(x, bias):
        return attention(x, bias=bias)

    bias = jnp.broadcast_to(jnp.asarray([0.0, 300.0, -300.0, 1.0, 300.5]), (1, attention.heads, 5, 5))
    value, gradients = (
        jax.jit(of)(x, bias) for of in (by_hand, jax.grad(lambda *a: jnp.sin(by_hand(*a)).sum(), (0, 1)))
    )
    np.testing.assert_allclose(jax.jit(ours)(x, bias), value, atol=1e-6)
    found = jax.jit(jax.grad(lambda *a: jnp.sin(ours(*a)).sum(), (0, 1)))(x, bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, gradients)


def test_weight_zero_removes_a_token_and_weight_two_doubles_it():
    x = np.random.default_rng(3).standard_normal((2, 5, 12)).astype(np.float32)
    weights = np.array([1, 0, 1, 1, 2], np.float32)[None, None, None]
    kept = np.array([0, 2, 3, 4, 4])

    def attend(model, x, weights=None):
        return model.blocks[0].attention(x, weights=weights)

    weighted = run(MODEL, VARIABLES, x, weights, method=attend)
    np.testing.assert_allclose(weighted[:, kept], run(MODEL, VARIABLES, x[:, kept], method=attend), atol=1e-6)


def test_a_removed_token_with_a_huge_logit_leaves_no_nan():
    q = jnp.ones((1, 3, 2, 4))
    k = jnp.stack([jnp.zeros((1, 3, 4)), jnp.full((1, 3, 4), 1e3)], axis=2)

    def first_key(w, k):
        weights = jnp.stack([1.0, w])[None, None, None]
        return MODEL.apply(
            VARIABLES,
            method=lambda m: normalised(m.blocks[0].attention.exponentials(q, k, weights=weights))[..., 0].sum(),
        )

    value, gradients = jax.jit(jax.value_and_grad(first_key, (0, 1)))(0.0, k)
    assert value == 6
    assert all(jnp.isfinite(g).all() for g in gradients)


def test_pooling_an_image_that_has_lost_every_patch_has_a_bounded_gradient():
    """One patch more is worth at most what that patch is, of no patches and of all."""
    model = MODEL.clone(pool="mean")
    variables = start(model)
    tokens = np.random.default_rng(6).standard_normal((3, 6, 12)).astype(np.float32)
    weights = np.array([[0] * 6, [1, 0, 2, 0, 0, 1], [0, 0.2, 0, 0, 0.1, 0]], np.float32)

    def logits(weights):
        return model.apply(variables, tokens, weights=weights, method="head")

    normed = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-6)
    normed = normed * variables["params"]["norm"]["scale"] + variables["params"]["norm"]["bias"]
    kernel, bias = (np.asarray(variables["params"]["class_head"][name]) for name in ("kernel", "bias"))
    np.testing.assert_allclose(logits(weights)[0], bias, atol=1e-6)
    for image in (1, 2):
        mean = np.average(normed[image], axis=0, weights=weights[image])
        np.testing.assert_allclose(logits(weights)[image], mean @ kernel + bias, rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda w: logits(w)[0].sum())(weights)[0]
    np.testing.assert_allclose(gradient, (normed[0] @ kernel).sum(-1), rtol=1e-3, atol=1e-4)


def test_every_width_is_free():
    model = MODEL.clone(heads=(2, 4), qk_dim=(3, 5), v_dim=(7, 2), mlp_hidden=(9, 11), scale=0.5)
    params = start(model)["params"]
    assert params["blocks_0"]["attention"]["qkv"]["kernel"].shape == (12, 2 * (3 + 3 + 7))
    assert params["blocks_1"]["attention"]["proj"]["kernel"].shape == (4 * 2, 12)
    assert params["blocks_1"]["mlp"]["fc2"]["kernel"].shape == (11, 12)
    assert jax.eval_shape(model.apply, {"params": params}, IMAGES).shape == (2, 3)
    assert vit("S", num_classes=2).block_widths[3] == {
        "width": 384, "heads": 6, "qk_dim": 64, "v_dim": 64, "mlp_hidden": 1536, "scale": 0.125,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, 7),
        ({"distilled": True}, 8),
        ({"registers": 3}, 10),
        ({"pool": "mean"}, 6),
        ({"pool": "mean", "registers": 2}, 8),
    ],
)
def test_tokens(settings, tokens):
    model = MODEL.clone(**settings)
    variables = start(model)
    assert model.prefix == tokens - 6
    x, other = (run(model, variables, images, method="embed") for images in (IMAGES, 1 - IMAGES))
    assert x.shape == (2, tokens, 12)
    # prefix tokens do not depend on the image, patches do
    changed = np.abs(np.asarray(x) - other).max((0, 2)) > 0
    np.testing.assert_array_equal(changed, np.arange(tokens) >= model.prefix)
    assert jax.eval_shape(model.apply, variables, IMAGES).shape == (2, 3)


def test_both_heads_of_a_distilled_model():
    model = MODEL.clone(distilled=True)
    variables = start(model)
    a, b = run(model, variables, IMAGES, method=lambda m, x: m.heads_apart(m.encode(x)))
    assert not np.allclose(a, b)
    np.testing.assert_allclose(run(model, variables, IMAGES), (a + b) / 2, atol=1e-6)


def test_randomness_only_in_training():
    model = MODEL.clone(dropout=0.2, drop_path=0.5)
    training = jax.jit(lambda key: model.apply(VARIABLES, IMAGES, train=True, rngs={"dropout": key}))
    assert not np.allclose(training(jax.random.key(0)), training(jax.random.key(1)))
    np.testing.assert_array_equal(run(model, VARIABLES, IMAGES), run(MODEL, VARIABLES, IMAGES))


def test_stochastic_depth_drops_whole_branches():
    def branches(model, x):
        return [block(x, train=True) for block in model.blocks]

    x = np.ones((4, 3, 12), np.float32)
    first, last = run(MODEL.clone(drop_path=1.0), VARIABLES, x, method=branches, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(last, x)  # rate 1 in the last block, 0 in the first
    assert not np.allclose(first, x)


def test_half_precision_compute():
    y = run(MODEL.clone(compute_dtype=jnp.bfloat16), VARIABLES, IMAGES)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, run(MODEL, VARIABLES, IMAGES), atol=0.1)


def test_half_precision_does_not_round_the_sums_of_the_blocks():
    half = MODEL.clone(compute_dtype=jnp.bfloat16)
    assert jax.eval_shape(partial(half.apply, method="encode"), VARIABLES, IMAGES).dtype == jnp.float32


def test_exact_gelu_of_half_precision_is_rounded_once():
    x = jnp.linspace(-4, 4, 801).astype(jnp.bfloat16)
    exact = [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x.astype(float).tolist()]
    np.testing.assert_allclose(exact_gelu(x).astype(np.float32), exact, rtol=2**-7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch": 5}, "patch must divide"),
        ({"heads": 5}, "heads must divide"),
        ({"mlp_hidden": (1, 2, 3)}, "mlp_hidden must be one value or a sequence of 2"),
        ({"pool": "max"}, "pool must be"),
        ({"gelu": "fast"}, "gelu must be"),
        ({"pool": "mean", "distilled": True}, "distilled needs"),
        ({"dropout": -0.1}, "dropout must be from 0 to 1, got -0.1"),
        ({"drop_path": 1.5}, "drop_path must be from 0 to 1, got 1.5"),
        ({"drop_path": math.nan}, "drop_path must be from 0 to 1, got nan"),
        ({"depth": -1}, "depth must be a whole number of at least 1"),
        ({"patch": 0}, "patch must be a whole number of at least 1"),
        ({"heads": 0}, "heads must be a whole number of at least 1"),
        ({"registers": -1}, "registers must be a whole number of at least 0"),
        ({"image_size": 16}, r"images must be \(batch, 16, 16, channels\)"),
    ],
)
def test_what_does_not_go_is_said(settings, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(MODEL.clone(**settings).init, jax.random.key(0), IMAGES)


def test_unknown_size():
    with pytest.raises(ValueError, match="size must be one of Ti, S, B, L"):
        vit("XL", num_classes=2)
