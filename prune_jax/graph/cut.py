"""Which positions of every array survive, given which elements do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from prune_jax.graph.labels import Free, Label, is_number, rows_of

if TYPE_CHECKING:
    from prune_jax.graph.steps import Value


class Cut:
    """Sizes and positions of cut arrays; ``alive[element]`` says which elements survive."""

    def __init__(self, alive: np.ndarray) -> None:
        self.alive = alive

    def mask(self, labels: list[Label], axis: int) -> np.ndarray:
        """Living positions along ``axis``, one row for every surviving row of the axes its label depends on."""
        ids = labels[axis]
        assert isinstance(ids, np.ndarray)
        mask = self.alive[ids]
        rows = [d for d in rows_of(ids, axis) if isinstance(labels[d], np.ndarray)]
        for d in sorted(rows, key=lambda d: _size(labels[d])):
            mask = np.take_along_axis(mask, self.index(labels, d), axis=d)
        return mask

    def index(self, labels: list[Label], axis: int) -> np.ndarray:
        """Surviving positions along ``axis``, ascending, with the dimensions of its label."""
        return living(self.mask(labels, axis), axis)

    def size(self, labels: list[Label], axis: int, size: Any) -> Any:
        """The axis' new length."""
        label = labels[axis]
        if isinstance(label, Free):
            free = label.last()
            return size if not free.known or free.axes is None else self.size(free.axes, free.axis, size)
        return size if label is None else self.index(labels, axis).shape[axis]

    def shape(self, labels: list[Label], shape: tuple) -> tuple:
        """An array's new shape."""
        return tuple(self.size(labels, d, n) for d, n in enumerate(shape))

    def array(self, x: Any, labels: list[Label]) -> Any:
        """Cut a full-size array."""
        todo = [d for d, label in enumerate(labels) if isinstance(label, np.ndarray)]
        for d in sorted(todo, key=lambda d: _size(labels[d])):
            index = self.index(labels, d)
            if index.shape[d] != x.shape[d]:
                x = take(x, index, d)
        return x

    def constant(self, x: Any, value: Value) -> Any:
        """Cut a constant where it meets the rest of the program."""
        if value.const is not None and value.const.uniform and not any(is_number(n) and n == 0 for n in x.shape):
            scalar = lax.reshape(lax.slice(x, [0] * x.ndim, [1] * x.ndim), ())
            return lax.broadcast(scalar, self.shape(value.labels, value.shape))
        return self.array(x, value.labels)

    def select(self, x: Any, labels: list[Label], axis: int, chosen: np.ndarray) -> Any:
        """Of a cut array, the survivors among the original positions ``chosen`` along ``axis``, in that order."""
        mask = self.mask(labels, axis)
        new = np.cumsum(mask, axis=axis) - 1
        picked = living(np.take(mask, chosen, axis=axis), axis)
        return take(x, np.take_along_axis(np.take(new, chosen, axis=axis), picked, axis=axis), axis)


def _size(label: Label) -> int:
    # a label is larger than those of the rows it depends on
    return label.size if isinstance(label, np.ndarray) else 0


def living(mask: np.ndarray, axis: int) -> np.ndarray:
    """Positions of the true entries along ``axis``; every row must hold equally many."""
    counts = mask.sum(axis=axis)
    if counts.size and counts.min() != counts.max():
        raise ValueError(
            f"this cut leaves between {counts.min()} and {counts.max()} positions in rows that must stay equally long; "
            "remove equally many from each"
        )
    count = int(counts.flat[0]) if counts.size else 0
    order = np.argsort(~mask, axis=axis, kind="stable")
    return np.take(order, np.arange(count), axis=axis)


def take(x: Any, index: np.ndarray, axis: int) -> Any:
    """The positions ``index`` along ``axis``, the same in all rows or, where ``index`` has rows, row by row."""
    rows = np.moveaxis(index, axis, -1)
    flat = rows[(0,) * (rows.ndim - 1)]
    if not (rows == flat).all():
        if isinstance(x, np.ndarray):
            return np.take_along_axis(x, index, axis=axis)
        return jnp.take_along_axis(x, jnp.asarray(index), axis=axis, mode="clip")
    if isinstance(x, np.ndarray):
        return np.take(x, flat, axis=axis)
    if flat.size and np.array_equal(flat, np.arange(flat[0], flat[0] + flat.size)):  # fuses, as a gather does not
        return lax.slice_in_dim(x, int(flat[0]), int(flat[0]) + flat.size, axis=axis)
    return jnp.take(x, jnp.asarray(flat), axis=axis, mode="clip")
