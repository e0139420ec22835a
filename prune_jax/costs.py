"""What a network costs: its parameters, and its FLOPs from its jaxpr; for measured time see `timing.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import jax
import numpy as np

from prune_jax.graph.steps import shape_of, subjaxprs
from prune_jax.tree import PyTree, is_none, map_masked

ZERO: Final = "zero"  # a constant of zeros: counts as dense, unless padded onto or selected beside a masked weight
Mask = np.ndarray | Literal["zero"] | None  # where an array may be other than zero; None: nothing is known


def count_parameters(params: PyTree, masks: PyTree | None = None) -> int:
    """Numbers in a pytree; with masks, those that the masks keep.

    Args:
        params: pytree of arrays or shapes.
        masks: bool pytree like ``params``, True = keep; None where a leaf is not masked.

    Returns:
        The count.

    Raises:
        ValueError: masks that do not match ``params``.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
        >>> count_parameters(params), count_parameters(params, {"kernel": jnp.eye(2, 3) > 0, "bias": None})
        (9, 5)
    """
    sizes = jax.tree.map(np.size, params)
    if masks is not None:
        kept = map_masked(lambda mask, leaf: int(np.asarray(mask).sum()), masks, params)
        sizes = jax.tree.map(lambda m, k, n: n if m is None else k, masks, kept, sizes, is_leaf=is_none)
    return sum(jax.tree.leaves(sizes))


def flops(fn: Callable, *args: Any, masks: PyTree | None = None) -> int:
    """Floating-point operations of the matrix products and convolutions of any JAX function, without running it.

    A multiply-add is two operations, as XLA counts and as most frameworks print (papers on ViTs often print
    multiply-adds, half of it, as "FLOPs"). Padding of a convolution counts as if it were image. A scan counts its body
    once a step, a cond its dearest branch. Softmax, norms and other elementwise work are left out.

    Nothing has to be declared for a pruned network: cut widths and dropped tokens are smaller shapes in the jaxpr.
    For weights that are zero but still there, ``masks`` leaves out every multiply-add that meets a masked weight. A
    weight is followed through reshapes, transposes, slices, splits, stacks, casts, products with other arrays,
    quotients by them, powers and the like; zeros that are padded on, joined to it or selected in its place
    (``jnp.where``) are left out with it. Past anything else (sums, gathers, slices at traced places, a scan's carry and
    outputs), and as the image of a convolution, it counts as if all of it were kept: the count is then an upper bound.

    A ragged product counts every row once, as if the groups covered all of them; with masks, each as one of its dearest
    group, since the sizes of the groups are not in the jaxpr.

    Args:
        fn: any JAX function.
        *args: its arguments; arrays or ``jax.ShapeDtypeStruct``.
        masks: bool pytree like the first argument, True = keep; None where a leaf is not masked.

    Returns:
        The count.

    Raises:
        ValueError: masks that do not match the first argument; a product inside a while loop (its number of steps is
            not in the jaxpr) or a ``shard_map``.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"a": jnp.ones((8, 16)), "b": jnp.ones((16, 4))}
        >>> net = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
        >>> flops(net, params, jnp.ones((10, 8))) == 2 * 10 * (8 * 16 + 16 * 4)
        True
        >>> masks = {"a": jnp.arange(8)[:, None] + jnp.zeros((8, 16)) < 2, "b": None}
        >>> flops(net, params, jnp.ones((10, 8)), masks=masks) == 2 * 10 * (2 * 16 + 16 * 4)
        True
    """
    closed = jax.make_jaxpr(fn)(*args)
    known: list[Mask] = [None] * len(closed.jaxpr.invars)
    if masks is not None:
        of_leaves = map_masked(lambda mask, leaf: _Known(np.asarray(mask, bool)), masks, args[0], name="the argument")
        leaves = jax.tree.leaves(of_leaves)
        known[: len(leaves)] = [leaf.mask if isinstance(leaf, _Known) else None for leaf in leaves]
    return _count(closed.jaxpr, known)[0]


class _Known:
    """A mask as one leaf among the arrays of a pytree."""

    def __init__(self, mask: np.ndarray) -> None:
        self.mask = mask


def _count(jaxpr: Any, inputs: Sequence[Mask]) -> tuple[int, list[Mask]]:
    """FLOPs of a jaxpr, and the masks of its outputs."""
    env: dict[Any, Mask] = {v: m for v, m in zip(jaxpr.invars, inputs, strict=True) if m is not None}

    def look(atom: Any) -> Mask:
        if hasattr(atom, "val"):  # a literal
            return None if np.any(atom.val) else ZERO
        return env.get(atom)

    total = 0
    for eqn in jaxpr.eqns:
        operands = [look(a) for a in eqn.invars]
        name = eqn.primitive.name
        outs: Sequence[Mask] = [None] * len(eqn.outvars)
        if name in ("dot_general", "scaled_dot"):
            total += _product(eqn, operands, eqn.params["dimension_numbers"])
        elif name == "ragged_dot_general":
            total += _ragged_product(eqn, operands)
        elif name == "conv_general_dilated":
            total += _convolution(eqn, operands[1])
        elif name == "scan":
            cost, outs = _scan(eqn, operands)
            total += cost
        elif name == "cond":
            counts = [_count(_open(branch), operands[1:]) for branch in eqn.params["branches"]]
            total += max(cost for cost, _ in counts)
            outs = [_union(eqn.outvars[i], [found[i] for _, found in counts]) for i in range(len(eqn.outvars))]
        elif any(True for _ in subjaxprs(eqn)):
            cost, outs = _call(eqn, operands)
            total += cost
        elif name in _FOLLOWED and any(isinstance(m, np.ndarray) for m in operands):
            found = _FOLLOWED[name](eqn, operands)
            outs = found if eqn.primitive.multiple_results else [found]
        elif name in _CONSTANT and operands[0] == ZERO:
            outs = [ZERO]
        env.update((v, m) for v, m in zip(eqn.outvars, outs, strict=True) if m is not None)
    return total, [look(a) for a in jaxpr.outvars]


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _call(eqn: Any, operands: Sequence[Mask]) -> tuple[int, Sequence[Mask]]:
    """A jitted, checkpointed or custom-derivative function: its body, once."""
    bodies = [_open(j) for j in subjaxprs(eqn)]
    if len(bodies) == 1 and len(bodies[0].invars) == len(operands) and eqn.primitive.name != "shard_map":
        return _count(bodies[0], operands)
    if any(_count(body, [None] * len(body.invars))[0] for body in bodies):
        reason = "its number of steps is not in the jaxpr" if eqn.primitive.name == "while" else "its runs are unknown"
        raise ValueError(
            f"flops cannot count the products inside a {eqn.primitive.name!r}: {reason}; use a scan, or count its body"
        )
    return 0, [None] * len(eqn.outvars)


def _scan(eqn: Any, operands: Sequence[Mask]) -> tuple[int, Sequence[Mask]]:
    """All steps of a scan; each sees its own slice of the stacked masks."""
    body, length = _open(eqn.params["jaxpr"]), eqn.params["length"]
    fixed = eqn.params["num_consts"]
    carried = fixed + eqn.params["num_carry"]
    stacked = operands[carried:]
    before = [*operands[:fixed], *[None] * eqn.params["num_carry"]]
    outs = [None] * len(eqn.outvars)
    if not any(isinstance(m, np.ndarray) for m in stacked):
        return length * _count(body, [*before, *stacked])[0], outs
    steps = ([m[i] if isinstance(m, np.ndarray) else m for m in stacked] for i in range(length))
    return sum(_count(body, [*before, *step])[0] for step in steps), outs


def _product(eqn: Any, operands: Sequence[Mask], dimension_numbers: Any) -> int:
    """Two operations for each pair of kept numbers that meet: sum over batch b and contracted k of l[b, k] r[b, k]."""
    contracted, batch = dimension_numbers
    sides = [
        _along(mask, shape_of(var), [*b, *c])
        for mask, var, b, c in zip(operands[:2], eqn.invars[:2], batch, contracted, strict=True)
    ]
    return 2 * int((sides[0] * sides[1]).sum())


def _ragged_product(eqn: Any, operands: Sequence[Mask]) -> int:
    """A product whose rows, contracted or batch axis falls into groups; which of them go where is not in the jaxpr."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    if not numbers.rhs_group_dimensions:  # the same pairs meet as without groups, only their sums are apart
        return _product(eqn, operands, numbers.dot_dimension_numbers)
    (contracted, contracted_right), (batch, batch_right) = numbers.dot_dimension_numbers
    left, right = operands[:2]
    if isinstance(left, np.ndarray):  # rows may go to different groups: each counts as if it had all rows' kept numbers
        free = tuple(d for d in range(left.ndim) if d not in (*contracted, *batch))
        left = np.broadcast_to(left.any(free, keepdims=True), left.shape)
    lefts = _along(left, shape_of(eqn.invars[0]), [*batch, *contracted])
    rights = _along(right, shape_of(eqn.invars[1]), [*numbers.rhs_group_dimensions, *batch_right, *contracted_right])
    of_groups = (lefts * rights).sum(tuple(range(1 + len(batch), rights.ndim)))
    return 2 * int(of_groups.max(0).sum())


