"""Choosing how many units each group loses, cutting them, and the smaller function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from prune_jax.graph.cut import Cut
from prune_jax.graph.groups import dependency_groups
from prune_jax.graph.importance import Aggregate, Normalise, squared_magnitude, unit_scores
from prune_jax.graph.plan import apply_plan, check_plan, deaths, make_plan
from prune_jax.graph.program import Program, abstract, keys, read_program
from prune_jax.graph.select import Measure, Scope, select


@dataclasses.dataclass(frozen=True)
class Pruned:
    """A smaller network: ``fn(params, *args)`` runs; ``plan`` replays the cut on other checkpoints."""

    fn: Callable
    params: Any
    plan: dict


def prune(
    fn: Callable,
    params: Any,
    *args: Any,
    ratio: float | dict[int, float],
    of: Measure = "units",
    scope: Scope = "global",
    importance: Any = squared_magnitude,
    aggregate: Aggregate = "sum",
    normalise: Normalise = "mean",
    kinds: Sequence[str] = ("width",),
    round_to: int = 1,
    minimum: int = 1,
    pin: Callable[[str], bool] = lambda path: False,
    free_output: Callable[[str], bool] = lambda path: False,
) -> Pruned:
    """Remove the least important units of any JAX function.

    The coupled groups of ``dependency_groups`` are scored, the lowest units go, and what is left is the same program at
    smaller sizes. Numbers in the program stay as they are (an attention scale 1/sqrt(d) keeps the original d), with one
    exception: a mean over a cut axis divides by the cut width, as in a network built small from the start.

    Args:
        fn: Function of parameters and arguments.
        params: Pytree of arrays.
        *args: Example arguments; their shapes are free in the result wherever ``fn`` leaves them free.
        ratio: Fraction to remove in [0, 1); or a dict from tie (``Group.tie``) to its own fraction.
        of: What ``ratio`` is a fraction of: "units", "parameters", or "flops" of matrix products and convolutions at
            the example's shapes. The last two are met as nearly as whole units allow.
        scope: Among which units the lowest are sought: "global" all, "local" every tie for itself, "kind" ties of the
            same form ("isomorphic"), or a function from a group to a name of its bucket.
        importance: Pytree of element scores like ``params`` (None where not scored), or a function from ``params`` to
            one. Larger = keep.
        aggregate: "sum", "mean" or "max" over the members of a unit.
        normalise: "mean" or "top" (equation 12 of DepGraph) within a group, or "none".
        kinds: Which groups may be cut: "width" (channels, dims) and "block" (whole heads, whole channel groups).
        round_to: Widths left are multiples of this where the group is at least that large.
        minimum: Fewest units left in a group.
        pin: Says by path which parameter leaves must keep their shape.
        free_output: Says by path which outputs may change shape, such as updated batch statistics.

    Returns:
        ``fn``, ``params`` and ``plan`` of the smaller network.

    Raises:
        ValueError: A ratio out of range, an unknown scope, kind or tie, scores of the wrong shape.
        UnknownPrimitiveError: See ``dependency_groups``.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2))}
        >>> net = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
        >>> small = prune(net, params, jnp.ones((1, 3)), ratio=0.25)
        >>> small.params["a"].shape, small.fn(small.params, jnp.ones((5, 3))).shape
        ((3, 6), (5, 2))

    Reference: Fang et al., DepGraph: Towards Any Structural Pruning (2301.12900).
    """
    groups = dependency_groups(fn, params, *args, pin=pin, free_output=free_output)
    scores = unit_scores(
        groups, importance(params) if callable(importance) else importance, aggregate=aggregate, normalise=normalise
    )
    dead = select(groups, scores, ratio=ratio, of=of, scope=scope, kinds=kinds, round_to=round_to, minimum=minimum)
    plan = make_plan(groups.program, dead)
    specs = abstract(args)
    known = {_key(specs): (groups.program, Cut(~dead[groups.program.classes.root]))}
    small = _smaller_function(fn, abstract(params), plan, pin, free_output, known)
    return Pruned(small, apply_plan(plan, params), plan)


def smaller_function(
    fn: Callable,
    params: Any,
    plan: dict,
    *,
    pin: Callable[[str], bool] = lambda path: False,
    free_output: Callable[[str], bool] = lambda path: False,
) -> Callable:
    """The function that a plan leaves of ``fn``: its jaxpr at the new sizes.

    It is traced anew for every shape of its arguments, so the batch size and whatever else ``fn`` leaves free stay
    free; jit, grad, vmap and ``jax.export`` apply to it as to any function.

    Args:
        fn: The dense function.
        params: Its parameters, arrays or shapes.
        plan: From ``prune``.
        pin: As given to ``prune``.
        free_output: As given to ``prune``.

    Returns:
        ``smaller(params, *args)``.

    Raises:
        ValueError: When called: parameters of the wrong shape, or a plan made for another function.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2))}
        >>> net = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
        >>> plan = prune(net, params, jnp.ones((1, 3)), ratio=0.25).plan
        >>> smaller_function(net, params, plan)(apply_plan(plan, params), jnp.ones((7, 3))).shape
        (7, 2)
    """
    check_plan(plan)
    return _smaller_function(fn, abstract(params), plan, pin, free_output, {})


def _smaller_function(
    fn: Callable,
    dense: Any,
    plan: dict,
    pin: Callable[[str], bool],
    free_output: Callable[[str], bool],
    known: dict[Any, tuple[Program, Cut]],
) -> Callable:
    """As ``smaller_function``; ``known`` holds what was read already, by the shapes of the arguments."""
    dense_tree: Any = jax.tree.structure(dense)
    expected = {tuple(e["path"]): tuple(_new_shape(e)) for e in plan["leaves"]}

    def smaller(params: Any, *args: Any) -> Any:
        flat, tree = jax.tree_util.tree_flatten_with_path(params)
        for path, x in flat:
            if expected.get(keys(path)) != np.shape(x):
                raise ValueError(
                    f"parameter {'/'.join(keys(path))!r} must have shape {expected.get(keys(path))} after "
                    f"this cut, got {np.shape(x)}"
                )
        if tree != dense_tree:
            raise ValueError(f"parameters must have the structure {dense_tree}, got {tree}")
        specs = abstract(args)
        key = _key(specs)
        if key in known:
            program, cut = known[key]
        else:
            program = read_program(fn, dense, specs, pin=pin, free_output=free_output)
            cut = Cut(~deaths(program, plan)[program.classes.root])
            # what fn closes over may belong to a transformation that is under way, and must not outlive it
            if not any(isinstance(c, jax.core.Tracer) for c in program.body.consts):
                known[key] = (program, cut)
        values = [x for _, x in flat] + jax.tree.leaves(args)
        return jax.tree.unflatten(program.out_tree, program.body.run(cut, *values))

    return smaller


def _key(specs: Any) -> Any:
    leaves, tree = jax.tree.flatten(specs)
    return tree, tuple((s.shape, s.dtype, s.weak_type) for s in leaves)


def _new_shape(entry: dict) -> list[int]:
    shape = list(entry["shape"])
    for keep in entry["keep"]:
        shape[keep["axis"]] = np.asarray(keep["positions"]).shape[-1]
    return shape
