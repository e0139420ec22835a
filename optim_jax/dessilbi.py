"""DessiLBI: structural sparsity found while training, as an optax transform around any other."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from optim_jax.base_sign import base_sign
from optim_jax.dtypes import wide, wide_dtype
from optim_jax.penalties import Penalty, PenaltyRule, assign_penalties, default_penalty, map_structured

NEVER = 2**31 - 1
"""First-activation step of a group that has not been active yet."""


class DessiLBIState(NamedTuple):
    """State of `dessilbi`; trees are like `params`, with None at unstructured leaves.

    Attributes:
      step: steps done, int32.
      z: the Bregman variable Z, float32 (float64 for float64 parameters).
      first_active: int32, one entry a group, of the leaf's rank: the number of steps after which Gamma's group was
        first nonzero, `NEVER` before. Lags one step, see `activation_order`. None if not recorded.
      gamma_scale: kappa of the last step; Gamma = gamma_scale * prox(Z).
      penalty: each leaf's `Penalty`; no arrays.
      base: the base transform's state.
    """

    step: Array
    z: Any
    first_active: Any
    gamma_scale: Array
    penalty: Any
    base: optax.OptState


def dessilbi(
    base: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    kappa: optax.ScalarOrSchedule = 1.0,
    mu: optax.ScalarOrSchedule = 20.0,
    *,
    penalty: Penalty | PenaltyRule = default_penalty,
    coupling: str = "outside",
    record: bool = True,
    base_is_direction: bool | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Deep structurally splitting linearised Bregman iteration around any optax transform.

    Minimises L(W) + ||W - Gamma||^2 / (2 mu) along a path on which the groups of the sparse shadow Gamma become nonzero
    one after the other, the important ones first. With d the base's direction, and old W and old Gamma on every
    right-hand side (the iteration of Fu et al., 2020, with their nu called `mu` as in their code):

        W'     = W - learning_rate * kappa * d - (learning_rate * kappa / mu) * (W - Gamma)
        Z'     = Z + (learning_rate / mu) * (W - Gamma)
        Gamma' = kappa * prox(Z')                                   Z = Gamma = 0 at the start

    Leaves without a penalty follow W' = W - learning_rate * kappa * d. The coupling stays outside the base's moments,
    as in the authors' code; `coupling="inside"` adds (W - Gamma) / mu to the gradient that the base sees, so that the
    base descends the augmented loss itself. For plain gradient descent, the paper's iteration, both are the same.

    A group comes alive when its Z has grown beyond the threshold 1: after about mu / (learning_rate * ||W_g||) steps if
    the loss holds W there. What the loss does not hold decays, its Z tends to W / kappa, and it never comes alive if
    that is below 1.

    Args:
      base: the optimizer to wrap, with learning rate 1: `optax.sgd(1.0, momentum=0.9)`, `optax.adamw(1.0)`. Its updates
        are multiplied by `learning_rate * kappa`. A bare direction, such as `optax.trace(0.9)`,
        `optax.scale_by_adam()` or `optax.identity()`, does as well, see `base_is_direction`.
      learning_rate: step size, a number or a schedule of the step count.
      kappa: damping factor > 0 of Gamma and of the weights' steps, a number or a schedule.
      mu: > 0, strength of the coupling is 1 / mu; a number or a schedule.
      penalty: which structure to look for, see `PenaltyRule`. Default: output filters of 4-d kernels (HWIO), elements
        of 2-d kernels, no structure elsewhere. One `Penalty` goes to every leaf of two or more dimensions. A function
        of path and shape does as well, but not under `optax.inject_hyperparams`, which takes every function for a
        schedule and calls it with the step count alone: wrap it in `PenaltyRule`.
      coupling: "outside" or "inside".
      record: whether to note when each group comes alive, for `activation_order` and `prune_by_path`.
      base_is_direction: whether the base's updates follow the gradient (True) or lead downhill (False). None: found in
        `init`, by trying the base for two steps on a small tree with the structure of `params`. A base that cannot be
        tried so, since it needs arrays of other shapes or extra arguments, or that then moves nothing, must be given
        with the answer.

    Returns:
      An optax transform. Its updates have the parameters' dtypes; Z takes 4 bytes a structured parameter and the
      record 4 bytes a group, which is 4 bytes an element where elements are the groups. Under
      `optax.inject_hyperparams`, `learning_rate`, `kappa` and `mu` are injected.

    Raises:
      TypeError: if `base` is no optax transform, a number none, such as `learning_rate=None`, or `penalty` no penalty.
      ValueError: if `learning_rate` is negative, `kappa` or `mu` not positive, one of them infinite or an array of
        several, `coupling` unknown, `penalty` matches no leaf or the base's direction is not found (in `init`), or
        `params` is None (in `update`).

    Example:
      >>> import optim_jax
      >>> loss = lambda params: jnp.sum(jnp.square(params["kernel"] - 3.0))
      >>> params = {"kernel": jnp.array([[0.5, -0.1], [2.0, 0.1]])}
      >>> optimizer = dessilbi(optax.adamw(1.0), 1e-3, mu=0.01)
      >>> state = optimizer.init(params)
      >>> for _ in range(10):
      ...     updates, state = optimizer.update(jax.grad(loss)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(optim_jax.support_masks(state)["kernel"])
      [[False False] [ True False]]

    Reference: Fu, Liu, Li, Sun, Zeng and Yao, "DessiLBI: Exploring Structural Sparsity of Deep Networks via
    Differential Inclusion Paths", ICML 2020, arXiv:2007.02010.
    """
    if not isinstance(base, optax.GradientTransformation):
        raise TypeError(f"base must be an optax transform such as optax.sgd(1.0, momentum=0.9), got {base!r}.")
    if coupling not in ("outside", "inside"):
        raise ValueError(f"coupling must be 'outside' or 'inside', got {coupling!r}.")
    for name, value in (("learning_rate", learning_rate), ("kappa", kappa), ("mu", mu)):
        _check_number(name, value)
    inner = optax.with_extra_args_support(base)

    def init(params: optax.Params) -> DessiLBIState:
        penalties = assign_penalties(penalty, params)
        base_state = inner.init(params)
        base_sign(base, base_is_direction, params)  # a base that would go uphill is refused before the first step

        def never(p: Penalty, z: Array) -> Array:
            # Computed from Z, where nothing is active, rather than filled: so it is sharded as Z is.
            return jnp.where(p.active(z), 0, NEVER).astype(jnp.int32)

        start = jnp.zeros([], jnp.int32)
        # Z grows by steps that half precision would round away.
        z = map_structured(lambda p, w: jnp.zeros_like(w, wide_dtype(w)), penalties, params)
        return DessiLBIState(
            step=start,
            z=z,
            first_active=map_structured(never, penalties, z) if record else None,
            gamma_scale=_number_at(kappa, start),
            penalty=penalties,
            base=base_state,
        )

    def update(
        updates: optax.Updates, state: DessiLBIState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, DessiLBIState]:
        if params is None:
            raise ValueError("params must be given to dessilbi, as update(updates, state, params), got None.")
        rate, scale, nu = (_number_at(number, state.step) for number in (learning_rate, kappa, mu))
        # XLA turns a constant divisor into a factor, computes the pull anew for W and for Z, and on CPU must copy both
        # first. A divisor that it cannot know makes it compute the pull once: a quarter less time for VGG-A.
        nu = jnp.where(state.step < 0, jnp.nan, nu)

        def pull_of(p: Penalty, w: Array, z: Array) -> Array:
            return (wide(w) - _times(state.gamma_scale, p.prox(z))) / nu.astype(z.dtype)

        def plus_pull(tree: Any, factor: Array | float) -> Any:
            return jax.tree.map(lambda x, e: x if e is None else (x + _times(factor, e)).astype(x.dtype), tree, pull)

        def earliest(p: Penalty, first: Array, z: Array) -> Array:
            return jnp.where(p.active(z), jnp.minimum(first, state.step), first)

        pull = map_structured(pull_of, state.penalty, params, state.z)
        if coupling == "inside":
            updates = plus_pull(updates, 1.0)
        directions, base_state = inner.update(updates, state.base, params, **extra_args)
        length = base_sign(base, base_is_direction, params) * rate * scale
        steps = jax.tree.map(lambda d: _times(length, wide(d)), directions)
        if coupling == "outside":
            steps = plus_pull(steps, -rate * scale)
        return jax.tree.map(lambda s, w: s.astype(w.dtype), steps, params), DessiLBIState(
            step=optax.safe_increment(state.step),
            z=map_structured(lambda p, z, e: z + _times(rate, e), state.penalty, state.z, pull),
            first_active=map_structured(earliest, state.penalty, state.first_active, state.z) if record else None,
            gamma_scale=scale,
            penalty=state.penalty,
            base=base_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _times(scalar: Array | float, x: Array) -> Array:
    return jnp.asarray(scalar, x.dtype) * x


def _number_at(number: optax.ScalarOrSchedule, step: Array) -> Array:
    return jnp.asarray(number(step) if callable(number) else number, float)


def _check_number(name: str, value: Any) -> None:
    if callable(value):
        return
    if isinstance(value, bool) or not isinstance(value, int | float | np.number | np.ndarray | Array):
        raise TypeError(f"{name} must be a number or a schedule of the step count, got {value!r}.")
    if np.ndim(value):
        raise ValueError(f"{name} must be a single number, got an array of shape {np.shape(value)}.")
    if isinstance(value, jax.core.Tracer):
        return
    if not (value >= 0 if name == "learning_rate" else value > 0) or math.isinf(value):
        raise ValueError(f"{name} must be {'>= 0' if name == 'learning_rate' else '> 0'} and finite, got {value}.")
