"""Choosing how many units each group loses, cutting them, and the smaller function."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np

from prune_jax.graph.cut import Cut
from prune_jax.graph.groups import dependency_groups
from prune_jax.graph.importance import Aggregate, Normalise, check_may_go, squared_magnitude, unit_scores
from prune_jax.graph.plan import apply_plan, check_leaves, check_params, deaths, expand, make_plan
from prune_jax.graph.program import Pin, Program, abstract, keys, read_program
from prune_jax.graph.schema import check_plan, kept_shapes
from prune_jax.graph.select import Measure, Scope, check_ratios, select, size_of
from prune_jax.tree import check_count


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
    ratio: float | dict[int, float] | None = None,
    of: Measure = "units",
    target_latency: float | None = None,
    measure: Callable[[Pruned], float] | None = None,
    scope: Scope = "global",
    importance: Any = squared_magnitude,
    aggregate: Aggregate = "sum",
    normalise: Normalise = "mean",
    kinds: Collection[str] = ("width",),
    round_to: int = 1,
    minimum: int = 1,
    rounds: int = 1,
    between: Callable[[Pruned], Any] = lambda pruned: pruned.params,
    pin: Pin = lambda path: False,
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
        ratio: Fraction to remove in [0, 1); or a dict from tie to its own fraction (``Group.tie``, of
            ``dependency_groups`` with the same ``pin``).
        of: What ``ratio`` is a fraction of: "units", "parameters", or "flops" of matrix products and convolutions at
            the example's shapes, where a ``cond`` counts all its branches and a ``while`` loop one iteration. The last
            two are met to 1 %, or as nearly as whole units allow. A latency takes no ``of``.
        target_latency: Instead of ``ratio``: what ``measure`` is to give, met to 1 % or as nearly as whole units allow.
        measure: Says how long a candidate takes, such as the median of timed calls of ``jax.jit(candidate.fn)``.
            Called up to 17 times a round, first with the uncut network; the unit is the same as the target's. It must
            return a finite number above 0.
        scope: Among which units the lowest are sought: "global" all, "local" every tie for itself, "kind" ties of the
            same form ("isomorphic"), or a function from a group to a name of its bucket.
        importance: Pytree of element scores like ``params`` (None where not scored), or a function from ``params`` to
            one. Larger = keep; +inf = never remove. Where some ties have no score at all, scopes "global" and "kind"
            leave these alone; where nothing has one, the first units go. See ``unit_scores``.
        aggregate: "sum", "mean" or "max" over the members of a unit.
        normalise: "mean" or "top" (equation 12 of DepGraph) within a group, or "none".
        kinds: Which groups may be cut: "width" (channels, dims) and "block" (whole heads, whole channel groups).
        round_to: A group that loses units is left with a multiple of this, if it is at least that large. One that loses
            none keeps its size, multiple or not.
        minimum: Fewest units left in a group.
        rounds: In how many rounds; each keeps the same fraction of the one before and scores anew what is left.
        between: Called with what each round but the last leaves; returns parameters for it, trained on or recovered.
            The next round scores and cuts these. ``importance`` always sees parameters of the original shapes, with
            zeros where something was cut.
        pin: Which leaves must keep their shape, or which of their axes; see ``dependency_groups``.
        free_output: Says by path which outputs may change shape, such as updated batch statistics.

    Returns:
        ``fn``, ``params`` and ``plan`` of the smaller network.

    Raises:
        ValueError: Nothing to cut, a ratio out of range, an unknown scope, kind or tie, scores of the wrong shape, a
            latency that the smallest network still exceeds, units that may not be removed among those that would have
            to be; what ``dependency_groups`` raises.
        TypeError: ``params`` are shapes; scores are traced; ``between`` returns no parameters.
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
    if (ratio is None) == (target_latency is None):
        raise ValueError(f"give either ratio or target_latency, got ratio={ratio} and target_latency={target_latency}")
    if (measure is None) != (target_latency is None):
        raise ValueError("measure says how long a network takes and goes with target_latency; give both or neither")
    _check_choices(ratio, of, scope, kinds)
    rounds, round_to = check_count("rounds", rounds, 1), check_count("round_to", round_to, 1)
    minimum = check_count("minimum", minimum, 1)
    for path, x in jax.tree_util.tree_flatten_with_path(params)[0]:
        if isinstance(x, jax.ShapeDtypeStruct):
            raise TypeError(
                f"params must be arrays, but {'/'.join(keys(path))!r} is a shape: a cut needs values to score and to "
                "keep (dependency_groups takes shapes)"
            )
    groups = dependency_groups(fn, params, *args, pin=pin, free_output=free_output)
    if ratio != 0 and not any(group.kind in kinds for group in groups):
        raise ValueError(f"there is no group of kinds={tuple(kinds)} to cut. The groups:\n{groups}")
    program, dense, specs = groups.program, abstract(params), abstract(args)

    def smaller(dead: np.ndarray) -> Pruned:
        plan = make_plan(program, dead)
        known = {_key(specs): (program, Cut(~dead[program.classes.root]))}
        return Pruned(_smaller_function(fn, dense, plan, pin, free_output, known), apply_plan(plan, params), plan)

    whole = np.zeros(program.classes.count, bool)
    size, budget = size_of(program, of), target_latency is not None
    if measure is not None and target_latency is not None:
        if of != "units":
            raise ValueError(f"of={of!r} goes with ratio; target_latency is met in what measure returns")
        target = _positive("target_latency", target_latency)
        size = _remembered(lambda dead: _positive("what measure returns", measure(smaller(dead))))
        ratio = max(0.0, 1 - target / size(whole))
    else:
        check_ratios(ratio, of)
    dead = whole
    for left in range(rounds - 1, -1, -1):
        scores = unit_scores(
            groups,
            importance(params) if callable(importance) else importance,
            aggregate=aggregate,
            normalise=normalise,
            gone=dead,
        )
        dead = select(
            groups,
            scores,
            ratio=_part(ratio, (rounds - left) / rounds),
            size=size,
            tolerance=0.01 if budget else 1e-3,
            budget=budget,
            scope=scope,
            kinds=tuple(kinds),
            round_to=round_to,
            minimum=minimum,
        )
        check_may_go(groups, scores, dead, compared=scope in ("global", "kind") and not isinstance(ratio, dict))
        if left:
            pruned = smaller(dead)
            params = expand(pruned.plan, _returned(between, pruned), dense)
    if target_latency is not None and size is not None and size(dead) > 1.01 * target_latency:
        raise ValueError(
            f"target_latency={target_latency:g} cannot be reached: the smallest network found within these limits "
            f"(kinds, minimum, round_to, pin) takes {size(dead):g}, the whole one {size(whole):g}"
        )
    return smaller(dead)


def _check_choices(ratio: Any, of: Measure, scope: Scope, kinds: Collection[str]) -> None:
    """Raise where an option is of the wrong type, or says nothing."""
    if isinstance(ratio, dict) and not ratio:
        raise ValueError("ratio is an empty dict, which cuts nothing: give a number, or a dict from tie to number")
    for value in ratio.values() if isinstance(ratio, dict) else [] if ratio is None else [ratio]:
        if math.isnan(_number(value)):
            raise ValueError(f"ratio must be a number in [0, 1), or a dict from tie to number, got {ratio!r}")
    if not callable(scope) and scope not in ("global", "local", "kind"):
        raise ValueError(f"scope must be 'global', 'local', 'kind' or a function of a group, got {scope!r}")
    if isinstance(kinds, str) or not isinstance(kinds, Collection) or not kinds:
        raise ValueError(f"kinds must be a sequence of 'width', 'block' or both, such as ('width',), got {kinds!r}")
    if unknown := set(kinds) - {"width", "block"}:
        raise ValueError(f"kinds must be among 'width' and 'block', got {sorted(unknown)}")


def _number(value: Any) -> float:
    """A number, or an array of one, as a float; NaN for anything else."""
    scalar = isinstance(value, numbers.Real) or (hasattr(value, "dtype") and np.shape(value) == ())
    return float(value) if scalar else math.nan


def _positive(name: str, value: Any) -> float:
    if not 0 < (number := _number(value)) < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    return number


def _returned(between: Callable[[Pruned], Any], pruned: Pruned) -> Any:
    """What the caller made of the parameters after a round."""
    params = between(pruned)
    if params is None or isinstance(params, Pruned):
        raise TypeError(f"between must return parameters, such as those of the Pruned it is given, got {type(params)}")
    check_params(params, kept_shapes(pruned.plan), " returned by between")
    return params


def _part(ratio: Any, done: float) -> Any:
    """What is removed after this fraction of the rounds, each of which keeps the same fraction."""
    if isinstance(ratio, dict):
        return {tie: _part(r, done) for tie, r in ratio.items()}
    return ratio if done == 1 else 1 - (1 - ratio) ** done


def _remembered(size: Callable[[np.ndarray], float]) -> Callable[[np.ndarray], float]:
    known: dict[bytes, float] = {}

    def remembered(dead: np.ndarray) -> float:
        key = dead.tobytes()
        if key not in known:
            known[key] = size(dead)
        return known[key]

    return remembered


def smaller_function(
    fn: Callable,
    params: Any,
    plan: dict,
    *,
    pin: Pin = lambda path: False,
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
        ValueError: A plan made for another function, which may show only when called; when called: parameters of the
            wrong shape.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2))}
        >>> net = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
        >>> plan = prune(net, params, jnp.ones((1, 3)), ratio=0.25).plan
        >>> smaller_function(net, params, plan)(apply_plan(plan, params), jnp.ones((7, 3))).shape
        (7, 2)
    """
    check_plan(plan)
    dense = abstract(params)
    check_leaves(plan, {keys(path): x.shape for path, x in jax.tree_util.tree_flatten_with_path(dense)[0]})
    return _smaller_function(fn, dense, plan, pin, free_output, {})


