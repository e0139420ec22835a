"""CP-ViT: the cascade against attention masked by hand, ranges, ratios, and heads that are really gone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from token_models import IMAGES, MODEL, VARIABLES, run

from prune_jax import flops
from prune_jax.models import Swin
from prune_jax.models.layers import normalised
from prune_jax.tokens import CPViT, attention_profile, attention_range, cut_heads, layer_ratios, least_heads, wrap

WRAPPED = {"params": {"model": VARIABLES["params"]}}


def by_hand(model, images, cuts):
    """The cascade with every token in its place: scores in numpy's order, dropped keys cut out of the attention."""
    x, scores, alive = model.embed(images), 0.0, jnp.ones((2, 16), bool)
    kept = []
    for block, cut in zip(model.blocks, cuts, strict=True):
        seen = jnp.pad(alive, ((0, 0), (1, 0)), constant_values=True)
        q, k, v = block.attention.project(block.norm1(x))
        p = normalised(block.attention.exponentials(q, k, weights=seen[:, None, None].astype(float)))
        x = block.add(x, block.attention.combine(p, v))
        of_queries = jnp.where(seen[:, None, :, None], p, 0)[..., 1:]
        scores = scores + of_queries.max(axis=2).sum(axis=1)
        ranked = jnp.argsort(jnp.where(alive, scores, jnp.inf), axis=1)
        lost = jnp.zeros_like(alive).at[jnp.arange(2)[:, None], ranked[:, :cut]].set(True)
        alive = alive & ~lost
        x = block.feed_forward(x)
        kept.append(alive)
    return model.head(x), jnp.stack(kept, axis=1)


def test_the_cascade_is_attention_masked_by_hand():
    method = CPViT(MODEL, (0.25, 0.0, 0.5))
    trace = run(method, WRAPPED, IMAGES, method="trace")
    logits, kept = jax.jit(lambda v: MODEL.apply(v, IMAGES, (4, 0, 8), method=by_hand))(VARIABLES)
    np.testing.assert_array_equal(trace.kept, kept)
    np.testing.assert_allclose(trace.logits, logits, atol=1e-5)


def test_ratio_zero_in_a_block_skips_nothing():
    trace = run(CPViT(MODEL, (0.0, 0.5, 0.0)), WRAPPED, IMAGES, method="trace")
    assert trace.kept[:, 0].all()
    np.testing.assert_array_equal(trace.kept[:, 1], trace.kept[:, 2])
    assert (trace.kept.sum(-1) == jnp.array([[16, 8, 8]])).all()


def test_merging_keeps_every_patch_somewhere():
    dropped = run(CPViT(MODEL, (0.5, 0.2, 0.0)), WRAPPED, IMAGES, method="trace")
    merged = run(CPViT(MODEL, (0.5, 0.2, 0.0), merge=True), WRAPPED, IMAGES, method="trace")
    np.testing.assert_array_equal(merged.kept[:, 0], dropped.kept[:, 0])
    assert merged.seen.all()
    np.testing.assert_array_equal(dropped.seen, dropped.kept)
    carriers = jnp.take_along_axis(merged.kept, merged.owner, axis=-1)
    assert carriers.all()  # a patch is carried by one that has a token


def test_the_profile_is_what_the_attention_shows():
    profile = run(MODEL, VARIABLES, IMAGES, method=attention_profile)

    def first_block(model, images):
        block = model.blocks[0]
        q, k, _ = block.attention.project(block.norm1(model.embed(images)))
        return normalised(block.attention.exponentials(q, k))

    p = np.asarray(MODEL.apply(VARIABLES, IMAGES, method=first_block))
    best = p[..., 1:].max(2)
    np.testing.assert_allclose(profile.patches[:, 0], best.sum(1), rtol=1e-4)
    np.testing.assert_allclose(profile.heads[0], best.sum(2).mean(0), rtol=1e-4)
    np.testing.assert_allclose(profile.maps.sum(-1), 1, rtol=1e-4)
    assert ((profile.ranges >= 0) & (profile.ranges <= 1)).all()


