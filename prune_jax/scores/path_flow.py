"""Sums over all input-output paths of a piecewise linear function, by interpreting its jaxpr.

A network of linear maps and gates (ReLU, max-pool) is a sum over paths p from an input to an output: path value v_p
(the product of the weights on it) times path activity a_p(x) in {0, 1} times the input it starts at. Two sums that
never list the paths:

- active flow:  sum over p of a_p(x) x_p^2     every weight 1, inputs squared, gates as the forward pass on x sets them
- weight flow:  sum over p of v_p^2            every weight squared, inputs 1, all gates open

The function's jaxpr is evaluated with each value in one of three states. An array that does not depend on the inputs is
a plain array (weights, normalisation factors, masks). ``Gate`` depends on them but is piecewise constant (comparisons,
signs, argmax). ``Signal`` is piecewise linear in them and carries a flow. Each primitive family has one rule, in
``path_rules``.

What multiplies a signal is a weight, whether parameter or constant; an exact zero means that there is no such edge.
What is added to a signal moves gates only. Flows are products over layers and leave float32's range in deep networks,
so each is stored as ``flow * 2**exponent``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core, source_info_util

from prune_jax.scores.path_rules import (
    PIECEWISE_CONSTANT,
    RULES,
    Flow,
    Gate,
    NoRuleError,
    Signal,
    aligned,
    bind,
    shape_of,
    value_of,
)
from prune_jax.tree import widen

# Primitives that call a jaxpr, and the parameter that holds it.
_CALLS = {"jit": "jaxpr", "remat2": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


def active_flow(apply_fn: Callable, params: Any, inputs: Any) -> Flow:
    """For each output the sum over its active paths of the squared input they start at, times 2**exponent."""
    start = jax.tree.map(lambda x: Signal(x, Flow(widen(x) ** 2, jnp.zeros((), widen(x).dtype))), inputs)
    return _evaluate(apply_fn, params, inputs, start)


def weight_flow(apply_fn: Callable, params: Any, inputs: Any) -> Flow:
    """For each output the sum over all its paths of the squared product of their weights, times 2**exponent."""
    start = jax.tree.map(lambda x: Signal(None, Flow(jnp.ones_like(widen(x)), jnp.zeros((), widen(x).dtype))), inputs)
    return _evaluate(apply_fn, params, inputs, start)


def _evaluate(apply_fn: Callable, params: Any, inputs: Any, start: Any) -> Flow:
    closed, shape = jax.make_jaxpr(apply_fn, return_shape=True)(params, inputs)
    if len(jax.tree.leaves(shape)) != 1:
        raise ValueError(f"apply_fn must return one array, got {jax.tree.structure(shape)}")
    signals = jax.tree.leaves(start, is_leaf=lambda node: isinstance(node, Signal))
    (output,) = _interpret(closed, [*jax.tree.leaves(params), *signals])
    if not isinstance(output, Signal):
        raise ValueError("no path leads from the inputs to the output of apply_fn")
    return output.flow


def _interpret(closed: core.ClosedJaxpr, args: Sequence[Any], site: str = "") -> list[Any]:
    env: dict[core.Var, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env |= dict(zip(closed.jaxpr.invars, args, strict=True))

    def read(atom: core.Var | core.Literal) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for eqn in closed.jaxpr.eqns:
        # Functions of JAX's own, such as jnp.sort, have no line of the user's inside: name the line that called them.
        here = source_info_util.summarize(eqn.source_info).strip() or site
        try:
            results = _apply(eqn, [read(atom) for atom in eqn.invars], here)
        except NoRuleError as error:
            raise NotImplementedError(
                f"px: `{eqn.primitive.name}` on values that depend on the inputs is {error}; at {here}. Paths exist "
                "only for networks of linear maps, ReLU-like gates and max- or average-pools, with BatchNorm on "
                "running averages; GELU, softmax, LayerNorm and attention have none"
            ) from None
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]


def _apply(eqn: core.JaxprEqn, operands: list[Any], site: str) -> list[Any]:
    name = eqn.primitive.name
    if name in _CALLS:
        body = eqn.params[_CALLS[name]]
        return _interpret(body if isinstance(body, core.ClosedJaxpr) else core.ClosedJaxpr(body, ()), operands, site)
    if not any(isinstance(operand, Signal | Gate) for operand in operands):
        return bind(eqn, operands)
    if name == "scan":
        return _scan(eqn, operands, site)

    known = all(operand.value is not None for operand in operands if isinstance(operand, Signal | Gate))
    values = bind(eqn, [value_of(operand) for operand in operands]) if known else [None] * len(eqn.outvars)
    avals: list[Any] = [var.aval for var in eqn.outvars]
    shapes = [aval.shape for aval in avals]
    integer = not all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in avals)
    if integer or name in PIECEWISE_CONSTANT or not any(isinstance(operand, Signal) for operand in operands):
        return [Gate(value, shape) for value, shape in zip(values, shapes, strict=True)]
    if name not in RULES:
        raise NoRuleError("not a piecewise linear operation that px knows")
    return [Signal(*pair) for pair in zip(values, RULES[name](eqn, operands), strict=True)]


# -- scan, unrolled ----------------------------------------------------------------------------------------------------


def _scan(eqn: core.JaxprEqn, operands: list[Any], site: str) -> list[Any]:
    body, reverse = eqn.params["jaxpr"], eqn.params["reverse"]
    # Operands are constants, carry, slices. Only slices and their outputs have one axis more outside than inside.
    num_carry = sum(map(_same_rank, body.jaxpr.outvars, eqn.outvars))
    num_slices = len(operands) - sum(map(_same_rank, body.jaxpr.invars, eqn.invars))
    first_slice = len(operands) - num_slices
    first_carry = first_slice - num_carry
    consts, carry, slices = operands[:first_carry], operands[first_carry:first_slice], operands[first_slice:]
    outputs: list[list[Any]] = [[] for _ in eqn.outvars[num_carry:]]
    for step in sorted(range(eqn.params["length"]), reverse=reverse):
        results = _interpret(body, [*consts, *carry, *(_index(x, step) for x in slices)], site)
        carry = results[:num_carry]
        for column, result in zip(outputs, results[num_carry:], strict=True):
            column.append(result)
    return [*carry, *(_stack(column[::-1] if reverse else column) for column in outputs)]


def _same_rank(a: Any, b: Any) -> bool:
    return len(a.aval.shape) == len(b.aval.shape)


def _index(x: Any, step: int) -> Any:
    if isinstance(x, Gate):
        return Gate(None if x.value is None else x.value[step], x.shape[1:])
    if isinstance(x, Signal):
        return Signal(None if x.value is None else x.value[step], Flow(x.flow.flow[step], x.flow.exponent))
    return x[step]


def _stack(column: list[Any]) -> Any:
    known = all(value_of(x) is not None for x in column)
    values = jnp.stack([value_of(x) for x in column]) if known else None
    if any(isinstance(x, Signal) for x in column):
        flows, exponent = aligned(column)
        return Signal(values, Flow(jnp.stack(flows), exponent))
    if any(isinstance(x, Gate) for x in column):
        return Gate(values, (len(column), *shape_of(column[0])))
    return values
