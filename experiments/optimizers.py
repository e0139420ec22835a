"""The optimizers that the DessiLBI studies compare, by name, and their learning rate schedules."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optim_jax import L1, GroupLasso, Penalty, PenaltyRule, assign_penalties, dessilbi
from optim_jax.penalties import map_structured
from prune_jax.tree import is_kernel, path_name

Arm = Literal["sgd", "adam", "dessilbi", "dessilbi-adam", "proximal"]


def titles(weight_decay: float) -> dict[str, str]:
    """The names of the arms: with decoupled weight decay Adam is AdamW."""
    adam = "AdamW" if weight_decay else "Adam"
    return {
        "sgd": "SGD",
        "adam": adam,
        "dessilbi": "DessiLBI",
        "dessilbi-adam": f"DessiLBI+{adam}",
        "proximal": "proximal SGD",
    }


def is_path(arm: str) -> bool:
    """Whether an arm has a path to prune along."""
    return arm.startswith("dessilbi")


def make(
    arm: Arm,
    rate: optax.Schedule,
    *,
    momentum: float,
    weight_decay: float,
    kappa: float,
    mu: float,
    dense: float,
    filters: float,
    strength: float,
) -> optax.GradientTransformation:
    """The optimizer of an arm.

    Args:
      arm: "sgd" and "adam" (AdamW where `weight_decay` is not 0), "dessilbi" and "dessilbi-adam" around them, or
        "proximal" SGD on the same penalty.
      rate: learning rate as a function of the step count.
      momentum: of SGD, plain or Nesterov's not: v' = momentum v + g.
      weight_decay: decoupled, as in AdamW; of all arms.
      kappa: of DessiLBI.
      mu: of DessiLBI.
      dense: threshold of single weights in dense layers; of DessiLBI and the prox.
      filters: threshold of a filter's norm; of DessiLBI, where that of the prox is 1.
      strength: of the penalty in proximal SGD.
    """
    momentum_or_adam = optax.scale_by_adam() if arm.endswith("adam") else optax.trace(momentum)
    base = optax.chain(momentum_or_adam, optax.add_decayed_weights(weight_decay))
    if is_path(arm):
        return dessilbi(base, rate, kappa, mu, penalty=penalty(dense, filters))
    descent = optax.chain(base, optax.scale_by_learning_rate(rate))
    return descent if arm != "proximal" else proximal(descent, rate, strength, penalty(dense))


def penalty(dense: float, filters: float = 1.0) -> PenaltyRule:
    """Filters of convolutions as groups, weights of dense layers alone: the official choice where both are 1.

    A single weight is some ten times smaller than the norm of a filter, and comes alive that much later: with the
    official threshold it does not in a short training, and the coupling is mere weight decay for it. Filters need a
    larger one where most of them are to be cut: those that the path has not reached are small, and are not missed.
    """
    return PenaltyRule(lambda path, shape: {4: GroupLasso(strength=filters), 2: L1(dense)}.get(len(shape)))


def proximal(
    base: optax.GradientTransformation,
    rate: optax.ScalarOrSchedule,
    strength: optax.ScalarOrSchedule,
    penalty: Penalty | PenaltyRule,
) -> optax.GradientTransformationExtraArgs:
    """Proximal gradient: W' = prox of rate * strength * penalty at W + the base's update.

    Args:
      base: any optimizer, its learning rate included.
      rate: the same learning rate, for the threshold; a number or a schedule.
      strength: weight of the penalty in the loss; a number or a schedule.
      penalty: as for `dessilbi`; must be positively homogeneous of degree one, as group lasso and L1 are.

    Returns:
      A transform whose updates have the parameters' dtypes.
    """
    wrapped = optax.with_extra_args_support(base)

    def init(params: optax.Params) -> tuple[jax.Array, optax.OptState]:
        return jnp.zeros([], jnp.int32), wrapped.init(params)

    def update(
        updates: optax.Updates,
        state: tuple[jax.Array, optax.OptState],
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, tuple[jax.Array, optax.OptState]]:
        if params is None:
            raise ValueError("params must be given to proximal, as update(updates, state, params), got None.")
        step, inner = state
        updates, inner = wrapped.update(updates, inner, params, **extra_args)
        weighed, by = (value(step) if callable(value) else value for value in (rate, strength))
        threshold = jnp.maximum(jnp.float32(weighed * by), jnp.finfo(jnp.float32).tiny)

        def shrunk(rule: Penalty, w: jax.Array, u: jax.Array) -> jax.Array:
            return threshold * rule.prox((w + u) / threshold) - w

        structured = map_structured(shrunk, assign_penalties(penalty, params), params, updates)
        chosen = jax.tree.map(lambda u, w, s: (u if s is None else s).astype(w.dtype), updates, params, structured)
        return chosen, (optax.safe_increment(step), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def schedule(
    kind: Literal["linear", "step", "constant"], rate: float, *, steps: int, steps_per_epoch: int
) -> optax.Schedule:
    """The learning rate over the steps.

    Args:
      kind: "linear" warms up over a twentieth of the steps and decays to zero; "step" divides by ten every 20 epochs,
        as the reports do; "constant".
      rate: the largest.
      steps: of the whole training.
      steps_per_epoch: for "step".
    """
    if kind == "constant":
        return optax.constant_schedule(rate)
    if kind == "step":
        every = 20 * steps_per_epoch
        return optax.exponential_decay(rate, every, 0.1, staircase=True)
    warmup = max(1, steps // 20)
    rise, fall = optax.linear_schedule(0.0, rate, warmup), optax.linear_schedule(rate, 0.0, max(1, steps - warmup))
    return optax.join_schedules([rise, fall], [warmup])


def adamw(rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """AdamW with clipped gradients, b2 = 0.98, and decay for kernels alone (see `prune_jax.tree.is_kernel`)."""

    def kernels(params: optax.Params) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, leaf: is_kernel(path_name(path), leaf), params)

    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=weight_decay, mask=kernels)
    )


class AveragingState(NamedTuple):
    """State of `averaging`: that of its base, and the moving average of the parameters."""

    base: optax.OptState
    average: optax.Params


def averaging(base: optax.GradientTransformation, decay: float | jax.Array) -> optax.GradientTransformationExtraArgs:
    """The base, which also keeps an exponential moving average of the parameters: a' = decay a + (1 - decay) W'.

    Args:
      base: any optimizer, its learning rate included.
      decay: in [0, 1); the average reaches back some 1 / (1 - decay) steps. It starts at the first parameters, whose
        weight is decay ** steps. A number; a schedule of it goes through `optax.inject_hyperparams`.

    Returns:
      A transform whose updates have the parameters' dtypes; the average is kept in float32 at least.
    """
    wrapped = optax.with_extra_args_support(base)

    def update(
        updates: optax.Updates, state: AveragingState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, AveragingState]:
        if params is None:
            raise ValueError("params must be given to averaging, as update(updates, state, params), got None.")
        updates, inner = wrapped.update(updates, state.base, params, **extra_args)
        updates = jax.tree.map(lambda u, w: u.astype(w.dtype), updates, params)
        now = optax.apply_updates(params, updates)
        average = jax.tree.map(
            lambda a, w: (decay * a + (1 - decay) * w.astype(a.dtype)).astype(a.dtype), state.average, now
        )
        return updates, AveragingState(inner, average)

    def wide(w: jax.Array) -> jax.Array:
        # A copy, because a buffer that is in a state twice cannot be donated.
        return jnp.copy(w).astype(jnp.promote_types(w.dtype, jnp.float32))

    def init(params: optax.Params) -> AveragingState:
        return AveragingState(wrapped.init(params), jax.tree.map(wide, params))

    return optax.GradientTransformationExtraArgs(init, update)


def average_of(state: Any) -> optax.Params:
    """The average that `averaging` keeps."""
    return state.average