def _smaller_function(
    fn: Callable,
    dense: Any,
    plan: dict,
    pin: Pin,
    free_output: Callable[[str], bool],
    known: dict[Any, tuple[Program, Cut]],
) -> Callable:
    """As ``smaller_function``; ``known`` holds what was read already, by the shapes of the arguments."""
    expected = kept_shapes(plan)
    means = next((program.walk.means for program, _ in known.values()), None)  # as the example arguments had them

    def smaller(params: Any, *args: Any) -> Any:
        leaves = check_params(params, expected)
        specs = abstract(args)
        key = _key(specs)
        if key in known:
            program, cut = known[key]
        else:
            program = read_program(fn, dense, specs, pin=pin, free_output=free_output, means=means)
            cut = Cut(~deaths(program, plan)[program.classes.root])
            # what fn closes over may belong to a transformation that is under way, and must not outlive it
            if not any(isinstance(c, jax.core.Tracer) for c in program.body.consts):
                known[key] = (program, cut)
        return jax.tree.unflatten(program.out_tree, program.body.run(cut, *leaves, *jax.tree.leaves(args)))

    return smaller


def _key(specs: Any) -> Any:
    leaves, tree = jax.tree.flatten(specs)
    # what is traced holds the precision that was the default
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return tree, precision, tuple((s.shape, s.dtype, s.weak_type) for s in leaves)
