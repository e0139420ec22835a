"""Training with masks: zeros stay zeros through every optimizer, and in every way that optax composes."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as checkpoint
import pytest

from prune_jax import (
    apply_masks,
    cubic,
    gradual_pruning,
    keep_masks,
    l1_penalty,
    l1_proximal,
    layer_statistics,
    make_masks,
    scores,
    sparsity,
)

PARAMS = {
    "dense": {"kernel": jax.random.normal(jax.random.key(0), (4, 6)), "bias": jnp.ones(6)},
    "out": {"kernel": jax.random.normal(jax.random.key(1), (6, 2))},
}
MASKS = make_masks(scores.magnitude(PARAMS), 0.5)
TARGET = jax.tree.map(lambda p: p + 1, PARAMS)


def gradients(params):
    """Of a quadratic whose minimum is away from zero everywhere, cut weights included."""
    return jax.tree.map(lambda p, t: p - t.astype(p.dtype), params, TARGET)


def train(optimizer, params, steps=5):
    state = optimizer.init(params)

    @jax.jit
    def run(params, state):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(gradients(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), None, length=steps)[0]

    return run(params, state)


def cut_entries(tree, masks):
    """Every state array that has a kernel's shape, where that kernel is cut."""
    shapes = {mask.shape: np.asarray(mask) for mask in jax.tree.leaves(masks)}
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return [array[~shapes[array.shape]] for array in arrays if array.shape in shapes]


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "nadamw": optax.nadamw(0.1),
    "amsgrad": optax.amsgrad(0.1),
    "adagrad": optax.adagrad(0.1),
    "adadelta": optax.adadelta(0.1),
    "rmsprop": optax.rmsprop(0.1, momentum=0.9, centered=True, initial_scale=1.0),
    "lion": optax.lion(0.1, weight_decay=0.1),
    "lamb": optax.lamb(0.1),
    "yogi": optax.yogi(0.1),
    "radam": optax.radam(0.1),
    "adabelief": optax.adabelief(0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
    "noise_first": optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.adam(0.1)),
    "clip_chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(0.1, 10))),
    "ema": optax.chain(optax.adam(0.1), optax.ema(0.9)),
    "multisteps": optax.MultiSteps(optax.adamw(0.1), 2).gradient_transformation(),
    "injected": optax.inject_hyperparams(optax.adamw)(learning_rate=0.1),
    "partition": optax.partition({"a": optax.adam(0.1), "b": optax.sgd(0.1, momentum=0.9)}, {"dense": "a", "out": "b"}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_cut_weights_and_moments_stay_zero(name):
    # Not masked beforehand: the first update has to take cut weights to zero.
    params, state = train(keep_masks(MASKS, OPTIMIZERS[name]), PARAMS)
    for layer in ("dense", "out"):
        kernel, mask = np.asarray(params[layer]["kernel"]), np.asarray(MASKS[layer]["kernel"])
        assert (kernel[~mask] == 0).all()
        assert (kernel[mask] != np.asarray(PARAMS[layer]["kernel"])[mask]).all()
    entries = cut_entries(state.base, MASKS)
    assert all((entry == 0).all() for entry in entries)
    if name not in ("sgd", "adafactor"):
        assert entries  # the check looked at something


def test_kept_weights_train_as_they_would_alone():
    base = optax.adamw(0.1, weight_decay=0.1)
    masked, _ = train(keep_masks(MASKS, base), PARAMS)
    alone, _ = train(base, PARAMS)  # the loss is separable, so kept weights do not feel the others
    for a, b, mask in zip(
        *(jax.tree.leaves({k: t[k]["kernel"] for k in t}) for t in (masked, alone, MASKS)), strict=True
    ):
        np.testing.assert_allclose(a[mask], b[mask], rtol=1e-6)
    np.testing.assert_allclose(masked["dense"]["bias"], alone["dense"]["bias"], rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_bad_gradients_of_cut_weights_do_not_leak(bad):
    grads = {
        "dense": {"kernel": jnp.where(MASKS["dense"]["kernel"], 1.0, bad), "bias": jnp.ones(6)},
        "out": {"kernel": jnp.where(MASKS["out"]["kernel"], 1.0, bad)},
    }
    optimizer = keep_masks(MASKS, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)))
    updates, state = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state)))


@pytest.mark.parametrize("chained", [lambda: optax.adamw(0.1), lambda: optax.sgd(0.1, momentum=0.9)])
def test_as_a_link_it_stands_first(chained):
    optimizer = optax.chain(keep_masks(MASKS), chained())
    params, state = train(optimizer, apply_masks(PARAMS, MASKS))
    assert all((entry == 0).all() for entry in cut_entries((params, state[1]), MASKS))
    with pytest.raises(ValueError, match=r"apply_masks\(params, masks\)"):
        optimizer.init(PARAMS)


