"""From element scores to unit scores."""

from __future__ import annotations

from typing import Any, Literal

import jax
import numpy as np

from prune_jax.graph.groups import Groups
from prune_jax.graph.program import keys
from prune_jax.tree import select, widen

Aggregate = Literal["sum", "mean", "max"]
Normalise = Literal["mean", "top", "none"]


def squared_magnitude(params: Any) -> Any:
    """The score w^2 of every element: summed over a unit it is ||w[k]||_2^2 of equation 10's Imp.

    Half-precision parameters are squared in float32; those that are not floating point have no score.
    """
    return jax.tree.map(lambda w: w * w, select(widen(params), lambda path, leaf: True))


def unit_scores(
    groups: Groups,
    scores: Any,
    *,
    aggregate: Aggregate = "sum",
    normalise: Normalise = "mean",
    top: float = 0.1,
    gone: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Score every unit of every group by its members.

    A member's score is the sum of its elements' scores. With Imp_{G,k} the aggregate over the members of unit k,
    normalised within its group G as ``"mean"``: K Imp_{G,k} / sum_k |Imp_{G,k}|, or as ``"top"``, equation 12 of the
    group-regularised sparse training of DepGraph: N Imp_{G,k} / sum |TopN(Imp_G)|. The absolute values, which the
    papers' scores are anyway, keep the order of scores of both signs (GraSP, movement).

    A score of +inf protects its unit: it does not count in the normalisation, and ``prune`` never removes it, so it
    must leave enough others. Units without any score count as 0 beside scored units of the same tie. A tie without any
    score is NaN: a scope that compares ties ("global", "kind") leaves it alone, others cut it by count, first units
    first. If nothing at all is scored, there is no preference: all scores are 0, and first units go first.

    Args:
        groups: From ``dependency_groups``.
        scores: Pytree like the parameters, larger = keep; None where not scored, +inf where never to be removed.
        aggregate: How the members of a unit make one score: their sum, mean or maximum.
        normalise: "mean", "top" or "none".
        top: N of "top" as a fraction of the group's size (at least one unit).
        gone: Classes of elements removed already: units among them score -inf and do not count in the normalisation.

    Returns:
        One array (units,) for every group, NaN where its tie has no score.

    Raises:
        ValueError: Scores of another structure or shape, NaN or -inf.
        TypeError: Scores whose values are not known, under ``jax.jit``.

    Example:
        >>> import jax.numpy as jnp
        >>> from prune_jax.graph import dependency_groups
        >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[0.0], [1.0]])}
        >>> groups = dependency_groups(lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((3, 1)))
        >>> unit_scores(groups, {"a": params["a"] ** 2, "b": params["b"] ** 2}, normalise="none")
        [array([1., 5.])]

    Reference: Fang et al., DepGraph (2301.12900), section 3.3.
    """
    if aggregate not in ("sum", "mean", "max"):
        raise ValueError(f"aggregate must be 'sum', 'mean' or 'max', got {aggregate!r}")
    if normalise not in ("mean", "top", "none"):
        raise ValueError(f"normalise must be 'mean', 'top' or 'none', got {normalise!r}")
    program = groups.program
    named = jax.tree_util.tree_flatten_with_path(scores, is_leaf=lambda x: x is None)[0]
    ours = {leaf.path for leaf in program.leaves}
    by_path = {keys(path): score for path, score in named if score is not None or keys(path) in ours}
    if by_path.keys() != ours:
        differing = sorted("/".join(path) for path in {keys(path) for path, _ in named} ^ ours)
        raise ValueError(
            f"scores must have the {len(ours)} leaves of the parameters (None where not scored), got {len(by_path)}; "
            f"these are in one of them only: {differing[:5]}"
        )
    total = np.zeros(program.walk.elements.size)
    scored = np.zeros(program.walk.elements.size, bool)
    for leaf in program.leaves:
        score = by_path[leaf.path]
        if score is None:
            continue
        if isinstance(score, jax.core.Tracer):
            raise TypeError(
                f"scores of {leaf.name!r} are traced: what is cut depends on their values, so prune outside jax.jit, "
                "grad and vmap, or give scores that are known while tracing"
            )
        value = np.asarray(score)
        if value.shape != leaf.shape:
            raise ValueError(f"scores of {leaf.name!r} must have shape {leaf.shape}, got {value.shape}")
        for label in leaf.labels:
            if isinstance(label, np.ndarray):
                if not (value > -np.inf).all():
                    raise ValueError(f"scores of {leaf.name!r} hold {'NaN' if np.isnan(value).any() else '-inf'}")
                fixed = tuple(d for d, n in enumerate(label.shape) if n == 1)
                total[label] = value.sum(axis=fixed, keepdims=True, dtype=np.float64)
                scored[label] = True
    known = {group.tie for group, n in zip(groups, _numbers(groups, scored), strict=True) if n.any()}
    out = []
    for group, raw in zip(groups, _aggregated(groups, total, scored, aggregate), strict=True):
        left = np.ones(len(raw), bool) if gone is None else ~gone[groups.units[group.index]]
        out.append(np.full(len(raw), -np.inf))
        out[-1][left] = _normalised(raw[left], normalise, top) if group.tie in known or not known else np.nan
    return out


def check_may_go(groups: Groups, scores: list[np.ndarray], dead: np.ndarray, *, compared: bool) -> None:
    """Raise if protected units were chosen, or units without a score where scores of several groups are compared."""
    for group, units, score in zip(groups, groups.units, scores, strict=True):
        lost, where = score[dead[units]], f"{group.members[0].path!r} axis {group.members[0].axis} (tie {group.tie})"
        if np.isposinf(lost).any():
            raise ValueError(
                f"so much cannot be removed without units of {where} that a score of +inf protects; remove less, or "
                "protect fewer"
            )
        if compared and np.isnan(lost).any():
            raise ValueError(
                f"so much cannot be removed without units of {where}, which have no score; remove less, score them "
                "too, or give scope='local' to cut them by count"
            )


def _aggregated(groups: Groups, total: np.ndarray, scored: np.ndarray, aggregate: Aggregate) -> list[np.ndarray]:
    classes = groups.program.classes
    ids = np.nonzero(scored)[0]
    if aggregate == "max":
        best = np.full(classes.count, -np.inf)
        np.maximum.at(best, classes.root[ids], total[ids])
        out = []
        for units in groups.units:
            rows = classes.closure[units]
            lengths = np.diff(rows.indptr)
            best_of_unit = np.maximum.reduceat(best[rows.indices], np.cumsum([0, *lengths[:-1]]))
            out.append(np.where(np.isneginf(best_of_unit), 0.0, best_of_unit))  # nothing scored
        return out
    sums = np.bincount(classes.root[ids], weights=total[ids], minlength=classes.count)
    values = [classes.closure[units].astype(np.float64) @ sums for units in groups.units]
    if aggregate == "sum":
        return values
    return [value / np.maximum(n, 1) for value, n in zip(values, _numbers(groups, scored), strict=True)]


def _numbers(groups: Groups, scored: np.ndarray) -> list[np.ndarray]:
    """For each group, how many scored members every unit has."""
    classes = groups.program.classes
    number = np.bincount(classes.root[np.nonzero(scored)[0]], minlength=classes.count)
    return [classes.closure[units].astype(np.int64) @ number for units in groups.units]


def _normalised(raw: np.ndarray, normalise: Normalise, top: float) -> np.ndarray:
    if normalise == "none":
        return raw
    largest = np.sort(raw[np.isfinite(raw)])
    if normalise == "top":
        largest = largest[::-1][: max(1, round(top * len(largest)))]
    scale = np.abs(largest).sum()
    return raw * len(largest) / scale if scale != 0 else raw
