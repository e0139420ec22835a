"""Rules for writing into arrays."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from prune_jax.graph.cut import Cut
from prune_jax.graph.labels import alone, is_number, settle
from prune_jax.graph.rules_shape import labelled
from prune_jax.graph.steps import Run, Value
from prune_jax.graph.walk import Walk


def scatter(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """Window axes that cover the operand pass and are shared with the updates.

    One axis may be written to at places known from the program, as in ``x.at[:, 2:5].set(y)``: positions of y are then
    those of x that they go to. All other axes must not change.
    """
    numbers, elements = eqn.params["dimension_numbers"], walk.elements
    operand, indices, updates = (list(v.labels) for v in ins)
    shape, update_shape = ins[0].shape, ins[2].shape
    inserted = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    window = [d for d in range(len(shape)) if d not in inserted]
    partner: dict[int, int] = dict(zip(window, numbers.update_window_dims, strict=True))
    written = _known_places(ins, numbers, partner)
    axis, places, own = written or (None, np.zeros(0, int), None)

    for d in range(len(indices)):
        settle(elements, indices, d)
    for e in range(len(update_shape)):
        if e not in partner.values() and e != own:
            settle(elements, updates, e)
    for d, n in enumerate(shape):
        u = partner.get(d)
        if d == axis:
            continue
        if u is None or update_shape[u] != n:
            settle(elements, operand, d)
            if u is not None:
                settle(elements, updates, u)
            continue
        a, b = alone(elements, operand, d, shape), alone(elements, updates, u, update_shape)
        if a is None or b is None:
            settle(elements, operand, d)
            settle(elements, updates, u)
        else:
            elements.union(a, b)
    if axis is None:
        return labelled(eqn, operand), None

    ids = alone(elements, operand, axis, shape)
    if own is not None:
        new = alone(elements, updates, own, update_shape)
        if new is not None and ids is not None:
            elements.union(new, ids[places])
        elif ids is not None:
            elements.freeze(ids[places])
        else:
            settle(elements, updates, own)
    if ids is None:
        return labelled(eqn, operand), None
    others = tuple(d for d in range(len(shape)) if d != axis)
    row_by_row = lax.ScatterDimensionNumbers(others, (axis,), (axis,))

    def run(cut: Cut, x: Any, index: Any, y: Any) -> list:
        alive = cut.alive[ids]
        at = (np.cumsum(alive) - 1)[places[alive[places]]]
        if not at.size:
            return [x]
        y = lax.expand_dims(y, [axis]) if own is None else jnp.moveaxis(y, own, axis)
        where = jnp.asarray(at[:, None], index.dtype)
        return [eqn.primitive.bind(x, where, y, **{**eqn.params, "dimension_numbers": row_by_row})]

    return labelled(eqn, operand), run


def _known_places(ins: list[Value], numbers: Any, partner: dict[int, int]) -> tuple[int, np.ndarray, int | None] | None:
    """The one axis that is written to, the places known from the program, and the updates' axis that has them."""
    shape, update_shape = ins[0].shape, ins[2].shape
    axes, inserted = tuple(numbers.scatter_dims_to_operand_dims), tuple(numbers.inserted_window_dims)
    if len(axes) != 1 or numbers.operand_batching_dims or inserted not in ((), axes) or not is_number(shape[axes[0]]):
        return None
    if any(update_shape[u] is not shape[d] and update_shape[u] != shape[d] for d, u in partner.items() if d != axes[0]):
        return None
    known = ins[1].known()
    if known is None or known.ndim > 2 or (known.ndim == 2 and not inserted):
        return None
    own = partner.get(axes[0])  # an axis of the slice that is written, or the one along which several are
    if inserted and known.ndim == 2:
        own = next(u for u in range(len(update_shape)) if u not in partner.values())
    places = known.ravel() if own is None or inserted else known[0] + np.arange(update_shape[own])
    if places.size and not 0 <= places.min() <= places.max() < shape[axes[0]]:
        return None
    return axes[0], places, own


SCATTER_RULES = dict.fromkeys(
    ("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max"), scatter
)
