"""Labels: which elements stand along each axis of an intermediate array.

The label of one axis is one of
- None: the axis never changes;
- an integer array with as many dimensions as the array it describes: its length along its own axis is the axis' size,
  along any other axis either 1 or that axis' size. The latter says that which positions go may differ from row to row,
  as in (heads, dims), where each head may lose different dims;
- Free: made by broadcasting, all positions alike; it takes on the label of whatever it first meets.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from prune_jax.graph.elements import Elements


class Free:
    """The label of a broadcast axis: unknown until it meets another label, then that label's number of positions."""

    __slots__ = ("axes", "axis", "known", "other")

    def __init__(self) -> None:
        self.known = False
        self.axes: list[Label] | None = None  # the labels of the array in which it was recognised; None: never changes
        self.axis = 0
        self.other: Free | None = None

    def last(self) -> Free:
        """The label at the end of a chain of broadcast axes that met each other."""
        here = self
        while here.other is not None:
            here = here.other
        return here


Label: TypeAlias = np.ndarray | Free | None


def place(ids: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """A 1-d array of elements as the label of ``axis`` in an array of rank ``rank``."""
    return ids.reshape([ids.size if d == axis else 1 for d in range(rank)])


def rows_of(ids: np.ndarray, axis: int) -> list[int]:
    """The axes along which the positions of ``axis`` differ."""
    return [d for d, n in enumerate(ids.shape) if n > 1 and d != axis]


def is_number(size: Any) -> bool:
    """Whether an axis length is a number and not a symbol."""
    return isinstance(size, int | np.integer)


def static(size: Any) -> bool:
    """Whether an axis has a known length above 1 (others, symbolic ones among them, never change)."""
    return is_number(size) and size > 1


def resolve(elements: Elements, label: Label, axis: int, shape: tuple) -> Label:
    """The label behind a broadcast axis that has met another, in the frame of an array of this shape."""
    if not isinstance(label, Free):
        return label
    label = label.last()
    if not label.known:
        return label
    if label.axes is None:
        return None
    ids = label.axes[label.axis]
    if ids is None:
        return None
    assert isinstance(ids, np.ndarray)
    if label.axis == axis and ids.ndim == len(shape) and all(n in (1, shape[d]) for d, n in enumerate(ids.shape)):
        return ids
    plain = elements.collapse(ids, tuple(d for d in range(ids.ndim) if d != label.axis))
    return place(plain, axis, len(shape))


def settle(elements: Elements, labels: list[Label], axis: int) -> None:
    """Freeze one axis: its label becomes None."""
    label = labels[axis]
    if isinstance(label, np.ndarray):
        elements.freeze(label)
    elif label is not None:
        label.last().known = True
    labels[axis] = None


def mix(elements: Elements, labels: list[Label], axis: int) -> list[Label]:
    """Labels past an operation that mixes all positions of an axis: it must not change, and no other depends on it."""
    labels = list(labels)
    settle(elements, labels, axis)
    return [elements.collapse(x, (axis,)) if isinstance(x, np.ndarray) else x for x in labels]


def concrete(elements: Elements, labels: list[Label], axis: int, shape: tuple) -> np.ndarray | None:
    """The axis' elements as an array, made anew where the axis is free."""
    label = labels[axis]
    if isinstance(label, Free):
        ids = place(elements.fresh((shape[axis],)), axis, len(shape))
        recognise(label, labels, axis)
        labels[axis] = ids
        return ids
    return label


def alone(elements: Elements, labels: list[Label], axis: int, shape: tuple) -> np.ndarray | None:
    """The axis' elements as a 1-d array, made independent of all other axes."""
    ids = concrete(elements, labels, axis, shape)
    if ids is None:
        return None
    labels[axis] = ids = elements.collapse(ids, tuple(d for d in range(ids.ndim) if d != axis))
    return ids.ravel()


def recognise(free: Free, labels: list[Label], axis: int) -> None:
    """Let a free axis stand for ``labels[axis]`` from now on (the list may still be filled in)."""
    free = free.last()
    free.known, free.axes, free.axis = True, labels, axis


def unify(elements: Elements, a: list[Label], b: list[Label], shape: tuple) -> list[Label]:
    """The labels of an array computed elementwise from two others of this shape."""
    out: list[Label] = []
    for axis in range(len(shape)):
        x, y = resolve(elements, a[axis], axis, shape), resolve(elements, b[axis], axis, shape)
        if isinstance(x, Free) and isinstance(y, Free):
            if x.last() is not y.last():
                x.last().other = y.last()
            out.append(y)
        elif isinstance(x, Free) or isinstance(y, Free):
            free, label = (x, y) if isinstance(x, Free) else (y, x)
            assert isinstance(free, Free)
            out.append(label)
            recognise(free, out, axis)
        elif x is None or y is None:
            for label in (x, y):
                if label is not None:
                    elements.freeze(label)
            out.append(None)
        elif x is y:
            out.append(x)
        else:
            elements.union(x, y)
            # what either side holds fixed over a dimension is now fixed over it on both sides
            out.append(x[tuple(slice(0, 1) if n == 1 and d != axis else slice(None) for d, n in enumerate(y.shape))])
    return out
