"""How many units each group loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from prune_jax.graph.cut import Cut
from prune_jax.graph.groups import Group, Groups
from prune_jax.graph.program import Program

Scope = str | Callable[[Group], str]
Measure = Literal["units", "parameters", "flops"]
BISECTIONS = 16


def select(
    groups: Groups,
    scores: list[np.ndarray],
    *,
    ratio: float | dict[int, float],
    of: Measure,
    scope: Scope,
    kinds: Sequence[str],
    round_to: int,
    minimum: int,
) -> np.ndarray:
    """Choose the units with the lowest scores; returns the classes that die, as a boolean array."""
    if of not in ("units", "parameters", "flops"):
        raise ValueError(f"of must be 'units', 'parameters' or 'flops', got {of!r}")
    if of != "units" and isinstance(ratio, dict):
        raise ValueError(f"a ratio for every tie counts units; with of={of!r} give one number")

    def dead(fraction: float | dict[int, float]) -> np.ndarray:
        lost = _losses(groups, scores, ratio=fraction, scope=scope, kinds=kinds, round_to=round_to, minimum=minimum)
        out = np.zeros(groups.program.classes.count, bool)
        for group, units, score in zip(groups, groups.units, scores, strict=True):
            out[units[np.argsort(score, kind="stable")[: lost.get(group.tie, 0)]]] = True
        return groups.program.classes.deaths(out)

    if isinstance(ratio, dict) or of == "units":
        return dead(ratio)
    _check_ratio(ratio)
    whole = _measure(groups.program, np.zeros(groups.program.classes.count, bool), of)
    low, high, tried = 0.0, 1.0, {}
    for _ in range(BISECTIONS):
        fraction = (low + high) / 2
        candidate = dead(fraction)
        removed = 1 - _measure(groups.program, candidate, of) / whole
        tried[abs(removed - ratio)] = candidate
        low, high = (fraction, high) if removed < ratio else (low, fraction)
    return tried[min(tried)]


def _measure(program: Program, dead: np.ndarray, of: Measure) -> float:
    """Parameters or FLOPs that are left."""
    cut = Cut(~dead[program.classes.root])
    if of == "parameters":
        return sum(math.prod(cut.shape(leaf.labels, leaf.shape)) for leaf in program.leaves)
    return float(sum(cost(cut) for cost in program.walk.costs))


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
    for name, least in (("round_to", round_to), ("minimum", minimum)):
        if least < 1:
            raise ValueError(f"{name} must be at least 1, got {least}")
    for value in ratio.values() if isinstance(ratio, dict) else [ratio]:
        _check_ratio(value)
    unknown = set(kinds) - {"width", "block"}
    if unknown:
        raise ValueError(f"kinds must be among 'width' and 'block', got {sorted(unknown)}")
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
                raise ValueError(f"ratio names tie {tie}, which cannot be cut; ties that can: {sorted(size)}")
        wanted = {tie: round(r * size[tie]) for tie, r in ratio.items()}
    else:
        buckets: dict[str, list[int]] = {}
        for tie, group in form.items():
            buckets.setdefault(_bucket(scope, group), []).append(tie)
        wanted = {}
        for ties in buckets.values():
            wanted.update(_lowest(ties, ladder, groups, ratio, minimum))
    return {tie: _rounded(size[tie], n, round_to, minimum) for tie, n in wanted.items()}


def _bucket(scope: Scope, group: Group) -> str:
    if callable(scope):
        return scope(group)
    if scope not in ("global", "local", "kind"):
        raise ValueError(f"scope must be 'global', 'local', 'kind' or a function of a group, got {scope!r}")
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
    kept = size - lost
    if round_to > 1 and size >= round_to:
        kept = max(round_to, round(kept / round_to) * round_to)
    return size - min(size, max(kept, minimum))


def _check_ratio(ratio: float) -> None:
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must be in [0, 1), got {ratio}")
