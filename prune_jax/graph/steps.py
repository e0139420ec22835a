"""What is known about the operands of an equation, and equations ready to be run at other sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from prune_jax.graph.cut import Cut
from prune_jax.graph.labels import Label, is_number

Run = Callable[..., list]
ELEMENTS_WORTH_KNOWING = 1 << 20


class Const:
    """A value known from the program alone; its number is computed only when a rule asks for it."""

    def __init__(self, eqn: JaxprEqn | None, args: list[Const], value: Any = None) -> None:
        self.eqn, self.args, self.value = eqn, args, value

    @property
    def uniform(self) -> bool:
        """Whether all entries are alike because a scalar was broadcast."""
        return (
            self.eqn is not None and self.eqn.primitive.name == "broadcast_in_dim" and not shape_of(self.eqn.invars[0])
        )

    def get(self) -> np.ndarray | None:
        """The value, or None where it cannot be had (a tracer, a symbolic size)."""
        stack = [self]
        while stack:
            node = stack[-1]
            missing = [a for a in node.args if a.value is None]
            if node.value is not None or not missing:
                stack.pop()
                if node.value is None and not node.compute():
                    return None
            else:
                stack.extend(missing)
        return None if isinstance(self.value, jax.core.Tracer) else np.asarray(self.value)

    def compute(self) -> bool:
        """Compute the value from those of its arguments; False where that cannot be done."""
        assert self.eqn is not None
        shape = shape_of(self.eqn.outvars[0])
        symbolic = self.eqn.primitive.name == "dim_as_value"
        known = not symbolic and all(is_number(n) for n in shape) and np.prod(shape) <= ELEMENTS_WORTH_KNOWING
        if not known or len(self.eqn.outvars) > 1 or any(isinstance(a.value, jax.core.Tracer) for a in self.args):
            return False
        with jax.ensure_compile_time_eval():
            self.value = self.eqn.primitive.bind(*[a.value for a in self.args], **self.eqn.params)
        return True


@dataclasses.dataclass(slots=True)
class Value:
    """What is known about one operand: its labels, whether it is a constant, what it sums up and was divided by."""

    aval: Any
    labels: list[Label]
    const: Const | None = None
    summed: tuple[list[Label], tuple, tuple[int, ...]] | None = None  # labels and shape of the source, reduced axes
    divided: int | None = None  # by this constant, where it is not the mean of what it sums up
    parameter: int | None = None  # made of parameters (and constants) alone: the leaf, of several the largest operand's

    @property
    def shape(self) -> tuple:
        """The original shape."""
        return self.aval.shape

    def known(self) -> np.ndarray | None:
        """The value, where the program alone determines it."""
        return None if self.const is None else self.const.get()


@dataclasses.dataclass(slots=True, eq=False)
class Step:
    """One equation ready to be run at other sizes."""

    eqn: JaxprEqn
    inputs: list[Value]
    outputs: list[Value]
    run: Run | None
    whole: bool  # constants go in and come out uncut

    def evaluate(self, cut: Cut, values: list) -> list:
        """Run the equation on cut operands (constants are still uncut)."""
        if not self.whole:
            values = [cut.constant(x, v) if v.const else x for x, v in zip(values, self.inputs, strict=True)]
        return self.run(cut, *values) if self.run else bind(self.eqn, values)


@dataclasses.dataclass(slots=True)
class Body:
    """A jaxpr that has been read."""

    jaxpr: Jaxpr
    consts: list[Any]
    steps: list[Step]
    outputs: list[Value]
    cut_outputs: bool

    def run(self, cut: Cut, *args: Any) -> list:
        """Evaluate with cut arguments."""
        env: dict[Var, Any] = dict(zip(self.jaxpr.constvars, self.consts, strict=True))
        env.update(zip(self.jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else env[atom]

        for step in self.steps:
            outs = step.evaluate(cut, [read(a) for a in step.eqn.invars])
            env.update(zip(step.eqn.outvars, outs, strict=True))
        results = [read(a) for a in self.jaxpr.outvars]
        if self.cut_outputs:
            results = [cut.constant(x, v) if v.const else x for x, v in zip(results, self.outputs, strict=True)]
        return results


def bind(eqn: JaxprEqn, values: list) -> list:
    """Run an equation's primitive on new operands, its parameters unchanged."""
    out = eqn.primitive.bind(*values, **eqn.params)
    return list(out) if eqn.primitive.multiple_results else [out]


def shape_of(var: Any) -> tuple:
    """The shape of a jaxpr's variable."""
    return var.aval.shape


def subjaxprs(eqn: JaxprEqn) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for p in eqn.params.values():
        for q in p if isinstance(p, tuple | list) else (p,):
            if hasattr(q, "eqns") or hasattr(q, "jaxpr"):
                yield q
