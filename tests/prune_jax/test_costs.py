"""Costs: against counts by hand, brute force over zero weights, and XLA's own analysis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from prune_jax import apply_masks, count_parameters, flops, make_masks, scores
from prune_jax.models import Swin, ViT
from prune_jax.tokens import CPViT, DynamicViT, PatchSkip, SwinPatchSkip, ToMe

VIT = ViT(num_classes=10, image_size=64, patch=8, width=192, depth=2, heads=3)
SWIN = Swin(num_classes=10, width=96, depths=(2, 2), heads=(3, 6), window=4)


def by_xla(fn, *args):
    return jax.jit(fn).lower(*args).cost_analysis()["flops"]


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.mark.parametrize(
    ("fn", "args"),
    [
        (lambda a, b: jnp.einsum("bij,bkj->bik", a, b), (shape(3, 4, 5), shape(3, 6, 5))),
        (lambda a, b: jnp.einsum("ij,kl->ijkl", a, b), (shape(2, 3), shape(4, 5))),
        (lambda x, k: lax.conv(x, k, (2, 2), "VALID"), (shape(2, 3, 9, 8), shape(5, 3, 3, 2))),
        (
            lambda x, k: lax.conv_general_dilated(x, k, (1,), "VALID", feature_group_count=3),
            (shape(2, 6, 9), shape(12, 2, 3)),
        ),
    ],
)
def test_products_count_as_xla_counts_them(fn, args):
    assert flops(fn, *args) == by_xla(fn, *args)


@pytest.mark.parametrize(
    "model",
    [
        VIT,
        SWIN,
        ToMe(VIT, (13, 10)),
        DynamicViT(VIT, (0, 1), 0.7),
        DynamicViT(VIT, (0, 1), 0.7, merge=True),
        CPViT(VIT, (0.3, 0.2)),
        CPViT(VIT, (0.3, 0.2), merge=True),
        PatchSkip(VIT, 0.5),
        PatchSkip(VIT, 0.5, attend="kept"),
        SwinPatchSkip(SWIN, 0.5),
    ],
    ids=lambda model: type(model).__name__,
)
def test_whole_models_within_two_percent_of_xla(model):
    """Dense, and with fewer tokens: XLA counts softmax, norms, GELU, and what sorting and gathering take, too."""
    images = shape(2, 64, 64, 3)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    ours, xla = flops(model.apply, variables, images), by_xla(model.apply, variables, images)
    assert ours <= xla <= 1.02 * ours


def test_vit_b_by_the_paper():
    model = ViT(num_classes=1000)
    variables = jax.eval_shape(model.init, jax.random.key(0), shape(1, 224, 224, 3))
    assert count_parameters(variables) == 86_567_656
    assert round(flops(model.apply, variables, shape(1, 224, 224, 3)) / 2e9, 1) == 17.6  # multiply-adds, DeiT's table


def test_scan_counts_each_step_and_cond_the_dearest_branch():
    w = shape(4, 4)
    x = shape(2, 4)
    once = 2 * 2 * 4 * 4
    assert flops(lambda w, x: lax.scan(lambda h, _: (h @ w, None), x, None, length=7)[0], w, x) == 7 * once
    assert flops(lambda w, x: lax.fori_loop(0, 5, lambda i, h: h @ w, x), w, x) == 5 * once
    assert flops(lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), w, x) == 2 * once
    assert flops(jax.checkpoint(jax.jit(lambda w, x: jnp.tanh(x @ w))), w, x) == once
    with pytest.raises(ValueError, match="inside a 'while'"):
        flops(lambda w, x: lax.while_loop(lambda h: h[0, 0] < 1, lambda h: h @ w, x), w, x)


def test_masked_weights_leave_the_count():
    rng = np.random.default_rng(0)
    params = {
        "a": rng.random((3, 4, 5)),
        "k": rng.random((2, 2, 5, 3)),
        "stack": rng.random((3, 6, 6)),
        "free": np.eye(6),
    }
    masks = jax.tree.map(lambda x: x > 0.6, params) | {"free": None}

    def net(p, x):  # the weights pass through a reshape, a transpose, a slice, a cast and a scan
        h = x @ p["a"].transpose(1, 2, 0).reshape(4, 15)[:, 1:].astype(jnp.float32)
        image = jnp.einsum("bi,hwio->bhwo", h[:, :5], p["k"])
        y = image.reshape(image.shape[0], -1)[:, :6]
        return lax.scan(lambda y, w: (y @ (2 * w), None), y, p["stack"])[0] @ p["free"]

    x = shape(7, 4)
    a = masks["a"].transpose(1, 2, 0).reshape(4, 15)[:, 1:].sum()
    kept = a + masks["k"].sum() + masks["stack"].sum() + 36
    assert flops(net, params, x, masks=masks) == 2 * 7 * kept
    whole = jax.tree.map(np.ones_like, params, is_leaf=None)
    everything = jax.tree.map(lambda m: m.astype(bool), whole)
    assert flops(net, params, x, masks=everything) == flops(net, params, x)


def test_two_masked_factors_meet_where_both_are_kept():
    rng = np.random.default_rng(1)
    params = {"a": rng.random((2, 3, 4)), "b": rng.random((2, 4, 5))}
    masks = jax.tree.map(lambda x: x > 0.5, params)
    pairs = sum(masks["a"][b, i, k] and masks["b"][b, k, j] for b, i, j, k in np.ndindex(2, 3, 5, 4))
    assert flops(lambda p: jnp.einsum("bik,bkj->bij", p["a"], p["b"]), params, masks=masks) == 2 * pairs


MASK = np.random.default_rng(3).random((8, 6)) > 0.4


@pytest.mark.parametrize(
    "between",
    [
        lambda w: w / 2,
        lambda w: jnp.where(w > 0, w, 0),
        lambda w: jnp.where(w > 0, 0.0, w),
        lambda w: jnp.where(w > 0, w, w[::-1]),
        lambda w: jnp.where(w > 0, jnp.zeros_like(w), jnp.pad(w[1:-1], ((1, 1), (0, 0)))),
        lambda w: jnp.pad(w, ((1, 2), (0, 3))),
        lambda w: lax.pad(w, 0.0, ((2, -3, 1), (-2, 1, 0))),
        lambda w: lax.pad(w, 1.0, ((0, 0, 0), (-7, 7, 1))),
        lambda w: jnp.split(w, [1, 3], 1)[1],
        lambda w: jnp.unstack(w, axis=1)[2][:, None],
        lambda w: jnp.stack([w, -w, jnp.ones_like(w)], 1).reshape(8, 18),
        lambda w: jnp.concatenate([w, jnp.zeros((8, 2))], 1),
        lambda w: jnp.tile(w, (1, 2)),
        lambda w: lax.stop_gradient(w),
        lambda w: jnp.sqrt(jnp.abs(jnp.tanh(w) ** 2)),
        lambda w: lax.optimization_barrier((w, w))[1],
        lambda w: lax.cond(w.sum() > 0, lambda: w, lambda: w[:, ::-1]),
    ],
)
def test_masked_weights_are_followed_to_a_product(between):
    """What is kept is what is not zero for some weights: here, for some of 30 random ones."""
    weights = jnp.where(MASK, jax.random.normal(jax.random.key(0), (30, 8, 6)), 0.0)
    kept = np.any([between(w) != 0 for w in weights], axis=0)
    net = lambda w, x: x @ between(w)  # noqa: E731
    x = shape(5, len(kept))
    assert flops(net, weights[0], x, masks=MASK) == 2 * 5 * kept.sum() < flops(net, weights[0], x)
    assert flops(net, weights[0], x, masks=None) == 2 * 5 * kept.size


def test_what_is_not_known_to_be_zero_counts():
    """Masked denominators, sums, other constants, and zeros that no masked weight meets."""
    masked = np.zeros((8, 6), bool)
    for between in (
        lambda w: 1 / w,
        lambda w: w / w,
        lambda w: w / 0,
        lambda w: w + 1,
        lambda w: jnp.where(w > 0, w, 1.0),
        lambda w: jnp.where(w > 0, w, jnp.ones(6)),
        lambda w: jnp.zeros((8, 6)),
        lambda w: jnp.where(w > 0, 0.0, jnp.zeros((8, 6))),
    ):
        net = lambda w, x, between=between: x @ between(w)  # noqa: E731
        assert flops(net, shape(8, 6), shape(5, 8), masks=masked) == 2 * 5 * 48


def ragged(lhs_ragged, contracted, batch=((), ()), groups=()):
    return lax.RaggedDotDimensionNumbers((contracted, batch), [lhs_ragged], groups)


def test_ragged_products_count_each_row_once():
    """By hand: rows (m), contracted (k) or batch (b) in 3 groups; every triple m, k, n meets once."""
    m, k, n, b, groups = 12, 5, 7, 4, 3
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
    assert flops(lax.ragged_dot, shape(m, k), shape(groups, k, n), sizes) == 2 * m * k * n

    def general(numbers):
        return lambda x, y, s: lax.ragged_dot_general(x, y, s, numbers)

    rows = general(ragged(1, ((2,), (2,)), ((0,), (1,)), (0,)))
    assert flops(rows, shape(b, m, k), shape(groups, b, k, n), sizes) == 2 * b * m * k * n
    assert flops(general(ragged(0, ((0,), (0,)))), shape(k, m), shape(k, n), sizes) == 2 * m * k * n
    in_batch = general(ragged(0, ((2,), (1,)), ((0,), (0,))))
    assert flops(in_batch, shape(b, m, k), shape(b, k, n), sizes) == 2 * b * m * k * n


def test_ragged_product_of_masked_weights_counts_the_dearest_group():
    rng = np.random.default_rng(4)
    mask, rows, sizes = rng.random((3, 5, 7)) > 0.5, rng.random(5) > 0.5, jax.ShapeDtypeStruct((3,), jnp.int32)
    net = lambda p, x, s: lax.ragged_dot(x * p["scale"][None], p["w"], s)  # noqa: E731
    params = {"w": mask * 1.0, "scale": rows * 1.0}
    x = shape(12, 5)
    assert flops(net, params, x, sizes, masks={"w": mask, "scale": None}) == 2 * 12 * mask.sum((1, 2)).max()
    both = (mask & rows[:, None]).sum((1, 2)).max()
    assert flops(net, params, x, sizes, masks={"w": mask, "scale": rows}) == 2 * 12 * both
    assert flops(net, params, x, sizes, masks={"w": mask & False, "scale": None}) == 0


def test_scaled_products_count():
    args = shape(4, 64), shape(64, 8), shape(4, 2), shape(2, 8)
    fn = lambda a, b, c, d: lax.scaled_dot(a, b, lhs_scale=c, rhs_scale=d)  # noqa: E731
    assert flops(fn, *args) == 2 * 4 * 64 * 8


def test_masked_convolution():
    kernel = np.random.default_rng(2).random((3, 3, 4, 5))
    mask = kernel > 0.7
    conv = lambda k, x: lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))  # noqa: E731
    assert flops(conv, kernel, shape(2, 6, 6, 4), masks=mask) == 2 * 2 * 36 * mask.sum()


def test_make_masks_at_half_sparsity_halves_the_kernels_flops():
    params = {"a": jnp.linspace(1.0, 2.0, 48).reshape(6, 8), "b": jnp.linspace(3.0, 4.0, 16).reshape(8, 2)}
    masks = make_masks(scores.magnitude(params), 0.5, scope="local")
    net = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    x = shape(3, 6)
    assert flops(net, params, x, masks=masks) * 2 == flops(net, params, x)
    masked = apply_masks(params, masks)
    assert count_parameters(params, masks) == sum(int((x != 0).sum()) for x in jax.tree.leaves(masked))


def test_masks_of_another_tree():
    with pytest.raises(ValueError, match="masks"):
        flops(lambda p: p["a"] @ p["a"], {"a": np.eye(3)}, masks={"b": np.eye(3) > 0})
    with pytest.raises(ValueError, match="masks"):
        count_parameters({"a": np.eye(3)}, {"a": np.ones(3, bool)})
