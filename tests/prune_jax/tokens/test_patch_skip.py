"""Patch skipping: both modes agree, skipped patches keep their tokens, scorers learn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from token_models import IMAGES, MODEL, VARIABLES, run, wrapped

from prune_jax import flops
from prune_jax.tokens import (
    PatchSkip,
    Skipping,
    balanced_skip_accuracy,
    capacities,
    keep_share,
    skip_accuracy,
    skip_loss,
    start_at_shares,
)
from prune_jax.tokens.patch_skip import compute_some


@pytest.mark.parametrize("attend", ["all", "kept"])
def test_masked_and_gathered_agree_on_the_same_decisions(attend):
    method = PatchSkip(MODEL, (0.5, 1.0, 0.25), attend=attend)
    variables = wrapped(method)
    trace = run(method, variables, IMAGES, method="trace")
    masked = run(method, variables, IMAGES, decisions=trace.kept, method="masked")
    np.testing.assert_allclose(masked.logits, trace.logits, atol=1e-5)
    np.testing.assert_array_equal(masked.kept, trace.kept)
    assert (trace.kept[:, 1] & ~trace.kept[:, 0]).any()  # they come back


def test_a_skipped_patch_keeps_its_token_and_is_still_seen():
    method = PatchSkip(MODEL, 0.5)
    variables = wrapped(method)

    def after_first(module, images, attend):
        x = module.model.embed(images)
        block = module.model.blocks[0]
        index = jnp.broadcast_to(jnp.array([0, 2, 5, 6]), (2, 4))
        return x, compute_some(block, x, block.norm1(x), index, attend), block(x)

    before, seen, full = method.apply(variables, IMAGES, "all", method=after_first)
    np.testing.assert_array_equal(seen[:, 1], before[:, 1])
    np.testing.assert_allclose(seen[:, 2], full[:, 2], atol=1e-5)  # as if nothing had been skipped
    _, unseen, _ = method.apply(variables, IMAGES, "kept", method=after_first)
    assert np.abs(unseen[:, 2] - full[:, 2]).max() > 1e-2


def test_costs_fall_with_the_capacity():
    variables = wrapped(PatchSkip(MODEL, 0.5))
    dense = flops(MODEL.apply, VARIABLES, IMAGES)
    counts = [flops(PatchSkip(MODEL, c, attend=a).apply, variables, IMAGES) for c, a in ((0.5, "all"), (0.5, "kept"))]
    assert counts[1] < counts[0] < dense


def test_thresholds_decide_by_the_score():
    method = PatchSkip(MODEL, threshold=0.5)
    variables = wrapped(method)
    assert method.tokens == (17, 17, 17)
    few = run(method.clone(threshold=0.99), variables, IMAGES, method="trace").kept.sum()
    some = run(method, variables, IMAGES, method="trace").kept.sum()
    many = run(method.clone(threshold=0.01), variables, IMAGES, method="trace").kept.sum()
    assert few < some < many
    first = run(method, variables, IMAGES, method="watch").scores[:, 0] > 0
    np.testing.assert_array_equal(run(method, variables, IMAGES, method="trace").kept[:, 0], first)


def test_watching_leaves_the_dense_run_alone():
    method = PatchSkip(MODEL)
    seen = run(method, wrapped(method), IMAGES, method="watch")

    def similar(model, images):
        x = model.embed(images)
        out = []
        for block in model.blocks:
            y = block(x)
            for a, b in zip(x[:, 1:], y[:, 1:], strict=True):
                for s, t in zip(np.asarray(a), np.asarray(b), strict=True):
                    out.append(0.5 + 0.5 * np.dot(s, t) / np.sqrt(np.dot(s, s) * np.dot(t, t)))
            x = y
        return np.array(out).reshape(3, 2, 16).transpose(1, 0, 2)

    expected = MODEL.apply(VARIABLES, IMAGES, method=similar)
    np.testing.assert_allclose(seen.similarity, expected, atol=1e-4)


@pytest.mark.slow
def test_scorers_learn_which_patches_a_block_changes():
    method = PatchSkip(MODEL, hidden=16)
    variables = wrapped(method)
    images = np.random.default_rng(0).standard_normal((16, 16, 16, 3)).astype(np.float32)
    cut = float(jnp.median(run(method, variables, images, method="watch").similarity))
    optimizer = optax.adam(3e-2)

    def loss(own):
        params = {**variables["params"], **own}
        seen = method.apply({"params": params}, images, method="watch")
        return skip_loss(seen, cut), skip_accuracy(seen, cut).mean()

    def step(state, _):
        own, opt = state
        (value, accuracy), gradients = jax.value_and_grad(loss, has_aux=True)(own)
        updates, opt = optimizer.update(gradients, opt)
        return (optax.apply_updates(own, updates), opt), (value, accuracy)

    of_model = jax.grad(lambda model: loss({"model": model})[0])(variables["params"]["model"])
    assert not any(jnp.any(g) for g in jax.tree.leaves(of_model))  # they watch it, and do not change it
    own = {k: v for k, v in variables["params"].items() if k != "model"}
    _, (losses, accuracy) = jax.jit(lambda s: jax.lax.scan(step, s, length=60))((own, optimizer.init(own)))
    assert losses[-1] < losses[0]
    assert accuracy[-1] > 0.8


def test_loss_and_accuracy_are_their_formulas():
    scores = jnp.array([[[2.0, -1.0], [0.5, 3.0]]])
    seen = Skipping(scores, jnp.array([[[0.8, 0.99], [0.97, 0.2]]]))
    p = 1 / (1 + np.exp(-np.asarray(scores[0])))
    by_hand = -np.mean([np.log(p[0, 0]), np.log(1 - p[0, 1]), np.log(1 - p[1, 0]), np.log(p[1, 1])])
    assert skip_loss(seen, 0.95) == pytest.approx(by_hand, rel=1e-5)
    np.testing.assert_allclose(skip_accuracy(seen, 0.95), [1.0, 0.5])


def test_kept_tokens_are_scored_as_in_the_run():
    method = PatchSkip(MODEL)
    variables = wrapped(method)
    seen = run(method, variables, IMAGES, method="observe")
    assert seen.tokens.shape == (2, 3, 16, 12)
    some = run(method, variables, seen.tokens[:, :, 3:5], seen.means, method="score")
    watched = run(method, variables, IMAGES, method="watch")
    np.testing.assert_allclose(some, watched.scores[:, :, 3:5], atol=1e-5)
    np.testing.assert_array_equal(seen.similarity, watched.similarity)


def test_balanced_accuracy_and_shares_count_each_kind_by_itself():
    rng = np.random.default_rng(3)
    scores, similarity = rng.standard_normal((2, 4, 3, 5)).astype(np.float32)
    seen = Skipping(scores, np.abs(similarity) * np.array([[1], [0.1], [2]], np.float32))
    keep, says = seen.similarity < 0.6, seen.scores > 0
    assert keep[:, 1].all()
    by_hand = [np.mean([(says[:, i] == k)[keep[:, i] == k].mean() for k in np.unique(keep[:, i])]) for i in range(3)]
    np.testing.assert_allclose(balanced_skip_accuracy(seen, 0.6), by_hand, rtol=1e-5)
    np.testing.assert_allclose(keep_share(seen.similarity, 0.6), keep.mean((0, 2)), rtol=1e-6)
    # a Swin's tuples, an array a block
    apart = Skipping(tuple(seen.scores.swapaxes(0, 1)), tuple(seen.similarity.swapaxes(0, 1)))
    for measure in (balanced_skip_accuracy, skip_accuracy, skip_loss):
        np.testing.assert_allclose(measure(apart, 0.6), measure(seen, 0.6), rtol=1e-5)
    np.testing.assert_allclose(keep_share(apart.similarity, 0.6), keep_share(seen.similarity, 0.6), rtol=1e-6)


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
def test_capacities_choose_as_many_patches_as_asked_however_many_scores_are_equal(levels, keep):
    rng = np.random.default_rng(levels)
    scores = np.floor(levels * rng.random((4, 3, 50))) + 0.3 * np.arange(3)[:, None] * (levels > 5)
    found = np.array(capacities(scores, keep))
    assert found.mean() == pytest.approx(round(keep * 600) / 600)
    # the expectation where equal scores are ranked at random
    order = np.argsort(-(scores + 1e-3 * rng.random((200, *scores.shape))).reshape(200, -1), axis=1)
    block = np.broadcast_to(np.arange(3)[:, None], scores.shape).ravel()
    drawn = [(block[order[:, : round(keep * 600)]] == b).sum() / (200 * 200) for b in range(3)]
    np.testing.assert_allclose(found, drawn, atol=0.01)


def test_capacities_of_scores_that_are_nan_are_refused():
    with pytest.raises(ValueError, match="scores are NaN"):
        capacities(jnp.full((1, 2, 4), jnp.nan), 0.5)


def test_capacities_of_equal_scores_still_save():
    assert capacities(jnp.zeros((4, 2, 16)), 0.1) == pytest.approx((13 / 128, 13 / 128))


def test_capacities_of_a_swin_take_its_tuples():
    first, second = np.array([[8.0, 7, 6, 1, 0, 0, 0, 0]] * 2), np.array([[5.0, 4], [-1, -1]])
    # 10 of 20: six of the first block above 5, two of the second, then the first block's ones
    assert capacities((first, second), 0.5) == pytest.approx((8 / 16, 2 / 4))
    assert capacities((jnp.asarray(first), jnp.asarray(second)), 0.3) == pytest.approx((6 / 16, 1 / 2))  # at least one
    rng = np.random.default_rng(1)
    scores = rng.standard_normal((4, 3, 16))
    assert capacities(tuple(scores.swapaxes(0, 1)), 0.4) == capacities(scores, 0.4)


def test_training_starts_at_the_commoner_answer():
    method = PatchSkip(MODEL)
    params = start_at_shares(wrapped(method)["params"], jnp.array([0.2, 0.7, 0.0]))
    quiet = {n: {**params[n], "fc2": {**params[n]["fc2"], "kernel": jnp.zeros((1, 1))}} for n in params if n != "model"}
    scores = run(method, {"params": {**params, **quiet}}, IMAGES, method="watch").scores
    chances = jax.nn.sigmoid(scores)
    np.testing.assert_allclose(chances, np.broadcast_to(np.array([0.2, 0.7, 1e-3])[:, None], (2, 3, 16)), rtol=1e-4)
    assert params["model"] is wrapped(method)["params"]["model"]
