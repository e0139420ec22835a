"""What was cut, as JSON: replayable on any checkpoint of the same function, and on optimizer states that mirror it.

What a plan holds: ``schema.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from prune_jax.graph.cut import Cut, take
from prune_jax.graph.describe import frozen_axes
from prune_jax.graph.elements import FROZEN
from prune_jax.graph.labels import is_number, rows_of
from prune_jax.graph.program import Leaf, Program, keys
from prune_jax.graph.schema import FORMAT, VERSION, check_plan

Path: TypeAlias = tuple[str, ...]


def make_plan(program: Program, dead: np.ndarray) -> dict:
    """The plan that removes the dead classes."""
    cut = Cut(~dead[program.classes.root])
    leaves = []
    for leaf in program.leaves:
        keep = []
        for axis, label in enumerate(leaf.labels):
            if not isinstance(label, np.ndarray):
                continue
            index = cut.index(leaf.labels, axis)
            if index.shape[axis] == leaf.shape[axis]:
                continue
            rows = rows_of(label, axis)
            table = np.moveaxis(index, axis, -1)
            table = table.reshape([n for d, n in enumerate(index.shape) if d in rows] + [index.shape[axis]])
            keep.append({"axis": axis, "rows": rows, "positions": table.tolist()})
        leaves.append({"path": list(leaf.path), "shape": list(leaf.shape), "keep": keep})
    return {"format": FORMAT, "version": VERSION, "leaves": leaves}


def check_leaves(plan: dict, here: dict[tuple[str, ...], tuple[int, ...]]) -> None:
    """Raise unless the plan was made for dense parameters of these shapes."""
    listed = {tuple(entry["path"]): tuple(entry["shape"]) for entry in plan["leaves"]}
    for path in [*listed, *here]:
        if listed.get(path) != here.get(path):
            raise ValueError(
                f"plan is for another function: leaf {'/'.join(path)!r} has shape {listed.get(path)} in the plan "
                f"and {here.get(path)} in the parameters"
            )


def deaths(program: Program, plan: dict) -> np.ndarray:
    """The classes a plan removes from a program, completed by all that must go with them.

    Raises:
        ValueError: The plan lists other leaves or shapes, or would separate positions that belong together here.
    """
    check_plan(plan)
    check_leaves(plan, {leaf.path: leaf.shape for leaf in program.leaves})
    listed = {tuple(entry["path"]): entry for entry in plan["leaves"]}
    root = program.classes.root
    removed = []
    for leaf in program.leaves:
        entries = {keep["axis"]: keep for keep in listed[leaf.path]["keep"]}
        for keep in entries.values():
            _check_rows(leaf, keep)
        removed += [(leaf, axis, _removed(leaf, entries, keep)) for axis, keep in entries.items()]
    alive = np.ones(program.walk.elements.size, bool)
    for *_, ids in removed:
        alive[ids] = False
    dead = np.zeros(program.classes.count, bool)
    dead[root[~alive]] = True
    dead = program.classes.deaths(dead)
    if dead[root[FROZEN]]:
        raise ValueError(_held(program, removed))
    cut = Cut(~dead[root])
    for leaf in program.leaves:
        for axis, label in enumerate(leaf.labels):
            if isinstance(label, np.ndarray):
                ids = _in_living_rows(cut, leaf, axis)
                if not np.array_equal(cut.alive[ids], alive[ids]):
                    raise ValueError(
                        f"plan is for another function: cutting {leaf.name!r} axis {axis} as it says "
                        "would separate positions that belong together in this one"
                    )
    return dead


def _held(program: Program, removed: list[tuple[Leaf, int, np.ndarray]]) -> str:
    """Why a plan that would cut what must keep its size cannot be followed; ``removed`` by leaf and axis."""
    root = program.classes.root

    def frozen(ids: np.ndarray) -> bool:
        dead = np.zeros(program.classes.count, bool)
        dead[root[ids]] = True
        return bool(program.classes.deaths(dead)[root[FROZEN]])

    leaf, axis, _ = next((r for r in removed if frozen(r[2])), removed[0])
    whys = [row["why"] for row in frozen_axes(program) if (row["path"], row["axis"]) == (leaf.name, axis)]
    why = whys[0] if whys else "with what it is joined to"
    what = f"cuts {leaf.name!r} axis {axis}, which must keep its size here ({why})"
    arguments = program.body.jaxpr.invars[len(program.leaves) :]
    if all(is_number(n) for v in arguments for n in getattr(v.aval, "shape", ())):
        return f"plan is for another function: it {what}"
    return (
        f"plan {what}, where a size of the arguments is a symbol: an axis merged or averaged with one of unknown size "
        "cannot be cut. Give fixed sizes (save_exported(..., free_batch=False)), or keep the two apart in the function"
    )


def _in_living_rows(cut: Cut, leaf: Leaf, axis: int) -> np.ndarray:
    """The elements along an axis, in the surviving rows only."""
    ids = leaf.labels[axis]
    assert isinstance(ids, np.ndarray)
    return cut.array(ids, [label if d in rows_of(ids, axis) else None for d, label in enumerate(leaf.labels)])


def _check_rows(leaf: Leaf, keep: dict) -> None:
    """Raise if one entry of a plan cuts what must keep its size, or differs along axes along which nothing does."""
    axis, label = keep["axis"], leaf.labels[keep["axis"]]
    if not isinstance(label, np.ndarray):
        raise ValueError(
            f"plan cuts {leaf.name!r} axis {axis}, which must keep its size (pinned, an input or an output)"
        )
    if not set(keep["rows"]) <= set(rows_of(label, axis)):
        raise ValueError(
            f"plan is for another function: the positions of {leaf.name!r} axis {axis} depend on axes "
            f"{rows_of(label, axis)} here and on {keep['rows']} in the plan"
        )


def _removed(leaf: Leaf, entries: dict[int, dict], keep: dict) -> np.ndarray:
    """The elements that one entry of a plan removes; rows that die as a whole are left to their own axes."""
    axis, rows = keep["axis"], keep["rows"]
    label = leaf.labels[axis]
    assert isinstance(label, np.ndarray)
    own = rows_of(label, axis)
    ids = _cut_leaf(label, [entries[d] for d in own if d in entries])
    ids = np.moveaxis(ids, axis, -1).reshape(*[ids.shape[d] for d in own], label.shape[axis])
    positions = np.asarray(keep["positions"], int)
    # rows that the plan does not tell apart (another axis was pinned when it was made) lose the same positions
    alike = positions.reshape([ids.shape[i] if d in rows else 1 for i, d in enumerate(own)] + [-1])
    gone = np.ones(ids.shape, bool)
    np.put_along_axis(gone, np.broadcast_to(alike, (*ids.shape[:-1], alike.shape[-1])), False, axis=-1)
    return ids[gone]


def apply_plan(plan: dict, tree: Any) -> Any:
    """Cut a checkpoint, or anything that mirrors one, by a plan.

    A leaf is cut when its path ends with a path of the plan (an optimizer's ``mu/params/Dense_0/kernel`` with
    ``params/Dense_0/kernel``) and its shape is the one the plan was made for. Scalars and other leaves stay. A tree
    with a leaf at the plan's own path holds parameters, and must hold all of them; a mirror may hold some.

    Args:
        plan: As ``prune(...).plan``, also after a round trip through JSON.
        tree: Pytree of arrays: parameters or an optimizer state of the dense function.

    Returns:
        The pytree with smaller arrays.

    Raises:
        ValueError: Not a plan, no leaf matches (though some are more than scalars), a matching leaf has another shape,
            or some of the parameters are missing.

    Example:
        >>> import jax.numpy as jnp
        >>> entry = {"path": ["a"], "shape": [3, 2], "keep": [{"axis": 0, "rows": [], "positions": [0, 2]}]}
        >>> plan = {"format": "prune_jax.graph plan", "version": 1, "leaves": [entry]}
        >>> apply_plan(plan, {"a": jnp.ones((3, 2))})["a"].shape
        (2, 2)
    """
    check_plan(plan)
    listed = {tuple(entry["path"]): entry for entry in plan["leaves"]}
    flat, tree_def = jax.tree_util.tree_flatten_with_path(tree)
    matched, out = 0, []
    entries = _entries([keys(path) for path, _ in flat], listed)
    for (path, x), entry in zip(flat, entries, strict=True):
        if entry is None or np.size(x) <= 1:
            out.append(x)
            continue
        if tuple(np.shape(x)) != tuple(entry["shape"]):
            raise ValueError(
                f"leaf {'/'.join(keys(path))!r} has shape {np.shape(x)}; the plan cuts arrays of shape "
                f"{tuple(entry['shape'])} there"
            )
        matched += 1
        out.append(_cut_leaf(x, entry["keep"]))
    if not matched and any(np.size(x) > 1 for _, x in flat):  # an optimizer may have no state, or just a count
        raise ValueError("no leaf of this tree has a path that the plan knows: the plan is for another function")
    missing = listed.keys() - {keys(path) for path, _ in flat}
    if missing and len(missing) < len(listed):
        names = sorted("/".join(path) for path in missing)
        raise ValueError(f"the tree holds some of the plan's parameters but not all: {names[:5]} are missing")
    return jax.tree.unflatten(tree_def, out)


def check_params(params: Any, expected: dict[tuple[str, ...], tuple[int, ...]], whose: str = "") -> list:
    """The leaves of ``params``, which must be the ones that ``kept_shapes`` expects."""
    flat = [(keys(path), x) for path, x in jax.tree_util.tree_flatten_with_path(params)[0]]
    paths = [path for path, _ in flat]
    if paths != list(expected):
        differing = sorted("/".join(path) or "." for path in expected.keys() ^ set(paths))
        raise ValueError(
            f"parameters{whose} must have the {len(expected)} leaves of the plan in its order, got {len(paths)}; these "
            f"are in one of them only: {differing[:5]}"
        )
    for path, x in flat:
        if expected[path] != np.shape(x):
            raise ValueError(
                f"parameter {'/'.join(path)!r}{whose} must have shape {expected[path]} after this cut, "
                f"got {np.shape(x)}"
            )
    return [x for _, x in flat]


def expand(plan: dict, small: Any, dense: Any) -> Any:
    """The inverse of ``apply_plan`` on parameters: the survivors at their old places, zeros where something was cut.

    ``dense`` holds arrays or shapes. The dense function of the result is the smaller function of ``small``, wherever
    zeroing and cutting agree.
    """
    flat, tree = jax.tree.flatten(small)
    shapes = [x.shape for x in jax.tree.leaves(dense)]
    out = []
    for x, shape, entry in zip(flat, shapes, plan["leaves"], strict=True):
        places = _cut_leaf(np.arange(np.prod(shape, dtype=int)).reshape(shape), entry["keep"])
        whole = x if not entry["keep"] else jnp.zeros(shape, x.dtype).at[np.unravel_index(places, shape)].set(x)
        out.append(whole)
    return jax.tree.unflatten(tree, out)


def _entries(paths: Sequence[Path], listed: dict[Path, dict]) -> list[dict | None]:
    """For each path of a tree the plan's entry whose path it ends with.

    Where it ends with several (Adam's ``mu/l/w`` with ``l/w`` and with ``mu/l/w`` of the parameters), the one is meant
    whose prefix stands before the most of the plan's paths; of equals, the shortest prefix.
    """
    splits = [[n for n in range(len(path) + 1) if path[n:] in listed] for path in paths]
    mirrors = Counter(path[:n] for path, found in zip(paths, splits, strict=True) for n in found)
    best = [max(((mirrors[p[:n]], -n) for n in found), default=None) for p, found in zip(paths, splits, strict=True)]
    return [None if b is None else listed[p[-b[1] :]] for p, b in zip(paths, best, strict=True)]


def _cut_leaf(x: Any, keep: Sequence[dict]) -> Any:
    for entry in sorted(keep, key=lambda k: len(k["rows"])):
        positions = np.asarray(entry["positions"], int)
        shape = [1] * np.ndim(x)
        for d, n in zip(sorted([*entry["rows"]]), positions.shape, strict=False):
            shape[d] = n
        shape[entry["axis"]] = positions.shape[-1]
        # positions are stored with their own axis last
        order = sorted([*entry["rows"], entry["axis"]])
        moved = np.moveaxis(positions, -1, order.index(entry["axis"]))
        x = take(x, moved.reshape(shape), entry["axis"])
    return x