def test_masks_live_in_the_state():
    optimizer = keep_masks(MASKS, optax.adam(0.1))
    masks = optax.tree.get(optimizer.init(PARAMS), "masks")
    assert sparsity(masks) == 0.5
    assert "bool[4,6]" in str(jax.make_jaxpr(optimizer.update)(PARAMS, optimizer.init(PARAMS), PARAMS).in_avals)


def test_donating_the_state_leaves_the_callers_masks_alone():
    optimizer = keep_masks(MASKS, optax.adam(0.1))
    step = jax.jit(optimizer.update, donate_argnums=1)
    step(PARAMS, optimizer.init(PARAMS), PARAMS)
    assert sparsity(MASKS) == 0.5


def test_training_goes_on_from_a_checkpoint(tmp_path):
    optimizer = keep_masks(MASKS, optax.adamw(0.1))
    halfway = train(optimizer, PARAMS, steps=3)
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", halfway)
        checkpointer.wait_until_finished()
        params, state = checkpointer.restore(tmp_path / "state", halfway)
    updates, _ = optimizer.update(gradients(params), state, params)
    same(optax.apply_updates(params, updates), train(optimizer, PARAMS, steps=4)[0])
    for layer in ("dense", "out"):
        np.testing.assert_array_equal(state.masks[layer]["kernel"], MASKS[layer]["kernel"])
        assert not np.asarray(params[layer]["kernel"])[~np.asarray(MASKS[layer]["kernel"])].any()


def prune_all_the_way(base=None, **options):
    base = optax.adamw(0.1, weight_decay=0.1) if base is None else base
    return gradual_pruning(base, cubic(0.75, rounds=3), every=2, begin=1, **options)


def test_gradual_pruning_follows_the_schedule_exactly():
    optimizer = prune_all_the_way()
    params, state, total = PARAMS, optimizer.init(PARAMS), 4 * 6 + 6 * 2
    update, previous = jax.jit(optimizer.update), None
    rounds = [Fraction(3, 4) * (1 - Fraction(3 - i, 3) ** 3) for i in (1, 2, 3)]
    expected = [0, *(math.floor(s * total) for s in np.repeat(rounds, 2)), 27, 27]
    for step in range(9):
        magnitudes = np.concatenate([np.abs(params[k]["kernel"]).ravel() for k in ("dense", "out")])
        updates, state = update(gradients(params), state, params)
        params = optax.apply_updates(params, updates)
        keep = np.concatenate([np.asarray(state.masks[k]["kernel"]).ravel() for k in ("dense", "out")])
        assert (~keep).sum() == expected[step]
        if previous is not None:
            assert not (keep & ~previous).any()  # what is cut stays cut
            if (keep != previous).any():  # of the rest, the smallest before this step went
                assert magnitudes[previous & ~keep].max() <= magnitudes[keep].min()
        previous = keep
        assert all((entry == 0).all() for entry in cut_entries((params, state.base), state.masks))
    assert state.masks["dense"]["bias"] is None


def test_movement_prunes_what_training_moves_towards_zero():
    # All weights start at 1; the targets of the first half are 0, of the second half 2.
    params = {"kernel": jnp.ones((4, 4))}
    target = jnp.where(jnp.arange(16).reshape(4, 4) < 8, 0.0, 2.0)
    optimizer = gradual_pruning(optax.sgd(0.01), [0.5], every=1, begin=5, criterion="movement")
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(7):
        updates, state = update({"kernel": params["kernel"] - target}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(state.masks["kernel"], target > 1)
    assert state.movement["kernel"].dtype == jnp.float32


def test_gradual_pruning_takes_scope_exclusion_and_choice_of_leaves():
    optimizer = gradual_pruning(optax.sgd(0.1), [0.5], every=1, scope="local", exclude="^out")
    _, state = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)
    assert {path: layer.kept for path, layer in layer_statistics(state.masks).items()} == {"dense/kernel": 12}
    optimizer = gradual_pruning(optax.sgd(0.1), [0.5], every=1, prunable=lambda path, leaf: "bias" in path)
    _, state = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)
    assert {path: layer.kept for path, layer in layer_statistics(state.masks).items()} == {"dense/bias": 3}


