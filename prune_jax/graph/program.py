"""A function read as a whole: its parameters' labels, its steps, and the classes of its elements."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.extend.core import Jaxpr
from jax.interpreters.partial_eval import dce_jaxpr

from prune_jax.graph.elements import FROZEN
from prune_jax.graph.labels import Label, settle
from prune_jax.graph.rules_control import CALLS, CONTROL_RULES
from prune_jax.graph.rules_gather import GATHER_RULES
from prune_jax.graph.rules_index import INDEX_RULES
from prune_jax.graph.rules_product import PRODUCT_RULES
from prune_jax.graph.rules_reshape import RESHAPE_RULES
from prune_jax.graph.rules_scatter import SCATTER_RULES
from prune_jax.graph.rules_shape import SHAPE_RULES
from prune_jax.graph.solve import Classes
from prune_jax.graph.steps import Body, Value
from prune_jax.graph.walk import Walk

RULES = {
    **SHAPE_RULES,
    **RESHAPE_RULES,
    **PRODUCT_RULES,
    **INDEX_RULES,
    **GATHER_RULES,
    **SCATTER_RULES,
    **CONTROL_RULES,
}
MAX_PASSES = 6
Pin: TypeAlias = Callable[[str], bool] | Mapping[str, int | Sequence[int]]


@dataclasses.dataclass(slots=True)
class Leaf:
    """One parameter array."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Any
    labels: list[Label]

    @property
    def name(self) -> str:
        """The path as text."""
        return "/".join(self.path) or "."


@dataclasses.dataclass(slots=True)
class Program:
    """What was found out about one function at one set of argument shapes."""

    leaves: list[Leaf]
    body: Body
    walk: Walk
    classes: Classes
    out_tree: Any


def keys(path: Sequence[Any]) -> tuple[str, ...]:
    """A pytree path as plain strings."""
    return tuple(jax.tree_util.keystr((k,), simple=True) for k in path)


def abstract(tree: Any) -> Any:
    """Shapes and dtypes of a pytree of arrays."""
    return jax.tree.map(_spec, tree)


def _spec(x: Any) -> jax.ShapeDtypeStruct:
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    aval = jax.typeof(x)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))


def read_program(
    fn: Callable,
    params: Any,
    args: tuple,
    *,
    pin: Pin,
    free_output: Callable[[str], bool],
    means: list[bool] | None = None,
) -> Program:
    """Trace ``fn`` and label everything; repeated while parameters ask for a choice row by row.

    ``means`` is what ``Walk.means`` held after a reading at other shapes.
    """
    params, args = abstract(params), abstract(args)
    jaxpr, consts, shapes = _traced(fn, params, args)
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    pinned = _pinned(pin, [("/".join(keys(path)) or ".", x.shape) for path, x in flat])
    outputs = [keys(path) for path, _ in jax.tree_util.tree_flatten_with_path(shapes)[0]]
    nest: dict[tuple[int, int, int], bool] = {}
    for _ in range(MAX_PASSES):
        walk = Walk(RULES, CALLS, means)
        leaves = [Leaf(keys(path), x.shape, x.dtype, []) for path, x in flat]
        used = _used(jaxpr, len(flat))
        for i, leaf in enumerate(leaves):
            fixed = not used[i] or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
            stay = range(len(leaf.shape)) if fixed else pinned[i]
            leaf.labels = _label(walk, i, leaf.shape, stay, nest)
        walk.parameter_of = lambda ids, walk=walk, leaves=leaves: _parameter(walk, leaves, ids)  # type: ignore[misc]
        inputs = [
            Value(v.aval, list(leaf.labels), parameter=i)
            for i, (v, leaf) in enumerate(zip(jaxpr.invars, leaves, strict=False))
        ]
        inputs += [Value(v.aval, [None] * len(getattr(v.aval, "shape", ()))) for v in jaxpr.invars[len(leaves) :]]
        body = walk.read(jaxpr, consts, inputs)
        if set(walk.nest) <= set(nest):
            break
        nest |= walk.nest
    if means is not None and len(walk.means) != len(means):  # another program at these shapes
        return read_program(fn, params, args, pin=pin, free_output=free_output)
    for value, path in zip(body.outputs, outputs, strict=True):
        if not free_output("/".join(path)):
            labels = list(value.labels)
            for d in range(len(labels)):
                settle(walk.elements, labels, d)
    walk.freeze_unread()
    axes = [label for leaf in leaves for label in leaf.labels if isinstance(label, np.ndarray)]
    return Program(leaves, body, walk, Classes(walk.elements, axes), jax.tree.structure(shapes))


