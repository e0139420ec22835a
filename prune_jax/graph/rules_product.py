"""Rules for matrix products and convolutions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn

from prune_jax.graph.cut import Cut
from prune_jax.graph.labels import Free, Label, concrete, recognise, resolve, settle, unify
from prune_jax.graph.rules_shape import labelled
from prune_jax.graph.steps import Run, Value, bind, shape_of
from prune_jax.graph.walk import Walk


def dot_general(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """Contracted and batch axes of both sides are the same; free axes pass."""
    (contract, batch) = eqn.params["dimension_numbers"]
    frames, shapes, frees = [], [], []
    for v, contracted, batched in zip(ins, contract, batch, strict=True):
        free = tuple(d for d in range(len(v.shape)) if d not in contracted and d not in batched)
        for role in (contracted, free):
            walk.seek_nesting(v.labels, tuple(sorted(role)))
        order = (*batched, *contracted, *free)
        frames.append([_moved(v.labels[d], order) for d in order])
        shapes.append(tuple(v.shape[d] for d in order))
        frees.append(len(free))
    nb, nc = len(batch[0]), len(contract[0])
    kept = [
        [d for d in range(len(v.shape)) if d not in c and d not in b]
        for v, c, b in zip(ins, contract, batch, strict=True)
    ]
    walk.note_product(ins, contract, kept)
    elements = walk.elements

    # inside: (batch, contracted), where positions that depend on a free axis of one side must stop doing so
    left, right = (_inside(walk, labels, nb + nc) for labels in frames)
    common = unify(elements, left, right, shapes[0][: nb + nc])

    # outside: (batch, free of left, free of right)
    out_shape = shape_of(eqn.outvars[0])
    sides = []
    for labels, before, after in ((frames[0], 0, frees[1]), (frames[1], frees[0], 0)):
        labels = [
            elements.collapse(x, tuple(range(nb, nb + nc))) if isinstance(x, np.ndarray) else x
            for d, x in enumerate(labels)
            if not nb <= d < nb + nc
        ]
        sides.append([_spread(x, nb, nc, before, after) for x in labels])
    left, right = sides
    batch_labels = _unify_batch(walk, left[:nb], right[:nb], out_shape)
    labels = [*batch_labels, *left[nb:], *right[nb:]]

    contracted_shape = shapes[0][nb : nb + nc]

    def cost(cut: Cut) -> float:
        inner = math.prod(cut.size(common, nb + i, n) for i, n in enumerate(contracted_shape))
        return 2 * inner * math.prod(cut.shape(labels, out_shape))

    walk.count(cost)
    return labelled(eqn, labels), None


def _moved(label: Label, order: tuple[int, ...]) -> Label:
    return label.transpose(order) if isinstance(label, np.ndarray) else label


def _inside(walk: Walk, labels: list[Label], count: int) -> list[Label]:
    """Labels of the first ``count`` axes, made independent of the others."""
    out: list[Label] = []
    for x in labels[:count]:
        if isinstance(x, np.ndarray):
            x = walk.elements.collapse(x, tuple(range(count, x.ndim)))
            x = x.reshape(x.shape[:count])
        out.append(x)
    return out


def _spread(label: Label, nb: int, nc: int, before: int, after: int) -> Label:
    """A label of (batch, contracted, free) as one of (batch, left free, right free)."""
    if not isinstance(label, np.ndarray):
        return label
    return label.reshape(*label.shape[:nb], *[1] * before, *label.shape[nb + nc :], *[1] * after)


def _unify_batch(walk: Walk, left: list[Label], right: list[Label], shape: tuple) -> list[Label]:
    """Batch axes of the output: known from either side."""
    rank, nb = len(shape), len(left)
    padding: list[Label] = [None] * (rank - nb)
    return unify(walk.elements, [*left, *padding], [*right, *padding], shape)[:nb]


def conv(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """Input channels meet the kernel's input axis group by group; output channels are the kernel's; space is fixed."""
    p, elements = eqn.params, walk.elements
    numbers = p["dimension_numbers"]
    groups, batch_groups = p["feature_group_count"], p["batch_group_count"]
    x, w = (list(v.labels) for v in ins)
    x_shape, w_shape = ins[0].shape, ins[1].shape
    batch, channel = numbers.lhs_spec[:2]
    outs, inputs = numbers.rhs_spec[:2]
    walk.note_product(ins, ([channel], [inputs]), ([], [outs]))
    for labels, dims in ((x, numbers.lhs_spec[2:]), (w, numbers.rhs_spec[2:])):
        for d in dims:
            settle(elements, labels, d)
    if batch_groups > 1:  # appears in gradients of grouped convolutions only
        for labels, d in ((x, batch), (x, channel), (w, outs), (w, inputs)):
            settle(elements, labels, d)

    # only channels remain as rows of each other: nothing else may depend on batch or space
    x = [
        elements.collapse(y, tuple(d for d in range(y.ndim) if d != i)) if isinstance(y, np.ndarray) else y
        for i, y in enumerate(x)
    ]
    keep = {outs, inputs} if groups > 1 else set()
    w = [
        elements.collapse(y, tuple(d for d in range(y.ndim) if d != i and d not in keep))
        if isinstance(y, np.ndarray)
        else y
        for i, y in enumerate(w)
    ]

    group_rows: np.ndarray | None = None
    if groups == 1:
        _same(walk, x, channel, x_shape, w, inputs, w_shape)
    else:
        group_rows = _grouped(walk, x, channel, x_shape, w, outs, inputs, w_shape, groups)

    rank = len(x_shape)
    out_labels: list[Label] = [None] * rank
    out_batch, out_channel = numbers.out_spec[:2]
    for place_, label in ((out_batch, x[batch]), (out_channel, w[outs])):
        if isinstance(label, np.ndarray):
            out = [1] * rank
            out[place_] = label.size
            label = label.reshape(out)
        out_labels[place_] = label
    shape = shape_of(eqn.outvars[0])
    window = math.prod(w_shape[d] for d in numbers.rhs_spec[2:])

    def cost(cut: Cut) -> float:
        fan_in = cut.size(w, inputs, w_shape[inputs])
        return 2 * window * fan_in * math.prod(cut.shape(out_labels, shape))

    walk.count(cost)

    def run(cut: Cut, *values: Any) -> list:
        if group_rows is None:
            return bind(eqn, list(values))
        new = eqn.params | {"feature_group_count": int(cut.alive[group_rows].sum())}
        return [eqn.primitive.bind(*values, **new)]

    return labelled(eqn, out_labels), run


def _same(walk: Walk, x: list[Label], dx: int, x_shape: tuple, w: list[Label], dw: int, w_shape: tuple) -> None:
    """Two axes of different arrays are one and the same."""
    a, b = resolve(walk.elements, x[dx], dx, x_shape), resolve(walk.elements, w[dw], dw, w_shape)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        walk.elements.union(a.ravel(), b.ravel())
    elif isinstance(a, Free) and b is not None:
        recognise(a, w, dw)
    elif isinstance(b, Free) and a is not None:
        recognise(b, x, dx)
    else:
        settle(walk.elements, x, dx)
        settle(walk.elements, w, dw)


def _grouped(
    walk: Walk,
    x: list[Label],
    channel: int,
    x_shape: tuple,
    w: list[Label],
    outs: int,
    inputs: int,
    w_shape: tuple,
    groups: int,
) -> np.ndarray | None:
    """Tie the channels of a grouped convolution; returns one element for every group, or None if none can go."""
    elements = walk.elements
    ids, out_ids = concrete(elements, x, channel, x_shape), concrete(elements, w, outs, w_shape)
    n, m = x_shape[channel], w_shape[outs]
    if ids is None or out_ids is None:
        for labels, d in ((x, channel), (w, outs), (w, inputs)):
            settle(elements, labels, d)
        return None
    out_ids = elements.collapse(out_ids, (inputs,))
    w[outs] = out_ids
    left, right = ids.reshape(groups, n // groups), out_ids.reshape(groups, m // groups)
    if n == groups:
        rows = left[:, 0]
    else:
        rows = elements.fresh((groups,))
        elements.block(rows)
        slots = elements.fresh(left.shape)
        elements.table(slots, 1)
        elements.join([rows[:, None], slots], left)
        # kernel[.., i, o]: input i of the group that output o belongs to
        label = w[inputs]
        if label is not None:
            source = walk.source(label), walk.source(out_ids)
            if source[0] and source[1] and source[0][0] == source[1][0]:
                walk.nest[source[0][0], source[1][1], source[0][1]] = False
            table = concrete(elements, w, inputs, w_shape)
            assert table is not None
            order = (outs, inputs, *[d for d in range(table.ndim) if d not in (outs, inputs)])
            table = table.transpose(order).reshape(-1, n // groups)  # (outputs or 1, inputs of a group)
            elements.union(table, np.repeat(slots, m // groups, axis=0))
        else:
            elements.freeze(slots)
    if m == groups:
        elements.union(right[:, 0], rows)
    else:
        slots = elements.fresh(right.shape)
        elements.table(slots, 1)
        elements.join([rows[:, None], slots], right)
    return rows


PRODUCT_RULES = {"dot_general": dot_general, "conv_general_dilated": conv}
