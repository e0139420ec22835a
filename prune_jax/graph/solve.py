"""From recorded facts to units: the smallest sets of positions that can go together.

Unions are resolved by connected components on arrays (no recursion). Joins are then brought to a normal form: a join
with one factor left is a union, equal factors make equal joints, equal joints make equal factors. What remains are
classes of elements; those that are no joint of others, not frozen, and reach a parameter are the units. What dies with
a unit is its closure: itself, and every joint of which it is a factor. A unit that would take a whole axis with it can
never go: it is frozen, which may show others to be one (after a reshape and back, channels are joints of the rows that
stood between), and all is resolved anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from prune_jax.graph.elements import FROZEN, Elements


def _hashes(count: int) -> np.ndarray:
    # fixed 64-bit numbers: sums of them tell sets of classes apart
    return np.random.Generator(np.random.Philox(7)).integers(1, 2**63, size=count, dtype=np.uint64)


class Classes:
    """Elements up to sameness, and which classes can die; ``axes`` of parameters must not become empty."""

    def __init__(self, elements: Elements, axes: Sequence[np.ndarray]) -> None:
        self._elements = elements
        self._edges = [*elements.edges, *((ids, np.full_like(ids, FROZEN)) for ids, _ in elements.frozen)]
        self._joint, self._factors = _stack(elements.joins)
        self._patterns = [tuple(np.unique(f, return_inverse=True)[1].tobytes() for f in fs) for _, fs in elements.joins]
        self.root = np.zeros(0, int)
        self._resolve()
        while True:
            while self._simplify():
                self._resolve()
            self._close()
            self.units, stuck = self._units(axes)
            frozen = np.nonzero(np.isin(self.root, self._separable(stuck)))[0]
            if not len(frozen):
                break
            self._edges.append((frozen, np.full_like(frozen, FROZEN)))
            self._resolve()

    @property
    def count(self) -> int:
        """Number of classes."""
        return int(self.root.max()) + 1

    def incidence(self, rows: Sequence[np.ndarray]) -> sparse.csr_matrix:
        """How often each class stands in each row, an array of elements."""
        row = np.repeat(np.arange(len(rows)), [r.size for r in rows])
        column = self.root[np.concatenate([np.zeros(0, int), *[r.ravel() for r in rows]])]
        return sparse.csr_matrix((np.ones(len(row), np.int64), (row, column)), shape=(len(rows), self.count))

    def _units(self, axes: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Classes that reach a parameter and are no joints: those that can go, and those that would empty an axis."""
        owned, parts = self.incidence(axes), self.incidence(self._elements.parts)
        has_parameter = np.asarray(owned.sum(axis=0)).ravel() > 0
        can_die = (self.closure.astype(np.int64) @ has_parameter.astype(np.int64) > 0) & ~self.derived
        can_die[self.root[FROZEN]] = False
        units = np.nonzero(can_die)[0]
        self._whole = sparse.vstack([owned, parts]).astype(bool).astype(np.int64).tocsr()
        self._lengths = np.asarray(self._whole.sum(axis=1)).ravel()
        emptied = (self._whole @ self.closure[units].astype(np.int64).T).tocoo()
        stuck = units[np.unique(emptied.col[emptied.data == self._lengths[emptied.row]])]
        return np.setdiff1d(units, stuck), stuck

    def _separable(self, stuck: np.ndarray) -> np.ndarray:
        """Those factors among the classes whose freezing makes no joint the same as a factor it has beside others.

        A slot must stay apart from the joint of it and its row: it may be alive in a row that is gone.
        """
        joint, factors, live = self._joints_now()
        freezing = live & np.isin(factors, stuck)
        rest = live & ~freezing
        number = rest.sum(axis=1, keepdims=True)
        code = joint[:, None] * self.count + factors
        left_alone = rest & (number == 1) & freezing.any(axis=1, keepdims=True)
        clash = (left_alone & np.isin(code, code[rest & (number > 1)])).any(axis=1)
        return np.setdiff1d(factors[freezing], factors[freezing & clash[:, None]])

    def _close(self) -> None:
        """What dies with each class, and which classes are joints."""
        joint, factors, live = self._joints_now()
        inner = live.sum(axis=1) > 1
        child = np.repeat(joint[inner], factors.shape[1])[live[inner].ravel()]
        parent = factors[inner].ravel()[live[inner].ravel()]
        n = self.count
        step = sparse.csr_matrix((np.ones(len(child), bool), (parent, child)), shape=(n, n))
        self.derived = np.zeros(n, bool)
        self.derived[child] = True
        closure = (step + sparse.identity(n, dtype=bool, format="csr")).astype(bool)
        while True:
            wider = (closure @ closure).astype(bool)
            if wider.nnz == closure.nnz:
                break
            closure = wider
        self.closure = closure.tocsr()

    def _resolve(self) -> None:
        n = self._elements.size
        self.root = components(self._edges, n)
        # keep one edge an element from here on
        first = np.zeros(self.count, int)
        first[self.root[::-1]] = np.arange(n)[::-1]
        self._edges = [(np.arange(n), first[self.root])]

    def _joints_now(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The classes of all joints and of their factors, and which of these count: neither frozen nor repeated."""
        factors = self.root[self._factors]
        live = factors != self.root[FROZEN]
        for column in range(1, factors.shape[1]):
            live[:, column] &= (factors[:, :column] != factors[:, column : column + 1]).all(axis=1)
        return self.root[self._joint], factors, live

    def _simplify(self) -> bool:
        """One round of normalisation; True if it found anything."""
        if not len(self._joint):
            return False
        frozen = self.root[FROZEN]
        joint, factors, live = self._joints_now()
        found: list[tuple[np.ndarray, np.ndarray]] = []

        def say(a: np.ndarray, b: np.ndarray) -> None:
            different = self.root[a] != self.root[b]
            if different.any():
                found.append((a[different], b[different]))

        stuck = np.nonzero((joint == frozen)[:, None] & live)
        say(self._factors[stuck], np.zeros(len(stuck[0]), int))
        number = live.sum(axis=1)
        say(self._joint[number == 0], np.zeros(int((number == 0).sum()), int))
        key = np.sort(np.where(live, factors, -1), axis=1)
        one = (key >= 0).sum(axis=1) == 1
        if one.any():
            column = np.argmax(factors == key[:, -1:], axis=1)
            say(self._joint[one], self._factors[np.arange(len(column)), column][one])
        _, first, group = np.unique(key, axis=0, return_index=True, return_inverse=True)
        several = number > 1
        say(self._joint[several], self._joint[first[group.ravel()]][several])
        for a, b in self._equal_tables(joint):
            say(a, b)
        if not found:
            child_key = self._children(joint, factors, live)
            say(*child_key)
        self._edges += found
        return bool(found)

    def _equal_tables(self, joint: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Two splits of the same joints into equally shaped factors are the same split."""
        seen: dict[tuple, tuple[int, int]] = {}
        same = []
        start = 0
        for (ids, _), pattern in zip(self._elements.joins, self._patterns, strict=True):
            stop = start + len(ids)
            other = seen.setdefault((joint[start:stop].tobytes(), pattern), (start, stop))
            if other[0] != start:
                same.append((self._factors[start:stop].ravel(), self._factors[other[0] : other[1]].ravel()))
            start = stop
        return same

    def _children(self, joint: np.ndarray, factors: np.ndarray, live: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Two factors with the same joints are the same: neither can die without the other."""
        inner = live.sum(axis=1) > 1
        rows, columns = np.nonzero(live & inner[:, None])
        pairs, index = np.unique(np.stack([factors[rows, columns], joint[rows]]), axis=1, return_index=True)
        total = np.zeros(self.count, np.uint64)
        np.add.at(total, pairs[0], _hashes(self.count)[pairs[1]])
        element = self._factors[rows, columns][index]
        derived = np.zeros(self.count, bool)
        derived[joint[inner]] = True
        free = ~derived[pairs[0]]
        element, total = element[free], total[pairs[0]][free]
        _, first, group = np.unique(total, return_index=True, return_inverse=True)
        return element, element[first[group]]

    def deaths(self, dead: np.ndarray) -> np.ndarray:
        """Complete a set of dead classes: joints of dead factors, and factors that dead joints imply."""
        if not len(self._joint):
            return dead
        dead = dead.copy()
        joint, factors, live = self._joints_now()
        while True:
            before = dead.sum()
            np.logical_or.at(dead, joint, dead[factors].any(axis=1))
            unexplained = dead[joint] & ~dead[factors].any(axis=1)
            if unexplained.any():
                if not (rows := self._dead_rows(joint, factors, dead, unexplained)).any():
                    last = factors.shape[1] - 1 - np.argmax(live[:, ::-1], axis=1)
                    rows[factors[unexplained, last[unexplained]]] = True
                dead |= rows
            if dead.sum() == before:
                return dead

    def deaths_of_each(self, units: np.ndarray) -> sparse.csr_matrix:
        """For each unit what dies with it alone: its closure, and factors that its joints imply, as ``deaths`` has it.

        These are more only where a joint is one in two ways: a position split into heads here, and otherwise there.
        """
        within = self.closure[units].astype(bool)
        joint, factors, live = self._joints_now()
        inner = live.sum(axis=1) > 1
        joint, factors, live = joint[inner], factors[inner], live[inner]
        number, row = self.count, np.arange(len(joint))
        ones = np.ones(len(joint), bool)
        joints = sparse.csr_matrix((ones, (joint, row)), shape=(number, len(joint)))
        by = sparse.csr_matrix((live[live], (factors[live], np.nonzero(live)[0])), shape=(number, len(joint)))
        gone, explained = (within @ joints).astype(bool), (within @ by).astype(bool)
        implying = np.unique((gone > gone.multiply(explained)).nonzero()[0])
        if not len(implying):
            return within
        completed = within.tolil()
        for i in implying:
            dead = np.zeros(number, bool)
            dead[units[i]] = True
            completed[i] = self.deaths(dead)[None]
        return completed.tocsr()

    def emptied(self, dead: np.ndarray) -> np.ndarray:
        """The classes along those axes of which nothing would be left."""
        empty = (self._whole @ dead.astype(np.int64) == self._lengths) & (self._lengths > 0)
        return np.asarray(self._whole[empty].sum(axis=0)).ravel() > 0

    def _dead_rows(
        self, joint: np.ndarray, factors: np.ndarray, dead: np.ndarray, unexplained: np.ndarray
    ) -> np.ndarray:
        """Rows (any factor but the last) all of whose joints are dead; if there is none, it was slots that died."""
        rows = np.zeros(self.count, bool)
        for column in range(factors.shape[1] - 1):
            total = np.bincount(factors[:, column], minlength=self.count)
            gone = np.bincount(factors[:, column], weights=dead[joint], minlength=self.count)
            here = np.zeros(self.count, bool)
            here[factors[unexplained, column]] = True
            rows = here & (total == gone) & ~dead
            rows[self.root[FROZEN]] = False
            if rows.any():
                break
        return rows


def components(edges: Sequence[tuple[np.ndarray, np.ndarray]], size: int) -> np.ndarray:
    """The connected component of each of ``size`` elements; an edge holds two arrays, paired place by place."""
    a, b = (np.concatenate([np.zeros(0, int), *[edge[side].ravel() for edge in edges]]) for side in (0, 1))
    graph = sparse.coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=(size, size))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def _stack(joins: list[tuple[np.ndarray, list[np.ndarray]]]) -> tuple[np.ndarray, np.ndarray]:
    """All joins as one array of joints and one of factors, padded in front with the frozen element."""
    width = max([2, *[len(f) for _, f in joins]])
    if not joins:
        return np.zeros(0, int), np.zeros((0, width), int)
    rows = [np.stack([*[np.zeros_like(ids)] * (width - len(factors)), *factors], axis=1) for ids, factors in joins]
    return np.concatenate([ids for ids, _ in joins]), np.concatenate(rows)
