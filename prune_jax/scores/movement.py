"""Movement: weights that training moves away from zero stay."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from prune_jax.tree import Prunable, PyTree, is_kernel, is_none, select, widen


def movement(
    params: PyTree,
    gradients: PyTree,
    previous: PyTree | None = None,
    *,
    prunable: Prunable = is_kernel,
) -> PyTree:
    """One step of the accumulated movement ``S_t = S_{t-1} - (dL/dw) w`` (Sanh et al. 2020, eqs. 4-5).

    A step of gradient descent moves w away from zero exactly where ``-(dL/dw) w > 0``. The learning rate, constant in
    the paper's sum, changes no ranking and is left out. Scores have both signs. ``prune_jax.gradual_pruning`` keeps
    this sum by itself.

    Args:
        params: pytree of parameters.
        gradients: gradients of the loss at ``params``, same structure.
        previous: the scores after the step before; None at the first step.
        prunable: which leaves are scored, ``(path, leaf) -> bool``; by default ``is_kernel``.

    Returns:
        Pytree like ``params``, float32 or wider, larger = keep; None where not scored.

    Example:
        >>> import jax.numpy as jnp
        >>> from prune_jax import scores
        >>> scores.movement({"k": jnp.array([[2.0, 2.0]])}, {"k": jnp.array([[-1.0, 1.0]])})
        {'k': Array([[ 2., -2.]], dtype=float32)}

    Reference: Sanh et al., Movement Pruning: Adaptive Sparsity by Fine-Tuning, arXiv:2005.07683.
    """
    weights = select(params, prunable)
    # Sums over thousands of steps lose their small terms in half precision.
    step = jax.tree.map(lambda w, g: None if w is None else -widen(g) * widen(w), weights, gradients, is_leaf=is_none)
    return step if previous is None else jax.tree.map(jnp.add, previous, step)
