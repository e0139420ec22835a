"""Reading a jaxpr: every equation's rule labels its outputs and says how to run it at other sizes.

Values that depend on neither parameters nor arguments (masks from iota, captured arrays, position tables) are kept
whole: they are computed as in the original program and cut where they first meet something else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend import source_info_util
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from prune_jax.graph.cut import Cut
from prune_jax.graph.elements import Elements
from prune_jax.graph.errors import UnknownPrimitiveError
from prune_jax.graph.labels import Free, Label, place, resolve, settle, static
from prune_jax.graph.solve import Classes
from prune_jax.graph.steps import Body, Const, Run, Step, Value, shape_of, subjaxprs


class Walk:
    """One reading of a program; rules find the record of elements and helpers here."""

    def __init__(
        self, rules: dict[str, Callable], calls: dict[str, Callable], decided: list[bool] | None = None
    ) -> None:
        self.elements = Elements()
        self.rules, self.calls, self.decided = rules, calls, decided
        self.sources: dict[int, tuple[int, int, int]] = {}  # first element of a parameter axis -> leaf, axis, size
        self.nest: dict[tuple[int, int, int], bool] = {}  # (leaf, row axis, axis) -> whether rows are blocks (heads)
        self.path: list[JaxprEqn] = []  # the equations being read, from the outermost in
        self.in_derivative = False
        self.costs: list[Callable[[Cut], float]] = []
        # Elements that weights bring forth, and that weights sum over; each with the parameter leaf that does.
        self.made: list[tuple[int, np.ndarray]] = []
        self.summed: list[tuple[int, np.ndarray]] = []
        self.made_alone: list[np.ndarray] = []  # of those made, the ones whose weight makes no other axis besides
        # Elements of parameter axes that slices and the like have left out, and those that they have taken.
        self.skipped: list[np.ndarray] = []
        self.taken: list[np.ndarray] = []
        # Of the sums over axes that may change: whether each is divided by their number; `decided` is what this list
        # held after an earlier reading.
        self.means: list[bool] = []
        self.averaged: list[np.ndarray] = []  # elements of the axes that means are taken over
        self._root: np.ndarray | None = None
        self.meetings: list[tuple[int, str]] = []  # an element, and the equation where two activations share it
        self.parameter_of: Callable[[np.ndarray], str] = lambda ids: "?"

    def count(self, cost: Callable[[Cut], float]) -> None:
        """Add the FLOPs of one equation of the primal program."""
        if not self.in_derivative:
            self.costs.append(cost)

    @property
    def backward(self) -> bool:
        """Whether what is being read belongs to a derivative rule, or to a transposed program such as a gradient."""
        return self.in_derivative or any("transpose(" in str(e.source_info.name_stack) for e in self.path)

    def decide(self, mean: bool) -> bool:
        """Whether a sum is a mean: where it looks so, and did in the earlier reading.

        At other shapes of the arguments a constant, such as the batch's size, may happen to be the number of entries.
        """
        self.means.append(mean)
        number = len(self.means)
        return mean and (self.decided is None or (number <= len(self.decided) and self.decided[number - 1]))

    def is_averaged(self, label: Label) -> bool:
        """Whether the program takes a mean over this axis somewhere; asked when all has been read."""
        while isinstance(label, Free):
            free = label.last()
            label = free.axes[free.axis] if free.known and free.axes is not None else None
        if label is None:
            return False
        if self._root is None:
            self._root = Classes(self.elements, ()).root
        return bool(np.isin(self._root[label], self._root[_all(self.averaged)]).any())

    def note_product(self, ins: list[Value], contracted: Sequence[Any], free: Sequence[Any]) -> None:
        """Note for people what a product's weight makes and sums over, or that two activations meet in it."""
        for v, other, inner, outer in zip(ins, reversed(ins), contracted, free, strict=True):
            if v.parameter is not None and other.parameter is None:
                for noted, axes in ((self.summed, inner), (self.made, outer)):
                    labels = (v.labels[d] for d in axes)
                    noted += [(v.parameter, x) for x in labels if isinstance(x, np.ndarray) and x.size]
                wide = [v.labels[d] for d in outer if v.shape[d] != 1]
                self.made_alone += [x for x in wide if len(wide) == 1 and isinstance(x, np.ndarray)]
        if ins[0].parameter is None and ins[1].parameter is None:
            self.note_meeting([ins[0].labels[d] for d in contracted[0]])

    def note_meeting(self, labels: Sequence[Label]) -> None:
        """Note for people where two activations come to share axes."""
        if not self.in_derivative:
            where = f"{self.path[-1].primitive.name} at {self.line()}"
            self.meetings += [(int(x.flat[0]), where) for x in labels if isinstance(x, np.ndarray)]

    def note_pick(self, label: Label, chosen: np.ndarray) -> None:
        """Note which positions of a parameter's axis are read where only some are."""
        if self.source(label) is not None:
            ids = np.ravel(label)  # type: ignore[arg-type]
            self.taken.append(ids[chosen])
            self.skipped.append(np.delete(ids, chosen))

    def freeze_unread(self) -> None:
        """Positions of parameters that nothing reads stay: longer arguments may, such as more tokens' positions."""
        skipped = np.setdiff1d(_all(self.skipped), _all(self.taken))
        joins = [ids for joint, factors in self.elements.joins for ids in (joint, *factors)]
        used = _all([ids for edge in self.elements.edges for ids in edge] + joins + self.elements.tables)
        self.elements.freeze(np.setdiff1d(skipped, used))

    def line(self) -> str:
        """The user's line that is being read."""
        return line_of(self.path)

    def source(self, label: Label) -> tuple[int, int] | None:
        """The parameter leaf and axis whose very own label this is."""
        if not isinstance(label, np.ndarray) or label.size != max(label.shape):
            return None
        leaf, axis, size = self.sources.get(int(label.flat[0]), (-1, -1, -1))
        return (leaf, axis) if size == label.size else None

    def seek_nesting(self, labels: list[Label], axes: tuple[int, ...]) -> None:
        """Note which of these axes stem side by side from one parameter, as heads and dims of a 3-d kernel do."""
        found = [s for s in (self.source(labels[a]) for a in axes) if s is not None]
        for i, (leaf, axis) in enumerate(found):
            for other, row in found[:i]:
                if other == leaf:
                    self.nest[leaf, row, axis] = True

    def read(self, jaxpr: Jaxpr, consts: list, inputs: list[Value], *, cut_outputs: bool = False) -> Body:
        """Label every variable of ``jaxpr``; ``cut_outputs`` gives constant outputs labels as if consumed."""
        env: dict[Var, Value] = {}
        for var, x in zip(jaxpr.constvars, consts, strict=True):
            env[var] = Value(var.aval, [None] * len(shape_of(var)), Const(None, [], x))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def look(atom: Any) -> Value:
            return Value(atom.aval, [], Const(None, [], atom.val)) if isinstance(atom, Literal) else env[atom]

        steps = []
        for eqn in jaxpr.eqns:
            self.path.append(eqn)
            self.elements.reading = tuple(self.path)
            values = [look(a) for a in eqn.invars]
            name = eqn.primitive.name
            whole = True
            if name in self.calls:
                outs, run = self.calls[name](self, eqn, [self.settled(v) for v in values])
            elif not eqn.effects and all(v.const for v in values) and not _has_jaxpr(eqn):
                constant = Const(eqn, [v.const for v in values if v.const])
                outs = [Value(o.aval, [None] * len(shape_of(o)), constant) for o in eqn.outvars]
                run = None
            else:
                whole = False
                values = [self.consumed(v) for v in values]
                outs, run = self.apply(eqn, values)
                weights = [v for v in values if v.parameter is not None]
                if weights and all(v.parameter is not None or v.const for v in values):
                    leaf = max(weights, key=lambda v: math.prod(v.shape)).parameter
                    outs = [dataclasses.replace(v, parameter=leaf) for v in outs]
            steps.append(Step(eqn, values, outs, run, whole))
            env.update(zip(eqn.outvars, outs, strict=True))
            self.path.pop()
            self.elements.reading = tuple(self.path)
        outputs = [look(a) for a in jaxpr.outvars]
        if cut_outputs:
            outputs = [self.consumed(v) for v in outputs]
        return Body(jaxpr, consts, steps, [self.settled(v) for v in outputs], cut_outputs)

    def apply(self, eqn: JaxprEqn, values: list[Value]) -> tuple[list[Value], Run | None]:
        """Use the rule of an ordinary primitive."""
        rule = self.rules.get(eqn.primitive.name, Walk.unknown)
        return rule(self, eqn, values)

    def unknown(self, eqn: JaxprEqn, values: list[Value]) -> tuple[list[Value], Run | None]:
        """A primitive without a rule may only see what never changes."""
        for v in values:
            moving = [x for x in v.labels if isinstance(x, np.ndarray)]
            if v.const or not moving:
                for d in range(len(v.labels)):
                    settle(self.elements, v.labels, d)
            else:
                raise UnknownPrimitiveError(
                    f"no rule for primitive {eqn.primitive.name!r} at {self.line()}; "
                    f"it is reached by {self.parameter_of(moving[0])}. Pin that parameter (pin=...) or add a rule."
                )
        return [Value(o.aval, [None] * len(getattr(o.aval, "shape", ()))) for o in eqn.outvars], None

    def settled(self, value: Value) -> Value:
        """The value with every broadcast axis that has met another replaced by that other."""
        labels = [resolve(self.elements, x, d, value.shape) for d, x in enumerate(value.labels)]
        return dataclasses.replace(value, labels=labels)

    def consumed(self, value: Value) -> Value:
        """A constant about to meet something else gets labels of its own here; other values are settled."""
        if value.const is None:
            return self.settled(value)
        rank, labels = len(value.shape), list[Label]()
        for d, n in enumerate(value.shape):
            if not static(n):
                labels.append(None)
            elif value.const.uniform:
                labels.append(Free())
            else:
                labels.append(place(self.elements.fresh((n,)), d, rank))
        return dataclasses.replace(value, labels=labels)


def line_of(path: Sequence[JaxprEqn]) -> str:
    """The user's line that an equation came from, which stands in others, the outermost first."""
    # library code traced once keeps no line of the user's: the call it came from does
    lines = (source_info_util.summarize(e.source_info) for e in reversed(path))
    return next(filter(None, lines), "an unknown line")


def _all(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, int), *[ids.ravel() for ids in arrays]])


def _has_jaxpr(eqn: JaxprEqn) -> bool:
    return any(True for _ in subjaxprs(eqn))
