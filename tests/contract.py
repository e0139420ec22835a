"""What every optax transform of this project must do: one check a function, run over cases by `test_contract.py`.

A new transform is one more `Case`; a new duty is one more function decorated with `check`.

Of dtypes the rule is: the updates of an optimizer, which are added to the parameters, have the parameters' dtype, and
those of a link before an optimizer the gradients'.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp


@dataclasses.dataclass(frozen=True)
class Case:
    """A transform under contract: `make(**hyperparams)` builds it, or `make(tree, **hyperparams)` if it is `per_tree`.

    `hyperparams` are those that may be schedules and be injected. A transform that `minimizes` is an optimizer; one
    that does not is a link before one, and is followed by gradient descent where the loss must fall. One that does not
    `need_params` need not complain when they are missing. One that is `per_tree` is for trees like the one it is given
    (default: like `SHAPES`), as optax itself is with a tree for a mask.
    """

    name: str
    make: Callable[..., optax.GradientTransformation]
    hyperparams: Mapping[str, float] = dataclasses.field(default_factory=dict)
    minimizes: bool = True
    needs_params: bool = True
    per_tree: bool = False

    def maker(self, tree: Any = None) -> Callable[..., optax.GradientTransformation]:
        if not self.per_tree:
            return self.make
        return functools.partial(self.make, random_tree(0) if tree is None else tree)

    def build(self, tree: Any = None) -> optax.GradientTransformation:
        return self.maker(tree)(**self.hyperparams)

    def optimizer(self) -> optax.GradientTransformation:
        return self.build() if self.minimizes else optax.chain(self.build(), optax.sgd(0.05))


CHECKS: list[Callable[[Case], None]] = []


def check(function: Callable[[Case], None]) -> Callable[[Case], None]:
    CHECKS.append(function)
    return function


# The shapes divide by eight devices on the last axis, and the conv and dense kernels are what the penalties look for.
SHAPES = {"conv": {"kernel": (3, 3, 2, 8), "bias": (8,)}, "dense": {"kernel": (16, 8), "bias": (8,)}}
CONV = {"conv": {"kernel": True, "bias": True}, "dense": {"kernel": False, "bias": False}}


def random_tree(seed: int, scale: float = 1.0, dtype: Any = jnp.float32) -> Any:
    rng = np.random.default_rng(seed)

    def leaf(shape):
        return jnp.asarray(scale * rng.standard_normal(shape), dtype)

    return jax.tree.map(leaf, SHAPES, is_leaf=lambda node: isinstance(node, tuple))


def apply(tx: optax.GradientTransformation, gradient: Any, state: Any, params: Any, **extra_args: Any) -> Any:
    updates, state = tx.update(gradient, state, params, **extra_args)
    return optax.apply_updates(params, updates), state


def run(tx: optax.GradientTransformation, params: Any, state: Any, steps: range, compiled: bool = False) -> Any:
    """Return parameters and state after steps on gradients that depend on the step's number."""
    step = functools.partial(apply, tx)
    step = jax.jit(step) if compiled else step
    for i in steps:
        params, state = step(gradient_at(i), state, params)
    return params, state


def gradient_at(step: int) -> Any:
    return random_tree(100 + step, 0.3)


def same(actual: Any, expected: Any, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Assert equal trees: structure, shapes, dtypes, and values within the tolerance (default: bit for bit)."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol, atol)


def squared_distance(params: Any, target: Any) -> Any:
    return 0.5 * optax.tree.norm(optax.tree.sub(params, target), squared=True)


@check
def minimizes_the_loss(case: Case) -> None:
    tx = case.optimizer()
    params, target = random_tree(0), random_tree(1)

    def body(carry: Any, _: None) -> Any:
        params, state = carry
        value, gradient = jax.value_and_grad(squared_distance)(params, target)
        return apply(tx, gradient, state, params), value

    _, losses = jax.lax.scan(body, (params, tx.init(params)), length=500)
    assert losses[-1] < 0.5 * losses[0]


@check
def scans_thousands_of_steps_as_a_loop_would(case: Case) -> None:
    tx, params = case.optimizer(), random_tree(0)

    def body(carry: Any, gradient: Any) -> Any:
        params, state = carry
        return apply(tx, gradient, state, params), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[gradient_at(i) for i in range(5)])
    start = params, tx.init(params)
    few, _ = jax.lax.scan(body, start, stacked)
    same(few, run(tx, *start, range(5)), rtol=1e-5, atol=1e-6)

    def cycled(carry, i):
        return body(carry, jax.tree.map(lambda leaf: leaf[i % 5], stacked))

    many, _ = jax.lax.scan(cycled, start, jnp.arange(3000))
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(many))


