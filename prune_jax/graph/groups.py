"""Units gathered into groups: what can be cut, what goes with it, and which groups must lose equally many."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from prune_jax.graph.describe import axis_table, describe, frozen_axes
from prune_jax.graph.elements import FROZEN
from prune_jax.graph.labels import rows_of
from prune_jax.graph.program import Pin, Program, read_program


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """The positions of one parameter axis that belong to a group.

    Position ``indices[i]`` goes with unit ``units[i]`` of the group. A row of ``indices`` is the position along
    ``axis``, preceded by positions along ``rows`` where each row may lose different ones (the dims of each head in a
    (width, heads, dims) kernel).
    """

    path: str
    axis: int
    rows: tuple[int, ...]
    units: np.ndarray
    indices: np.ndarray

    @property
    def each(self) -> int:
        """Largest number of positions that go with one unit."""
        return int(np.bincount(self.units).max())


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Units that play the same part: the channels of one layer, the query-key dims of one head, the heads of one layer.

    ``kind`` is "width" or, for whole heads and whole channel groups, "block". Groups with the same ``tie`` must lose
    equally many units. ``form`` is equal for groups of the same form in different layers.
    """

    index: int
    kind: str
    size: int
    tie: int
    form: str
    members: tuple[Member, ...]


class Groups:
    """All groups of a program; iterable, indexable, printable."""

    def __init__(self, program: Program, groups: list[Group], units: list[np.ndarray], held: list[str]) -> None:
        self.program, self._groups, self.units, self.held = program, groups, units, held

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Group:
        return self._groups[index]

    @property
    def ties(self) -> dict[int, list[Group]]:
        """Groups by tie: each list loses equally many units."""
        out: dict[int, list[Group]] = {}
        for group in self:
            out.setdefault(group.tie, []).append(group)
        return out

    def __str__(self) -> str:
        return describe(self)

    def table(self) -> list[dict]:
        """Which parameter axis belongs to which tie and in which role, in the order of the program.

        Returns:
            Plain dicts with ``path``, ``axis``, ``role``, ``tie`` and the group's ``kind``. The role is "made by" (the
            axis of a weight that brings the units forth: f^out of equation 7), "read by" (the axis that is summed over:
            f^in) or "along" (biases, scales, positions: f^in and f^out at once).
        """
        return axis_table(self)

    def frozen(self) -> list[dict]:
        """Which parameter axes must not change, and why.

        Returns:
            Plain dicts with ``path``, ``axis`` and ``why``: the operation, and the line, that first asked for it.
        """
        return frozen_axes(self.program)

    def matrix(self) -> tuple[list[str], np.ndarray]:
        """The dependency matrix: names of parameter axes, and 1 where two axes share a unit.

        The matrix D of equation 9: D[i, j] = 1 when axis i of one array and axis j of another (or the same) are cut
        together. Rows and columns are named ``path:axis``.

        Returns:
            The names (n,) and the symmetric 0/1 matrix (n, n).

        Reference: DepGraph (2301.12900).
        """
        names = [f"{leaf.name}:{d}" for leaf in self.program.leaves for d in range(len(leaf.shape))]
        place = {name: i for i, name in enumerate(names)}
        out = np.zeros((len(names), len(names)), np.int8)
        for group in self:
            at = [place[f"{m.path}:{m.axis}"] for m in group.members]
            out[np.ix_(at, at)] = 1
        return names, out


def dependency_groups(
    fn: Callable,
    params: Any,
    *args: Any,
    pin: Pin = lambda path: False,
    free_output: Callable[[str], bool] = lambda path: False,
) -> Groups:
    """Find which positions of which parameters can only be removed together.

    ``fn(params, *args)`` is traced to its jaxpr; every axis of every intermediate array is labelled with elements, and
    each primitive says which elements are the same (D of equations 2-9 of DepGraph, for single positions instead of
    whole layers).

    Args:
        fn: Any JAX function of a pytree of arrays and further arguments.
        params: The parameters, arrays or ``jax.ShapeDtypeStruct``.
        *args: Example arguments, arrays or ``jax.ShapeDtypeStruct``; their axes never change.
        pin: What must keep its size: a function that says so of whole leaves, by their path such as
            "params/Dense_0/kernel", or a dict from path to the axis or axes, ``{"params/Dense_0/kernel": 1}``.
        free_output: Says of an output, by its path, whether its shape may change (updated batch statistics).

    Returns:
        The groups, each with its members (leaf path, axis, indices).

    Raises:
        ValueError: ``fn`` itself fails for these arguments; ``pin`` names a leaf or an axis that there is not.
        UnknownPrimitiveError: A primitive without a rule depends on a parameter.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2))}
        >>> groups = dependency_groups(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, jnp.ones((1, 3)))
        >>> print(groups)
        [0] width: 8 units
            made by a axis 1
            read by b axis 0

    Reference: Fang et al., DepGraph: Towards Any Structural Pruning (2301.12900).
    """
    return find_groups(read_program(fn, params, args, pin=pin, free_output=free_output))


