"""DynamicViT: both forms agree, decisions are drawn as said, losses are their formulas, gradients reach predictors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from token_models import IMAGES, MODEL, VARIABLES, run, start, wrapped

from prune_jax.tokens import DynamicViT, dynamic_vit_loss, gumbel_keep, ratio_loss, teach, token_distillation
from prune_jax.tokens.dynamic_vit import Predictor, merge_masked, policy

LABELS = jnp.array([0, 2])


def decided(method, variables):
    """What the inference form decides, as masks after each stage."""
    return run(method, variables, IMAGES, method="trace").kept[:, jnp.array(method.stages)]


@pytest.mark.parametrize("pool", ["token", "mean"])
@pytest.mark.parametrize("merge", [False, True])
def test_masked_and_gathered_agree_on_the_same_decisions(merge, pool):
    method = DynamicViT(MODEL.clone(pool=pool), (0, 2), (0.5, 0.25), merge=merge)
    variables = start(method)
    masks = decided(method, variables)
    np.testing.assert_array_equal(masks.sum(-1), [[8, 4], [8, 4]])
    masked = run(method, variables, IMAGES, decisions=masks, method="masked")
    np.testing.assert_allclose(masked.logits, run(method, variables, IMAGES), atol=1e-5)
    np.testing.assert_array_equal(masked.decisions, masks)


def test_what_a_stage_has_dropped_no_later_one_brings_back():
    """M <- M * M_c."""
    method = DynamicViT(MODEL, (0, 2), 0.5)
    drawn = np.random.default_rng(0).random((2, 2, 16)) < 0.6
    nested = drawn.cumprod(axis=1).astype(bool)
    assert (drawn != nested).any()
    outputs = [run(method, wrapped(method), IMAGES, decisions=d, method="masked") for d in (drawn, nested)]
    np.testing.assert_array_equal(outputs[0].decisions, nested)
    np.testing.assert_array_equal(outputs[0].logits, outputs[1].logits)


def test_the_predictor_sees_only_what_is_left():
    """Its masked form on all tokens is its plain form on the kept ones: equations 13 to 17."""
    predictor = Predictor(4)
    x = np.random.default_rng(0).standard_normal((2, 6, 12)).astype(np.float32)
    variables = jax.tree.map(lambda p: p + 0.3, predictor.init(jax.random.key(0), x))
    mask = jnp.array([[1.0, 0, 1, 1, 0, 1]] * 2)
    kept = np.flatnonzero(mask[0])
    masked = predictor.apply(variables, x, mask)
    np.testing.assert_allclose(masked[:, kept], predictor.apply(variables, x[:, kept]), atol=1e-5)
    np.testing.assert_allclose(jnp.exp(masked).sum(-1), 1, atol=1e-5)


def test_masks_are_hierarchical_and_drawn_with_their_probability():
    method = DynamicViT(MODEL, (0, 1, 2))
    variables = start(method)
    images = np.repeat(IMAGES, 16, axis=0)  # each with noise of its own
    masks = run(method, variables, images, rngs={"gumbel": jax.random.key(0)}, method="masked").decisions
    assert set(np.unique(masks)) == {0.0, 1.0}
    assert (masks[:, 1:] <= masks[:, :-1]).all()
    assert (masks[0] != masks[1]).any()
    log_p = jnp.log(jnp.array([[0.3, 0.7], [0.9, 0.1]]))
    drawn = jax.vmap(lambda key: gumbel_keep(key, log_p))(jax.random.split(jax.random.key(1), 4000))
    np.testing.assert_allclose(drawn.mean(0), [0.7, 0.1], atol=0.03)


def test_a_stage_that_keeps_all_draws_nothing():
    method = DynamicViT(MODEL, (0, 2), (1.0, 0.5))
    masks = run(method, start(method), IMAGES, rngs={"gumbel": jax.random.key(0)}, method="masked").decisions
    assert (masks[:, 0] == 1).all()
    assert (masks[:, 1] == 0).any()


def test_the_gradient_of_a_decision_is_that_of_the_softmax():
    log_p, key = jnp.log(jnp.array([0.3, 0.7])), jax.random.key(3)
    noise = jax.random.gumbel(key, (2,))
    expected = jax.grad(lambda p: jax.nn.softmax((p + noise) / 0.5)[1])(log_p)
    np.testing.assert_allclose(jax.grad(lambda p: gumbel_keep(key, p, 0.5))(log_p), expected, rtol=1e-5)


@pytest.mark.parametrize("merge", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_flow_through_decisions_to_every_predictor(merge):
    method = DynamicViT(MODEL, (1, 2), 0.5, merge=merge)
    variables = wrapped(method)
    teacher = jax.lax.stop_gradient(run(MODEL, VARIABLES, IMAGES, method=teach))

    def loss(params, **weights):
        rngs = {"gumbel": jax.random.key(1)}
        output = method.apply({"params": params}, IMAGES, method="masked", rngs=rngs)
        return dynamic_vit_loss(output, LABELS, *teacher, method.fractions, **weights)[0]

    def size(**weights):
        gradients = jax.jit(jax.grad(lambda p: loss(p, **weights)))(variables["params"])
        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))
        return [float(jnp.abs(gradients[f"predictors_{s}"]["out"]["kernel"]).sum()) for s in range(2)]

    assert min(size()) > 0
    # not by the ratio alone: what the classifier says of the decisions gets through the attention
    assert min(size(ratio=0.0, distillation=0.0, tokens=0.0)) > 0


def test_dropping_a_kept_token_would_take_its_weight_to_the_kept_one_most_like_it():
    """The gradient of the attention's weights by decisions: column j loses j's size, its target's column gains it."""
    rng = np.random.default_rng(0)
    x, size = rng.standard_normal((1, 6, 8)).astype(np.float32), rng.uniform(1, 3, (1, 6)).astype(np.float32)
    before = jnp.ones((1, 6))
    now = before.at[0, 4].set(0)

    def weights(now):
        return policy(now, merge_masked(x, size, before, now)[1], 0)[0, 0]

    found = np.asarray(jax.jacobian(weights)(now))[:, :, 0]  # row, column, decision
    unit = x[0] / np.linalg.norm(x[0], axis=-1, keepdims=True)
    likeness = unit @ unit.T - 2 * np.eye(6) - 2 * (np.arange(6) == 4)
    for j in (0, 1, 2, 3, 5):
        merged = size[0] + np.where(np.arange(6) == likeness[4].argmax(), size[0, 4], 0)
        expected = np.zeros((6, 6))
        expected[:, j] = merged[j]
        expected[j, j] = 0
        expected[:, likeness[j].argmax()] -= size[0, j]
        expected[4, 4] = found[4, 4, j]  # nobody reads what a token that is gone sees of itself
        np.testing.assert_allclose(found[:, :, j], expected, atol=1e-5)


