"""How each primitive family acts on the path sums of ``path_flow``: one rule for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from prune_jax.tree import widen


class Flow(NamedTuple):
    """A sum over paths: ``flow * 2**exponent``, the exponent a whole number."""

    flow: jax.Array
    exponent: jax.Array


@dataclass(frozen=True)
class Signal:
    """Piecewise linear in the inputs. ``value`` is None in a weight flow, where nothing is computed on data."""

    value: jax.Array | None
    flow: Flow


@dataclass(frozen=True)
class Gate:
    """Piecewise constant in the inputs. ``value`` is None in a weight flow."""

    value: jax.Array | None
    shape: tuple[int, ...]


class NoRuleError(Exception):
    """Raised by a rule, with the reason; turned into an error that names primitive and line."""


def bind(eqn: core.JaxprEqn, operands: list[Any], **changed: Any) -> list[Any]:
    """The equation's primitive applied to operands; parameters may be changed."""
    result = eqn.primitive.bind(*operands, **{**eqn.params, **changed})
    return list(result) if eqn.primitive.multiple_results else [result]


# -- helpers on flows --------------------------------------------------------------------------------------------------


def value_of(operand: Any) -> Any:
    """What the forward pass has there; None where it is not known."""
    return operand.value if isinstance(operand, Signal | Gate) else operand


def shape_of(operand: Any) -> tuple[int, ...]:
    """The shape of a gate or an array."""
    return operand.shape if isinstance(operand, Gate) else jnp.shape(operand)


def _rescaled(flow: jax.Array, exponent: jax.Array) -> Flow:
    """The same flow with its largest entry near 1."""
    largest = lax.stop_gradient(flow).max(initial=0)
    shift = jnp.floor(jnp.log2(jnp.where(largest > 0, largest, 1)))
    shift = jnp.clip(shift, -126, 126)  # 2**shift and its inverse stay normal numbers
    return Flow(flow * jnp.exp2(-shift), exponent + shift)


def aligned(operands: Sequence[Any]) -> tuple[list[Any], jax.Array]:
    """Flows of all signals under one exponent; zeros for what is only added; indices as they are."""
    signals = [operand for operand in operands if isinstance(operand, Signal)]
    exponent = jnp.stack([signal.flow.exponent for signal in signals]).max()
    dtype = signals[0].flow.flow.dtype

    def align(operand: Any) -> Any:
        if isinstance(operand, Signal):
            return operand.flow.flow * jnp.exp2(operand.flow.exponent - exponent)
        if isinstance(operand, Gate) or jnp.issubdtype(jnp.result_type(operand), jnp.floating):
            return jnp.zeros(shape_of(operand), dtype)
        return operand

    return [align(operand) for operand in operands], exponent


def _split_product(operands: list[Any]) -> tuple[int, Signal, jax.Array]:
    """The signal's place, the signal, and its coefficient's flow: 1 (if not 0) on active paths, else its square."""
    (place, signal), *others = [(i, operand) for i, operand in enumerate(operands) if isinstance(operand, Signal)]
    if others:
        raise NoRuleError("a product of two signals")
    factor, dtype = operands[1 - place], signal.flow.flow.dtype
    if signal.value is not None:
        coefficient = (jnp.asarray(value_of(factor)) != 0).astype(dtype)
    elif isinstance(factor, Gate):
        coefficient = jnp.ones(factor.shape, dtype)
    else:
        coefficient = jnp.asarray(factor).astype(dtype) ** 2
    return place, signal, coefficient


# -- one rule for each primitive family: (equation, operands) -> a Flow for each output --------------------------------


def _same(eqn: core.JaxprEqn, operands: list[Any]) -> list[Flow]:
    """One signal whose sign or precision changes."""
    return [operands[0].flow]


def _linear(eqn: core.JaxprEqn, operands: list[Any]) -> list[Flow]:
    """Sums and moves of entries, applied to the flows themselves."""
    flows, exponent = aligned(operands)
    return [Flow(flow, exponent) for flow in bind(eqn, flows)]


def _indexed(eqn: core.JaxprEqn, operands: list[Any]) -> list[Flow]:
    if any(isinstance(operand, Gate) for operand in operands[1:]):
        raise NoRuleError("an index that depends on the inputs")
    return _linear(eqn, operands)


def _add(eqn: core.JaxprEqn, operands: list[Any]) -> list[Flow]:
    (a, b), exponent = aligned(operands)
    return [Flow(a + b, exponent)]


def _mul(eqn: core.JaxprEqn, operands: list[Any]) -> list[Flow]:
    _, signal, coefficient = _split_product(operands)
    return [Flow(signal.flow.flow * coefficient, signal.flow.exponent)]


def _div(eqn: core.JaxprEqn, operands: list[Any]) -> list[Flow]:
    place, signal, coefficient = _split_product(operands)
    if place == 1:
        raise NoRuleError("not a piecewise linear operation that px knows")
    # A divisor is never zero, so that its coefficient on active paths is 1 here too.
    return [Flow(signal.flow.flow / coefficient, signal.flow.exponent)]


def _contract(eqn: core.JaxprEqn, operands: list[Any]) -> list[Flow]:
    """Matrix products and convolutions."""
    place, signal, coefficient = _split_product(operands)
    flow, exponent = signal.flow

    def product() -> Flow:
        pair = [flow, coefficient] if place == 0 else [coefficient, flow]
        return _rescaled(bind(eqn, pair, preferred_element_type=flow.dtype)[0], exponent)

    if signal.value is None or place == 1 or not _is_plain_convolution(eqn):
        return [product()]
    # Without a zero weight all coefficients are 1 and a convolution sums windows, the same for every output channel.
    # That is several times cheaper.
    return [lax.cond((coefficient != 0).all(), lambda: _window_sums(eqn, signal.flow), product)]


