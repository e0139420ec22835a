"""Recovery without training: layers that lost inputs are fitted to what the dense network computes.

Both networks run side by side over the calibration batches, stage by stage: up to the next layers whose inputs are then
known, which are fitted, and on from there with the fitted weights. So each layer also makes up for what those before it
could not, and the data pass through either network once. (Fitting every layer to the dense network's own activations
instead leaves up to twice the error, and more where a layer norm was cut.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal, Var

from prune_jax.graph.consumers import Consumer, Flow, find_consumers
from prune_jax.graph.cut import Cut
from prune_jax.graph.flatten import flatten
from prune_jax.graph.least_squares import Chunk, Moments, chunk_moments, ridge_update
from prune_jax.graph.plan import check_params, deaths
from prune_jax.graph.program import abstract, read_program
from prune_jax.graph.pruning import Pruned
from prune_jax.graph.schema import kept_shapes
from prune_jax.graph.steps import Step

Env = dict[int, Any]


def recover(pruned: Pruned, fn: Callable, params: Any, batches: Iterable[Any], *, ridge: float = 1e-3) -> Any:
    """Make up for what was cut, without training: refit every layer that lost inputs, in closed form.

    For each matrix product or convolution with a parameter W whose input axis was cut, with x what reaches it in the
    smaller network and y what it computes in the dense one (at the surviving outputs)::

        W' = W + (C_xx + ridge tr(C_xx) / k I)^-1 (C_xy - C_xx W)

    where x are the k surviving inputs of one output. If a parameter is added to the product, C are covariances and that
    parameter takes the mean, mean(y) - mean(x) W'; without one, C are raw second moments. If the inputs are the dense
    ones (nothing before was cut), this is W' = W_keep + (C_kk + ...)^-1 C_kc W_cut: what the lost inputs did is taken
    over by those that predict them. The fitted error of a layer is never above its error before.

    In attention the output projection makes up for lost value dims, and the projections for lost channels. Lost
    query-key dims are not made up for: scores are products of two activations, with no weight between them to fit.
    Weights that several equations share (a recurrent cell, a tied embedding), those that are computed from parameters
    (scaled by a constant, weight norm), and those inside loops longer than 64 steps and inside branches, stay as they
    are.

    Args:
        pruned: From ``prune(fn, params, ...)``; its ``params`` may have been trained on since.
        fn: The dense function.
        params: Its parameters.
        batches: Calibration arguments, all of one shape: each what ``fn`` takes after ``params``, a tuple of arguments
            or one that is no plain tuple (an array, a dict, a NamedTuple). The more rows (images times places) there
            are than inputs, the better. What the networks hold between two stages is kept in memory for all of them.
        ridge: Above 0, relative to the inputs' mean variance: how strongly W' is held to W.

    Returns:
        Parameters for ``pruned.fn``.

    Raises:
        ValueError: No batches, batches of different shapes, a ridge that is not positive and finite, ``params`` of
            another function, parameters in ``pruned`` that are not of its plan's shapes, or NaN or infinity that
            reaches a layer to be fitted.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from prune_jax.graph import prune
        >>> a = jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])  # the last unit is the sum of the others
        >>> params = {"a": a, "b": jnp.array([[2.0], [3.0], [0.1]])}
        >>> net = lambda p, x: x @ p["a"] @ p["b"]
        >>> x = jax.random.normal(jax.random.key(0), (64, 2))
        >>> small = prune(net, params, x, ratio=0.34)  # loses that unit
        >>> recover(small, net, params, [x], ridge=1e-6)["b"].round(2)
        Array([[2.1], [3.1]], dtype=float32)
    """
    if not 0 < ridge < math.inf:
        raise ValueError(f"ridge must be above 0 and finite, got {ridge}")
    calibration = [batch if type(batch) is tuple else (batch,) for batch in batches]  # a NamedTuple is one argument
    if not calibration:
        raise ValueError("batches must hold at least one batch of arguments, got none")
    first = abstract(calibration[0])
    for i, batch in enumerate(calibration):
        if abstract(batch) != first:
            raise ValueError(f"batches must all have the shapes {first}, but batch {i} has {abstract(batch)}")
    program = read_program(flatten(fn), abstract(params), first, pin=lambda _: False, free_output=lambda _: True)
    whole = Cut(np.ones(program.walk.elements.size, bool))
    cut = Cut(~deaths(program, pruned.plan)[program.classes.root])
    check_params(pruned.params, kept_shapes(pruned.plan), " of pruned")
    flow = Flow(program)
    dense, (small, tree) = jax.tree.leaves(params), jax.tree.flatten(pruned.params)
    names = {v: i for i, v in enumerate(program.body.jaxpr.invars[len(dense) :])}
    names.update({v: len(names) + i for i, v in enumerate(v for step in flow.moving for v in step.eqn.outvars)})
    states: list[tuple[Env, Env]] = [(dict(enumerate(jax.tree.leaves(batch))),) * 2 for batch in calibration]
    stages = _stages(flow, find_consumers(flow, cut))
    for at in {c.bias.leaf for stage in stages for c in stage.consumers if c.bias is not None}:
        # the shift that a layer is given is from the dense bias, whatever training or an earlier recovery made of it
        small[at] = cut.array(dense[at], program.leaves[at].labels)
    for stage in stages:

        def advance(
            dense: list, small: list, theirs: Env, ours: Env, stage: Stage = stage
        ) -> tuple[list[Chunk], tuple[Env, Env]]:
            """One batch through this stage of the dense network and of the smaller one."""
            theirs = _run(flow, whole, names, dense, theirs, [*stage.steps, *[c.step for c in stage.consumers]])
            ours = _run(flow, cut, names, small, ours, stage.steps)
            chunks = []
            for c in stage.consumers:
                y = cut.array(theirs[names[c.output]], c.outputs.labels)
                chunks.append(chunk_moments(*c.rows(cut, small[c.weight.leaf], ours[names[c.activation]], y)))
            needed = {names[v] for v in stage.needed if v in names}
            return chunks, (_only(theirs, needed), _only(ours, needed))

        run = jax.jit(advance)
        moments = [Moments() for _ in stage.consumers]
        for i, state in enumerate(states):
            chunks, states[i] = run(dense, small, *state)
            for c, m, chunk in zip(stage.consumers, moments, chunks, strict=True):
                if not chunk.finite():
                    layer = program.leaves[c.weight.leaf].name
                    raise ValueError(
                        f"NaN or infinity of batch {i} reaches the layer of {layer!r}, which cannot be fitted to it; "
                        "leave such data out, or find where either network overflows"
                    )
                m.add(chunk)
        for c, m in zip(stage.consumers, moments, strict=True):
            _refit(cut, c, m, small, ridge)
    return jax.tree.unflatten(tree, small)


@dataclasses.dataclass
class Stage:
    """Steps to run, then layers whose inputs are then known; ``needed`` later are these variables."""

    steps: list[Step]
    consumers: list[Consumer]
    needed: set[Var]


def _stages(flow: Flow, consumers: list[Consumer]) -> list[Stage]:
    """Cut the program where a layer's input depends on a layer that is still to be fitted."""
    by_step = {c.step: c for c in consumers}
    stages = [Stage([], [], set())]
    waiting: list[Step] = []  # steps that wait for the layers of the current stage
    tainted: set[Var] = set()
    for step in flow.moving:
        consumer = by_step.get(step)
        if consumer is not None:
            if consumer.activation in tainted:
                stages.append(Stage(waiting, [], set()))
                waiting, tainted = [], set()
            stages[-1].consumers.append(consumer)
        if consumer is not None or any(v in tainted for v in _reads(step)):
            waiting.append(step)
            tainted.update(step.eqn.outvars)
        else:
            stages[-1].steps.append(step)
    needed: set[Var] = set()
    for stage in reversed(stages):
        stage.needed = set(needed)
        for step in (*stage.steps, *[c.step for c in stage.consumers]):
            needed.update(_reads(step), step.eqn.outvars)
    return stages


