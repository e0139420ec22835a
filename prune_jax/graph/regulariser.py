"""Sparse training by groups: push whole units towards zero while training."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from prune_jax.graph.groups import Groups
from prune_jax.graph.program import keys

Path: TypeAlias = tuple[str, ...]
Owners: TypeAlias = dict[Path, tuple[tuple[int, ...], list[np.ndarray]]]


class GroupRegulariserState(NamedTuple):
    """State of ``group_regulariser``: steps done."""

    step: jax.Array


def group_regulariser(
    groups: Groups, strength: optax.ScalarOrSchedule, alpha: optax.ScalarOrSchedule = 4.0
) -> optax.GradientTransformationExtraArgs:
    """Add the gradient of the group regulariser of DepGraph to the updates; chain it before the optimizer.

    With Imp_{G,k} = sum_{w in G} ||w[k]||_2^2 over the members of unit k of group G, equations 10 and 11::

        Reg(G) = sum_k gamma_k Imp_{G,k},  gamma_k = 2^(alpha (Imp_max - Imp_{G,k}) / (Imp_max - Imp_min))

    gamma is held constant in the gradient, so that an element of unit k gains ``2 strength gamma_k w``, summed over the
    units it belongs to (a weight matrix lies between two groups). Whole heads and channel groups are left to their
    dims.

    Args:
        groups: From ``dependency_groups`` for the same parameters.
        strength: Weight of the regulariser, 0 or more; a number, or a schedule of it by step.
        alpha: How much harder the least important unit of a group is pushed: up to 2^alpha. A number or a schedule.

    Returns:
        An optax transform; its update needs ``params``, and keeps the gradients' dtype. Parameters that are not
        floating point neither count nor are pushed, and updates that are None stay None.

    Raises:
        ValueError: A negative strength, or an update without ``params`` or with others than those of ``groups``.

    Example:
        >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[0.0], [1.0]])}
        >>> from prune_jax.graph import dependency_groups
        >>> groups = dependency_groups(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((3, 1)))
        >>> push = group_regulariser(groups, strength=0.5, alpha=1.0)
        >>> zero = jax.tree.map(jnp.zeros_like, params)
        >>> push.update(zero, push.init(params), params)[0]["a"]
        Array([[2., 2.]], dtype=float32)

    Reference: Fang et al., DepGraph (2301.12900), section 3.3.
    """
    if not callable(strength) and not isinstance(strength, jax.core.Tracer) and not strength >= 0:
        raise ValueError(f"strength must be at least 0, got {strength}")
    owners, group_of = _owners(groups)

    def init(params: optax.Params) -> GroupRegulariserState:
        del params
        return GroupRegulariserState(jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: GroupRegulariserState, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, GroupRegulariserState]:
        del extra
        if params is None:
            raise ValueError("group_regulariser needs params: call update(updates, state, params)")
        leaves = _by_path(params, "params", owners)
        if missing := ["/".join(path) for path in owners if path not in leaves]:
            raise ValueError(f"params must hold all parameters of the groups; these are missing: {missing[:5]}")
        importance = jnp.zeros(len(group_of) + 1, jnp.float32)
        for path, leaf in leaves.items():
            for owner in owners[path][1]:
                fixed = tuple(d for d, n in enumerate(owner.shape) if n == 1)
                total = jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=fixed, keepdims=True)
                importance = importance.at[owner].add(total)
        now, steepness = (value(state.step) if callable(value) else value for value in (strength, alpha))
        gamma = _gamma(importance[:-1], group_of, len(groups), steepness)

        def push(path: tuple, update: Any) -> Any:
            for owner in owners[keys(path)][1]:
                update = update + (2 * now * gamma[owner] * leaves[keys(path)]).astype(update.dtype)
            return update

        _by_path(updates, "updates", owners)
        new = jax.tree_util.tree_map_with_path(push, updates)
        return new, GroupRegulariserState(optax.safe_increment(state.step))

    return optax.GradientTransformationExtraArgs(init, update)


def _by_path(tree: Any, name: str, owners: Owners) -> dict[Path, Any]:
    """The leaves of a tree by path, which must be among those of the groups."""
    leaves = {keys(path): x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}
    for path, x in leaves.items():
        shape = owners[path][0] if path in owners else None
        if np.shape(x) != shape:
            raise ValueError(
                f"{name} must be like the parameters that the groups were found for, but leaf {'/'.join(path)!r} has "
                f"shape {np.shape(x)} where those have {shape}"
            )
    return leaves


def _owners(groups: Groups) -> tuple[Owners, np.ndarray]:
    """For every leaf its shape and the units of each position of its axes (the last number: none); each unit's group.

    An axis has one array of units, but where positions belong to several (to a channel of either factor of an outer
    product), it has one for the first unit of each position, one for the second, and so on.
    """
    classes = groups.program.classes
    chosen = [g for g in groups if g.kind == "width"]
    total = sum(g.size for g in chosen)
    index, sizes = (np.array([getattr(g, name) for g in chosen], int) for name in ("index", "size"))
    group_of = np.repeat(index, sizes)
    closure = classes.closure[np.concatenate([np.zeros(0, int), *[groups.units[g.index] for g in chosen]])].tocsc()
    several = np.diff(closure.indptr)  # units of each class
    units_of = np.full((max(several.max(initial=0), 1), classes.count), total)
    column = np.repeat(np.arange(classes.count), several)
    units_of[np.arange(len(column)) - closure.indptr[column], column] = closure.indices
    owners = {}
    for leaf in groups.program.leaves:
        labels = leaf.labels if jnp.issubdtype(leaf.dtype, jnp.floating) else []
        found = [units[classes.root[x]] for x in labels if isinstance(x, np.ndarray) for units in units_of]
        owners[leaf.path] = leaf.shape, [owner for owner in found if (owner < total).any()]
    return owners, group_of


def _gamma(importance: jax.Array, group_of: np.ndarray, count: int, alpha: Any) -> jax.Array:
    """Equation 11, with gamma 1 in groups whose units are all alike, and 0 for what belongs to no unit."""
    largest = jax.ops.segment_max(importance, group_of, count)[group_of]
    smallest = jax.ops.segment_min(importance, group_of, count)[group_of]
    spread = largest - smallest
    relative = jnp.where(spread > 0, (largest - importance) / jnp.where(spread > 0, spread, 1.0), 0.0)
    return jnp.append(2.0 ** (alpha * relative), 0.0)
