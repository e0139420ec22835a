"""How sparsity grows: one shot, exponential rounds, cubic; and the loop that scores and prunes in rounds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from prune_jax.masks import (
    Exclude,
    Scope,
    apply_masks,
    check_floating,
    check_sparsity,
    cut_counts,
    group_leaves,
    masks_from_counts,
)
from prune_jax.tree import PyTree, check_count, is_none, path_name


def one_shot(sparsity: float) -> np.ndarray:
    """All at once: ``[sparsity]``.

    Args:
        sparsity: fraction removed, in [0, 1].

    Returns:
        float64 array (1,) of sparsities, one a round.

    Example:
        >>> from prune_jax import one_shot
        >>> one_shot(0.9)
        array([0.9])
    """
    return np.array([check_sparsity(sparsity)])


def exponential(sparsity: float, rounds: int = 100) -> np.ndarray:
    """The same fraction of what is left each round: ``s_i = 1 - (1 - s)^(i / n)``, i = 1..n (Tanaka et al. 2020).

    Args:
        sparsity: fraction removed after the last round, in [0, 1].
        rounds: n; 100 for SynFlow and PX.

    Returns:
        float64 array (rounds,) of sparsities, ending exactly at ``sparsity``.

    Raises:
        ValueError: rounds is no whole number of at least 1.

    Example:
        >>> from prune_jax import exponential
        >>> exponential(0.75, rounds=2)
        array([0.5 , 0.75])

    Reference: Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow,
    arXiv:2006.05467, algorithm 1.
    """
    final = check_sparsity(sparsity)
    values = 1 - (1 - final) ** (_progress(rounds))
    values[-1] = final
    return values


def cubic(sparsity: float, rounds: int, initial: float = 0.0) -> np.ndarray:
    """Fast at first, gently at the end: ``s_i = s + (s_0 - s)(1 - i / n)^3``, i = 1..n (Zhu and Gupta 2017, eq. 1).

    Args:
        sparsity: fraction removed after the last round, in [0, 1].
        rounds: n.
        initial: s_0, the sparsity before the first round.

    Returns:
        float64 array (rounds,) of sparsities, ending exactly at ``sparsity``.

    Raises:
        ValueError: initial above sparsity, or rounds no whole number of at least 1.

    Example:
        >>> from prune_jax import cubic
        >>> cubic(0.8, rounds=2)
        array([0.7, 0.8])

    Reference: Zhu and Gupta, To prune, or not to prune, arXiv:1710.01878.
    """
    final, start = check_sparsity(sparsity), check_sparsity(initial)
    if start > final:
        raise ValueError(f"initial={initial} is above sparsity={sparsity}; sparsity can only grow")
    return final + (start - final) * (1 - _progress(rounds)) ** 3


def iterative_masks(
    score_fn: Callable[[PyTree], PyTree],
    params: PyTree,
    sparsities: Sequence[float] | np.ndarray,
    scope: Scope = "global",
    *,
    exclude: Exclude = None,
) -> PyTree:
    """Score what is left, prune a little more, again: one compiled loop over all rounds.

    Each round scores ``apply_masks(params, masks)`` and cuts to the round's sparsity exactly. What is cut stays cut.

    Args:
        score_fn: ``score_fn(params) -> scores``, such as
            ``lambda p: scores.px(apply_fn, p, inputs)``; runs inside jit, once compiled for all rounds.
        params: pytree of parameters.
        sparsities: sparsity after each round, not decreasing, such as ``exponential(0.99)``.
        scope: as in ``make_masks``.
        exclude: as in ``make_masks``.

    Returns:
        Masks as of ``make_masks``.

    Raises:
        ValueError: sparsities empty, decreasing or outside [0, 1], or NaN scores; the round and paths are named.
        TypeError: scores that are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from prune_jax import exponential, iterative_masks, scores
        >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
        >>> iterative_masks(scores.magnitude, params, exponential(0.75, rounds=10))["kernel"]
        Array([[False,  True],
               [False, False]], dtype=bool)
    """
    rounds = check_sparsities(sparsities)
    shapes = jax.eval_shape(score_fn, params)
    groups = group_leaves(shapes, scope, exclude)
    check_floating(shapes, exclude)
    counts = np.stack([cut_counts(shapes, groups, sparsity) for sparsity in rounds])

    @jax.jit  # the counts are an argument, so that a cache of compiled programs serves all sparsities
    def run(params: PyTree, counts: jax.Array) -> tuple[PyTree, list[jax.Array]]:
        def one_round(masks: PyTree, cut: jax.Array) -> tuple[PyTree, list[jax.Array]]:
            scores = score_fn(apply_masks(params, masks))
            nan = [jnp.isnan(leaf).any() for leaf in jax.tree.leaves(scores)]
            return masks_from_counts(below_cut(scores, masks), groups, cut), nan

        return jax.lax.scan(one_round, all_kept(shapes, groups), counts)

    masks, nan = run(params, jnp.asarray(counts))
    if not any(isinstance(flag, jax.core.Tracer) for flag in nan):
        paths = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(shapes)[0]]
        for path, flags in zip(paths, nan, strict=True):
            if np.asarray(flags).any():
                raise ValueError(f"scores are NaN in {path!r} from round {np.argmax(flags) + 1} on")
    return masks


def check_sparsities(sparsities: Sequence[float] | np.ndarray) -> list[float]:
    """One float a round, each in [0, 1] and none below the one before; or an error that says which."""
    if not np.iterable(sparsities) or np.ndim(sparsities) != 1:
        raise ValueError(f"sparsities must be a sequence, one a round, such as one_shot(0.9), got {sparsities!r}")
    values = [check_sparsity(sparsity) for sparsity in sparsities]
    if not values:
        raise ValueError("sparsities is empty; give the sparsity after each round, such as exponential(0.99)")
    for i, (before, after) in enumerate(itertools.pairwise(values)):
        if after < before:
            raise ValueError(f"sparsities must not decrease, but {before} (round {i + 1}) is followed by {after}")
    return values


def all_kept(scores: PyTree, groups: Sequence[Sequence[int]]) -> PyTree:
    """Masks that cut nothing, None outside the groups; of ``scores`` only shapes and sharding are used."""
    leaves, treedef = jax.tree.flatten(scores, is_leaf=is_none)
    grouped = {index for group in groups for index in group}
    return jax.tree.unflatten(
        treedef, [jnp.ones_like(leaf, bool) if i in grouped else None for i, leaf in enumerate(leaves)]
    )


def below_cut(scores: PyTree, masks: PyTree) -> PyTree:
    """Scores with -inf where already cut, so that what is cut stays cut; float32 or wider."""

    def lower(mask: jax.Array | None, score: jax.Array) -> jax.Array | None:
        return None if mask is None else jnp.where(mask, score, -jnp.inf)

    return jax.tree.map(lower, masks, scores, is_leaf=is_none)


def _progress(rounds: int) -> np.ndarray:
    check_count("rounds", rounds, 1)
    return np.arange(1, rounds + 1) / rounds
