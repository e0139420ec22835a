"""GraSP: keep the weights whose removal would weaken the gradient flow."""

from __future__ import annotations

from collections.abc import Callable

import jax

from prune_jax.scores.loss import cross_entropy
from prune_jax.tree import Prunable, PyTree, is_kernel, merge, select, widen


def grasp(
    apply_fn: Callable,
    params: PyTree,
    inputs: PyTree,
    labels: PyTree,
    *,
    temperature: float = 200.0,
    loss_fn: Callable[[jax.Array, PyTree], jax.Array] = cross_entropy,
    prunable: Prunable = is_kernel,
) -> PyTree:
    """Gradient signal preservation: ``w * (H g)`` with g = dL/dw and H the Hessian (Wang et al. 2020, eq. 8).

    Removing w changes ``g.g / 2`` by ``-w * (H g)`` to first order; the paper cuts where that is largest, so the
    largest ``w * (H g)`` stay. ``H g`` is one forward-mode derivative of the gradient, exact, without finite steps.
    Scores have both signs.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> logits``, any JAX function.
        params: pytree of parameters; half precision is widened to float32, and the inputs' too.
        inputs: one batch, leading axis = examples.
        labels: what ``loss_fn`` takes; integers (batch,) for the default.
        temperature: divides the logits; 200 in the authors' code.
        loss_fn: ``loss_fn(logits, labels) -> scalar``.
        prunable: which leaves are scored, ``(path, leaf) -> bool``; by default ``is_kernel``. g and H are
            those of the scored leaves only.

    Returns:
        Pytree like ``params``, float32 or wider, larger = keep; None where not scored.

    Raises:
        ValueError: temperature is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from prune_jax import scores
        >>> s = scores.grasp(  # L = w^2 / 2 so that g = w and H = 1
        ...     lambda p, x: p["kernel"], {"kernel": jnp.array([[3.0]])}, None, None,
        ...     temperature=1.0, loss_fn=lambda out, _: 0.5 * out[0, 0] ** 2)
        >>> s["kernel"]
        Array([[9.]], dtype=float32)

    Reference: Wang et al., Picking Winning Tickets Before Training by Preserving Gradient Flow, arXiv:2002.07376.
    """
    if isinstance(temperature, int | float) and temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    params, inputs = widen((params, inputs))
    weights = select(params, prunable)
    gradient_at = jax.grad(lambda w: loss_fn(apply_fn(merge(w, params), inputs) / temperature, labels))
    gradient = gradient_at(weights)
    _, hessian_gradient = jax.jvp(gradient_at, (weights,), (gradient,))
    return jax.tree.map(lambda w, hg: w * hg, weights, hessian_gradient)
