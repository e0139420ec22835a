"""optax transforms: training that keeps cut weights cut, and pruning while training.

Transforms that own the masks wrap the base optimizer. A link in a chain cannot do it alone: standing first it cannot
undo what later links add to a cut weight, standing last it cannot keep a cut weight's gradient out of the moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from prune_jax.masks import Exclude, Scope, apply_masks, cut_counts, group_leaves, masks_from_counts
from prune_jax.schedules import all_kept, below_cut, check_sparsities
from prune_jax.scores.magnitude import magnitude
from prune_jax.scores.movement import movement
from prune_jax.tree import (
    Prunable,
    PyTree,
    cast_like,
    check_count,
    is_kernel,
    is_none,
    map_masked,
    require_params,
    select,
)


class KeepMasksState(NamedTuple):
    """State of ``keep_masks``: the masks, and the base optimizer's state."""

    masks: PyTree
    base: optax.OptState


class GradualPruningState(NamedTuple):
    """State of ``gradual_pruning``: steps done, masks, summed movement (None if not used), the base's state."""

    step: jax.Array
    masks: PyTree
    movement: PyTree
    base: optax.OptState


def keep_masks(
    masks: PyTree, base: optax.GradientTransformation | None = None
) -> optax.GradientTransformationExtraArgs:
    """Trains with ``base`` and keeps cut weights and their moments at exactly zero.

    At every step ``base`` sees gradients and parameters that are zero where cut, its moments are zeroed there, and the
    update takes a cut weight to zero exactly, from any finite value. Hence neither weight decay, noise, a NaN in a cut
    weight's gradient nor parameters that were not masked first can bring a cut weight back. Use it as the whole
    optimizer::

        optimizer = keep_masks(masks, optax.adamw(1e-3))

    Without ``base`` it is a link for a chain, and must stand FIRST, ``optax.chain(keep_masks(masks), ...)``, with
    parameters that are masked already; ``init`` refuses others. Links after it must then add nothing where gradient,
    parameter and moments are zero (noise does).

    The masks live in the state, so that they are saved, sharded and donated with it; read them by
    ``optax.tree.get(state, "masks")``. Moments are found by the parameter's path and shape; row and column statistics
    (Adafactor) are not per weight and stay.

    Args:
        masks: pytree of bool like the parameters, None where a leaf is left alone.
        base: any optax optimizer; None = identity.

    Returns:
        A transform whose ``update`` needs ``params``. Updates have the parameters' dtype, so that a cut weight lands on
        zero exactly; without ``base``, the gradients'.

    Raises:
        ValueError: (from ``init``, ``update``) params is None, or masks do not match; (from ``init``, without base)
            parameters that are not masked.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from prune_jax import keep_masks
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> optimizer = keep_masks({"w": jnp.array([True, False])}, optax.sgd(0.5))
        >>> updates, _ = optimizer.update({"w": jnp.ones(2)}, optimizer.init(params), params)
        >>> optax.apply_updates(params, updates)
        {'w': Array([0.5, 0. ], dtype=float32)}
    """
    inner = optax.with_extra_args_support(optax.identity() if base is None else base)

    def init(params: PyTree) -> KeepMasksState:
        require_params(params, "keep_masks")
        if _is_placeholder(params):
            return KeepMasksState(params, inner.init(params))
        masked = apply_masks(params, masks)
        if base is None and not _equal(params, masked):
            raise ValueError(
                "keep_masks without a base optimizer needs params that are masked already: call "
                "init(apply_masks(params, masks)), or wrap the optimizer: keep_masks(masks, optimizer)"
            )
        return KeepMasksState(_own(masks, params), _mask_moments(inner.init(masked), masks, params))

    def update(
        updates: PyTree, state: KeepMasksState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, KeepMasksState]:
        require_params(params, "keep_masks")
        like = updates if base is None else params
        updates, inner_state = _masked_update(inner, state.masks, updates, state.base, params, extra)
        return cast_like(updates, like), KeepMasksState(state.masks, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def gradual_pruning(
    base: optax.GradientTransformation,
    sparsities: Sequence[float] | np.ndarray,
    *,
    every: int,
    begin: int = 0,
    criterion: str = "magnitude",
    scope: Scope = "global",
    exclude: Exclude = None,
    prunable: Prunable | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains with ``base`` and prunes on the way, masks recomputed inside jit (Zhu and Gupta 2017).

    At steps ``begin, begin + every, ...`` masks are cut to the next of ``sparsities``, exactly
    (as many weights of each group as ``make_masks`` cuts), from the weights before that step's update. Between and
    after, masks are kept as by ``keep_masks``: cut weights and their moments are exactly zero, and stay cut.

    Args:
        base: any optax optimizer.
        sparsities: sparsity after each pruning, not decreasing, such as ``cubic(0.9, rounds=50)``.
        every: steps between two prunings.
        begin: the step of the first pruning, counted from 0.
        criterion: ``"magnitude"`` (``|w|``) or ``"movement"`` (``-sum_t (dL/dw) w`` over the steps so far, but for
            those where it is not finite).
        scope: as in ``make_masks``.
        exclude: as in ``make_masks``.
        prunable: which leaves are pruned, ``(path, leaf) -> bool``; None = ``is_kernel``.

    Returns:
        A transform whose ``update`` needs ``params``, and whose updates have their dtype. Its state holds the masks:
        ``optax.tree.get(state, "masks")``.

    Raises:
        ValueError: sparsities empty, decreasing or outside [0, 1]; every or begin no whole numbers of at least
            1 and 0; an unknown criterion or scope; (from ``init``, ``update``) params is None.
        TypeError: traced arguments, as ``optax.inject_hyperparams`` makes of numbers: counts must be known when
            tracing, so name ``sparsities``, ``every`` and ``begin`` in its ``static_args``.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from prune_jax import cubic, gradual_pruning, sparsity
        >>> params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}
        >>> optimizer = gradual_pruning(optax.adam(0.1), cubic(0.5, rounds=2), every=10)
        >>> updates, state = optimizer.update(params, optimizer.init(params), params)
        >>> sparsity(state.masks)  # int(0.4375 * 8) of 8
        0.375

    Reference: Zhu and Gupta, To prune, or not to prune, arXiv:1710.01878; Sanh et al., Movement Pruning,
    arXiv:2005.07683.
    """
    rounds = check_sparsities(sparsities)
    if isinstance(every, jax.core.Tracer) or isinstance(begin, jax.core.Tracer):
        raise TypeError("every and begin are traced; name them in static_args of optax.inject_hyperparams")
    check_count("every", every, 1)
    check_count("begin", begin, 0)
    if criterion not in ("magnitude", "movement"):
        raise ValueError(f"criterion must be 'magnitude' or 'movement', got {criterion!r}")
    inner = optax.with_extra_args_support(base)
    # The default is resolved here: optax.inject_hyperparams takes a function among the arguments for a schedule.
    chosen = is_kernel if prunable is None else prunable

    def init(params: PyTree) -> GradualPruningState:
        require_params(params, "gradual_pruning")
        weights = select(params, chosen)
        masks = all_kept(weights, group_leaves(weights, scope, exclude))
        moved = None
        if criterion == "movement":
            moved = jax.tree.map(jnp.zeros_like, movement(params, params, prunable=chosen))
        return GradualPruningState(jnp.zeros((), jnp.int32), masks, moved, inner.init(params))

    def prune(masks: PyTree, scores: PyTree, round_: jax.Array) -> PyTree:
        groups = group_leaves(masks, scope, exclude)
        counts = np.stack([cut_counts(masks, groups, sparsity) for sparsity in rounds])
        return masks_from_counts(below_cut(scores, masks), groups, jnp.asarray(counts)[round_])

    def update(
        updates: PyTree, state: GradualPruningState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, GradualPruningState]:
        require_params(params, "gradual_pruning")
        moved = state.movement
        if moved is not None:
            # A step of infinite or undefined gradients, which the base may skip, must not poison the sum for good.
            after = movement(params, updates, moved, prunable=chosen)
            moved = jax.tree.map(lambda old, new: jnp.where(jnp.isfinite(new), new, old), moved, after)
        round_, between = jnp.divmod(state.step - begin, every)
        masks = jax.lax.cond(
            (state.step >= begin) & (between == 0) & (round_ < len(rounds)),
            lambda: prune(state.masks, magnitude(params, prunable=chosen) if moved is None else moved, round_),
            lambda: state.masks,
        )
        updates, inner_state = _masked_update(inner, masks, updates, state.base, params, extra)
        step = optax.safe_increment(state.step)
        return cast_like(updates, params), GradualPruningState(step, masks, moved, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _masked_update(
    base: optax.GradientTransformationExtraArgs, masks: PyTree, updates: PyTree, state: Any, params: PyTree, extra: dict
) -> tuple[PyTree, Any]:
    updates = map_masked(_zero_where_cut, masks, updates, name="gradients")
    updates, state = base.update(updates, state, apply_masks(params, masks), **extra)
    # The last word: a cut weight's update is minus the weight, which adds up to zero exactly.
    updates = map_masked(lambda mask, u, w: jnp.where(mask, u, -w), masks, updates, params, name="updates")
    return updates, _mask_moments(state, masks, params)


def _mask_moments(state: Any, masks: PyTree, params: PyTree) -> Any:
    """Zeros where cut in every state array that belongs to a parameter: same path at its end, same shape."""
    by_path = dict(jax.tree_util.tree_flatten_with_path(masks)[0])
    names = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    mask_of = {path: by_path.get(path) for path in names}  # None for what is left alone, by itself or with its parents

    def mask_moment(path: tuple, leaf: Any) -> Any:
        # The longest name wins: the moment of head/kernel is not that of a parameter called kernel.
        name = next((path[start:] for start in range(len(path) + 1) if path[start:] in mask_of), None)
        mask = None if name is None else mask_of[name]
        floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        if mask is None or not floating or jnp.shape(leaf) != mask.shape:
            return leaf
        return _zero_where_cut(mask, leaf)

    return jax.tree_util.tree_map_with_path(mask_moment, state)


def _is_placeholder(params: PyTree) -> bool:
    """Whether this is what ``optax.tree.map_params`` hands to ``init`` to see where parameters go in the state."""
    return not jax.tree.leaves(params) and not isinstance(params, dict | list | tuple)


def _own(masks: PyTree, params: PyTree) -> PyTree:
    """Copies, since a training step that donates its state must not take the caller's masks; sharded as the params."""

    def copy(mask: jax.Array | None, leaf: Any) -> jax.Array | None:
        if mask is None or isinstance(leaf, optax.MaskedNode):
            return mask if mask is None else jnp.array(mask, copy=True)
        return jnp.logical_and(mask, jnp.ones_like(leaf, bool))

    return jax.tree.map(copy, masks, params, is_leaf=is_none)


def _zero_where_cut(mask: jax.Array, leaf: jax.Array) -> jax.Array:
    return jnp.where(mask, leaf, jnp.zeros_like(leaf))


def _equal(a: PyTree, b: PyTree) -> bool:
    """Whether two trees hold the same values; True inside jit, where values are not known."""
    leaves = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    if any(isinstance(leaf, jax.core.Tracer) for pair in leaves for leaf in pair):
        return True
    return all(bool(jnp.array_equal(x, y)) for x, y in leaves)