def _along(mask: Mask, shape: tuple[int, ...], axes: Sequence[int]) -> np.ndarray:
    """How many numbers are kept along all other axes, at each position of ``axes``."""
    others = tuple(d for d in range(len(shape)) if d not in axes)
    if not isinstance(mask, np.ndarray):
        return np.broadcast_to(np.int64(math.prod(shape[d] for d in others)), [shape[d] for d in axes])
    return mask.sum(others, dtype=np.int64).transpose([sorted(axes).index(d) for d in axes])


def _convolution(eqn: Any, kernel: Mask) -> int:
    """Two operations for each kept weight, image and output position."""
    spec = eqn.params["dimension_numbers"].out_spec
    out = shape_of(eqn.outvars[0])
    places = out[spec[0]] * math.prod(out[d] for d in spec[2:])
    weights = kernel.sum() if isinstance(kernel, np.ndarray) else math.prod(shape_of(eqn.invars[1]))
    return 2 * places * int(weights)


def _whole(mask: Mask, var: Any) -> np.ndarray:
    """The mask of a variable in its full shape, zeros of a constant among them."""
    return mask if isinstance(mask, np.ndarray) else np.broadcast_to(mask is None, shape_of(var))


def _union(var: Any, masks: Sequence[Mask]) -> Mask:
    """What may be any one of several arrays is zero where all of them are; ``var`` has their shape."""
    if any(m is None for m in masks):
        return None
    if not any(isinstance(m, np.ndarray) for m in masks):
        return ZERO
    return np.logical_or.reduce([_whole(m, var) for m in masks])


