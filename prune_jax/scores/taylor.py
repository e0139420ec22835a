"""Taylor: the squared change of the loss when a weight is removed."""

from __future__ import annotations

from collections.abc import Callable

import jax

from prune_jax.scores.loss import cross_entropy
from prune_jax.tree import Prunable, PyTree, is_kernel, merge, select, widen


def taylor(
    apply_fn: Callable,
    params: PyTree,
    inputs: PyTree,
    labels: PyTree,
    *,
    order: int = 1,
    loss_fn: Callable[[jax.Array, PyTree], jax.Array] = cross_entropy,
    prunable: Prunable = is_kernel,
) -> PyTree:
    """Squared Taylor expansion of ``L(w) - L(w = 0)`` around the trained weights (Molchanov et al. 2019).

    First order, eq. 8: ``(g w)^2``. Second order, eq. 7: ``(g w - w (H w) / 2)^2`` with g the gradient and H the
    Hessian of the loss. Average over batches for a steadier score.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> logits``, any JAX function.
        params: pytree of parameters; half precision is widened to float32, and the inputs' too.
        inputs: one batch, leading axis = examples.
        labels: what ``loss_fn`` takes; integers (batch,) for the default.
        order: 1 or 2.
        loss_fn: ``loss_fn(logits, labels) -> scalar``.
        prunable: which leaves are scored, ``(path, leaf) -> bool``; by default ``is_kernel``. g and H are
            those of the scored leaves only.

    Returns:
        Pytree like ``params``, float32 or wider, larger = keep; None where not scored.

    Raises:
        ValueError: order is neither 1 nor 2.

    Example:
        >>> import jax.numpy as jnp
        >>> from prune_jax import scores
        >>> loss = lambda out, _: 0.5 * out[0, 0] ** 2  # removal changes it by 4.5
        >>> scores.taylor(lambda p, x: p["k"], {"k": jnp.array([[3.0]])}, None, None, order=2, loss_fn=loss)
        {'k': Array([[20.25]], dtype=float32)}

    Reference: Molchanov et al., Importance Estimation for Neural Network Pruning, arXiv:1906.10771.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}")
    params, inputs = widen((params, inputs))
    weights = select(params, prunable)
    gradient_at = jax.grad(lambda w: loss_fn(apply_fn(merge(w, params), inputs), labels))
    if order == 1:
        return jax.tree.map(lambda g, w: (g * w) ** 2, gradient_at(weights), weights)
    gradient, hessian_w = jax.jvp(gradient_at, (weights,), (weights,))
    return jax.tree.map(lambda g, w, hw: (g * w - 0.5 * w * hw) ** 2, gradient, weights, hessian_w)
