"""The rule for reshape: axes are merged and split."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from prune_jax.graph.cut import Cut
from prune_jax.graph.labels import Free, Label, concrete, is_number, recognise, settle
from prune_jax.graph.rules_shape import labelled, notes, transposed
from prune_jax.graph.steps import Run, Value, shape_of
from prune_jax.graph.walk import Walk


def reshape(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """Axes are merged and split segment by segment of equal size."""
    source, out_shape = ins[0], shape_of(eqn.outvars[0])
    order = eqn.params.get("dimensions")  # of the axes, first; JAX asks for it in convolutions that it has mapped
    labels, shape = list(source.labels), source.shape
    if order is not None:
        labels, shape = transposed(labels, order), tuple(shape[d] for d in order)
    segments = _segments(shape, out_shape)
    for inside, outside in reversed(segments):  # from the back, so that earlier positions stay valid
        old, new = [shape[d] for d in inside], [out_shape[d] for d in outside]
        start = inside[0] if inside else len(shape)
        if old == new:
            continue
        if [n for n in old if n != 1] == [n for n in new if n != 1]:
            labels = _resize_ones(labels, start, old, new)
        else:
            labels, middle = _merge(walk, labels, shape, start, len(old))
            labels = _split(walk, labels, middle, start, new)
        shape = (*shape[:start], *new, *shape[start + len(old) :])

    def run(cut: Cut, x: Any, *sizes: Any) -> list:
        return [lax.reshape(x, cut.shape(labels, out_shape), order)]

    return labelled(eqn, labels, **(notes(source) if order is None else {})), run


def _segments(a: tuple, b: tuple) -> list[tuple[list[int], list[int]]]:
    """Shortest runs of dimensions of ``a`` and ``b`` with equal products, in order."""
    segments: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(a) or j < len(b):
        left, right = ([i], [j]) if i < len(a) and j < len(b) else (list(range(i, len(a))), list(range(j, len(b))))
        while True:
            try:
                x, y = math.prod(a[d] for d in left), math.prod(b[d] for d in right)
                if x == y:
                    break
                grow_left = x < y
            except Exception:  # sizes of unlike symbols cannot be compared: take all that remains as one segment
                left, right = list(range(i, len(a))), list(range(j, len(b)))
                break
            if grow_left:
                left.append(left[-1] + 1)
            else:
                right.append(right[-1] + 1)
        segments.append((left, right))
        i, j = i + len(left), j + len(right)
    return segments


def _resize_ones(labels: list[Label], start: int, old: list, new: list) -> list[Label]:
    """Axes of size 1 come and go."""
    values = iter([x for x, n in zip(labels[start:], old, strict=False) if n != 1])
    middle = [None if n == 1 else next(values) for n in new]
    out = []
    for x in [*labels[:start], *middle, *labels[start + len(old) :]]:
        if isinstance(x, np.ndarray):
            sizes = iter([m for m, n in zip(x.shape[start:], old, strict=False) if n != 1])
            x = x.reshape(*x.shape[:start], *[1 if n == 1 else next(sizes) for n in new], *x.shape[start + len(old) :])
        out.append(x)
    return out


def _merge(walk: Walk, labels: list[Label], shape: tuple, start: int, count: int) -> tuple[list[Label], tuple]:
    """Merge ``count`` axes into one; a merged position lives while all its factors do."""
    dims = range(start, start + count)
    middle = (*shape[:start], math.prod(shape[start : start + count]), *shape[start + count :])
    sized = [d for d in dims if not is_number(shape[d]) or shape[d] != 1]
    labels = list(labels)
    if not all(is_number(shape[d]) for d in sized):  # positions of a symbolic size have no elements
        for d in dims:
            settle(walk.elements, labels, d)
        labels = [walk.elements.collapse(x, tuple(dims)) if isinstance(x, np.ndarray) else x for x in labels]

    # merged positions keep their order only if an outer axis loses the same ones whatever the inner axes' position
    for d in sized:
        ids = labels[d]
        if isinstance(ids, np.ndarray):
            labels[d] = walk.elements.collapse(ids, tuple(e for e in sized if e > d))

    def widen(ids: np.ndarray) -> np.ndarray:
        full = [shape[d] if d in dims else n for d, n in enumerate(ids.shape)]
        return np.broadcast_to(ids, full).reshape(*full[:start], middle[start], *full[start + count :])

    if count > 1:
        if sized and all(isinstance(labels[d], Free) for d in sized):
            merged: Label = Free()
        else:
            rows = [d for d in sized if isinstance(labels[d], np.ndarray)]
            for d in sized:
                free = labels[d]
                if isinstance(free, Free):
                    # copies made by a broadcast: which of them go may differ from row to row
                    outer = [e for e in rows if e < d]
                    new = walk.elements.fresh(tuple(shape[e] if e in outer or e == d else 1 for e in range(len(shape))))
                    walk.elements.table(new, d)
                    recognise(free, labels, d)
                    labels[d] = new
            factors = [widen(x) for x in (labels[d] for d in sized) if isinstance(x, np.ndarray)]
            merged = None if not factors else factors[0] if len(factors) == 1 else walk.elements.join(factors)
    else:
        merged = labels[start]
    rest = [
        widen(x)
        if isinstance(x, np.ndarray) and any(x.shape[d] > 1 for d in dims)
        else x.reshape(*x.shape[:start], 1, *x.shape[start + count :])
        if isinstance(x, np.ndarray)
        else x
        for x in labels
    ]
    out: list[Label] = [*rest[:start], merged, *rest[start + count :]]
    if isinstance(merged, np.ndarray):
        # of two axes one may depend on the other's positions, not each on the other's
        for d, n in enumerate(merged.shape):
            label = out[d]
            if d != start and n > 1 and isinstance(label, np.ndarray):
                out[d] = walk.elements.collapse(label, (start,))
    return out, middle


def _split(walk: Walk, labels: list[Label], shape: tuple, start: int, new: list) -> list[Label]:
    """Split one axis; its positions live while their row and their slot in the row both do."""
    if len(new) == 1:
        return labels
    labels = list(labels)
    moving = [t for t, n in enumerate(new) if n != 1]
    if isinstance(labels[start], Free) and len(moving) > 1:
        concrete(walk.elements, labels, start, shape)
    label = labels[start]

    def open_up(ids: np.ndarray) -> np.ndarray:
        inner = new if ids.shape[start] > 1 else [1] * len(new)
        return ids.reshape(*ids.shape[:start], *inner, *ids.shape[start + 1 :])

    middle: list[Label] = [None] * len(new)
    if isinstance(label, np.ndarray) and len(moving) == 1:
        middle[moving[0]] = open_up(label)
    elif isinstance(label, np.ndarray):
        joint = open_up(label)
        factors: list[np.ndarray] = []
        for t in moving:
            ids = walk.elements.fresh(
                (*joint.shape[:start], *new[: t + 1], *[1] * (len(new) - t - 1), *joint.shape[start + len(new) :])
            )
            walk.elements.table(ids, start + t)
            factors.append(ids)
            middle[t] = ids
        for ids, slots in itertools.combinations(factors, 2):
            walk.elements.block(ids, slots)
        walk.elements.join(factors, joint)
    elif isinstance(label, Free) and moving:
        middle[moving[0]] = label
    rest = [open_up(x) if isinstance(x, np.ndarray) else x for d, x in enumerate(labels) if d != start]
    return [*rest[:start], *middle, *rest[start:]]


RESHAPE_RULES = {"reshape": reshape}