def _either(eqn: Any, operands: Sequence[Mask]) -> np.ndarray:
    """A product is zero where either factor is, and a function that keeps zero is where its one argument is."""
    masks = [m for m in operands if isinstance(m, np.ndarray)]
    return np.logical_and.reduce([np.broadcast_to(m, shape_of(eqn.outvars[0])) for m in masks])


def _broadcast(eqn: Any, operands: Sequence[Any]) -> np.ndarray:
    mask, shape, places = operands[0], eqn.params["shape"], eqn.params["broadcast_dimensions"]
    between = [1] * len(shape)
    for size, place in zip(mask.shape, places, strict=True):
        between[place] = size
    return np.broadcast_to(mask.reshape(between), shape)


def _divide(eqn: Any, operands: Sequence[Mask]) -> Mask:
    """Zero where the numerator is, unless the denominator may be zero too."""
    return _either(eqn, operands[:1]) if isinstance(operands[0], np.ndarray) and operands[1] is None else None


def _concatenate(eqn: Any, operands: Sequence[Mask]) -> np.ndarray:
    whole = [_whole(m, v) for m, v in zip(operands, eqn.invars, strict=True)]
    return np.concatenate(whole, eqn.params["dimension"])


def _stack(eqn: Any, operands: Sequence[Mask]) -> np.ndarray:
    return np.stack([_whole(m, v) for m, v in zip(operands, eqn.invars, strict=True)], eqn.params["axis"])


def _pad(eqn: Any, operands: Sequence[Mask]) -> np.ndarray:
    """Each number moves to ``low + (1 + interior) i``, or out of the array; the fill is all around and between."""
    mask, fill = (_whole(m, v) for m, v in zip(operands, eqn.invars, strict=True))
    out = np.full(shape_of(eqn.outvars[0]), fill)
    moved = [
        low + (1 + interior) * np.arange(n)
        for n, (low, _, interior) in zip(mask.shape, eqn.params["padding_config"], strict=True)
    ]
    inside = [(places >= 0) & (places < n) for places, n in zip(moved, out.shape, strict=True)]
    out[np.ix_(*(places[i] for places, i in zip(moved, inside, strict=True)))] = mask[np.ix_(*inside)]
    return out


def _slice(eqn: Any, operands: Sequence[Any]) -> np.ndarray:
    p = eqn.params
    strides = p["strides"] or (1,) * len(p["start_indices"])
    return operands[0][tuple(map(slice, p["start_indices"], p["limit_indices"], strides))]


def _split(eqn: Any, operands: Sequence[Any]) -> list[np.ndarray]:
    return np.split(operands[0], np.cumsum(eqn.params["sizes"])[:-1], eqn.params["axis"])


def _shaped(eqn: Any, operands: Sequence[Any]) -> np.ndarray:
    return np.reshape(operands[0], shape_of(eqn.outvars[0]))


_CONSTANT = ("broadcast_in_dim", "convert_element_type", "reshape")  # how a zero becomes an array of zeros
_KEEP_ZERO = ("neg", "abs", "sign", "round", "square", "sqrt", "tanh")
_COPY = ("convert_element_type", "copy", "reduce_precision", "stop_gradient")
# from masks of the operands to that of the output, or those of all outputs where the primitive has several
_FOLLOWED: dict[str, Callable[[Any, Sequence[Any]], Any]] = {
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _shaped),
    **dict.fromkeys((*_COPY, *_KEEP_ZERO, "mul"), _either),
    "integer_pow": lambda eqn, operands: _either(eqn, operands) if eqn.params["y"] > 0 else None,
    "div": _divide,
    "select_n": lambda eqn, operands: _union(eqn.outvars[0], operands[1:]),
    "transpose": lambda eqn, operands: np.transpose(operands[0], eqn.params["permutation"]),
    "rev": lambda eqn, operands: np.flip(operands[0], eqn.params["dimensions"]),
    "broadcast_in_dim": _broadcast,
    "tile": lambda eqn, operands: np.tile(operands[0], eqn.params["reps"]),
    "concatenate": _concatenate,
    "stack": _stack,
    "pad": _pad,
    "slice": _slice,
    "split": _split,
    "unstack": lambda eqn, operands: list(np.moveaxis(operands[0], eqn.params["axis"], 0)),
    "optimization_barrier": lambda eqn, operands: operands,
}
