"""Rules for elementwise operations, reductions and changes of shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn

from prune_jax.graph.cut import Cut
from prune_jax.graph.labels import Free, Label, is_number, mix, rows_of, settle, static, unify
from prune_jax.graph.steps import Run, Value, bind, shape_of
from prune_jax.graph.walk import Walk

ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt ceil clamp
clz complex conj convert_element_type copy copy_p cos cosh digamma div erf erf_inv erfc exp exp2 expm1 floor ge gt
igamma igammac imag integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min mul name ne neg
nextafter not one_minus_square or polygamma population_count pow pvary real reduce_precision
regularized_incomplete_beta rem round rsqrt select_n sharding_constraint shift_left shift_right_arithmetic
shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor
"""
REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor")
CUMULATIVE = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
KEEPS_NOTES = {"convert_element_type", "copy", "neg"}


def labelled(eqn: JaxprEqn, labels: list[Label], **extra: Any) -> list[Value]:
    """The one output of an equation, labelled."""
    return [Value(eqn.outvars[0].aval, labels, **extra)]


def notes(value: Value) -> dict[str, Any]:
    """What an operation that only moves the entries keeps of a value: what it sums up, what it was divided by."""
    return {"summed": value.summed, "divided": value.divided}


def elementwise(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """All operands of full rank share their labels; scalars have none, and axes of size 1 stretch to any size."""
    shape = shape_of(eqn.outvars[0])
    full = [_stretched(v, shape) for v in ins if len(v.shape) == len(shape)]
    if not full:  # a bitcast between types of unlike width
        return walk.unknown(eqn, ins)
    labels = full[0]
    for other in full[1:]:
        _seek_nesting(walk, labels, other)
        if len(ins) == 2 and ins[0].parameter is None and ins[1].parameter is None:
            both = zip(labels, other, strict=True)
            arrays = [(x, y) for x, y in both if isinstance(x, np.ndarray) and isinstance(y, np.ndarray)]
            walk.note_meeting([x for x, y in arrays if x.flat[0] != y.flat[0]])
        labels = unify(walk.elements, labels, other, shape)
    return labelled(eqn, labels, **(notes(ins[0]) if eqn.primitive.name in KEEPS_NOTES else {})), None


def equal(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """What is compared with known numbers is told by them, as the entries of a one-hot code are: none can go."""
    for v in ins:
        if v.const is not None and not v.const.uniform:
            for d in range(len(v.labels)):
                settle(walk.elements, v.labels, d)
    return elementwise(walk, eqn, ins)


def _stretched(value: Value, shape: tuple) -> list[Label]:
    return [
        Free() if is_number(n) and n == 1 and static(m) else x
        for x, n, m in zip(value.labels, value.shape, shape, strict=True)
    ]


def _seek_nesting(walk: Walk, a: list[Label], b: list[Label]) -> None:
    """A bias (heads, dims) added to something whose dims may go head by head would gain from going so too."""
    for table, plain in ((a, b), (b, a)):
        for axis, label in enumerate(table):
            if isinstance(label, np.ndarray):
                for row in rows_of(label, axis):
                    walk.seek_nesting(plain, (row, axis))


def divide(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """Elementwise; but a sum over n entries divided by the constant n is a mean, and n becomes the cut number.

    What else is divided by a whole number notes it: in the gradient of a mean the cotangent is, and then broadcast.
    """
    outs, run = elementwise(walk, eqn, ins)
    name = eqn.primitive.name
    side = 0 if name == "mul" and ins[0].const is not None else 1
    total, divisor = ins[1 - side], ins[side]
    if divisor.const is None or divisor.shape not in ((), total.shape):
        return outs, run
    labels, shape, axes = total.summed or ([], (), ())
    moving = any(labels[a] is not None for a in axes)
    uniform = divisor.const.uniform or divisor.shape == ()
    if not moving and not uniform:
        return outs, run
    number = (divisor.const.args[0] if divisor.const.uniform else divisor.const).get()
    if number is None and moving:  # a symbolic size may be in it: nobody knows what it counts
        labels = list(labels)
        for a in axes:
            settle(walk.elements, labels, a)
    if number is None or number.size == 0:
        return outs, run
    dtype = divisor.aval.dtype
    counts = all(is_number(shape[a]) for a in axes) and _divides_by(number, math.prod(shape[a] for a in axes), name)
    if moving and walk.decide(counts):
        walk.averaged += [x for x in (labels[a] for a in axes) if isinstance(x, np.ndarray)]

        def mean(cut: Cut, *values: Any) -> list:
            new = math.prod(cut.size(labels, a, shape[a]) for a in axes)
            operands = list(values)
            operands[side] = lax.full(np.shape(values[side]), new if name == "div" else 1 / new, dtype)
            return bind(eqn, operands)

        return outs, mean
    if uniform and not (axes and counts) and jnp.issubdtype(dtype, jnp.floating):
        first = float(number.flat[0])
        whole = round(first if name == "div" else 1 / first) if 1e-9 < first < 1e9 else 0
        if whole > 1 and _divides_by(number, whole, name):
            outs[0].divided = whole
    return outs, run


def _divides_by(number: np.ndarray, n: int, name: str) -> bool:
    """Whether to "div" by this number, or to "mul" with it, is to divide by n, as nearly as its type can say."""
    if not jnp.issubdtype(number.dtype, jnp.floating):
        return name == "div" and bool((number == n).all())
    with np.errstate(over="ignore"):  # more entries than half precision can count
        count = np.asarray(n).astype(number.dtype)
    same = (count,) if name == "div" else (np.asarray(1 / n).astype(number.dtype), np.asarray(1, number.dtype) / count)
    return any(bool((number == x).all()) for x in same)


def barrier(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """Every operand passes as it is."""
    return [Value(o.aval, v.labels, **notes(v)) for o, v in zip(eqn.outvars, ins, strict=True)], None


def broadcast_in_dim(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """New and stretched axes are free; the others keep their labels.

    What was divided by the number of copies is, in a derivative, the cotangent of a mean over them, if there is one
    over the axes that they meet: each copy then has its share of the cut number.
    """
    shape, where = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    source = ins[0]
    labels: list[Label] = [Free() if static(n) else None for n in shape]
    copied = [d for d, n in enumerate(shape) if static(n)]
    for d, out in enumerate(where):
        label = source.labels[d]
        if source.shape[d] is shape[out] or source.shape[d] == shape[out]:
            labels[out] = _reframe(label, where, len(shape))
            copied = [e for e in copied if e != out]
    dims = tuple(where)
    shares = source.divided is not None and source.divided == math.prod(shape[d] for d in copied) and walk.backward

    def run(cut: Cut, x: Any, *sizes: Any) -> list:
        new = cut.shape(labels, shape)
        if shares and any(walk.is_averaged(labels[d]) for d in copied):
            x = x * np.asarray(source.divided / math.prod(new[d] for d in copied), x.dtype)
        return [lax.broadcast_in_dim(x, new, dims)]

    return labelled(eqn, labels, **notes(source)), run


def _reframe(label: Label, where: tuple[int, ...], rank: int) -> Label:
    """A label of an array whose dimension d becomes ``where[d]`` of an array of rank ``rank``."""
    if not isinstance(label, np.ndarray):
        return label
    shape = [1] * rank
    for d, out in enumerate(where):
        shape[out] = label.shape[d]
    return label.reshape(shape)


def transpose(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """Labels move with their axes."""
    return labelled(eqn, transposed(ins[0].labels, eqn.params["permutation"]), **notes(ins[0])), None


def transposed(labels: list[Label], order: Sequence[int]) -> list[Label]:
    """Labels of an array whose axes are put into another order."""
    return [x.transpose(order) if isinstance(x, np.ndarray) else x for x in (labels[d] for d in order)]


def squeeze(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """Axes of size 1 go."""
    return labelled(eqn, drop(ins[0].labels, tuple(eqn.params["dimensions"])), **notes(ins[0])), None


def drop(labels: list[Label], dims: tuple[int, ...]) -> list[Label]:
    """Labels without the axes ``dims``, on which no other may depend any more."""
    kept = [x for d, x in enumerate(labels) if d not in dims]
    return [
        x.reshape([n for d, n in enumerate(x.shape) if d not in dims]) if isinstance(x, np.ndarray) else x for x in kept
    ]


def reduce(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """Reduced axes go; what depended on their positions becomes independent of them."""
    axes = tuple(eqn.params["axes"])
    source = ins[0]
    summed = (source.labels, source.shape, axes) if eqn.primitive.name == "reduce_sum" else None
    divided = source.divided if all(is_number(n) and n == 1 for n in (source.shape[a] for a in axes)) else None
    return labelled(eqn, reduced(walk, source.labels, axes), summed=summed, divided=divided), None


def reduced(walk: Walk, labels: list[Label], axes: tuple[int, ...]) -> list[Label]:
    """Labels after the axes ``axes`` have been summed away."""
    labels = [
        walk.elements.collapse(x, axes) if isinstance(x, np.ndarray) and d not in axes else x
        for d, x in enumerate(labels)
    ]
    return drop(labels, axes)


def argreduce(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """A position is an output: the axis it counts along must not change."""
    axes = tuple(eqn.params["axes"])
    labels = list(ins[0].labels)
    for axis in axes:
        settle(walk.elements, labels, axis)
    return labelled(eqn, reduced(walk, labels, axes)), None


def cumulative(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """Labels stay; rows along the accumulated axis become alike. Copies of one entry are then told by their positions,
    as the entries of a range are: none can go."""
    axis = eqn.params["axis"]
    labels = list(ins[0].labels)
    if isinstance(labels[axis], Free) and eqn.primitive.name not in ("cummax", "cummin"):
        settle(walk.elements, labels, axis)
    labels = [
        walk.elements.collapse(x, (axis,)) if isinstance(x, np.ndarray) and d != axis else x
        for d, x in enumerate(labels)
    ]
    return labelled(eqn, labels), None


def sort(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """Operands are sorted together along one axis, which must not change."""
    axis = eqn.params["dimension"]
    labels = ins[0].labels
    for v in ins[1:]:
        labels = unify(walk.elements, labels, v.labels, v.shape)
    labels = mix(walk.elements, labels, axis)
    return [Value(o.aval, labels) for o in eqn.outvars], None


def top_k(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """The largest along the last axis, which must not change."""
    axis = eqn.params.get("axis", -1) % len(ins[0].labels)
    labels = mix(walk.elements, ins[0].labels, axis)
    return [Value(o.aval, labels) for o in eqn.outvars], None


def fft(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """The last axes are transformed, each of its frequencies from all positions: they must not change."""
    labels = ins[0].labels
    for axis in range(len(labels) - len(eqn.params["fft_lengths"]), len(labels)):
        labels = mix(walk.elements, labels, axis)
    return labelled(eqn, labels), None


def random_bits(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """Noise has whatever size its neighbours have; a cut network draws other numbers than the dense one."""
    shape = eqn.params["shape"]  # of the noise of each key
    keys: list[Label] = [None] * len(ins[0].shape)
    labels: list[Label] = [Free() if static(n) else None for n in shape]

    def run(cut: Cut, key: Any, *sizes: Any) -> list:
        return [eqn.primitive.bind(key, *sizes, **{**eqn.params, "shape": cut.shape(labels, shape)})]

    return labelled(eqn, [*keys, *labels]), run


def reverse(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """Reversed axes carry their labels reversed."""
    dims = tuple(eqn.params["dimensions"])
    labels = [np.flip(x, dims) if isinstance(x, np.ndarray) else x for x in ins[0].labels]
    return labelled(eqn, labels), None


def reduce_window(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run | None]:
    """Axes a window slides over must not change; the others pass."""
    p = eqn.params
    labels = list(ins[0].labels)
    for d in range(len(labels)):
        trivial = p["window_dimensions"][d] == 1 and p["window_strides"][d] == 1 and tuple(p["padding"][d]) == (0, 0)
        if not trivial or p["base_dilation"][d] != 1:
            labels = mix(walk.elements, labels, d)
    return labelled(eqn, labels), None


SHAPE_RULES = {
    **dict.fromkeys(ELEMENTWISE.split(), elementwise),
    **dict.fromkeys(REDUCTIONS, reduce),
    **dict.fromkeys(CUMULATIVE, cumulative),
    **dict.fromkeys(("argmax", "argmin"), argreduce),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), reduce_window),
    "eq": equal,
    "div": divide,
    "mul": divide,
    "optimization_barrier": barrier,
    "device_put": barrier,
    "broadcast_in_dim": broadcast_in_dim,
    "transpose": transpose,
    "squeeze": squeeze,
    "sort": sort,
    "top_k": top_k,
    "fft": fft,
    "random_bits": random_bits,
    "rev": reverse,
}