@check
def compiles_once_and_agrees_with_eager(case: Case) -> None:
    tx, params = case.build(), random_tree(0)
    state = tx.init(params)
    same(jax.jit(tx.init)(params), state)
    assert jax.eval_shape(tx.init, params) == jax.eval_shape(lambda: state)
    step = jax.jit(functools.partial(apply, tx))
    carry = params, state
    for i in range(3):
        carry = step(gradient_at(i), carry[1], carry[0])
    assert step._cache_size() == 1
    same(carry, run(tx, params, state, range(3)), rtol=1e-5, atol=1e-6)


@check
def accepts_extra_arguments(case: Case) -> None:
    tx, params = case.build(), random_tree(0)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    state = tx.init(params)
    plain = tx.update(gradient_at(0), state, params)
    same(tx.update(gradient_at(0), state, params, value=jnp.ones([]), unknown="argument"), plain)


@check
def keeps_dtypes_also_under_cond(case: Case) -> None:
    tx = case.build()

    @jax.jit
    def maybe(taken: Any, gradient: Any, state: Any, params: Any) -> Any:
        # Both branches must agree in every dtype, weak types included, or cond raises.
        idle = optax.tree.zeros_like(params), state
        return jax.lax.cond(taken, lambda: tx.update(gradient, state, params), lambda: idle)

    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        params = random_tree(0, dtype=dtype)
        state = tx.init(params)
        before = [leaf.dtype for leaf in jax.tree.leaves(state)]
        for taken in (True, False, True):
            updates, state = maybe(taken, random_tree(1, 0.1, dtype), state, params)
            assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        assert [leaf.dtype for leaf in jax.tree.leaves(state)] == before


@check
def follows_the_rule_of_dtypes(case: Case) -> None:
    """Also where gradients are wider than parameters, as those that were accumulated in float32 are."""
    tx, params = case.build(), random_tree(0, dtype=jnp.bfloat16)
    state, step, dtypes = tx.init(params), jax.jit(tx.update), []
    for i in range(2):
        updates, state = step(gradient_at(i), state, params)
        expected = jnp.bfloat16 if case.minimizes else jnp.float32
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(expected)}
        dtypes.append([leaf.dtype for leaf in jax.tree.leaves(state)])
    # A base's moments may widen once, as optax's do: from the parameters' dtype to the gradients'.
    assert dtypes[0] == dtypes[1]


@check
def schedules_equal_constants(case: Case) -> None:
    params, tx = random_tree(0), case.build()
    start, end = (run(tx, params, tx.init(params), range(steps))[0] for steps in (2, 5))
    for name, value in case.hyperparams.items():
        constant = case.maker()(**{**case.hyperparams, name: optax.constant_schedule(value)})
        same(run(constant, params, constant.init(params), range(5))[0], end, rtol=1e-6, atol=1e-7)
        # A schedule is evaluated at the number of steps done: a drop at 2 shows in the third step, not before.
        drop = case.maker()(**{**case.hyperparams, name: lambda step, v=value: jnp.where(step < 2, v, 0.5 * v)})
        carry = run(drop, params, drop.init(params), range(2))
        same(carry[0], start, rtol=1e-6, atol=1e-7)
        with pytest.raises(AssertionError):
            same(run(drop, *carry, range(2, 5))[0], end, rtol=1e-6, atol=1e-7)


