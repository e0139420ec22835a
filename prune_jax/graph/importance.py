"""From element scores to unit scores."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from prune_jax.graph.groups import Groups
from prune_jax.graph.program import keys

Aggregate = Literal["sum", "mean", "max"]
Normalise = Literal["mean", "top", "none"]


def squared_magnitude(params: Any) -> Any:
    """The score w^2 of every element: summed over a unit it is ||w[k]||_2^2 of equation 10's Imp."""
    return jax.tree.map(lambda w: w * w if jnp.issubdtype(w.dtype, jnp.floating) else None, params)


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

    Args:
        groups: From ``dependency_groups``.
        scores: Pytree like the parameters, larger = keep; None where not scored.
        aggregate: How the members of a unit make one score: their sum, mean or maximum.
        normalise: "mean", "top" or "none".
        top: N of "top" as a fraction of the group's size (at least one unit).
        gone: Classes of elements removed already: units among them score -inf and do not count in the normalisation.

    Returns:
        One array (units,) for every group.

    Raises:
        ValueError: Scores of another structure or shape, or NaN.

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
    by_path, ours = {keys(path): score for path, score in named}, {leaf.path for leaf in program.leaves}
    if by_path.keys() != ours:
        differing = sorted("/".join(path) for path in by_path.keys() ^ ours)
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
        value = np.asarray(score)
        if value.shape != leaf.shape:
            raise ValueError(f"scores of {leaf.name!r} must have shape {leaf.shape}, got {value.shape}")
        for label in leaf.labels:
            if isinstance(label, np.ndarray):
                fixed = tuple(d for d, n in enumerate(label.shape) if n == 1)
                total[label] = sums = value.sum(axis=fixed, keepdims=True, dtype=np.float64)
                if np.isnan(sums).any():
                    raise ValueError(f"scores of {leaf.name!r} hold NaN")
                scored[label] = True
    out = []
    for units, raw in zip(groups.units, _aggregated(groups, total, scored, aggregate), strict=True):
        left = np.ones(len(raw), bool) if gone is None else ~gone[units]
        out.append(np.full(len(raw), -np.inf))
        out[-1][left] = _normalised(raw[left], normalise, top)
    return out


def _aggregated(groups: Groups, total: np.ndarray, scored: np.ndarray, aggregate: Aggregate) -> list[np.ndarray]:
    classes = groups.program.classes
    ids = np.nonzero(scored)[0]
    number = np.bincount(classes.root[ids], minlength=classes.count)
    if aggregate == "max":
        best = np.full(classes.count, -np.inf)
        np.maximum.at(best, classes.root[ids], total[ids])
        out = []
        for units in groups.units:
            rows = classes.closure[units]
            lengths = np.diff(rows.indptr)
            best_of_unit = np.maximum.reduceat(best[rows.indices], np.cumsum([0, *lengths[:-1]]))
            out.append(np.where(np.isfinite(best_of_unit), best_of_unit, 0.0))
        return out
    sums = np.bincount(classes.root[ids], weights=total[ids], minlength=classes.count)
    out = []
    for units in groups.units:
        rows = classes.closure[units].astype(np.float64)
        value = rows @ sums
        out.append(value / np.maximum(rows @ number, 1) if aggregate == "mean" else value)
    return out


def _normalised(raw: np.ndarray, normalise: Normalise, top: float) -> np.ndarray:
    if normalise == "none":
        return raw
    largest = np.sort(raw)[::-1][: max(1, round(top * len(raw)))] if normalise == "top" else raw
    scale = np.abs(largest).sum()
    return raw * len(largest) / scale if scale != 0 else raw
