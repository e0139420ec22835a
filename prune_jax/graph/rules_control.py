"""Rules for primitives that hold jaxprs: calls, loops, branches and functions with derivative rules of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, DropVar, Jaxpr, JaxprEqn, Var, jaxpr_as_fun

from prune_jax.graph.cut import Cut
from prune_jax.graph.errors import UnknownPrimitiveError
from prune_jax.graph.labels import Label, settle, unify
from prune_jax.graph.rules_shape import drop
from prune_jax.graph.steps import Body, Run, Value, shape_of
from prune_jax.graph.walk import Walk


def opened(inner: Any) -> tuple[Jaxpr, list]:
    """A jaxpr and its constants, whether it was closed or not."""
    return (inner.jaxpr, list(inner.consts)) if hasattr(inner, "jaxpr") else (inner, [])


def call(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run]:
    """jit and closed calls: read through."""
    jaxpr, consts = opened(eqn.params.get("jaxpr") or eqn.params["call_jaxpr"])
    body = walk.read(jaxpr, consts, ins)
    return body.outputs, body.run


def remat(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run]:
    """Read through; what is rematerialised stays so."""
    jaxpr, consts = opened(eqn.params["jaxpr"])
    body = walk.read(jaxpr, consts, [dataclasses.replace(v, const=None) for v in ins], cut_outputs=True)

    def run(cut: Cut, *args: Any) -> list:
        inner = jax.checkpoint(
            lambda *xs: body.run(cut, *xs), prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"]
        )
        return inner(*args)

    return body.outputs, run


def custom_derivative(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run]:
    """Read through, and keep the rule: its derivative program is traced at the original size and cut likewise.

    Inside a derivative program such functions are only read through: a rule that calls its own function would never
    end. Where a rule cannot be read, the function can still be cut and run; only its derivative is an error.
    """
    if walk.in_derivative:
        plain = walk.read(*opened(eqn.params["call_jaxpr"]), [Value(v.aval, v.labels) for v in ins], cut_outputs=True)
        return plain.outputs, plain.run
    moving = [i for i, v in enumerate(eqn.invars) if isinstance(v, Var)]
    variables = [v for v in eqn.invars if isinstance(v, Var)]
    closed = sum(i < eqn.params.get("num_consts", 0) for i in moving)  # what the function closes over comes first
    ins = [Value(v.aval, v.labels, parameter=v.parameter) for v in ins]
    jaxpr, consts = opened(eqn.params["call_jaxpr"])
    outvars = [Var(v.aval) if isinstance(v, DropVar) else v for v in eqn.outvars]
    alone = jaxpr.replace(
        constvars=[], invars=variables, outvars=outvars, eqns=[eqn.replace(outvars=outvars)], effects=eqn.effects
    )
    original = jaxpr_as_fun(ClosedJaxpr(alone, []))
    primal = walk.read(jaxpr, consts, ins, cut_outputs=True)
    forward = eqn.primitive.name == "custom_jvp_call"
    here = len(walk.path)
    try:
        rule = _read_rule(walk, original, variables, [ins[i] for i in moving], primal.outputs, closed, forward)
    except Exception as error:  # somebody else's rule, traced outside of its own program, may fail in any way
        del walk.path[here:]
        where = f"the derivative rule of the function at {walk.line()}"
        return primal.outputs, _forward_only(primal, f"{where} cannot be read: {type(error).__name__}: {error}")
    finally:
        walk.in_derivative = False
    return primal.outputs, _differentiable(primal, rule, moving, closed, forward)


def _read_rule(
    walk: Walk,
    original: Callable,
    variables: list[Var],
    inputs: list[Value],
    outputs: list[Value],
    closed: int,
    forward: bool,
) -> Body:
    """The derivative program, by tangents (forward) or by cotangents; outputs labelled as what they belong to.

    The first ``closed`` inputs are arrays that the function closes over, which have no derivative.
    """
    avals = [_spec(v) for v in variables]
    if forward:
        tangents = [jax.ShapeDtypeStruct(a.shape, _tangent(a.dtype)) for a in avals[closed:]]

        def derivative(x: list, t: list) -> Any:
            return jax.jvp(lambda *y: original(*x[:closed], *y), x[closed:], t)

        sources = [*inputs, *inputs[closed:]]
        targets = [*outputs, *outputs]
    else:
        tangents = [jax.ShapeDtypeStruct(v.shape, _tangent(v.aval.dtype)) for v in outputs]

        def derivative(x: list, t: list) -> Any:
            return jax.vjp(lambda *y: original(*x[:closed], *y), *x[closed:])[1](t)

        sources = [*inputs, *outputs]
        targets = inputs[closed:]
    program = jax.make_jaxpr(derivative)(avals, tangents)
    values = [
        Value(v.aval, s.labels) for v, s in zip(program.jaxpr.invars, [walk.settled(s) for s in sources], strict=True)
    ]
    walk.in_derivative = True
    rule = walk.read(program.jaxpr, program.consts, values, cut_outputs=True)
    for got, wanted in zip(rule.outputs, targets, strict=True):
        _share(walk, got, wanted)
    return rule


def _spec(var: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)


def _tangent(dtype: Any) -> Any:
    return dtype if jax.numpy.issubdtype(dtype, jax.numpy.inexact) else jax.dtypes.float0


def _forward_only(primal: Body, reason: str) -> Run:
    def run(cut: Cut, *args: Any) -> list:
        function = jax.custom_jvp(lambda *xs: tuple(primal.run(cut, *xs)))

        def refuse(xs: Any, ts: Any) -> tuple:
            raise UnknownPrimitiveError(reason)

        function.defjvp(refuse)
        return list(function(*args))

    return run


def _differentiable(primal: Body, rule: Body, moving: list[int], closed: int, forward: bool) -> Run:
    def run(cut: Cut, *args: Any) -> list:
        def full(xs: Any) -> list:
            values = list(args)
            for i, x in zip(moving, xs, strict=True):
                values[i] = x
            return values

        def evaluate(*xs: Any) -> tuple:
            return tuple(primal.run(cut, *full(xs)))

        xs = [args[i] for i in moving]
        if not forward:
            backward = jax.custom_vjp(evaluate)

            def vjp(xs: Any, cts: Any) -> tuple:
                return *[None] * closed, *rule.run(cut, *xs, *cts)

            backward.defvjp(lambda *xs: (backward(*xs), xs), vjp)
            return list(backward(*xs))
        function = jax.custom_jvp(evaluate)

        def jvp(xs: Any, ts: Any) -> tuple:
            out = rule.run(cut, *xs, *ts[closed:])
            return function(*xs), tuple(out[len(out) // 2 :])

        function.defjvp(jvp)
        return list(function(*xs))

    return run


def _share(walk: Walk, a: Value, b: Value) -> list[Label]:
    return unify(walk.elements, walk.settled(a).labels, walk.settled(b).labels, a.shape)


def _inner(walk: Walk, value: Value, aval: Any) -> Value:
    """One step's slice of a scanned array: the leading axis must not change."""
    labels = list(value.labels)
    settle(walk.elements, labels, 0)
    labels = [walk.elements.collapse(x, (0,)) if isinstance(x, np.ndarray) else x for x in labels]
    return Value(aval, drop(labels, (0,)), parameter=value.parameter)


