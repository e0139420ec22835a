"""The form of a plan, and what can be read off it alone.

A plan is a plain dict::

    {"format": "prune_jax.graph plan", "version": 1,
     "leaves": [{"path": ["params", "Dense_0", "kernel"], "shape": [784, 300],
                 "keep": [{"axis": 1, "rows": [], "positions": [0, 2, 5]}]}]}

Every parameter leaf is listed. ``positions`` are the survivors along ``axis`` in the original numbering; where rows may
differ (``rows`` is not empty), they are nested lists, one for every surviving position of the axes ``rows``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

FORMAT, VERSION = "prune_jax.graph plan", 1


def check_plan(plan: Any) -> None:
    """Raise unless this is a whole plan that this version can read."""
    if not isinstance(plan, dict) or plan.get("format") != FORMAT:
        raise ValueError(f"plan must be a dict with format {FORMAT!r}, as prune(...).plan is")
    if plan.get("version") != VERSION:
        raise ValueError(f"plan has version {plan.get('version')!r}; this library reads version {VERSION}")
    _demand(_is_list(plan.get("leaves"), dict), "'leaves'", "a list of dicts", plan.get("leaves"))
    seen = set()
    for i, entry in enumerate(plan["leaves"]):
        path: Any = entry.get("path")
        shape: Any = entry.get("shape")
        _demand(_is_list(path, str), f"'path' of leaf {i}", "a list of names", path)
        where = f"leaf {'/'.join(path) or '.'!r}"
        _demand(tuple(path) not in seen, where, "listed once", "it again")
        seen.add(tuple(path))
        sized = _is_list(shape, int) and all(n >= 0 for n in shape)
        _demand(sized, f"'shape' of {where}", "a list of sizes", shape)
        _check_keep(f"{where} of shape {tuple(shape)}", entry)


def _check_keep(where: str, entry: dict) -> None:
    """Raise unless what is kept of one leaf fits together."""
    keep: Any = entry.get("keep")
    shape = entry["shape"]
    _demand(_is_list(keep, dict), f"'keep' of {where}", "a list of dicts", keep)
    positions: dict[int, np.ndarray] = {}
    for part in keep:
        axis, rows = part.get("axis"), part.get("rows")
        fits = _is_list([axis], int) and 0 <= axis < len(shape)
        _demand(fits and axis not in positions, where, "told what to keep once for each axis cut", f"axis {axis!r}")
        others = [d for d in range(len(shape)) if d != axis]
        rising = _is_list(rows, int) and list(rows) == sorted(set(rows) & set(others))
        _demand(rising, f"'rows' for axis {axis} of {where}", f"rising, among the other axes {others}", rows)
        try:
            table = np.asarray(part.get("positions"))
        except ValueError:  # rows of different lengths
            table = np.zeros(0)
        ok = table.ndim > 0 and table.size > 0 and table.dtype.kind == "i" and bool(np.all(np.diff(table, axis=-1) > 0))
        ok = ok and table.min() >= 0 and table.max() < shape[axis]
        _demand(ok, where, f"told rising positions along axis {axis}", part.get("positions"))
        positions[axis] = table
    left = _kept_shape(entry)
    for part in keep:
        wanted, got = tuple(left[d] for d in part["rows"]), positions[part["axis"]].shape[:-1]
        axis, rows = part["axis"], tuple(part["rows"])
        _demand(got == wanted, where, f"told positions along axis {axis} for {wanted} rows of axes {rows}", got)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(x, kind) and not isinstance(x, bool) for x in value)


def _demand(ok: bool, where: str, right: str, got: Any) -> None:
    if not ok:
        text = repr(got) if not isinstance(got, str) else got
        shown = text if len(text) <= 60 else f"{text[:57]}..."
        raise ValueError(f"plan is damaged: {where} must be {right}, got {shown}")


def kept_shapes(plan: dict) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shape that a plan leaves of every parameter, by path.

    Args:
        plan: As ``prune(...).plan``.

    Raises:
        ValueError: Not a plan.

    Example:
        >>> entry = {"path": ["a"], "shape": [3, 2], "keep": [{"axis": 0, "rows": [], "positions": [0, 2]}]}
        >>> kept_shapes({"format": "prune_jax.graph plan", "version": 1, "leaves": [entry]})
        {('a',): (2, 2)}
    """
    check_plan(plan)
    return {tuple(entry["path"]): _kept_shape(entry) for entry in plan["leaves"]}


def _kept_shape(entry: dict) -> tuple[int, ...]:
    shape = list(entry["shape"])
    for keep in entry["keep"]:
        shape[keep["axis"]] = np.asarray(keep["positions"]).shape[-1]
    return tuple(shape)