def test_l1_penalty_is_the_gradient_of_the_norm():
    penalty = optax.chain(l1_penalty(0.3), optax.identity())
    updates, _ = penalty.update(gradients(PARAMS), penalty.init(PARAMS), PARAMS)

    def penalised(params):
        quadratic = sum(
            0.5 * ((p - t) ** 2).sum() for p, t in zip(jax.tree.leaves(params), jax.tree.leaves(TARGET), strict=True)
        )
        return quadratic + 0.3 * sum(jnp.abs(params[k]["kernel"]).sum() for k in ("dense", "out"))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, jax.grad(penalised)(PARAMS))


def test_l1_proximal_descends_to_the_lasso_solution_with_exact_zeros():
    # min 0.5 (w - t)^2 + s |w| is the soft threshold of t.
    target = jnp.linspace(-2, 2, 12).reshape(3, 4)
    params, strength = {"kernel": jnp.ones((3, 4))}, 0.7
    optimizer = optax.chain(optax.sgd(0.5), l1_proximal(strength, 0.5))
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(60):
        updates, state = update({"kernel": params["kernel"] - target}, state, params)
        params = optax.apply_updates(params, updates)
    expected = np.sign(target) * np.maximum(np.abs(target) - strength, 0)
    np.testing.assert_allclose(params["kernel"], expected, atol=1e-6)
    np.testing.assert_array_equal(params["kernel"] == 0, expected == 0)
    assert (expected == 0).sum() == 4


def test_l1_strength_may_be_a_schedule_or_injected():
    def schedule(step):
        return jnp.where(step < 1, 0.0, 2.0)

    for penalty in (l1_penalty(schedule), l1_proximal(schedule, lambda step: 0.5)):
        state = penalty.init(PARAMS)
        zero = jax.tree.map(jnp.zeros_like, PARAMS)
        first, state = penalty.update(zero, state, PARAMS)
        second, _ = penalty.update(zero, state, PARAMS)
        assert not np.asarray(first["out"]["kernel"]).any()
        assert np.asarray(second["out"]["kernel"]).all()
    injected = optax.inject_hyperparams(l1_penalty)(strength=0.5)
    updates, _ = jax.jit(injected.update)(zero, injected.init(PARAMS), PARAMS)
    np.testing.assert_allclose(np.abs(updates["out"]["kernel"]), 0.5)


# -- the contract of an optax transform --------------------------------------------------------------------------------

TRANSFORMS = {
    "keep_masks": lambda: keep_masks(MASKS, optax.adamw(0.1)),
    "magnitude": prune_all_the_way,
    "movement": lambda: prune_all_the_way(criterion="movement"),
    "l1_penalty": lambda: optax.chain(l1_penalty(1e-2), optax.adam(0.1)),
    "l1_proximal": lambda: optax.chain(optax.sgd(0.1), l1_proximal(1e-2, 0.1)),
}


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_scan_equals_single_steps(name):
    optimizer = TRANSFORMS[name]()
    params, state, update = PARAMS, optimizer.init(PARAMS), jax.jit(optimizer.update)
    for _ in range(4):
        updates, state = update(gradients(params), state, params)
        params = optax.apply_updates(params, updates)
    same(params, train(optimizer, PARAMS, steps=4)[0])


def test_extra_arguments_reach_the_base_optimizer():
    base = optax.contrib.reduce_on_plateau(patience=1)
    for optimizer in (keep_masks(MASKS, base), gradual_pruning(base, [0.5], every=1)):
        _, state = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, value=jnp.array(3.0))
        assert float(state.base.best_value) == 3


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_dtypes_are_stable_under_cond(name, dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    optimizer = TRANSFORMS[name]()
    state = optimizer.init(params)

    @jax.jit
    def maybe(params, state, go):
        return jax.lax.cond(go, lambda: optimizer.update(gradients(params), state, params), lambda: (params, state))

    updates, state = maybe(params, state, True)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(updates))
    if name == "keep_masks":
        params = optax.apply_updates(params, updates)
        assert all((entry == 0).all() for entry in cut_entries(params, MASKS))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_optax_masked_hides_leaves(name):
    shown = {"dense": {"kernel": True, "bias": False}, "out": {"kernel": False}}
    params, _ = train(optax.masked(TRANSFORMS[name](), shown), PARAMS, steps=1)
    expected = PARAMS["out"]["kernel"] + gradients(PARAMS)["out"]["kernel"]  # optax.masked passes gradients through
    np.testing.assert_allclose(params["out"]["kernel"], expected, rtol=1e-6)
    assert (params["dense"]["kernel"] != PARAMS["dense"]["kernel"]).all()
    if name == "keep_masks":
        assert (params["dense"]["kernel"][~MASKS["dense"]["kernel"]] == 0).all()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_multisteps_and_injected_hyperparameters(name):
    _, state = train(optax.MultiSteps(TRANSFORMS[name](), 2).gradient_transformation(), PARAMS, steps=4)
    assert int(state.gradient_step) == 2
    build = {
        "keep_masks": lambda learning_rate: keep_masks(MASKS, optax.adam(learning_rate)),
        "magnitude": lambda learning_rate: prune_all_the_way(optax.adam(learning_rate)),
        "movement": lambda learning_rate: prune_all_the_way(optax.adam(learning_rate), criterion="movement"),
        "l1_penalty": lambda learning_rate: optax.chain(l1_penalty(learning_rate), optax.adam(learning_rate)),
        "l1_proximal": lambda learning_rate: optax.chain(optax.sgd(learning_rate), l1_proximal(0.01, learning_rate)),
    }[name]
    injected = optax.inject_hyperparams(build)(learning_rate=optax.constant_schedule(0.05))
    same(train(injected, PARAMS, 4)[0], train(build(0.05), PARAMS, 4)[0])