def _traced(fn: Callable, params: Any, args: tuple) -> tuple[Jaxpr, list, Any]:
    """The jaxpr of ``fn``, its constants, and the shapes of its outputs.

    Without what no output needs: a parameter that only such equations read is unused, inside of a jit as outside.
    """
    try:
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(params, *args)
    except Exception as error:
        named = jax.tree_util.tree_flatten_with_path(args)[0]
        shapes = ", ".join(f"args{jax.tree_util.keystr(path)} {x.dtype}{list(x.shape)}" for path, x in named)
        raise ValueError(
            f"fn itself fails with these parameters for arguments of shapes {shapes or '() (there are none)'}: "
            f"{type(error).__name__}: {error}"
        ) from error
    jaxpr, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    return jaxpr, list(closed.consts), shapes


def _pinned(pin: Pin, leaves: list[tuple[str, tuple[int, ...]]]) -> list[Sequence[int]]:
    """For every leaf, given its name and shape, the axes that must keep their size."""
    if callable(pin):
        return [range(len(shape)) if pin(name) else () for name, shape in leaves]
    if not isinstance(pin, Mapping):
        raise TypeError(f"pin must be a function of a path, or a dict from path to axis or axes, got {pin!r}")
    names = [name for name, _ in leaves]
    pinned: list[Sequence[int]] = [()] * len(leaves)
    for name, axes in pin.items():
        if names.count(name) != 1:
            raise ValueError(
                f"pin names {name!r}, which is {'no' if name not in names else 'more than one'} parameter; "
                f"parameters are {', '.join(names)}"
            )
        at = names.index(name)
        shape = leaves[at][1]
        chosen = list(axes) if isinstance(axes, Iterable) else [axes]
        if not all(isinstance(axis, int | np.integer) and not isinstance(axis, bool) for axis in chosen):
            raise TypeError(f"pin must give {name!r} an axis or a sequence of axes, which are integers, got {axes!r}")
        if wrong := [axis for axis in chosen if not -len(shape) <= axis < len(shape)]:
            raise ValueError(f"pin names axis {wrong[0]} of {name!r}, which has shape {shape}")
        pinned[at] = [int(axis) % len(shape) for axis in chosen]
    return pinned


def _used(jaxpr: Any, count: int) -> list[bool]:
    names = {id(a) for eqn in jaxpr.eqns for a in eqn.invars} | {id(a) for a in jaxpr.outvars}
    return [id(v) in names for v in jaxpr.invars[:count]]


def _label(
    walk: Walk, leaf: int, shape: tuple[int, ...], stay: Sequence[int], nest: dict[tuple[int, int, int], bool]
) -> list[Label]:
    labels: list[Label] = []
    for axis, n in enumerate(shape):
        if n <= 1 or axis in stay:
            labels.append(None)
            continue
        rows = [row for (which, row, own) in nest if (which, own) == (leaf, axis) and (leaf, axis, row) not in nest]
        rows = [row for row in rows if shape[row] > 1]
        ids = walk.elements.fresh(tuple(m if d == axis or d in rows else 1 for d, m in enumerate(shape)))
        if rows:
            walk.elements.table(ids, axis)
        else:
            walk.sources[int(ids.flat[0])] = (leaf, axis, n)
        labels.append(ids)
    for (which, row, own), block in nest.items():
        ids_of_row, slots = (labels[row], labels[own]) if which == leaf else (None, None)
        if block and isinstance(ids_of_row, np.ndarray) and isinstance(slots, np.ndarray):
            walk.elements.block(*np.broadcast_arrays(ids_of_row, slots))
    return labels


def _parameter(walk: Walk, leaves: list[Leaf], ids: np.ndarray) -> str:
    """Parameters whose positions stand along an axis, for an error message."""
    root = Classes(walk.elements, ()).root
    here = np.unique(root[ids])
    here = here[here != root[FROZEN]]
    names = [
        f"parameter {leaf.name!r} axis {axis}"
        for leaf in leaves
        for axis, label in enumerate(leaf.labels)
        if isinstance(label, np.ndarray) and np.isin(root[label], here).any()
    ]
    return names[0] if names else "a value whose size may change"