def test_attention_range():
    """Of a band along the diagonal, of one stripe, of uniform attention, and of a sum over a loop."""
    grid = (3, 4)
    place = np.array([divmod(n, 4) for n in range(12)])
    near = (abs(place[:, None] - place[None]) <= 1).all(-1)
    stripe = np.zeros((12, 12))
    stripe[:, 7] = 1
    assert attention_range(stripe, grid) == pytest.approx(1)
    assert attention_range(np.full((12, 12), 1 / 12), grid) == 0.5
    assert attention_range(np.eye(12), grid) == pytest.approx(0, abs=1e-6)
    a = np.random.default_rng(0).random((12, 12)) + 3 * near
    a /= a.sum(1, keepdims=True)
    c = a.mean(0)
    stripes = sum(abs(c[j] - 1 / 12) for j in range(12)) / 2
    diagonal = sum(a[i, j] - c[j] for i in range(12) for j in range(12) if near[i, j]) / 12
    assert attention_range(a, grid) == pytest.approx(stripes / (stripes + diagonal), rel=1e-4)


@pytest.mark.parametrize("sharpness", [1.0, 2.0])
@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.5, 0.8])
def test_layer_ratios_reach_the_ratio(ratio, sharpness):
    ratios = layer_ratios([0.2, 0.5, 0.1, 0.0], ratio, sharpness=sharpness)
    gone = np.cumsum(ratios)
    assert gone.mean() == pytest.approx(ratio, abs=1e-6)
    assert min(ratios) >= 0
    assert gone[-1] < 1
    assert ratios[3] == 0
    if 0 < gone[-1] < 0.94:
        assert ratios[1] / ratios[0] == pytest.approx(2.5**sharpness)


def test_layer_ratios_reach_the_ratio_however_unlike_the_ranges():
    ratios = layer_ratios([0.01, 0.5, 0.5], 0.9, sharpness=8)
    assert np.cumsum(ratios) == pytest.approx([0.8, 0.95, 0.95])


def test_heads_cut_are_heads_switched_off():
    kept = ((0, 1, 2), (0, 2), (2,))
    small, cut = cut_heads(MODEL, VARIABLES, kept)

    def switched(model, images):
        x = model.embed(images)
        for block, heads in zip(model.blocks, kept, strict=True):
            q, k, v = block.attention.project(block.norm1(x))
            on = jnp.zeros(3).at[jnp.array(heads)].set(1)[None, :, None, None]
            x = block.feed_forward(block.add(x, block.attention.combine(block.attention.exponentials(q, k), on * v)))
        return model.head(x)

    np.testing.assert_allclose(run(small, cut, IMAGES), run(MODEL, VARIABLES, IMAGES, method=switched), atol=1e-5)
    assert flops(small.apply, cut, IMAGES) < flops(MODEL.apply, VARIABLES, IMAGES)
    method = CPViT(small, (0.5, 0.0, 0.0))
    assert run(method, wrap(method, cut, jax.random.key(0)), IMAGES).shape == (2, 3)


def test_least_heads_add_up_over_blocks():
    heads = [jnp.array([1.0, 5.0, 3.0]), jnp.array([9.0, 0.0, 0.5]), jnp.array([0.0, 0.0, 9.0])]
    assert least_heads(heads, 0.0) == ((0, 1, 2),) * 3
    assert least_heads(heads, (0.0, 0.34, 0.0)) == ((0, 1, 2), (0, 1, 2), (0, 1))
    assert least_heads(heads, (0.2, 0.2, 0.0)) == ((0, 1, 2), (0, 1, 2), (0, 1))
    with pytest.raises(ValueError, match="heads must be as many in every block"):
        least_heads([jnp.ones(2), jnp.ones(3)], 0.1)
    for ratios in (0.5, (1.0, 0.0, 0.0), (0.3, 0.3, 0.39999999)):
        with pytest.raises(ValueError, match="sum to less than 1"):
            least_heads(heads, ratios)
    assert least_heads(heads, (0.3, 0.39, 0.3))[-1] == (0,)