def test_token_distillation_of_half_precision_is_summed_in_float32():
    patches = jnp.ones((400, 196, 8), jnp.float16)
    assert token_distillation(patches, 0 * patches, jnp.ones((400, 196))) == 1


def test_losses_are_their_formulas():
    rng = np.random.default_rng(0)
    masks = (rng.random((2, 2, 16)) < 0.5).astype(np.float32)
    by_hand = np.mean([(masks[b, s].mean() - (0.5, 0.25)[s]) ** 2 for b in range(2) for s in range(2)])
    assert ratio_loss(masks, (0.5, 0.25)) == pytest.approx(by_hand, rel=1e-5)
    a, b = rng.standard_normal((2, 2, 16, 12)).astype(np.float32)
    kept = [((a[i, n] - b[i, n]) ** 2).mean() for i in range(2) for n in range(16) if masks[i, 1, n]]
    assert token_distillation(a, b, masks[:, 1]) == pytest.approx(np.mean(kept), rel=1e-5)
    assert token_distillation(a, b, 0 * masks[:, 1]) == 0


@pytest.mark.parametrize("shapes", [((3, 16, 12), (3, 16, 12), (3, 1)), ((3, 16, 12), (3, 1, 12), (3, 16))])
def test_what_would_broadcast_to_another_loss_is_refused(shapes):
    with pytest.raises(ValueError, match=r"must be \(B, N, D\) with a mask \(B, N\), got"):
        token_distillation(*map(jnp.ones, shapes))