def _only(env: Env, needed: set[int]) -> Env:
    return {i: x for i, x in env.items() if i in needed}


def _reads(step: Step) -> list[Var]:
    return [a for a in step.eqn.invars if isinstance(a, Var)]


def _run(flow: Flow, cut: Cut, names: dict[Var, int], leaves: list, env: Env, steps: list[Step]) -> Env:
    """Run steps that are not done yet; what comes of parameters alone is computed where it is asked for."""
    env = dict(env)
    fixed = dict(zip(flow.leaves, leaves, strict=True)) | flow.constants

    def read(atom: Any) -> Any:
        if isinstance(atom, Literal):
            return atom.val
        if atom in names:
            return env[names[atom]]
        if atom not in fixed:
            step = flow.fixed[atom]
            assert step is not None
            outs = step.evaluate(cut, [read(a) for a in step.eqn.invars])
            fixed.update(zip(step.eqn.outvars, outs, strict=True))
        return fixed[atom]

    for step in steps:
        if names[step.eqn.outvars[0]] not in env:
            outs = step.evaluate(cut, [read(a) for a in step.eqn.invars])
            env.update({names[v]: x for v, x in zip(step.eqn.outvars, outs, strict=True)})
    return env


def _refit(cut: Cut, consumer: Consumer, moments: Moments, leaves: list, ridge: float) -> None:
    """Replace the layer's weight and bias among the leaves."""
    at, bias = consumer.weight.leaf, consumer.bias
    weights = np.asarray(consumer.as_matrix(cut, leaves[at]), np.float64)
    change, shift = ridge_update(moments, weights, ridge, intercept=bias is not None)
    leaves[at] = leaves[at] + consumer.weight_change(cut, leaves[at], change).astype(leaves[at].dtype)
    if bias is not None:
        moved = consumer.bias_change(cut, leaves[bias.leaf], shift)
        leaves[bias.leaf] = leaves[bias.leaf] + moved.astype(leaves[bias.leaf].dtype)