@check
def hyperparameters_can_be_injected(case: Case) -> None:
    params, tx = random_tree(0), case.build()
    injected = optax.inject_hyperparams(case.maker())(**case.hyperparams)
    state = injected.init(params)
    assert set(case.hyperparams) <= set(state.hyperparams)
    same(run(injected, params, state, range(3))[0], run(tx, params, tx.init(params), range(3))[0], 1e-6, 1e-7)
    halves = {name: 0.5 * value for name, value in case.hyperparams.items()}
    for name, half in halves.items():
        state.hyperparams[name] = jnp.float32(half)
    other = case.maker()(**halves)
    # The first step already follows the new values, although `init` saw the old ones; compiled, they are not known.
    first = run(injected, params, state, range(1), compiled=True)[0]
    same(first, run(other, params, other.init(params), range(1))[0], 1e-5, 1e-6)


@check
def accumulates_gradients_in_multi_steps(case: Case) -> None:
    params, tx = random_tree(0), case.build()
    several = optax.MultiSteps(tx, every_k_schedule=3)
    micro = run(several, params, several.init(params), range(6), compiled=True)[0]
    state = tx.init(params)
    for step in range(2):
        total = optax.tree.add(
            optax.tree.add(gradient_at(3 * step), gradient_at(3 * step + 1)), gradient_at(3 * step + 2)
        )
        params, state = apply(tx, optax.tree.scale(1 / 3, total), state, params)
    same(micro, params, rtol=1e-5, atol=1e-6)


@check
def takes_what_a_chain_hands_it(case: Case) -> None:
    params, tx = random_tree(0), case.build()
    halved = optax.chain(optax.scale(0.5), tx)
    same(
        halved.update(gradient_at(0), halved.init(params), params)[0],
        tx.update(optax.tree.scale(0.5, gradient_at(0)), tx.init(params), params)[0],
    )


@check
def works_masked_partitioned_and_chained(case: Case) -> None:
    params = random_tree(0)
    alone = {"conv": params["conv"]}
    # What a wrapped transform sees of the parameters: holes where others' leaves are.
    hollow = jax.tree.map(lambda mine, leaf: leaf if mine else optax.MaskedNode(), CONV, params)
    lone, tx = case.build(alone), case.build(hollow)
    expected, _ = lone.update({"conv": gradient_at(0)["conv"]}, lone.init(alone), alone)
    labels = jax.tree.map(lambda mine: "mine" if mine else "other", CONV)
    others = {
        "masked": (optax.masked(tx, CONV), gradient_at(0)["dense"]),
        "partition": (
            optax.partition({"mine": tx, "other": optax.scale(-2.0)}, labels),
            optax.tree.scale(-2.0, gradient_at(0)["dense"]),
        ),
        "chain": (optax.chain(optax.masked(tx, CONV), optax.identity()), gradient_at(0)["dense"]),
    }
    for wrapped, dense in others.values():
        updates, _ = jax.jit(wrapped.update)(gradient_at(0), wrapped.init(params), params)
        same(updates, {"conv": expected["conv"], "dense": dense}, rtol=1e-5, atol=1e-6)


@check
def freeze_holds_leaves_still(case: Case) -> None:
    params = random_tree(0)
    tx = optax.chain(case.build(), optax.transforms.freeze(CONV))
    state = tx.init(params)
    moved, _ = run(tx, params, state, range(3))
    same(moved["conv"], params["conv"])
    # One step: later ones may depend on the frozen leaves.
    free, _ = run(case.build(), params, case.build().init(params), range(1))
    same(run(tx, params, state, range(1))[0]["dense"], free["dense"], rtol=1e-6, atol=1e-7)


