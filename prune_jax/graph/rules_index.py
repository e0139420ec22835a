"""Rules for slicing, joining and padding."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from prune_jax.graph.cut import Cut
from prune_jax.graph.labels import Free, Label, concrete, place, settle, static, unify
from prune_jax.graph.rules_shape import drop, labelled
from prune_jax.graph.steps import Run, Value, bind, shape_of
from prune_jax.graph.walk import Walk


def pick(walk: Walk, labels: list[Label], axis: int, chosen: np.ndarray, shape: tuple) -> list[Label]:
    """Labels after taking the positions ``chosen`` along ``axis``."""
    source = concrete(walk.elements, labels, axis, shape)
    walk.note_pick(source, chosen)
    taken = chosen if len(chosen) else [0]  # of nothing, no other axis can tell which rows it has
    out = [np.take(x, taken, axis=axis) if isinstance(x, np.ndarray) and x.shape[axis] > 1 else x for x in labels]
    label = out[axis]
    if isinstance(label, np.ndarray):
        if not len(chosen):
            out[axis] = None
        elif len(chosen) == 1:
            walk.elements.freeze(label)
            out[axis] = None
        else:
            walk.elements.table(label, axis)
            for row in np.moveaxis(label, axis, -1).reshape(-1, len(chosen)):
                walk.elements.part(row)
    return out


def slice_(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """Labels are sliced like the array."""
    p, shape = eqn.params, ins[0].shape
    strides = p["strides"] or (1,) * len(shape)
    labels, stages = list(ins[0].labels), []
    start, limit, step = list(p["start_indices"]), list(p["limit_indices"]), list(strides)
    current = shape
    for d, n in enumerate(shape):
        if (start[d], limit[d], step[d]) == (0, n, 1):
            continue
        if isinstance(labels[d], np.ndarray | Free) or any(
            isinstance(x, np.ndarray) and x.shape[d] > 1 for x in labels
        ):
            chosen = np.arange(start[d], limit[d], step[d])
            before = list(labels)
            labels = pick(walk, before, d, chosen, current)
            if before[d] is not None:
                stages.append((before, d, chosen))
                start[d], limit[d], step[d] = 0, None, 1
        current = (*current[:d], shape_of(eqn.outvars[0])[d], *current[d + 1 :])

    def run(cut: Cut, x: Any) -> list:
        ends = [n if end is None else end for n, end in zip(x.shape, limit, strict=True)]
        for d, n in enumerate(shape):  # an axis that is not sliced may have been cut
            if (start[d], ends[d], step[d]) == (0, n, 1):
                ends[d] = x.shape[d]
        for before, d, chosen in stages:
            x = cut.select(x, before, d, chosen)
            ends[d] = x.shape[d]
        return [lax.slice(x, start, ends, step)]

    return labelled(eqn, labels), run


def split(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """Several slices side by side."""
    axis, sizes = eqn.params["axis"], [int(n) for n in eqn.params["sizes"]]
    source, shape = list(ins[0].labels), ins[0].shape
    starts = np.cumsum([0, *sizes])
    pieces = [np.arange(a, b) for a, b in itertools.pairwise(starts)]
    concrete(walk.elements, source, axis, shape)
    outs = [
        Value(o.aval, pick(walk, list(source), axis, piece, shape))
        for o, piece in zip(eqn.outvars, pieces, strict=True)
    ]

    def run(cut: Cut, x: Any) -> list:
        if source[axis] is None:
            return list(bind(eqn, [x]))
        return [cut.select(x, source, axis, piece) for piece in pieces]

    return outs, run


def concatenate(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """Labels are concatenated along the axis; the other axes are shared."""
    axis, elements = eqn.params["dimension"], walk.elements
    rank = len(ins[0].shape)
    shared: list[Label] | None = None
    parts = []
    for v in ins:
        others = [
            elements.collapse(x, (axis,)) if isinstance(x, np.ndarray) and d != axis else x
            for d, x in enumerate(v.labels)
        ]
        others[axis] = None
        frame = (*v.shape[:axis], 1, *v.shape[axis + 1 :])
        shared = others if shared is None else unify(elements, shared, others, frame)
        parts.append(list(v.labels))
    assert shared is not None
    labels = list(shared)
    if any(part[axis] is not None for part in parts):
        found = []
        for v, part in zip(ins, parts, strict=True):
            ids = concrete(elements, part, axis, v.shape)
            found.append(place(np.zeros(v.shape[axis], int), axis, rank) if ids is None else ids)
        wide = [max(x.shape[d] for x in found) for d in range(rank)]
        labels[axis] = np.concatenate(
            [np.broadcast_to(x, [*wide[:axis], x.shape[axis], *wide[axis + 1 :]]) for x in found], axis=axis
        )
    return labelled(eqn, labels), None


def tile(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """Copies of an axis carry the same labels; a copied axis of size 1 is free."""
    reps, shape = eqn.params["reps"], ins[0].shape
    labels = list(ins[0].labels)
    for d in range(len(shape)):
        if static(reps[d]) and shape[d] != 1:
            concrete(walk.elements, labels, d, shape)

    def repeated(ids: np.ndarray) -> np.ndarray:
        return np.tile(ids, [r if n > 1 else 1 for n, r in zip(ids.shape, reps, strict=True)])

    labels = [repeated(x) if isinstance(x, np.ndarray) else x for x in labels]
    labels = [Free() if n == 1 and static(r) else x for x, n, r in zip(labels, shape, reps, strict=True)]
    out_shape = shape_of(eqn.outvars[0])

    def run(cut: Cut, x: Any) -> list:
        new = [
            cut.size(labels, d, out_shape[d]) if n == 1 else r for d, (n, r) in enumerate(zip(shape, reps, strict=True))
        ]
        return [eqn.primitive.bind(x, **{**eqn.params, "reps": tuple(new)})]

    return labelled(eqn, labels), run


def stack(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """A new axis, one position for every operand; the operands share their labels."""
    axis = eqn.params["axis"]
    labels = ins[0].labels
    for v in ins[1:]:
        labels = unify(walk.elements, labels, v.labels, v.shape)
    labels = [np.expand_dims(x, axis) if isinstance(x, np.ndarray) else x for x in labels]
    return labelled(eqn, [*labels[:axis], None, *labels[axis:]]), None


def unstack(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """Every position of an axis by itself: none can go, but each may differ from the others in its other axes."""
    axis, labels = eqn.params["axis"], list(ins[0].labels)
    settle(walk.elements, labels, axis)
    outs = []
    for i, o in enumerate(eqn.outvars):
        own = pick(walk, labels, axis, np.array([i]), ins[0].shape)
        outs.append(Value(o.aval, drop(own, (axis,))))
    return outs, None


def pad(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """Padding adds new positions, which go with whatever they meet."""
    config, shape = eqn.params["padding_config"], ins[0].shape
    labels, elements = list(ins[0].labels), walk.elements
    padded: dict[int, list[np.ndarray]] = {}
    for d, (low, high, interior) in enumerate(config):
        if (low, high, interior) == (0, 0, 0):
            continue
        labels = [
            elements.collapse(x, (d,)) if isinstance(x, np.ndarray) and e != d else x for e, x in enumerate(labels)
        ]
        if interior or low < 0 or high < 0:
            settle(elements, labels, d)
        ids = concrete(elements, labels, d, shape)
        if ids is None:
            continue
        ids = elements.collapse(ids, tuple(e for e in range(ids.ndim) if e != d))
        ends = [place(elements.fresh((n,)), d, len(shape)) for n in (low, high)]
        labels[d] = np.concatenate([ends[0], ids, ends[1]], axis=d)
        padded[d] = ends

    def run(cut: Cut, x: Any, value: Any) -> list:
        new = list(config)
        for d, (low, high) in padded.items():
            new[d] = (int(cut.alive[low].sum()), int(cut.alive[high].sum()), 0)
        return [lax.pad(x, value, new)]

    return labelled(eqn, labels), run


INDEX_RULES = {
    "slice": slice_,
    "split": split,
    "concatenate": concatenate,
    "pad": pad,
    "tile": tile,
    "stack": stack,
    "unstack": unstack,
}
