"""The layers of a flat program that can make up for inputs they have lost."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, Var

from prune_jax.graph.cut import Cut
from prune_jax.graph.products import Product
from prune_jax.graph.program import Program
from prune_jax.graph.steps import Step, Value

VIEWS = ("convert_element_type", "copy", "expand_dims", "reshape", "rev", "slice", "split", "squeeze", "transpose")


@dataclasses.dataclass(frozen=True)
class View:
    """A parameter as one equation sees it: its leaf, the steps between, and the variable they end in."""

    leaf: int
    steps: tuple[Step, ...]
    end: Var

    def apply(self, cut: Cut, x: Any) -> Any:
        """The cut leaf as the equation sees it."""
        env: dict[Var, Any] = {}
        for step in self.steps:
            values = [a.val if isinstance(a, Literal) else env.get(a, x) for a in step.eqn.invars]
            env.update(zip(step.eqn.outvars, step.evaluate(cut, values), strict=True))
        return env.get(self.end, x)

    def adjoint(self, cut: Cut, leaf: Any, seen: Any) -> Any:
        """Entries of ``seen``, shaped as the equation sees the leaf, summed back to where they stand in the leaf."""
        back = jax.linear_transpose(lambda x: self.apply(cut, x), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        end = jax.eval_shape(lambda x: self.apply(cut, x), leaf)
        return back(jnp.asarray(seen, end.dtype))[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Consumer:
    """A product y = x * w that lost inputs; ``bias`` is what is added to y (``sign`` 1) or subtracted from it (-1)."""

    step: Step
    product: Product
    inputs: Value
    weights: Value
    outputs: Value
    weight: View
    bias: View | None = None
    sign: int = 1

    @property
    def activation(self) -> Var:
        """The operand that is no weight."""
        atom = self.step.eqn.invars[1 - self.product.side]
        assert isinstance(atom, Var)  # a product of constants alone is no consumer
        return atom

    @property
    def output(self) -> Var:
        """The product."""
        return self.step.eqn.outvars[0]

    def matrix(self, cut: Cut) -> jax.ShapeDtypeStruct:
        """The shape (G, k, m) that is left of the weight."""
        return jax.eval_shape(self.product.matrix, _after(cut, self.weights), _after(cut, self.inputs))

    def as_matrix(self, cut: Cut, leaf: Any) -> Any:
        """The weight (G, k, m) in a cut leaf."""
        return self.product.matrix(self.weight.apply(cut, leaf), _after(cut, self.inputs))

    def rows(self, cut: Cut, leaf: Any, x: Any, y: Any) -> tuple[Any, Any]:
        """Activation and product, both cut, as (G, n, k) and (G, n, m); ``leaf`` is the weight's."""
        w = self.weight.apply(cut, leaf)
        return self.product.inputs(x, w), self.product.outputs(y, self.matrix(cut))

    def weight_change(self, cut: Cut, leaf: Any, change: Any) -> Any:
        """What the weight's leaf gains when the matrix (G, k, m) gains ``change``."""
        w = _after(cut, self.weights)
        back = jax.linear_transpose(lambda w: self.product.matrix(w, _after(cut, self.inputs)), w)
        return self.weight.adjoint(cut, leaf, back(jnp.asarray(change, w.dtype))[0])

    def bias_change(self, cut: Cut, leaf: Any, shift: Any) -> Any:
        """What the bias' leaf gains when the outputs gain ``shift`` (G, m); None if no such bias can."""
        view, y = self.bias, _after(cut, self.outputs)
        assert view is not None
        rows = partial(self.product.outputs, matrix=self.matrix(cut))
        wide = jnp.broadcast_to(jnp.asarray(shift, y.dtype)[:, None], jax.eval_shape(rows, y).shape)
        wanted = jax.linear_transpose(rows, y)(wide)[0]

        def given(leaf: Any) -> Any:
            return jnp.broadcast_to(view.apply(cut, leaf), y.shape).astype(y.dtype)

        back = jax.linear_transpose(given, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        times = back(jnp.ones_like(wanted))[0]
        mean = jnp.where(times > 0, back(wanted)[0] / jnp.maximum(times, 1), 0)
        far = jnp.abs(given(mean) - wanted).max() > 1e-3 * jnp.abs(wanted).max()
        return None if far else self.sign * mean


def _after(cut: Cut, value: Value) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(cut.shape(value.labels, value.shape), value.aval.dtype)


class Flow:
    """Which variables of a flat program come from parameters and constants alone, and who reads what."""

    def __init__(self, program: Program) -> None:
        self.program, body = program, program.body
        self.leaves = body.jaxpr.invars[: len(program.leaves)]
        self.readers: dict[Var, list[tuple[Step, int]]] = {}
        self.fixed: dict[Var, Step | None] = dict.fromkeys([*self.leaves, *body.jaxpr.constvars])
        self.moving: list[Step] = []
        for step in body.steps:
            read = [(i, a) for i, a in enumerate(step.eqn.invars) if isinstance(a, Var)]
            for i, atom in read:
                self.readers.setdefault(atom, []).append((step, i))
            if all(a in self.fixed for _, a in read) and not step.eqn.effects:
                self.fixed.update(dict.fromkeys(step.eqn.outvars, step))
            else:
                self.moving.append(step)
        self.constants = dict(zip(body.jaxpr.constvars, body.consts, strict=True))
        self.results = {a for a in body.jaxpr.outvars if isinstance(a, Var)}

    def uses(self, leaf: int, also: tuple[str, ...] = ()) -> list[tuple[View, Step, int]] | None:
        """Every use of a leaf, seen through steps that only move entries; None if it is used in another way too."""
        found, todo = [], [View(leaf, (), self.leaves[leaf])]
        while todo:
            view = todo.pop()
            if view.end in self.results:
                return None
            for step, side in self.readers.get(view.end, ()):
                if step.eqn.outvars[0] not in self.fixed:
                    found.append((view, step, side))
                elif step.eqn.primitive.name in (*VIEWS, *also):
                    todo += [View(leaf, (*view.steps, step), out) for out in step.eqn.outvars]
                else:
                    return None
        return found


def find_consumers(flow: Flow, cut: Cut) -> list[Consumer]:
    """All dense and convolution layers that lost inputs, in program order.

    A weight that is also used in another way (tied to an embedding), or that several equations share entry for entry
    (a recurrent cell), is left alone.
    """
    leaves = [cut_leaf(flow.program, cut, i) for i in range(len(flow.leaves))]
    found: dict[Step, Consumer] = {}
    biases: dict[Var, tuple[View, Step, int]] = {}
    for i in range(len(leaves)):
        uses = flow.uses(i)
        if uses and all(_is_product(step, side) for _, step, side in uses) and _apart(cut, leaves[i], uses):
            for view, step, side in uses:
                inputs, weight, outputs = (
                    flow.program.walk.settled(v) for v in (step.inputs[1 - side], step.inputs[side], step.outputs[0])
                )
                consumer = Consumer(step, Product(step.eqn, side), inputs, weight, outputs, view)
                if any(cut.size(weight.labels, a, weight.shape[a]) != weight.shape[a] for a in consumer.product.summed):
                    found[step] = consumer
        uses = flow.uses(i, also=("broadcast_in_dim",)) or []
        if len(uses) == 1 and uses[0][1].eqn.primitive.name in ("add", "sub"):
            other = uses[0][1].eqn.invars[1 - uses[0][2]]
            if isinstance(other, Var):
                biases[other] = uses[0]
    return [_with_bias(flow, cut, found[step], leaves, biases) for step in flow.moving if step in found]


def cut_leaf(program: Program, cut: Cut, leaf: int) -> jax.ShapeDtypeStruct:
    """The shape of a leaf after the cut."""
    entry = program.leaves[leaf]
    return jax.ShapeDtypeStruct(cut.shape(entry.labels, entry.shape), entry.dtype)


def _is_product(step: Step, side: int) -> bool:
    if step.eqn.primitive.name == "conv_general_dilated":  # batch groups stand in derivatives only
        return side == 1 and step.eqn.params["batch_group_count"] == 1
    return step.eqn.primitive.name == "dot_general"


def _apart(cut: Cut, leaf: jax.ShapeDtypeStruct, uses: list[tuple[View, Step, int]]) -> bool:
    """Whether no entry of the leaf is seen twice."""
    if len(uses) == 1:
        return True
    ends = [jax.eval_shape(partial(view.apply, cut), leaf) for view, _, _ in uses]
    seen = [view.adjoint(cut, leaf, jnp.ones(e.shape)) for (view, _, _), e in zip(uses, ends, strict=True)]
    return bool(sum(seen).max() <= 1)


def _with_bias(flow: Flow, cut: Cut, consumer: Consumer, leaves: list[jax.ShapeDtypeStruct], biases: dict) -> Consumer:
    """The consumer with the parameter that is added to its product, if that can shift every output by itself."""
    y = consumer.output
    if y not in biases or len(flow.readers[y]) != 1 or y in flow.results:
        return consumer
    view, step, side = biases[y]
    subtracted = step.eqn.primitive.name == "sub"
    if subtracted and side == 0:  # b - y
        return consumer
    found = dataclasses.replace(consumer, bias=view, sign=-1 if subtracted else 1)
    matrix = consumer.matrix(cut)
    shift = np.random.default_rng(0).normal(size=(matrix.shape[0], matrix.shape[2]))
    return consumer if found.bias_change(cut, leaves[view.leaf], shift) is None else found