def test_gradual_pruning_under_inject_hyperparams_needs_static_arguments():
    arguments = {"base": optax.sgd(0.1), "sparsities": [0.25, 0.5], "every": 1}
    static = optax.inject_hyperparams(gradual_pruning, static_args=("sparsities", "every", "begin"))(**arguments)
    _, state = train(static, PARAMS, 2)
    assert sparsity(state.inner_state.masks) == 0.5
    with pytest.raises(TypeError, match="static_args"):
        train(optax.inject_hyperparams(gradual_pruning)(**arguments), PARAMS, 2)


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "keep_masks"])
def test_empty_trees(name):
    optimizer = TRANSFORMS[name]()
    updates, _ = jax.jit(optimizer.update)({}, optimizer.init({}), {})
    assert updates == {}


def test_keep_masks_of_an_empty_tree():
    optimizer = keep_masks({}, optax.adam(0.1))
    assert optimizer.update({}, optimizer.init({}), {})[0] == {}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_missing_params_are_a_clear_error(name):
    optimizer = TRANSFORMS[name]()
    with pytest.raises(ValueError, match=r"needs params: call"):
        optimizer.update(PARAMS, optimizer.init(PARAMS))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="masks do not match params"):
        keep_masks({"other": jnp.ones(3, bool)}, optax.sgd(0.1)).init(PARAMS)
    with pytest.raises(ValueError, match="every must be a whole number of at least 1, got 0"):
        gradual_pruning(optax.sgd(0.1), [0.5], every=0)
    with pytest.raises(ValueError, match="got 'snip'"):
        gradual_pruning(optax.sgd(0.1), [0.5], every=1, criterion="snip")
    with pytest.raises(ValueError, match="must not decrease"):
        gradual_pruning(optax.sgd(0.1), [0.5, 0.4], every=1)
    with pytest.raises(ValueError, match="strength must be at least 0, got -1"):
        l1_penalty(-1)
    with pytest.raises(ValueError, match="learning_rate must be at least 0"):
        l1_proximal(1, -0.1)


def test_a_step_of_nan_gradients_does_not_poison_the_movement():
    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
    base = optax.apply_if_finite(optax.sgd(0.01), 5)
    optimizer = gradual_pruning(base, [0.5], every=1, begin=3, criterion="movement")
    state = optimizer.init(params)
    pull = {"a": jnp.tile(jnp.array([1.0, -1.0]), (4, 2)), "b": jnp.tile(jnp.array([-2.0, 2.0]), (4, 2))}
    for step in range(4):
        grads = jax.tree.map(lambda g: g * jnp.nan, pull) if step == 1 else pull
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for name in pull:  # what gradient descent moves towards zero goes
        np.testing.assert_array_equal(state.masks[name], pull[name] < 0)


def test_moments_of_a_leaf_that_is_left_alone_are_left_alone():
    params = {"kernel": jnp.ones((2, 2)), "head": {"kernel": jnp.ones((2, 2))}}
    for head in ({"kernel": None}, None):
        masks = {"kernel": jnp.array([[True, False], [False, False]]), "head": head}
        optimizer, plain = keep_masks(masks, optax.sgd(0.1, momentum=0.9)), optax.sgd(0.1, momentum=0.9)
        ours, theirs = (params, optimizer.init(params)), (params, plain.init(params))
        for _ in range(2):
            ones = jax.tree.map(jnp.ones_like, params)
            (p, s), (q, t) = ours, theirs
            u, s = optimizer.update(ones, s, p)
            v, t = plain.update(ones, t, q)
            ours, theirs = (optax.apply_updates(p, u), s), (optax.apply_updates(q, v), t)
        np.testing.assert_array_equal(ours[0]["head"]["kernel"], theirs[0]["head"]["kernel"])