def scan_parts(eqn: JaxprEqn, jaxpr: Jaxpr) -> tuple[int, int, int]:
    """Where a scan's carry starts and ends among its operands, and how many arrays it carries."""
    # constants and carry enter the body as they are, scanned arrays lose their leading axis
    m = sum(len(shape_of(a)) == len(shape_of(b)) for a, b in zip(eqn.invars, jaxpr.invars, strict=True))
    carried = sum(len(shape_of(a)) == len(shape_of(b)) for a, b in zip(eqn.outvars, jaxpr.outvars, strict=True))
    return m - carried, m, carried


def scan(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run]:
    """Every step sees the same labels; the carry's are those it started with."""
    p = eqn.params
    jaxpr, consts = opened(p["jaxpr"])
    n, m, carried = scan_parts(eqn, jaxpr)
    inputs = [Value(v.aval, v.labels, parameter=v.parameter) for v in ins[:m]]
    inputs += [_inner(walk, v, var.aval) for v, var in zip(ins[m:], jaxpr.invars[m:], strict=True)]
    before = len(walk.costs)
    body = walk.read(jaxpr, consts, inputs, cut_outputs=True)
    once, walk.costs[before:] = walk.costs[before:], []
    walk.count(lambda cut: p["length"] * sum(cost(cut) for cost in once))
    for start, end in zip(inputs[n:m], body.outputs[:carried], strict=True):
        _share(walk, start, end)
    outs = [Value(o.aval, v.labels) for o, v in zip(eqn.outvars, inputs[n:m], strict=False)]
    for o, v in zip(eqn.outvars[carried:], body.outputs[carried:], strict=True):
        labels = [x.reshape(1, *x.shape) if isinstance(x, np.ndarray) else x for x in v.labels]
        outs.append(Value(o.aval, [None, *labels]))

    def run(cut: Cut, *args: Any) -> list:
        fixed, carry, xs = args[:n], args[n:m], args[m:]

        def step(c: Any, x: Any) -> tuple:
            out = body.run(cut, *fixed, *c, *x)
            return tuple(out[:carried]), tuple(out[carried:])

        end: Any
        ys: Any
        end, ys = lax.scan(step, tuple(carry), tuple(xs), length=p["length"], reverse=p["reverse"], unroll=p["unroll"])
        return [*end, *ys]

    return outs, run


