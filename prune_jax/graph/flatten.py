"""A function as one flat list of equations: calls read through, loops over stacked layers unrolled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from prune_jax.graph.rules_control import CALLS, opened, scan_parts
from prune_jax.graph.steps import bind

LONGEST_UNROLLED = 64  # layers, not time steps
INNER = {
    **dict.fromkeys(CALLS, ("jaxpr", "call_jaxpr")),
    **dict.fromkeys(("remat", "remat2", "checkpoint"), ("jaxpr",)),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"), ("call_jaxpr",)),
}


def flatten(fn: Callable) -> Callable:
    """The same function, whose jaxpr holds no calls and no short scans; for evaluation only, not for derivatives."""

    def flat(*args: Any) -> Any:
        program, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        return jax.tree.unflatten(
            jax.tree.structure(shapes), _evaluate(program.jaxpr, program.consts, jax.tree.leaves(args))
        )

    return flat


def _evaluate(jaxpr: Jaxpr, consts: list, args: list) -> list:
    env: dict[Var, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        outs = _apply(eqn, [read(a) for a in eqn.invars])
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(a) for a in jaxpr.outvars]


def _apply(eqn: JaxprEqn, values: list) -> list:
    name = eqn.primitive.name
    if name in INNER:
        inner = next(eqn.params[key] for key in INNER[name] if eqn.params.get(key) is not None)
        return _evaluate(*opened(inner), values)
    if name == "scan" and eqn.params["length"] <= LONGEST_UNROLLED:
        return _unrolled(eqn, values)
    return bind(eqn, values)


def _unrolled(eqn: JaxprEqn, values: list) -> list:
    jaxpr, consts = opened(eqn.params["jaxpr"])
    n, m, carried = scan_parts(eqn, jaxpr)
    length = eqn.params["length"]
    carry, rows = values[n:m], []
    order = range(length)
    for i in reversed(order) if eqn.params["reverse"] else order:
        xs = [lax.index_in_dim(x, i, keepdims=False) for x in values[m:]]
        out = _evaluate(jaxpr, consts, [*values[:n], *carry, *xs])
        carry = out[:carried]
        rows.append(out[carried:])
    if eqn.params["reverse"]:
        rows.reverse()
    return [*carry, *[jnp.stack(column) for column in zip(*rows, strict=True)]]