def test_ratios_that_are_one_but_for_rounding_are_refused():
    assert sum((0.1,) * 10) < 1
    with pytest.raises(ValueError, match="sum to less than 1"):
        least_heads([jnp.arange(4.0)] * 10, 0.1)
    with pytest.raises(ValueError, match="sum to less than 1"):
        CPViT(MODEL.clone(depth=10), 0.1)
    assert CPViT(MODEL.clone(depth=10), 0.0999).tokens[-1] == 2


@pytest.mark.parametrize("ratios", [None, "abc", float("nan"), (0.1, None, 0.1)])
def test_ratios_are_numbers(ratios):
    with pytest.raises(ValueError, match="ratios must be numbers that are not negative and sum to less than 1"):
        CPViT(MODEL, ratios)


def test_what_calibrates_must_be_there():
    for measure in (lambda: layer_ratios([], 0.1), lambda: layer_ratios([[1.0, 1.0]], 0.1)):
        with pytest.raises(ValueError, match="ranges must be one of each block"):
            measure()
    with pytest.raises(ValueError, match=r"heads must be as many in every block .* got no block"):
        least_heads([], 0.1)
    with pytest.raises(ValueError, match=r"attention must be \(..., 15, 15\) on this grid, got \(4, 16, 16\)"):
        attention_range(jnp.ones((4, 16, 16)) / 16, (3, 5))
    with pytest.raises(ValueError, match="images must be at least one"):
        MODEL.apply(VARIABLES, IMAGES[:0], method=attention_profile)


def test_heads_are_cut_out_of_this_model_alone():
    all_heads = ((0, 1, 2),) * 3
    with pytest.raises(ValueError, match=r"variables must be those of the ViT, which have blocks_0, got .*'model'"):
        cut_heads(MODEL, {"params": {"model": VARIABLES["params"]}}, all_heads)
    with pytest.raises(ValueError, match=r"variables must be \{'params': ...\}"):
        cut_heads(MODEL, VARIABLES["params"], all_heads)
    with pytest.raises(ValueError, match=r"the qkv kernel of block 0 must be \(24, 72\), got \(12, 36\)"):
        cut_heads(MODEL.clone(width=24), VARIABLES, all_heads)
    with pytest.raises(TypeError, match="heads are cut out of a ViT, got Swin"):
        cut_heads(Swin(num_classes=3), VARIABLES, all_heads)


def test_bad_calibrations_are_named():
    with pytest.raises(ValueError, match=r"ratio must be from 0 to 0.47 with these ranges, got 0.5"):
        layer_ratios([0.0, 1.0], 0.5)
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="ranges must be one of each block, finite and not negative"):
            layer_ratios([1.0, bad], 0.5)
    with pytest.raises(ValueError, match="sharpness must be above 0 and finite, got 0"):
        layer_ratios([1.0, 1.0], 0.5, sharpness=0)
    with pytest.raises(ValueError, match=r"kept\[1\] must name one or more of 3 heads, got \(\)"):
        cut_heads(MODEL, VARIABLES, ((0,), (), (1,)))
    with pytest.raises(ValueError, match=r"kept\[0\] must name one or more of 3 heads, got \(3,\)"):
        cut_heads(MODEL, VARIABLES, ((3,), (0,), (1,)))
    with pytest.raises(ValueError, match=r"kept\[1\] must name each head once, got \(1, 1\)"):
        cut_heads(MODEL, VARIABLES, ((0,), (1, 1), (1,)))
    with pytest.raises(ValueError, match=r"kept\[0\] must name one or more of 3 heads, got \(True, False\)"):
        cut_heads(MODEL, VARIABLES, ((True, False), (0,), (1,)))
    with pytest.raises(ValueError, match="kept must list the heads of 3 blocks, got 1"):
        cut_heads(MODEL, VARIABLES, ((0,),))