def while_(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run]:
    """The carry keeps its labels through the loop."""
    p = eqn.params
    n, m = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    plain = [Value(v.aval, v.labels, parameter=v.parameter) for v in ins]
    test = walk.read(*opened(p["cond_jaxpr"]), [*plain[:n], *plain[m:]], cut_outputs=True)
    body = walk.read(*opened(p["body_jaxpr"]), plain[n:], cut_outputs=True)
    for start, end in zip(plain[m:], body.outputs, strict=True):
        _share(walk, start, end)

    def run(cut: Cut, *args: Any) -> list:
        end = lax.while_loop(
            lambda c: test.run(cut, *args[:n], *c)[0], lambda c: tuple(body.run(cut, *args[n:m], *c)), tuple(args[m:])
        )
        return list(end)

    return [Value(o.aval, v.labels) for o, v in zip(eqn.outvars, plain[m:], strict=True)], run


def cond(walk: Walk, eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], Run]:
    """All branches return arrays with the same labels."""
    plain = [Value(v.aval, v.labels, parameter=v.parameter) for v in ins[1:]]
    bodies = []
    for branch in eqn.params["branches"]:
        bodies.append(walk.read(*opened(branch), [walk.settled(v) for v in plain], cut_outputs=True))
    outs = []
    for o, *values in zip(eqn.outvars, *[b.outputs for b in bodies], strict=True):
        labels = walk.settled(values[0]).labels
        for v in values[1:]:
            labels = unify(walk.elements, labels, walk.settled(v).labels, v.shape)
        outs.append(Value(o.aval, labels))

    def run(cut: Cut, which: Any, *args: Any) -> list:
        branches = [lambda *xs, body=body: body.run(cut, *xs) for body in bodies]
        return list(lax.switch(which, branches, *args))

    return outs, run


CALLS = {"jit": call, "pjit": call, "closed_call": call, "core_call": call, "call": call}
CONTROL_RULES = {
    "remat": remat,
    "remat2": remat,
    "checkpoint": remat,
    "scan": scan,
    "while": while_,
    "cond": cond,
    "custom_jvp_call": custom_derivative,
    "custom_vjp_call": custom_derivative,
    "custom_vjp_call_jaxpr": custom_derivative,
}
