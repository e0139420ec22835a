"""Patch skipping in a Swin, behind the same protocol: dense at capacity 1, forms agree, counted, wrapped, timed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from token_models import counted, run, start

from prune_jax import flops
from prune_jax.models import Swin
from prune_jax.tokens import SwinPatchSkip, TokenMethod, skip_accuracy, skip_loss, token_costs, wrap

SWIN = Swin(num_classes=3, patch=2, window=4, width=(8, 12), depths=(2, 1), heads=(2, 3))
WIDE = np.random.default_rng(4).standard_normal((2, 18, 12, 3)).astype(np.float32)  # padded, and shifted windows
SIZE = (18, 12)
SOME = SwinPatchSkip(SWIN, (0.5, 0.25, 0.5), image_size=SIZE)


def test_at_full_capacity_it_is_dense_exactly():
    variables = start(SWIN, WIDE)
    method = SwinPatchSkip(SWIN, 1.0, image_size=SIZE)
    small = {"params": {**start(method, WIDE, seed=5)["params"], "model": variables["params"]}}
    trace = run(method, small, WIDE, method="trace")
    np.testing.assert_array_equal(trace.logits, run(SWIN, variables, WIDE))
    assert [kept.shape for kept in trace.kept] == [(2, 54), (2, 54), (2, 15)]
    assert all(kept.all() for kept in trace.kept)
    assert method.tokens == (54, 54, 15)
    assert flops(method.apply, small, WIDE) == flops(SWIN.apply, variables, WIDE)


@pytest.mark.slow
def test_bfloat16():
    """At full capacity dense exactly; masked and gathered agree within what bfloat16 resolves."""
    low, variables = SWIN.clone(compute_dtype=jnp.bfloat16), start(SOME, WIDE)
    dense = run(low, {"params": variables["params"]["model"]}, WIDE)
    np.testing.assert_array_equal(run(SwinPatchSkip(low, 1.0, image_size=SIZE), variables, WIDE), dense)
    method = SOME.clone(model=low)
    trace = run(method, variables, WIDE, method="trace")
    masked = run(method, variables, WIDE, decisions=trace.kept, method="masked").logits
    np.testing.assert_allclose(masked, trace.logits, atol=0.02 * np.abs(trace.logits).max())
    assert np.abs(dense - trace.logits).max() > 0.1 * np.abs(trace.logits).max()


def test_masked_and_gathered_agree_on_the_same_decisions():
    variables = start(SOME, WIDE)
    trace = run(SOME, variables, WIDE, method="trace")
    masked = run(SOME, variables, WIDE, decisions=trace.kept, method="masked")
    np.testing.assert_allclose(masked.logits, trace.logits, atol=1e-5)
    for a, b in zip(masked.kept, trace.kept, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not all(kept.all() for kept in trace.kept)


def test_tokens_are_those_counted_and_one_program_serves_all_batches():
    """A window of 16 of 9 x 6 patches computes 8, then 4; in the second stage one of 12 of 5 x 3 computes 6."""
    variables = start(SOME, WIDE)
    forward, traced = counted(SOME, "trace")
    traces = [forward(variables, images) for images in (WIDE, WIDE[::-1], 2 * WIDE[::-1])]
    assert len(traced) == 1
    np.testing.assert_allclose(traces[1].logits, traces[0].logits[::-1], atol=1e-5)
    for now, swapped, other in zip(*[trace.kept for trace in traces], strict=True):
        np.testing.assert_array_equal(swapped, now[::-1])
        assert not np.array_equal(now, swapped)
        assert not np.array_equal(other, swapped)
    assert np.abs(traces[2].logits - traces[1].logits).max() > 1e-3
    assert SOME.tokens == (6 * 8, 6 * 4, 2 * 6)
    assert SwinPatchSkip(SWIN, image_size=SIZE).tokens == (54, 54, 15)
    square = SwinPatchSkip(SWIN, (0.5, 0.25, 0.5), image_size=(32, 32))  # no padding: what is computed is kept
    images = np.random.default_rng(5).standard_normal((2, 32, 32, 3)).astype(np.float32)
    kept = run(square, variables, images, method="trace").kept
    assert [now.sum(-1).tolist() for now in kept] == [[n, n] for n in square.tokens]


@pytest.mark.slow
def test_scorers_decide_in_threshold_mode_and_can_be_trained():
    method = SwinPatchSkip(SWIN, image_size=SIZE)
    variables = start(method, WIDE)
    seen = run(method, variables, WIDE, method="watch")
    kept = run(method, variables, WIDE, method="trace").kept
    np.testing.assert_array_equal(kept[0], seen.scores[0] > 0)
    assert all(((s >= 0) & (s <= 1)).all() for s in seen.similarity)
    assert skip_accuracy(seen, 0.9).shape == (3,)

    def loss(params):
        return skip_loss(method.apply({"params": params}, WIDE, method="watch"), 0.9)

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    assert all(jnp.any(gradients[f"scorers_{i}"]["fc1"]["kernel"] != 0) for i in range(3))
    assert not any(jnp.any(g) for g in jax.tree.leaves(gradients["model"]))


def test_training_drops_the_branches_of_whole_examples():
    """Where the second block drops both branches of an example, its computed patches are those it was given."""
    model = Swin(num_classes=3, patch=2, window=2, width=(8,), depths=(2,), heads=(2,), drop_path=0.5)
    method = SwinPatchSkip(model, (1.0, 0.5), image_size=(8, 8))
    images = np.random.default_rng(6).standard_normal((32, 8, 8, 3)).astype(np.float32)
    variables = start(method, images)

    def changed(method, x):
        blocks = method.model.blocks[0]
        x = blocks[0](method.model.embed(x, train=True), train=True)
        after, kept = method._gathered(1, blocks[1], x, 0.5, True)
        return ((after != x).any(axis=-1) & kept, kept)

    rngs = {"dropout": jax.random.key(3)}
    moved, kept = jax.jit(lambda v, x: method.apply(v, x, method=changed, rngs=rngs))(variables, images)
    of_image = moved.any(axis=(1, 2))
    assert 0 < of_image.sum() < len(images)  # a quarter loses both branches
    np.testing.assert_array_equal(moved, kept & of_image[:, None, None])
    assert jax.eval_shape(lambda v, x: method.apply(v, x, train=True, rngs=rngs), variables, images).shape == (32, 3)


def test_it_is_wrapped_and_timed_like_any_other():
    assert isinstance(SOME, TokenMethod)
    variables = wrap(SOME, start(SWIN, WIDE), jax.random.key(1))
    assert set(variables["params"]) == {"model", "scorers_0", "scorers_1", "scorers_2"}
    costs = token_costs(SOME, variables, batches=(1,), repeats=1)
    assert costs.tokens == SOME.tokens
    assert costs.flops < costs.dense_flops
    assert set(costs.latency) == {1}


def test_decisions_of_another_shape_are_named():
    variables = start(SOME, WIDE)
    right = [jnp.ones((2, n), bool) for n in (54, 54, 15)]
    for decisions, message in (
        (right[:2], "decisions must be a sequence of 3, got 2"),
        (right[:1] * 3, r"decisions\[2\] must be \(images, patches\) = \(2, 15\), got \(2, 54\)"),
        ([right[0][:1], *right[1:]], r"decisions\[0\] must be \(images, patches\) = \(2, 54\), got \(1, 54\)"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda v, d=decisions: SOME.apply(v, WIDE, decisions=d, method="masked"), variables)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="capacity must be one value or a sequence of 3"):
        SwinPatchSkip(SWIN, (0.5, 0.5))
    with pytest.raises(ValueError, match="capacity must be above 0 and at most 1, got 0"):
        SwinPatchSkip(SWIN, 0)
    with pytest.raises(ValueError, match="threshold must be between 0 and 1, got 0"):
        SwinPatchSkip(SWIN, threshold=0)
    with pytest.raises(ValueError, match="image_size must be a whole number of at least 1, got 0"):
        SwinPatchSkip(SWIN, image_size=0)


def test_one_number_is_an_image_size():
    assert SwinPatchSkip(SWIN, image_size=18) == SwinPatchSkip(SWIN, image_size=(18, 18))
    assert SwinPatchSkip(SWIN, image_size=18).tokens == (81, 81, 25)
