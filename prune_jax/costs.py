"""What a network costs: parameters, FLOPs from its jaxpr, measured latency."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from prune_jax.graph.walk import shape_of, subjaxprs
from prune_jax.tree import PyTree, is_none, map_masked

Mask = np.ndarray | None  # where an array may be other than zero; None where nothing is known, so everywhere


class Latency(NamedTuple):
    """Seconds a call takes: median and quartiles over `seconds`, one entry a call; and what compiling took, once."""

    median: float
    low: float
    high: float
    compile: float
    seconds: tuple[float, ...]


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
    weight is followed through reshapes, transposes, slices, concatenations, casts and products with other arrays.

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


def latency(fn: Callable, *args: Any, repeats: int = 20, warmup: int = 3) -> Latency:
    """Measured seconds of ``jax.jit(fn)(*args)``.

    Compiles apart, keeps the arguments on the device, calls ``warmup`` times unmeasured, and waits for each result.
    Nothing is donated. Timings on a machine that does other work are upper bounds.

    Args:
        fn: any JAX function of arrays.
        *args: its arguments.
        repeats: measured calls.
        warmup: calls before them.

    Returns:
        Median, quartiles, seconds of compilation, and every call's seconds.

    Raises:
        ValueError: ``repeats`` below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> times = latency(lambda x: x @ x, jnp.ones((8, 8)), repeats=5)
        >>> len(times.seconds), times.low <= times.median <= times.high
        (5, True)
    """
    return latencies({"fn": (fn, args)}, repeats=repeats, warmup=warmup)["fn"]


def latencies(
    calls: Mapping[str, tuple[Callable, Sequence[Any]]], *, repeats: int = 20, warmup: int = 3
) -> dict[str, Latency]:
    """As ``latency`` for several functions that take turns, one call each: a machine that drifts does so for all.

    Args:
        calls: name -> function and its arguments.
        repeats: measured calls of each.
        warmup: calls of each before them.

    Returns:
        A ``Latency`` for each name.

    Raises:
        ValueError: ``repeats`` below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> found = latencies({n: (lambda x: x @ x, [jnp.ones((int(n), int(n)))]) for n in ("8", "64")}, repeats=5)
        >>> sorted(found), len(found["8"].seconds)
        (['64', '8'], 5)
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    compiled, compile_seconds = {}, {}
    for name, (fn, args) in calls.items():
        on_device = jax.block_until_ready(jax.device_put(tuple(args)))
        start = time.perf_counter()
        compiled[name] = (jax.jit(fn).lower(*on_device).compile(), on_device)
        compile_seconds[name] = time.perf_counter() - start
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name, (run, args) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*args))
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    found = {}
    for name, times in seconds.items():
        low, median, high = np.quantile(times, (0.25, 0.5, 0.75)).tolist()
        found[name] = Latency(median, low, high, compile_seconds[name], tuple(times))
    return found


class _Known:
    """A mask as one leaf among the arrays of a pytree."""

    def __init__(self, mask: np.ndarray) -> None:
        self.mask = mask


def _count(jaxpr: Any, inputs: Sequence[Mask]) -> tuple[int, list[Mask]]:
    """FLOPs of a jaxpr, and the masks of its outputs."""
    env: dict[Any, np.ndarray] = {v: m for v, m in zip(jaxpr.invars, inputs, strict=True) if m is not None}

    def look(atom: Any) -> Mask:
        return None if hasattr(atom, "val") else env.get(atom)

    total = 0
    for eqn in jaxpr.eqns:
        operands = [look(a) for a in eqn.invars]
        name = eqn.primitive.name
        outs: Sequence[Mask] = [None] * len(eqn.outvars)
        if name == "dot_general":
            total += _product(eqn, operands)
        elif name == "conv_general_dilated":
            total += _convolution(eqn, operands[1])
        elif name == "scan":
            cost, outs = _scan(eqn, operands)
            total += cost
        elif name == "cond":
            total += max(_count(_open(branch), operands[1:])[0] for branch in eqn.params["branches"])
        elif any(True for _ in subjaxprs(eqn)):
            cost, outs = _call(eqn, operands)
            total += cost
        elif name in _FOLLOWED and any(m is not None for m in operands):
            outs = [_FOLLOWED[name](eqn, operands)]
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
    if all(m is None for m in stacked):
        return length * _count(body, [*before, *stacked])[0], outs
    steps = ([m if m is None else m[i] for m in stacked] for i in range(length))
    return sum(_count(body, [*before, *step])[0] for step in steps), outs


