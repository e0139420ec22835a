"""Elements: integer names for the positions along array axes, and what is known about them.

Element 0 never dies. Every other element is one position along some axis of some array. Three facts are recorded while
a program is read, all as arrays, so that they are cheap for large networks:

- union: two elements are the same thing;
- join: an element lives as long as ALL of its factors live (column (head, dim) of a flat kernel lives while the head
  lives and the dim lives);
- table: the rows of a 2-d array of elements must keep equally many living entries, or no rectangular array is left.
"""

from __future__ import annotations

from typing import Any

import numpy as np

FROZEN = 0


class Elements:
    """The growing record of one walk over a program."""

    def __init__(self) -> None:
        self.size = 1
        self.edges: list[tuple[np.ndarray, np.ndarray]] = []
        self.frozen: list[tuple[np.ndarray, Any]] = []
        self.reading: Any = None  # what is being read; kept beside what it freezes
        self.joins: list[tuple[np.ndarray, list[np.ndarray]]] = []
        self.tables: list[np.ndarray] = []
        self.parts: list[np.ndarray] = []
        self.blocks: list[tuple[np.ndarray, np.ndarray | None]] = []

    def fresh(self, shape: tuple[int, ...]) -> np.ndarray:
        """New elements in an array of this shape."""
        count = int(np.prod(shape))
        ids = np.arange(self.size, self.size + count).reshape(shape)
        self.size += count
        return ids

    def union(self, a: np.ndarray, b: np.ndarray) -> None:
        """Say that the elements of two (broadcastable) arrays are pairwise the same."""
        a, b = np.broadcast_arrays(a, b)
        self.edges.append((a.ravel(), b.ravel()))

    def freeze(self, ids: np.ndarray) -> None:
        """Say that these elements never die."""
        self.frozen.append((ids.ravel(), self.reading))

    def join(self, factors: list[np.ndarray], joint: np.ndarray | None = None) -> np.ndarray:
        """Say that ``joint`` (new by default) lives exactly while all of its factors live."""
        wide = np.broadcast_arrays(*factors)
        if joint is None:
            joint = self.fresh(wide[0].shape)
        self.joins.append((joint.ravel(), [f.ravel() for f in wide]))
        return joint

    def table(self, ids: np.ndarray, axis: int) -> None:
        """Say that along ``axis`` every row of ``ids`` keeps equally many."""
        if ids.size > ids.shape[axis]:
            self.tables.append(np.moveaxis(ids, axis, -1).reshape(-1, ids.shape[axis]))

    def part(self, ids: np.ndarray) -> None:
        """Say that these positions form an axis of their own, which must not become empty."""
        self.parts.append(np.unique(ids))

    def block(self, ids: np.ndarray, slots: np.ndarray | None = None) -> None:
        """Say that each of these elements stands for a whole block of positions (a head, a channel group).

        With ``slots``, which ``ids`` broadcast to, only where some slot of its block can go as well (a channel before
        its pixels in memory is none), and can do so alone: what is brought forth one by one and loses the same slots
        as all others (the inputs of a layer whose kernel is summed up from several) is no block either.
        """
        if slots is not None:
            ids = np.broadcast_to(ids, slots.shape)
        self.blocks.append((ids.ravel(), None if slots is None else slots.ravel()))

    def collapse(self, ids: np.ndarray, dims: tuple[int, ...]) -> np.ndarray:
        """Make ``ids`` independent of ``dims``: entries that differ only there become the same."""
        first = tuple(slice(0, 1) if d in dims else slice(None) for d in range(ids.ndim))
        if ids[first].size == ids.size:
            return ids
        self.union(ids, ids[first])
        return ids[first]
