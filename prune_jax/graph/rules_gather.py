"""Rules for indexing with arrays and for slices at places known only when the program runs."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from prune_jax.graph.cut import Cut, take
from prune_jax.graph.labels import Label, alone, mix, place, settle, unify
from prune_jax.graph.rules_index import pick
from prune_jax.graph.rules_shape import drop, labelled
from prune_jax.graph.steps import Run, Value, shape_of
from prune_jax.graph.walk import Walk


def gather(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """Axes taken whole pass; an indexed axis is frozen unless the indices are known and few-dimensional."""
    p, elements = eqn.params, walk.elements
    numbers, sizes = p["dimension_numbers"], list(p["slice_sizes"])
    operand, indices = list(ins[0].labels), list(ins[1].labels)
    shape, index_shape = ins[0].shape, ins[1].shape
    out_shape = shape_of(eqn.outvars[0])
    batching = tuple(numbers.operand_batching_dims)
    picked = _known_positions(ins, numbers, sizes)
    whole = [d for d in range(len(shape)) if sizes[d] is shape[d] or sizes[d] == shape[d]]
    for d in range(len(shape)):
        if d in batching or (d in whole and d not in numbers.collapsed_slice_dims):
            continue
        if d not in picked:
            settle(elements, operand, d)
    settle(elements, indices, len(index_shape) - 1)

    if any(operand[d] is not None or _is_row(operand, d) for d in picked):
        stages, labels = [], list(operand)
        current = list(shape)
        for d, chosen in picked.items():
            before = list(labels)
            labels = pick(walk, before, d, chosen, tuple(current))
            current[d] = len(chosen)
            stages.append((before, d, chosen))
        gone = tuple(numbers.collapsed_slice_dims) if len(index_shape) == 1 else ()
        labels = drop(labels, gone)

        def run_pick(cut: Cut, x: Any, index: Any) -> list:
            for before, d, chosen in stages:
                x = cut.select(x, before, d, chosen) if before[d] is not None else take(x, place(chosen, d, x.ndim), d)
            return [lax.squeeze(x, gone)]

        return labelled(eqn, labels), run_pick

    # everything else: the output's axes are the operand's whole axes and the indices' batch axes, each on its own
    labels = [None] * len(out_shape)
    window = [d for d in range(len(shape)) if d not in numbers.collapsed_slice_dims and d not in batching]
    for d, out in zip(window, numbers.offset_dims, strict=True):
        labels[out] = _placed(walk, operand, d, shape, out, len(out_shape))
    batch_out = [d for d in range(len(out_shape)) if d not in numbers.offset_dims]
    for d, out in enumerate(batch_out):
        labels[out] = _placed(walk, indices, d, index_shape, out, len(out_shape))
    for d, i in zip(batching, numbers.start_indices_batching_dims, strict=True):
        label = _placed(walk, operand, d, shape, batch_out[i], len(out_shape))
        other = labels[batch_out[i]]
        if isinstance(label, np.ndarray) and isinstance(other, np.ndarray):
            elements.union(label, other)
        elif label is not None or other is not None:
            settle(elements, operand, d)
            settle(elements, labels, batch_out[i])

    def run(cut: Cut, x: Any, index: Any) -> list:
        new = tuple(cut.size(operand, d, n) if d in whole and d in window else n for d, n in enumerate(sizes))
        return [eqn.primitive.bind(x, index, **{**p, "slice_sizes": new})]

    return labelled(eqn, labels), run


def _known_positions(ins: list[Value], numbers: Any, sizes: list) -> dict[int, np.ndarray]:
    """Axes indexed at positions known from the program: ``x[:, 3]``, ``x[2:4]`` and ``x[:, [1, 0]]`` in place."""
    indexed, shape = list(numbers.start_index_map), ins[0].shape
    rank = len(ins[1].shape)
    others = tuple(d for d in range(len(shape)) if d not in indexed)
    if (
        rank > 2
        or numbers.operand_batching_dims
        or any(sizes[d] is not shape[d] and sizes[d] != shape[d] for d in others)
    ):
        return {}
    if rank == 2 and (tuple(numbers.collapsed_slice_dims) != tuple(indexed) or tuple(numbers.offset_dims) != others):
        return {}
    known = ins[1].known()
    if known is None:
        return {}
    if rank == 2:
        positions = {indexed[0]: known[:, 0]} if len(indexed) == 1 else {}
    else:
        positions = {d: np.arange(k, k + sizes[d]) for d, k in zip(indexed, known.tolist(), strict=True)}
    inside = all(not p.size or (p.min() >= 0 and p.max() < shape[d]) for d, p in positions.items())
    return positions if inside else {}


def _is_row(labels: list[Label], axis: int) -> bool:
    return any(isinstance(x, np.ndarray) and x.shape[axis] > 1 for x in labels)


def _placed(walk: Walk, labels: list[Label], axis: int, shape: tuple, out: int, rank: int) -> Label:
    """An axis' label, made independent of all others, in a new place."""
    ids = alone(walk.elements, labels, axis, shape)
    return None if ids is None else place(ids, out, rank)


def dynamic_slice(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """Axes taken whole pass; one sliced at a known place is sliced; the others must not change."""
    sizes, shape = eqn.params["slice_sizes"], ins[0].shape
    labels, stages = list(ins[0].labels), []
    new_sizes = list(sizes)
    for d, n in enumerate(shape):
        if sizes[d] is n or sizes[d] == n:
            continue
        known = ins[1 + d].known() if labels[d] is not None else None
        if known is None:
            labels = mix(walk.elements, labels, d)
        else:
            start = int(np.clip(known, 0, n - sizes[d]))
            before = list(labels)
            chosen = np.arange(start, start + sizes[d])
            labels = pick(walk, before, d, chosen, (*sizes[:d], *shape[d:]))
            stages.append((before, d, chosen))

    def run(cut: Cut, x: Any, *starts: Any) -> list:
        for before, d, chosen in stages:
            x = cut.select(x, before, d, chosen)
        skip = {d for _, d, _ in stages}
        sizes = [x.shape[d] if d in skip or shape[d] == n else n for d, n in enumerate(new_sizes)]
        where = [lax.full_like(s, 0) if d in skip else s for d, s in enumerate(starts)]
        return [lax.dynamic_slice(x, where, sizes)]

    return labelled(eqn, labels), run


def dynamic_update_slice(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """Axes the update covers are shared; the others must not change."""
    elements = walk.elements
    operand, update = list(ins[0].labels), list(ins[1].labels)
    for d, (n, m) in enumerate(zip(ins[0].shape, ins[1].shape, strict=True)):
        if not (n is m or n == m):
            for labels in (operand, update):
                settle(elements, labels, d)
    operand = [elements.collapse(x, _partial(ins, x)) if isinstance(x, np.ndarray) else x for x in operand]
    update = [elements.collapse(x, _partial(ins, x)) if isinstance(x, np.ndarray) else x for x in update]
    return labelled(eqn, unify(elements, operand, update, ins[0].shape)), None


def _partial(ins: list[Value], ids: np.ndarray) -> tuple[int, ...]:
    return tuple(d for d in range(ids.ndim) if ins[0].shape[d] != ins[1].shape[d])


GATHER_RULES = {
    "gather": gather,
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
}