def find_groups(program: Program) -> Groups:
    """Sort the units of a program into groups."""
    classes = program.classes
    owned = classes.incidence([label for _, _, label in _axes(program)])
    parts = classes.incidence(program.walk.elements.parts)
    units = classes.units
    within = classes.deaths_of_each(units).astype(np.int64)

    tables, owner = _tables(program)
    in_table = (within @ tables.T).tocsr()
    in_part = (within @ parts.astype(bool).astype(np.int64).T).tocsr()
    in_owned = (within @ owned.T).tocsr()
    is_block = within @ _blocks(program).astype(np.int64) > 0

    tabled = np.diff(in_table.indptr) > 0
    signature = _signature(in_table, 1) + _signature(in_part, 2) + is_block.astype(np.uint64)
    signature = np.where(tabled, signature, signature + _signature(in_owned, 3))
    number = program.walk.elements.size
    first_id = np.full(classes.count, number)
    np.minimum.at(first_id, classes.root, np.arange(number))
    own = np.minimum.reduceat(first_id[within.indices], within.indptr[:-1]) if len(units) else np.zeros(0, int)
    _, first, cell = np.unique(signature, return_index=True, return_inverse=True)

    # groups in the order of the first parameter position they hold, and units within a group likewise
    rank = np.full(len(first), number)
    np.minimum.at(rank, cell, own)
    cell = np.argsort(np.argsort(rank, kind="stable"))[cell]
    order = np.lexsort((own, cell))
    units, within, in_table, is_block, cell = units[order], within[order], in_table[order], is_block[order], cell[order]
    starts = np.searchsorted(cell, np.arange(len(first) + 1))
    tie, feasible = _ties(starts, in_table, owner)

    groups: list[Group] = []
    chosen, held = [], []
    seen: dict[int, int] = {}
    rank_of = {leaf.name: len(leaf.shape) for leaf in program.leaves}
    for c, members in enumerate(_members(program, within, starts)):
        start, stop = starts[c], starts[c + 1]
        if not feasible[c]:
            held.append(
                f"{stop - start} units of {members[0].path} axis {members[0].axis}: rows of equal length, which "
                "these units share unevenly"
            )
            continue
        kind = "block" if is_block[start] else "width"
        form = "+".join([kind, *sorted(f"{rank_of[m.path]}d{m.axis}x{m.each}" for m in members)])
        groups.append(Group(len(groups), kind, int(stop - start), seen.setdefault(tie[c], len(seen)), form, members))
        chosen.append(units[start:stop])
    return Groups(program, groups, chosen, held)


def _axes(program: Program) -> Iterator[tuple[int, int, np.ndarray]]:
    for i, leaf in enumerate(program.leaves):
        for axis, label in enumerate(leaf.labels):
            if isinstance(label, np.ndarray):
                yield i, axis, label


def _flat(program: Program, label: np.ndarray) -> np.ndarray:
    return program.classes.root[label].ravel()


def _tables(program: Program) -> tuple[sparse.csr_matrix, np.ndarray]:
    """All distinct rows that must stay equally long, and the table each belongs to."""
    seen: set[tuple[tuple[int, ...], bytes]] = set()
    rows: list[np.ndarray] = []
    owner: list[int] = []
    for table in program.walk.elements.tables:
        _, first = np.unique(program.classes.root[table], axis=0, return_index=True)
        distinct = table[first]
        key = (distinct.shape, program.classes.root[distinct].tobytes())
        if len(distinct) > 1 and key not in seen:  # one row is always as long as itself
            owner += [len(seen)] * len(distinct)
            rows += list(distinct)
            seen.add(key)
    return program.classes.incidence(rows), np.asarray(owner, int)