@check
def skips_steps_that_are_not_finite(case: Case) -> None:
    params, tx = random_tree(0), case.build()
    guarded = optax.apply_if_finite(tx, max_consecutive_errors=5)
    broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), gradient_at(9))
    here, state = run(guarded, params, guarded.init(params), range(2), compiled=True)
    after, state = jax.jit(functools.partial(apply, guarded))(broken, state, here)
    same(after, here)
    here, state = run(guarded, here, state, range(2, 4), compiled=True)
    expected, inner = run(tx, params, tx.init(params), range(4))
    same((here, state.inner_state), (expected, inner), rtol=1e-5, atol=1e-6)


@check
def accepts_empty_trees(case: Case) -> None:
    for empty in ({}, (), {"layer": {}}):
        tx = case.build(empty)
        updates, state = tx.update(empty, tx.init(empty), empty)
        assert updates == empty
        assert tx.update(empty, state, empty)[0] == empty


@check
def says_that_params_are_missing(case: Case) -> None:
    tx, params = case.build(), random_tree(0)
    if case.needs_params:
        with pytest.raises(ValueError, match="params"):
            tx.update(gradient_at(0), tx.init(params))
    else:
        tx.update(gradient_at(0), tx.init(params))


@check
def maps_over_the_params_in_its_state(case: Case) -> None:
    tx, params = case.build(), random_tree(0)
    state = tx.init(params)
    same(optax.tree.map_params(tx, lambda leaf: leaf, state), state)


@check
def resumes_from_a_checkpoint_bit_for_bit(case: Case) -> None:
    tx, params = case.build(), random_tree(0)
    carry = run(tx, params, tx.init(params), range(4))
    uninterrupted = run(tx, *carry, range(4, 8))
    abstract = jax.tree.map(jnp.zeros_like, (params, tx.init(params)))
    with tempfile.TemporaryDirectory() as folder:
        ocp.save(Path(folder) / "orbax", carry)
        restored = ocp.load(Path(folder) / "orbax", abstract)
        np.savez(Path(folder) / "leaves.npz", *jax.tree.leaves(carry))
        with np.load(Path(folder) / "leaves.npz") as leaves:
            unpacked = jax.tree.unflatten(jax.tree.structure(abstract), [jnp.asarray(leaves[name]) for name in leaves])
    for loaded in (restored, unpacked):
        same(loaded, carry)
        same(run(tx, *loaded, range(4, 8)), uninterrupted)


@check
def trains_a_batch_of_models_under_vmap(case: Case) -> None:
    tx, models = case.build(), [random_tree(seed) for seed in (0, 1)]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    step = jax.vmap(functools.partial(apply, tx), in_axes=(None, 0, 0))
    state = jax.vmap(tx.init)(both)
    for i in range(2):
        both, state = step(gradient_at(i), state, both)
    for index, params in enumerate(models):
        alone = run(tx, params, tx.init(params), range(2))[0]
        same(jax.tree.map(lambda leaf, i=index: leaf[i], both), alone, rtol=1e-5, atol=1e-6)


@check
def keeps_the_sharding_of_its_state(case: Case) -> None:
    """The state lives where its parameters live, on every device there is, and the steps come out the same."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))

    def last_axis(leaf):
        return NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), "data"))

    tx, params = case.build(), random_tree(0)
    split = jax.tree.map(lambda leaf: jax.device_put(leaf, last_axis(leaf)), params)
    state = tx.init(split)
    before = [leaf.sharding for leaf in jax.tree.leaves(state)]
    for leaf in jax.tree.leaves(state):
        if leaf.shape and leaf.shape[-1] == params["conv"]["bias"].size:
            assert leaf.sharding.is_equivalent_to(last_axis(leaf), leaf.ndim)

    step = jax.jit(functools.partial(apply, tx), donate_argnums=(1, 2))
    for i in range(3):
        gradient = jax.tree.map(lambda leaf: jax.device_put(leaf, last_axis(leaf)), gradient_at(i))
        split, state = step(gradient, state, split)
    for leaf, sharding in zip(jax.tree.leaves(state), before, strict=True):
        assert not leaf.ndim or leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    same(jax.device_get(split), jax.device_get(run(tx, params, tx.init(params), range(3))[0]), rtol=1e-5, atol=1e-6)
