"""What holds for every token method: dense where nothing goes, static shapes, equivariance, composition, costs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from token_models import (
    DENSE,
    IMAGES,
    LOW,
    MODEL,
    SPARSE,
    VARIABLES,
    counted,
    name,
    run,
    shuffle,
    start,
    without_positions,
    wrapped,
)

from prune_jax import apply_masks, flops, make_masks
from prune_jax.graph import prune
from prune_jax.models import Swin, ViT, narrow
from prune_jax.scores import magnitude
from prune_jax.tokens import CPViT, DynamicViT, PatchSkip, SwinPatchSkip, ToMe, cut_heads, token_costs, wrap


@pytest.mark.parametrize("method", DENSE, ids=name)
def test_nothing_dropped_is_the_dense_model_exactly(method):
    trace = run(method, wrapped(method), IMAGES, method="trace")
    np.testing.assert_array_equal(trace.logits, run(MODEL, VARIABLES, IMAGES))
    assert trace.kept.all()
    assert method.tokens == (17, 17, 17)
    assert flops(method.apply, wrapped(method), IMAGES) == flops(MODEL.apply, VARIABLES, IMAGES)


@pytest.mark.parametrize("method", SPARSE, ids=name)
def test_tokens_are_those_counted_and_one_program_serves_all_batches(method):
    variables = wrapped(method)
    forward, traced = counted(method, "trace")
    traces = [forward(variables, images) for images in (IMAGES, IMAGES[::-1], 2 * IMAGES[::-1])]
    assert len(traced) == 1
    for trace in traces:
        assert trace.logits.shape == (2, 3)
        assert jnp.isfinite(trace.logits).all()
        if not (isinstance(method, PatchSkip) and method.capacity is None):
            np.testing.assert_array_equal(trace.kept.sum(-1) + 1, jnp.tile(jnp.array(method.tokens)[None], (2, 1)))
    # and yet it is by image: nothing of the first batch is left in the program
    np.testing.assert_array_equal(traces[1].owner, traces[0].owner[::-1])
    np.testing.assert_allclose(traces[1].logits, traces[0].logits[::-1], atol=1e-5)
    for a, b in itertools.combinations(traces, 2):
        assert not np.array_equal(a.owner, b.owner)
        assert np.abs(a.logits - b.logits).max() > 1e-3


@pytest.mark.parametrize("method", [m for m in SPARSE if not isinstance(m, ToMe)], ids=name)
def test_permuting_patches_permutes_decisions(method):
    variables, order = without_positions(wrapped(method)), np.random.default_rng(2).permutation(16)
    plain = run(method, variables, IMAGES, method="trace")
    shuffled = run(method, variables, shuffle(IMAGES, order), method="trace")
    np.testing.assert_array_equal(shuffled.kept, plain.kept[..., order])
    np.testing.assert_allclose(shuffled.logits, plain.logits, atol=1e-5)


@pytest.mark.parametrize("method", SPARSE[1::2], ids=name)
def test_gradients_reach_the_model(method):
    def loss(variables):
        return method.apply(variables, IMAGES).sum()

    gradients = jax.jit(jax.grad(loss))(wrapped(method))["params"]["model"]
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert all(jnp.any(gradients[f"blocks_{i}"]["mlp"]["fc1"]["kernel"] != 0) for i in range(3))


@pytest.mark.slow
def test_mean_pooling_and_registers():
    """Pooled patches weigh as much as they stand for: merging equal tokens changes nothing."""
    model = MODEL.clone(pool="mean", registers=2)
    variables = start(model)
    variables["params"]["position_embedding"] = jnp.zeros_like(variables["params"]["position_embedding"])
    alike = np.tile(IMAGES[:, :4, :4], (1, 4, 4, 1))
    alike[:, :4, 4:8] = IMAGES[:, 4:8, 4:8]  # one patch differs, and is merged with none
    method = ToMe(model, (6, 2, 1))
    small = wrap(method, variables, jax.random.key(0))
    np.testing.assert_allclose(run(method, small, alike), run(model, variables, alike), atol=1e-5)
    for other in (DynamicViT(model, (1,), 0.5), CPViT(model, 0.2), PatchSkip(model, 0.5)):
        small = wrap(other, variables, jax.random.key(0))
        assert run(other, small, IMAGES).shape == (2, 3)


@pytest.mark.slow
def test_a_narrowed_vit_is_wrapped_like_any_other():
    pruned = prune(MODEL.apply, VARIABLES, IMAGES, ratio=0.5, scope="local")
    model = narrow(MODEL, pruned.plan)
    model, params = cut_heads(model, pruned.params, ((0, 1, 2), (0, 1, 2), (2,)))
    for kind in (DynamicViT, CPViT, PatchSkip, ToMe):
        full = {DynamicViT: {"stages": (1,), "keep": 1.0}, CPViT: {}, PatchSkip: {"capacity": 1.0}, ToMe: {"r": 0}}
        less = {DynamicViT: {"stages": (1,)}, CPViT: {"ratios": 0.2}, PatchSkip: {"capacity": 0.5}, ToMe: {"r": 2}}
        small = wrap(kind(model, **full[kind]), params, jax.random.key(0))
        np.testing.assert_array_equal(run(kind(model, **full[kind]), small, IMAGES), run(model, params, IMAGES))
        method = kind(model, **less[kind])
        assert flops(method.apply, small, IMAGES) < flops(model.apply, params, IMAGES)


def test_masks_apply_to_the_wrapped_model():
    method = DynamicViT(MODEL, (1,), 0.5)
    variables = wrapped(method)
    masks = make_masks(magnitude(variables), 0.5)
    dense = run(method, apply_masks(variables, masks), IMAGES)
    assert dense.shape == (2, 3)
    assert flops(method.apply, variables, IMAGES, masks=masks) < flops(method.apply, variables, IMAGES)


def test_costs():
    method = ToMe(MODEL, (8, 0, 0))
    costs = token_costs(method, wrapped(method), batches=(1, 2), repeats=2)
    assert costs.tokens == (9, 9, 9)
    assert costs.flops < costs.dense_flops
    assert set(costs.latency) == set(costs.dense_latency) == {1, 2}
    assert token_costs(method, wrapped(method), batches=()).latency == {}


@pytest.mark.parametrize("method", DENSE, ids=name)
def test_nothing_dropped_is_the_dense_model_exactly_in_bfloat16(method):
    logits = run(method.clone(model=LOW), wrapped(method), IMAGES)
    np.testing.assert_array_equal(logits, run(LOW, VARIABLES, IMAGES))
    assert np.abs(logits - run(MODEL, VARIABLES, IMAGES)).max() > 1e-4  # it is in bfloat16


# Not those that merge: of two partners that are equally near in bfloat16, each form may take another.
@pytest.mark.parametrize(
    "method",
    [m for m in SPARSE if getattr(m, "capacity", m.tokens) and hasattr(m, "masked") and not getattr(m, "merge", False)],
    ids=name,
)
def test_masked_and_gathered_agree_in_bfloat16(method):
    """Within what bfloat16 resolves, far less than what the decisions change."""
    method = method.clone(model=LOW.clone(pool="mean"))  # logits that every patch has a part in
    variables = start(method)
    trace = run(method, variables, IMAGES, method="trace")
    blocks = method.stages if isinstance(method, DynamicViT) else range(3)
    decisions = trace.kept[:, jnp.array(blocks)]
    masked, other = (
        run(method, variables, IMAGES, decisions=d, method="masked").logits for d in (decisions, decisions[..., ::-1])
    )
    scale = np.abs(trace.logits).max()
    np.testing.assert_allclose(masked, trace.logits, atol=0.02 * scale)
    assert np.abs(other - trace.logits).max() > 0.05 * scale


@pytest.mark.slow
@pytest.mark.parametrize("method", SPARSE, ids=name)
def test_bfloat16_is_near_float32(method):
    logits, expected = (run(m, wrapped(method), IMAGES) for m in (method.clone(model=LOW), method))
    np.testing.assert_allclose(logits, expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("method", "axes", "shape"),
    [
        (DynamicViT(MODEL, (0, 2), 0.5), r"\(images, stages, patches\)", (2, 2, 16)),
        (PatchSkip(MODEL, 0.5), r"\(images, blocks, patches\)", (2, 3, 16)),
    ],
    ids=["DynamicViT", "PatchSkip"],
)
@pytest.mark.parametrize("change", [(-1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, 1), (0, 0, -15)])
def test_decisions_of_another_shape_are_named(method, axes, shape, change):
    decisions = jnp.ones(np.add(shape, change), bool)
    with pytest.raises(ValueError, match=rf"decisions must be {axes} = \({', '.join(map(str, shape))}\), got \("):
        jax.eval_shape(lambda v: method.apply(v, IMAGES, decisions=decisions, method="masked"), wrapped(method))


def test_parameters_of_another_model_are_named():
    other = start(ViT(num_classes=3, image_size=16, patch=4, width=24, depth=3, heads=3))
    with pytest.raises(ValueError, match=r"'blocks_0/attention/proj/bias' is \(24,\), the model has \(12,\)"):
        wrap(ToMe(MODEL, 1), other, jax.random.key(0))


def test_variables_of_another_structure_are_named():
    method, key = ToMe(MODEL, 1), jax.random.key(0)
    small, bare = wrapped(method), VARIABLES["params"]
    with pytest.raises(ValueError, match="variables are those of a method; wrap takes the model's alone"):
        wrap(method, small, key)
    with pytest.raises(ValueError, match=r"variables must be \{'params': ...\}, got .*blocks_0"):
        wrap(method, bare, key)
    with pytest.raises(ValueError, match="variables must be those of a ViT or Swin, got params of Dense_0"):
        wrap(method, {"params": {"Dense_0": {}}}, key)
    with pytest.raises(ValueError, match=r"variables must be the method's, as wrap makes them, got .*blocks_0"):
        token_costs(method, VARIABLES)
    with pytest.raises(ValueError, match=r"variables must be \{'params': ...\}, got list"):
        token_costs(method, [small])
    with pytest.raises(ValueError, match="batches must be a whole number of at least 1, got 0"):
        token_costs(method, small, batches=(1, 0))
    with pytest.raises(ValueError, match="repeats must be a whole number of at least 1, got 0"):
        token_costs(method, small, repeats=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DynamicViT(MODEL, (1,), 0.0), "keep must be above 0 and at most 1, got 0.0"),
        (lambda: DynamicViT(MODEL, (1,), 1.5), "keep must be above 0 and at most 1, got 1.5"),
        (lambda: DynamicViT(MODEL, (1, 3)), r"stages must be ascending blocks from 0 to 2, got \(1, 3\)"),
        (lambda: DynamicViT(MODEL, (2, 1)), r"stages must be ascending"),
        (lambda: DynamicViT(MODEL, (1, 2), (0.5, 0.6)), "keep must be one number or 2 falling fractions"),
        (lambda: DynamicViT(MODEL, (1, 2), (0.5, 0.0)), "keep must be above 0"),
        (lambda: DynamicViT(MODEL, 1), r"stages must be a tuple of blocks, such as \(3, 6, 9\), got 1"),
        (lambda: DynamicViT(MODEL, (1.5,)), "stages must be a whole number of at least 0, got 1.5"),
        (lambda: DynamicViT(MODEL, (1,), features=0), "features must be a whole number of at least 1, got 0"),
        (lambda: DynamicViT(MODEL, (1,), temperature=0.0), "temperature must be above 0 and finite, got 0.0"),
        (lambda: DynamicViT(MODEL, (1,), temperature=-1.0), "temperature must be above 0"),
        (lambda: CPViT(MODEL, (0.1, float("nan"), 0.0)), "ratios must be numbers that are not negative"),
        (lambda: PatchSkip(MODEL, hidden=0), "hidden must be a whole number of at least 1, got 0"),
        (lambda: PatchSkip(MODEL, np.array([0.5, 0.0, 1.0])), "capacity must be above 0 and at most 1, got 0.0"),
        (lambda: CPViT(MODEL, 0.4), "ratios must be numbers that are not negative and sum to less than 1"),
        (lambda: CPViT(MODEL, (0.1, 0.2)), "ratios must be one value or a sequence of 3"),
        (lambda: CPViT(MODEL, queries="some"), "queries must be 'all' or 'prefix', got 'some'"),
        (lambda: CPViT(MODEL.clone(pool="mean"), queries="prefix"), "needs a model with a class token"),
        (lambda: PatchSkip(MODEL, 0.0), "capacity must be above 0"),
        (lambda: PatchSkip(MODEL, (0.5, 0.5)), "capacity must be one value or a sequence of 3"),
        (lambda: PatchSkip(MODEL, threshold=1.0), "threshold must be between 0 and 1, got 1.0"),
        (lambda: PatchSkip(MODEL, attend="none"), "attend must be 'all' or 'kept', got 'none'"),
        (lambda: ToMe(MODEL, (8, 5, 0)), "at most half of the 8 patch tokens of block 1, got 5"),
        (lambda: ToMe(MODEL, -1), "r must be a whole number of at least 0, got -1"),
        (lambda: ToMe(MODEL, 2.5), "r must be a whole number of at least 0, got 2.5"),
        (lambda: ToMe(MODEL, (1, 1)), "r must be one value or a sequence of 3"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", [CPViT, DynamicViT, PatchSkip, ToMe])
def test_models_of_another_kind_are_named(kind):
    with pytest.raises(TypeError, match=f"{kind.__name__} wraps a ViT, got Swin"):
        kind(Swin(num_classes=3))
    with pytest.raises(TypeError, match="SwinPatchSkip wraps a Swin, got ViT"):
        SwinPatchSkip(MODEL)


@pytest.mark.parametrize("array", [np.array, jnp.array])
def test_arrays_say_what_tuples_say(array):
    assert DynamicViT(MODEL, array([1, 2]), array([0.5, 0.25])) == DynamicViT(MODEL, (1, 2), (0.5, 0.25))
    assert DynamicViT(MODEL, (1,), array(0.5)).tokens == DynamicViT(MODEL, (1,), 0.5).tokens
    assert CPViT(MODEL, array([0.25, 0.0, 0.5])) == CPViT(MODEL, (0.25, 0.0, 0.5))
    assert PatchSkip(MODEL, array([0.5, 0.25, 1.0])) == PatchSkip(MODEL, (0.5, 0.25, 1.0))
    assert ToMe(MODEL, array([8, 1, 3])) == ToMe(MODEL, (8, 1, 3))
    swin = Swin(num_classes=3, depths=(1, 1), width=array([8, 12]), heads=(2, 3), window=array([4, 2]))
    assert (swin.widths, swin.windows) == ((8, 12), (4, 2))
    assert SwinPatchSkip(swin, array([0.5, 1.0])).capacities == (0.5, 1.0)