def test_decisions_of_any_type_are_yes_or_no():
    method = DynamicViT(MODEL, stages=(1,), keep=0.5)
    variables = start(method)
    kept = jax.random.bernoulli(jax.random.key(5), 0.5, (2, 1, 16))
    masked = jax.jit(lambda d: method.apply(variables, IMAGES, decisions=d, method="masked").logits)
    expected = masked(kept.astype(jnp.float32))
    for decisions in (kept, kept.astype(jnp.int32), 255 * kept.astype(jnp.uint8)):
        np.testing.assert_array_equal(masked(decisions), expected)


def test_every_stage_has_a_fraction():
    for fractions in ((0.5,), (0.5, 0.5), 0.5):
        with pytest.raises(ValueError, match="a fraction for each stage"):
            ratio_loss(jnp.ones((2, 3, 4)), fractions)


def test_the_dense_model_as_its_own_student_has_nothing_to_learn():
    method = DynamicViT(MODEL, (1, 2), 1.0)
    logits, patches = run(MODEL, VARIABLES, IMAGES, method=teach)
    everything = jnp.ones((2, 2, 16))
    output = method.apply(wrapped(method), IMAGES, decisions=everything, method="masked")
    _, parts = dynamic_vit_loss(output, LABELS, logits, patches, method.fractions)
    assert parts["ratio"] == 0
    assert parts["classes"] == pytest.approx(0, abs=1e-5)
    assert parts["tokens"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("pool", ["token", "mean"])
@pytest.mark.parametrize("factor", [-0.5, np.nan, np.inf])
def test_what_is_dropped_cannot_matter(factor, pool):
    """Other values, NaN or infinity in patches that are dropped before the first block reach nothing."""
    method = DynamicViT(MODEL.clone(pool=pool), (0, 2), 0.5)
    variables = start(method)
    masks = decided(method, variables)
    changed = np.array(IMAGES)
    for image, patch in zip(*np.nonzero(~np.asarray(masks[:, 0])), strict=True):
        i, j = divmod(patch, 4)
        changed[image, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4] *= factor
    outputs = [run(method, variables, images, decisions=masks, method="masked") for images in (IMAGES, changed)]
    np.testing.assert_allclose(outputs[1].logits, outputs[0].logits, atol=1e-5)
    kept = np.asarray(masks[:, -1])
    np.testing.assert_allclose(outputs[1].patches[kept], outputs[0].patches[kept], atol=1e-5)


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_the_gradient_of_a_dropped_patch_is_what_keeping_it_would_change(pool):
    method = DynamicViT(MODEL.clone(pool=pool), (2,), 0.5)
    variables, masks = start(method), jnp.asarray(np.random.default_rng(0).random((2, 1, 16)) < 0.5, jnp.float32)

    def loss(decisions):
        return run(method, variables, IMAGES, decisions=decisions, method="masked").logits[0].sum()

    gradient = jax.grad(loss)(masks)[0, 0]
    for patch in np.flatnonzero(masks[0, 0] == 0)[:3]:
        step = float(loss(masks.at[0, 0, patch].set(0.02)) - loss(masks)) / 0.02
        assert gradient[patch] == pytest.approx(step, rel=0.1, abs=1e-3)
        assert abs(gradient[patch]) > 1e-4