def _blocks(program: Program) -> np.ndarray:
    """Which classes stand for whole blocks of positions; see ``Elements.block``."""
    root, count = program.classes.root, program.classes.count
    alone = np.zeros(count, bool)
    for label in program.walk.made_alone:
        alone[root[label]] = True
    out = np.zeros(count, bool)
    for ids, slots in program.walk.elements.blocks:
        if slots is None:
            out[root[ids]] = True
            continue
        pairs = np.unique(np.stack([root[slots], root[ids]], axis=1), axis=0)
        slot, row = pairs[pairs[:, 0] != root[FROZEN]].T
        _, which, blocks_of_slot = np.unique(slot, return_inverse=True, return_counts=True)
        out[row[(blocks_of_slot[which] == 1) | ~alone[row]]] = True
    return out


def _signature(matrix: sparse.csr_matrix, salt: int) -> np.ndarray:
    """A number for each row that is equal for equal rows."""
    code = np.random.Generator(np.random.Philox(salt)).integers(1, 2**63, size=matrix.shape[1], dtype=np.uint64)
    out = np.zeros(matrix.shape[0], np.uint64)
    row = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    np.add.at(out, row, code[matrix.indices] * matrix.data.astype(np.uint64))
    return out


def _ties(starts: np.ndarray, in_table: sparse.csr_matrix, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cells that must lose equally many, so that every row of every table does; and whether that is enough.

    In each set of cells that tables connect, those with the same places in the same tables form a tie. If some rows
    are then still unevenly long, the whole set is one tie.

    Args:
        starts: where each cell starts among the units, and the end.
        in_table: (units, rows) how many places of a row a unit takes.
        owner: the table of each row.

    Returns:
        The tie of each cell, and of each cell whether it can be cut at all.
    """
    n = len(starts) - 1
    if not n or not in_table.shape[1]:
        return np.arange(n), np.ones(n, bool)
    per_cell = in_table[starts[:-1]].tocsr()  # units of a cell are alike: the first stands for all
    places = per_cell.tocoo()
    number = int(owner.max()) + 1
    graph = sparse.coo_matrix((np.ones(len(places.row)), (places.row, n + owner[places.col])), shape=(n + number,) * 2)
    connected = connected_components(graph, directed=False)[1]
    whole, of_table = connected[:n], connected[n:]
    of_owner = sparse.csr_matrix((np.ones(len(owner), np.int64), (np.arange(len(owner)), owner)))
    alike = np.unique(_signature((per_cell @ of_owner).tocsr(), 4) + whole.astype(np.uint64), return_inverse=True)[1]
    fine = ~np.isin(whole, of_table[_uneven(places, alike, owner)])
    tie = np.where(fine, alike, alike.max() + 1 + whole)
    return tie, ~np.isin(whole, of_table[_uneven(places, tie, owner)])


def _uneven(places: sparse.coo_matrix, tie: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """The tables of which a tie takes more places in one row than in another."""
    ties = sparse.csr_matrix((np.ones(len(tie), np.int64), (tie, np.arange(len(tie)))))
    rows = (ties @ places).T.tocsr()  # (rows, ties) places that each tie takes, for one unit of each of its cells
    rows.sort_indices()
    code = _signature(rows, 5)
    first = np.zeros(int(owner.max()) + 1, np.uint64)
    first[owner[::-1]] = code[::-1]
    return np.unique(owner[code != first[owner]])


def _members(program: Program, within: sparse.csr_matrix, starts: np.ndarray) -> list[tuple[Member, ...]]:
    """The parameter positions of all units, gathered by group."""
    axes = list(_axes(program))
    ids = np.concatenate([np.zeros(0, int), *[_flat(program, label) for _, _, label in axes]])
    offsets = np.cumsum([0, *[label.size for _, _, label in axes]])
    position = sparse.csr_matrix((np.ones(len(ids), np.int64), (np.arange(len(ids)), ids)), (len(ids), within.shape[1]))
    found = (within @ position.T).tocoo()
    unit, place = found.row, found.col
    which = np.searchsorted(offsets, place, side="right") - 1
    group = np.searchsorted(starts, unit, side="right") - 1
    order = np.lexsort((place, unit, which, group))
    unit, place, which, group = unit[order], place[order], which[order], group[order]
    edges = np.flatnonzero(np.diff(group * len(axes) + which)) + 1
    members: list[list[Member]] = [[] for _ in starts[1:]]
    for part in np.split(np.arange(len(unit)), edges) if len(unit) else []:
        g, (leaf, axis, label) = group[part[0]], axes[which[part[0]]]
        rows = tuple(rows_of(label, axis))
        places = np.stack(np.unravel_index(place[part] - offsets[which[part[0]]], label.shape), axis=1)
        members[g].append(
            Member(program.leaves[leaf].name, axis, rows, unit[part] - starts[g], places[:, [*rows, axis]])
        )
    return [tuple(m) for m in members]
