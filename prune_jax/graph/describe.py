"""Groups as text that says which layers are coupled, how, and where."""

from __future__ import annotations

import collections
import re
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.extend.core import Var

from prune_jax.graph.elements import FROZEN
from prune_jax.graph.solve import components
from prune_jax.graph.walk import line_of

if TYPE_CHECKING:
    from prune_jax.graph.groups import Group, Groups, Member
    from prune_jax.graph.program import Program

ROLES = ("made by", "along", "read by")
Line = tuple[str, str, str]  # role, path with a gap for its first number, what is said of the axis


def describe(groups: Groups) -> str:
    """One paragraph a kind of tie; layers that differ in a number only share it.

    A unit is *made by* the axis of a weight that brings it forth, runs *along* what is applied to it element by element
    (biases, scales, positions), and is *read by* the axis of a weight that sums over it.
    """
    met = _meetings(groups)
    alike: dict[tuple, list[tuple[int, dict[Line, set[str]], collections.Counter]]] = {}
    for tie, members in groups.ties.items():
        lines = _lines(groups, members)
        why = sum((met[g.index] for g in members), collections.Counter())
        heads = tuple(sorted(collections.Counter((g.kind, g.size) for g in members).items()))
        alike.setdefault((heads, tuple(lines)), []).append((tie, lines, why))
    out = []
    for (heads, lines), ties in alike.items():
        number = ", ".join(str(tie) for tie, _, _ in ties)
        sizes = " and ".join(f"{kind}: {_units(size, count)}" for (kind, size), count in heads)
        out.append(f"[{number}] {sizes}{', equally many lost in each' if sum(n for _, n in heads) > 1 else ''}")
        for role, path, axis in lines:
            numbers = set().union(*[entries[role, path, axis] for _, entries, _ in ties])
            out.append(f"    {role} {path.format(_span(numbers))} {axis}")
        counts = sum((why for _, _, why in ties), collections.Counter())
        out += [f"    joined by {where}{f' ({n} times)' if n > 1 else ''}" for where, n in counts.most_common(6)]
    out += [f"held: {reason}" for reason in groups.held]
    if not groups:
        out.append("nothing can be cut; what keeps each axis:")
        out += [f"    {row['path']} axis {row['axis']}: {row['why']}" for row in frozen_axes(groups.program)]
    return "\n".join(out)


def axis_table(groups: Groups) -> list[dict]:
    """Every parameter axis that belongs to a tie, in the order in which the program reads the parameters."""
    program = groups.program
    first: dict[str, tuple[int, int]] = {}
    names = {v: leaf.name for v, leaf in zip(program.body.jaxpr.invars, program.leaves, strict=False)}
    for i, eqn in enumerate(program.body.jaxpr.eqns):
        for place, atom in enumerate(eqn.invars):
            if isinstance(atom, Var) and atom in names:
                first.setdefault(names[atom], (i, place))
    rows = {(m.path, m.axis, g.tie, g.kind): _role(groups, m) for g in groups for m in g.members}
    found = [{"path": p, "axis": a, "role": role, "tie": t, "kind": k} for (p, a, t, k), role in rows.items()]
    return sorted(found, key=lambda row: (first[row["path"]], row["axis"], row["tie"]))


def frozen_axes(program: Program) -> list[dict]:
    """Every parameter axis of more than one position none of which can go, and the first reason for it."""
    elements, root = program.walk.elements, program.classes.root
    # who is connected with whom before anything is frozen
    pairs = [*elements.edges, *((joint, factor) for joint, factors in elements.joins for factor in factors)]
    apart = [(a != FROZEN) & (b != FROZEN) for a, b in pairs]
    component = components([(a[keep], b[keep]) for (a, b), keep in zip(pairs, apart, strict=True)], elements.size)
    first: dict[int, Any] = {}
    for ids, reading in elements.frozen:
        for c in np.unique(component[ids]).tolist():
            first.setdefault(c, reading)
    out = []
    for leaf in program.leaves:
        for axis, (label, size) in enumerate(zip(leaf.labels, leaf.shape, strict=True)):
            if size == 1 or (isinstance(label, np.ndarray) and (root[label] != root[FROZEN]).any()):
                continue
            if not isinstance(label, np.ndarray):
                why = "it is pinned, or the function does not use it"
            elif (c := int(component[label.flat[0]])) not in first:
                why = "without any of it nothing would be left of an axis"
            elif not first[c]:
                why = "an output has its size"
            else:
                why = _short(f"{first[c][-1].primitive.name} at {line_of(first[c])}")
            out.append({"path": leaf.name, "axis": axis, "why": why})
    return out


def _units(size: int, count: int) -> str:
    return f"{size} units" + (f" in each of {count} groups" if count > 1 else "")


def _lines(groups: Groups, members: list[Group]) -> dict[Line, set[str]]:
    """What a tie's groups hold, by role; the numbers that fill the gap of each path."""
    found: dict[Line, set[str]] = {}
    for group in members:
        for m in group.members:
            per_row = f", row by row of axis {', '.join(map(str, m.rows))}" if m.rows else ""
            each = f", {m.each} places a unit" if m.each > 1 else ""
            first = re.search(r"\d+", m.path)
            path = m.path.replace("{", "{{").replace("}", "}}")
            if first:
                path = path[: first.start()] + "{}" + path[first.end() :]
            line = (_role(groups, m), path, f"axis {m.axis}{each}{per_row}")
            found.setdefault(line, set()).update([first.group()] if first else [])
    return dict(sorted(found.items(), key=lambda item: ROLES.index(item[0][0])))


def _role(groups: Groups, member: Member) -> str:
    program = groups.program
    index = next(i for i, leaf in enumerate(program.leaves) if leaf.name == member.path)
    own = program.leaves[index].labels
    ids, firsts = own[member.axis], {int(x.flat[0]) for x in own if isinstance(x, np.ndarray) and x.size}
    assert isinstance(ids, np.ndarray)
    noted = [
        (role, x)
        for role, products in (("made by", program.walk.made), ("read by", program.walk.summed))
        for leaf, x in products
        if leaf == index
    ]
    for role, x in noted:
        if x.flat[0] == ids.flat[0]:
            return role
    # Reshaped before its product, as a convolution's kernel is that meets patches, an axis goes by what it has become.
    root = program.classes.root
    for role, x in noted:
        if int(x.flat[0]) not in firsts and np.isin(root[x.ravel()], root[ids.ravel()]).any():
            return role
    return "along"


def _meetings(groups: Groups) -> dict[int, collections.Counter]:
    """For each group, where activations meet that share its units."""
    classes = groups.program.classes
    noted = groups.program.walk.meetings
    roots = classes.root[[i for i, _ in noted]] if noted else np.zeros(0, int)
    out = {}
    for group in groups:
        inside = np.isin(roots, classes.closure[groups.units[group.index]].indices)
        out[group.index] = collections.Counter(_short(noted[i][1]) for i in np.flatnonzero(inside))
    return out


def _short(where: str) -> str:
    """Without folders, columns and enclosing functions: "add at vit.py:85 (Block.__call__)"."""
    where = re.sub(r" at (?:.*/)?([^/:]+:\d+)(?::\d+)?", r" at \1", where)
    return re.sub(r"\(.*<locals>\.", "(", where)


def _span(numbers: set[str]) -> str:
    """{0, 1, 2} as "{0-2}", one number as itself."""
    if len(numbers) < 2:
        return next(iter(numbers), "")
    ordered = sorted(int(n) for n in numbers)
    if ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{{{ordered[0]}-{ordered[-1]}}}"
    return "{" + ",".join(map(str, ordered)) + "}"