def _is_plain_convolution(eqn: core.JaxprEqn) -> bool:
    if eqn.primitive.name != "conv_general_dilated":
        return False
    numbers = eqn.params["dimension_numbers"]
    groups = (eqn.params["feature_group_count"], eqn.params["batch_group_count"])
    return groups == (1, 1) and numbers.lhs_spec == numbers.out_spec


def _window_sums(eqn: core.JaxprEqn, signal: Flow) -> Flow:
    """The convolution of a flow with ones."""
    _, channels, *spatial = eqn.params["dimension_numbers"].lhs_spec
    kernel: Any = eqn.invars[1].aval
    output: Any = eqn.outvars[0].aval

    def at_spatial(values: Sequence[Any], elsewhere: Any) -> list[Any]:
        by_axis = dict(zip(spatial, values, strict=True))
        return [by_axis.get(axis, elsewhere) for axis in range(len(output.shape))]

    sums = lax.reduce_window(
        signal.flow.sum(channels, keepdims=True),
        np.zeros((), signal.flow.dtype),
        lax.add,
        window_dimensions=at_spatial([kernel.shape[i] for i in eqn.params["dimension_numbers"].rhs_spec[2:]], 1),
        window_strides=at_spatial(eqn.params["window_strides"], 1),
        padding=at_spatial(eqn.params["padding"], (0, 0)),
        base_dilation=at_spatial(eqn.params["lhs_dilation"], 1),
        window_dilation=at_spatial(eqn.params["rhs_dilation"], 1),
    )
    result = _rescaled(sums, signal.exponent)
    return result._replace(flow=jnp.broadcast_to(result.flow, output.shape))


def _extremum(eqn: core.JaxprEqn, operands: list[Any]) -> list[Flow]:
    """``max`` and ``min``: the winner's flow; on active paths a signal must beat a constant strictly."""
    (a, b), exponent = aligned(operands)
    if not _gated(operands):
        return [Flow(a + b, exponent)]
    beats = jnp.greater if eqn.primitive.name == "max" else jnp.less
    left, right = (value_of(operand) for operand in operands)
    wins = beats(left, right) if isinstance(operands[0], Signal) else ~beats(right, left)
    return [Flow(jnp.where(wins, a, b), exponent)]


def _select(eqn: core.JaxprEqn, operands: list[Any]) -> list[Flow]:
    which, *cases = operands
    flows, exponent = aligned(cases)
    if value_of(which) is None:  # a gate without data: every case is a path of its own
        return [Flow(sum(flows), exponent)]
    return [Flow(lax.select_n(value_of(which), *flows), exponent)]


def _clamp(eqn: core.JaxprEqn, operands: list[Any]) -> list[Flow]:
    low, signal, high = operands
    if isinstance(low, Signal) or isinstance(high, Signal):
        raise NoRuleError("clipped at bounds that depend on the inputs")
    if signal.value is None:
        return [signal.flow]
    inside = (signal.value > value_of(low)) & (signal.value < value_of(high))
    return [Flow(jnp.where(inside, signal.flow.flow, 0), signal.flow.exponent)]


def _pool(eqn: core.JaxprEqn, operands: list[Any]) -> list[Flow]:
    """Maxima over axes or windows: the flow of the largest entry; without data the flow of all entries."""
    (signal,) = operands
    flow, exponent = signal.flow
    if signal.value is not None:  # the derivative of a maximum picks the entry that won
        entries = lax.optimization_barrier(widen(signal.value))  # computed twice they might not equal their maximum
        _, picked = jax.jvp(lambda x: bind(eqn, [x])[0], (entries,), (flow,))
        return [Flow(picked, exponent)]
    if "axes" in eqn.params:
        return [Flow(flow.sum(eqn.params["axes"]), exponent)]
    window = {key: eqn.params[key] for key in ("window_dimensions", "window_strides", "padding")}
    dilation = {key: eqn.params[key] for key in ("base_dilation", "window_dilation")}
    return [Flow(lax.reduce_window(flow, np.zeros((), flow.dtype), lax.add, **window, **dilation), exponent)]


def _gated(operands: list[Any]) -> bool:
    return all(operand.value is not None for operand in operands if isinstance(operand, Signal | Gate))


PIECEWISE_CONSTANT = {"sign", "floor", "ceil", "round"}  # besides everything with an integer or bool result
RULES: dict[str, Callable[[core.JaxprEqn, list[Any]], list[Flow]]] = {
    **dict.fromkeys(("neg", "abs", "convert_element_type", "reduce_precision"), _same),
    **dict.fromkeys(("copy", "copy_p", "name", "sharding_constraint", "stop_gradient"), _same),
    **dict.fromkeys(("add", "add_any", "sub"), _add),
    **dict.fromkeys(("reshape", "squeeze", "expand_dims", "broadcast_in_dim", "transpose", "rev", "slice"), _linear),
    **dict.fromkeys(("concatenate", "pad", "split", "stack", "unstack", "tile"), _linear),
    **dict.fromkeys(("reduce_sum", "cumsum", "reduce_window_sum"), _linear),
    **dict.fromkeys(("dynamic_slice", "dynamic_update_slice", "gather", "scatter", "scatter-add"), _indexed),
    "mul": _mul,
    "div": _div,
    **dict.fromkeys(("dot_general", "conv_general_dilated"), _contract),
    **dict.fromkeys(("max", "min"), _extremum),
    "select_n": _select,
    "clamp": _clamp,
    **dict.fromkeys(("reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min"), _pool),
}
