"""How many units each group loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from prune_jax.graph.cut import Cut
from prune_jax.graph.groups import Group, Groups
from prune_jax.graph.program import Program

Scope = str | Callable[[Group], str]
Measure = Literal["units", "parameters", "flops"]
Size = Callable[[np.ndarray], float]  # dead classes -> how much is left
BISECTIONS = 16


def select(
    groups: Groups,
    scores: list[np.ndarray],
    *,
    ratio: float | dict[int, float],
    size: Size | None,
    tolerance: float,
    budget: bool,
    scope: Scope,
    kinds: Sequence[str],
    round_to: int,
    minimum: int,
) -> np.ndarray:
    """Choose the units with the lowest scores; those with score -inf are gone already.

    Args:
        groups: All groups.
        scores: One array for each group.
        ratio: Fraction to remove, of units or of ``size``; or by tie.
        size: What is left when these classes are dead; None counts units.
        tolerance: How far, as a fraction of the wanted size, is near enough.
        budget: Whether the wanted size must not be exceeded by more than that, as far as can be.
        scope: See ``prune``.
        kinds: See ``prune``.
        round_to: See ``prune``.
        minimum: See ``prune``.

    Returns:
        The classes that die, as a boolean array.

    Raises:
        ValueError: That much cannot be removed (of a budget the caller finds out).
    """
    number = groups.program.classes.count

    def dead(fraction: float | dict[int, float]) -> np.ndarray:
        lost = _losses(groups, scores, ratio=fraction, scope=scope, kinds=kinds, round_to=round_to, minimum=minimum)
        while True:
            out = np.zeros(number, bool)
            for units in _lowest_units(groups, scores, lost):
                out[units] = True
            out = groups.program.classes.deaths(out)
            tie = _too_many(groups, scores, lost, groups.program.classes.emptied(out))
            if tie is None:
                return out
            # what several groups lose together would leave nothing of an axis
            fewer = range(lost[tie] - 1, 0, -1)
            size = min(group.size for group in groups.ties[tie])
            lost[tie] = next((n for n in fewer if _rounded(size, n, round_to, minimum) == n), 0)

    if isinstance(ratio, dict) or size is None:
        return dead(ratio)
    whole = size(np.zeros(number, bool))
    target = (1 - ratio) * whole
    if not budget and (reachable := size(dead(1.0))) > (1 + tolerance) * target:
        raise ValueError(
            f"ratio {ratio:g} of the size cannot be removed: {1 - reachable / whole:.3g} at most, with what is pinned, "
            f"kinds={tuple(kinds)}, minimum={minimum} and round_to={round_to}"
        )
    low, high = 0.0, 1.0
    best, least = dead(low), (True, np.inf)
    for _ in range(BISECTIONS):
        fraction = (low + high) / 2
        candidate = dead(fraction)
        left = size(candidate)
        distance = (budget and left > (1 + tolerance) * target, abs(left - target))
        if distance < least:
            best, least = candidate, distance
        if distance[1] <= tolerance * target:
            break
        low, high = (fraction, high) if left > target else (low, fraction)
    return best


def _lowest_units(groups: Groups, scores: list[np.ndarray], lost: dict[int, int]) -> list[np.ndarray]:
    """For each group, the units of the lowest scores, as many as its tie loses."""
    return [
        units[np.argsort(score, kind="stable")[: lost.get(group.tie, 0)]]
        for group, units, score in zip(groups, groups.units, scores, strict=True)
    ]


def _too_many(groups: Groups, scores: list[np.ndarray], lost: dict[int, int], emptied: np.ndarray) -> int | None:
    """Of the ties that empty an axis together, the one whose last loss has the highest score."""
    if not emptied.any():
        return None
    closure = groups.program.classes.closure
    last = {
        group.tie: np.sort(score)[lost[group.tie] - 1]
        for group, units, score in zip(groups, _lowest_units(groups, scores, lost), scores, strict=True)
        if len(units) and (closure[units].astype(np.int64) @ emptied.astype(np.int64)).any()
    }
    return max(last, key=lambda tie: last[tie], default=None)


def size_of(program: Program, of: Measure) -> Size | None:
    """How many parameters or FLOPs are left; None for units."""
    if of not in ("units", "parameters", "flops"):
        raise ValueError(f"of must be 'units', 'parameters' or 'flops', got {of!r}")

    def parameters(dead: np.ndarray) -> float:
        cut = Cut(~dead[program.classes.root])
        return sum(math.prod(cut.shape(leaf.labels, leaf.shape)) for leaf in program.leaves)

    def flops(dead: np.ndarray) -> float:
        cut = Cut(~dead[program.classes.root])
        return float(sum(cost(cut) for cost in program.walk.costs))

    return {"units": None, "parameters": parameters, "flops": flops}[of]


def _losses(
    groups: Groups,
    scores: list[np.ndarray],
    *,
    ratio: float | dict[int, float],
    scope: Scope,
    kinds: Sequence[str],
    round_to: int,
    minimum: int,
) -> dict[int, int]:
    """How many units every group of each tie loses."""
    size, ladder, form = {}, {}, {}
    for tie, members in groups.ties.items():
        if members[0].kind not in kinds:
            continue
        size[tie] = min(g.size for g in members)
        # the k-th loss of a tie takes the k-th lowest unit of each of its groups
        steps = [np.sort(scores[g.index])[: size[tie]] for g in members]
        ladder[tie], form[tie] = np.mean(steps, axis=0), members[0]
    if isinstance(ratio, dict):
        for tie in ratio:
            if tie not in size:
                raise ValueError(
                    f"ratio names tie {tie}, which cannot be cut; ties that can, with what is pinned and "
                    f"kinds={tuple(kinds)}: {sorted(size)}"
                )
        wanted = {tie: round(r * size[tie]) for tie, r in ratio.items()}
    else:
        buckets: dict[str, list[int]] = {}
        for tie, group in form.items():
            buckets.setdefault(_bucket(scope, group), []).append(tie)
        wanted = {}
        for ties in buckets.values():
            wanted.update(_lowest(ties, ladder, groups, ratio, minimum))
    gone = {tie: int(np.isneginf(ladder[tie]).sum()) for tie in wanted}
    return {tie: max(gone[tie], _rounded(size[tie], n, round_to, minimum)) for tie, n in wanted.items()}


def _bucket(scope: Scope, group: Group) -> str:
    if callable(scope):
        return scope(group)
    return {"global": "", "local": str(group.tie), "kind": group.form}[scope]


def _lowest(
    ties: list[int], ladder: dict[int, np.ndarray], groups: Groups, ratio: float, minimum: int
) -> dict[int, int]:
    """Losses of each tie when the lowest units of all of them go; a tie's step weighs as many units as it removes."""
    weight = {tie: len(groups.ties[tie]) for tie in ties}
    steps = [(s, tie) for tie in ties for s in ladder[tie][: max(0, len(ladder[tie]) - minimum)]]
    budget = ratio * sum(weight[tie] * len(ladder[tie]) for tie in ties)
    lost = dict.fromkeys(ties, 0)
    for i in np.argsort([s for s, _ in steps], kind="stable"):
        tie = steps[i][1]
        if weight[tie] / 2 > budget:
            break
        lost[tie] += 1
        budget -= weight[tie]
    return lost


def _rounded(size: int, lost: int, round_to: int, minimum: int) -> int:
    """The nearest loss that leaves a multiple of ``round_to`` and no fewer than ``minimum``; no loss stays none."""
    if lost == 0:
        return 0
    kept = max(size - lost, minimum)
    if round_to > 1:
        kept = round_to * max(1, round(kept / round_to), math.ceil(minimum / round_to))
        if kept > size:
            kept = size // round_to * round_to
    return size - kept if minimum <= kept <= size and kept > 0 else 0


def check_ratios(ratio: Any, of: Measure) -> None:
    """Raise unless this can be removed."""
    if isinstance(ratio, dict) and of != "units":
        raise ValueError(f"a ratio for every tie counts units; with of={of!r} give one number")
    for value in ratio.values() if isinstance(ratio, dict) else [ratio]:
        if not 0 <= value < 1:
            raise ValueError(f"ratio must be in [0, 1), got {value}")