def _product(eqn: Any, operands: Sequence[Mask]) -> int:
    """Two operations for each pair of kept numbers that meet: sum over batch b and contracted k of l[b, k] r[b, k]."""
    contracted, batch = eqn.params["dimension_numbers"]
    sides = [
        _along(mask, shape_of(var), [*b, *c])
        for mask, var, b, c in zip(operands, eqn.invars, batch, contracted, strict=True)
    ]
    return 2 * int((sides[0] * sides[1]).sum())


def _along(mask: Mask, shape: tuple[int, ...], axes: Sequence[int]) -> np.ndarray:
    """How many numbers are kept along all other axes, at each position of ``axes``."""
    others = tuple(d for d in range(len(shape)) if d not in axes)
    if mask is None:
        return np.broadcast_to(np.int64(math.prod(shape[d] for d in others)), [shape[d] for d in axes])
    return mask.sum(others, dtype=np.int64).transpose([sorted(axes).index(d) for d in axes])


def _convolution(eqn: Any, kernel: Mask) -> int:
    """Two operations for each kept weight, image and output position."""
    spec = eqn.params["dimension_numbers"].out_spec
    out = shape_of(eqn.outvars[0])
    places = out[spec[0]] * math.prod(out[d] for d in spec[2:])
    return 2 * places * (math.prod(shape_of(eqn.invars[1])) if kernel is None else int(kernel.sum()))


def _either(eqn: Any, operands: Sequence[Mask]) -> np.ndarray:
    """A product is zero where either factor is."""
    masks = [m for m in operands if m is not None]
    return np.logical_and.reduce([np.broadcast_to(m, shape_of(eqn.outvars[0])) for m in masks])


def _broadcast(eqn: Any, operands: Sequence[Mask]) -> np.ndarray:
    mask, shape, places = operands[0], eqn.params["shape"], eqn.params["broadcast_dimensions"]
    assert mask is not None
    between = [1] * len(shape)
    for size, place in zip(mask.shape, places, strict=True):
        between[place] = size
    return np.broadcast_to(mask.reshape(between), shape)


def _concatenate(eqn: Any, operands: Sequence[Mask]) -> np.ndarray:
    whole = [np.ones(shape_of(v), bool) if m is None else m for m, v in zip(operands, eqn.invars, strict=True)]
    return np.concatenate(whole, eqn.params["dimension"])


def _slice(eqn: Any, operands: Sequence[Mask]) -> np.ndarray:
    p = eqn.params
    strides = p["strides"] or (1,) * len(p["start_indices"])
    return operands[0][tuple(map(slice, p["start_indices"], p["limit_indices"], strides))]  # type: ignore[index]


def _shaped(eqn: Any, operands: Sequence[Mask]) -> np.ndarray:
    return np.reshape(operands[0], shape_of(eqn.outvars[0]))  # type: ignore[arg-type]


_FOLLOWED: dict[str, Callable[[Any, Sequence[Mask]], np.ndarray]] = {
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _shaped),
    **dict.fromkeys(("convert_element_type", "copy", "neg", "reduce_precision", "mul"), _either),
    "transpose": lambda eqn, operands: np.transpose(operands[0], eqn.params["permutation"]),  # type: ignore[arg-type]
    "rev": lambda eqn, operands: np.flip(operands[0], eqn.params["dimensions"]),  # type: ignore[arg-type]
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "slice": _slice,
}
