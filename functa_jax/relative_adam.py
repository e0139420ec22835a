"""Adam in units of the weights: one learning rate for networks of every width, depth and frequency."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array


class UnitState(NamedTuple):
    """The unit of each leaf's updates, a pytree of scalars."""

    unit: Any


def relative_adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    max_norm: float = 0.1,
    floor: float = 1e-3,
    reference_width: int = 64,
) -> optax.GradientTransformationExtraArgs:
    """Adam whose steps are fractions of the weights' own size at the start.

    u = -learning_rate * unit * m / sqrt(v), with unit = max(rms(w_0), floor) for each leaf, times
    min(1, sqrt(reference_width / n)) for matrices with n inputs, and gradients clipped to a global norm before.

    SIREN's weights have size sqrt(2 / n) / w0: a step that is small for one width and frequency is as large as the
    weights of another, and training collapses. Relative to the weights, and smaller by the root of the number of
    inputs that move together (Yang et al. 2021, arXiv:2203.03466), the same number serves all.

    Args:
      learning_rate: fraction of a weight's size moved in a step; a number or a schedule of the step.
      b1: decay of the mean of gradients.
      b2: decay of the mean of squared gradients.
      max_norm: global norm that gradients are clipped to.
      floor: smallest unit, for weights that start at zero.
      reference_width: number of inputs from which on the unit of matrices shrinks.

    Returns:
      An optax transform, over any pytree; updates have the dtypes of the parameters that `init` saw.

    Example:
      >>> params = {"w": jnp.full((4, 4), 0.01)}
      >>> optimizer = relative_adam(0.1)
      >>> updates, _ = optimizer.update({"w": jnp.full((4, 4), 5.0)}, optimizer.init(params))
      >>> round(float(updates["w"][0, 0]), 5)  # a tenth of the weight
      -0.001
    """

    def unit(leaf: Array) -> Array:
        size = jnp.maximum(jnp.sqrt(jnp.mean(jnp.square(leaf))), floor)
        return size * jnp.minimum(1.0, jnp.sqrt(reference_width / leaf.shape[0])) if leaf.ndim == 2 else size

    def init(params: optax.Params) -> UnitState:
        return UnitState(jax.tree.map(unit, params))

    def update(
        updates: optax.Updates, state: UnitState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, UnitState]:
        del params  # the size at the start counts, not the present one
        return jax.tree.map(lambda d, u: (u.astype(d.dtype) * d).astype(u.dtype), updates, state.unit), state

    return optax.chain(
        optax.clip_by_global_norm(max_norm),
        optax.scale_by_adam(b1=b1, b2=b2, eps=1e-12),
        optax.GradientTransformation(init, update),
        optax.scale_by_learning_rate(learning_rate),
    )
