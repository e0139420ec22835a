"""SNIP: how strongly the loss feels a weight's connection at initialisation."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from prune_jax.scores.loss import cross_entropy
from prune_jax.tree import Prunable, PyTree, is_kernel, merge, select, widen


def snip(
    apply_fn: Callable,
    params: PyTree,
    inputs: PyTree,
    labels: PyTree,
    *,
    loss_fn: Callable[[jax.Array, PyTree], jax.Array] = cross_entropy,
    prunable: Prunable = is_kernel,
) -> PyTree:
    """Connection sensitivity: ``|dL/dw * w|``, the derivative of the loss by a mask at 1 (Lee et al. 2019, eq. 6).

    The paper divides by the sum over all weights, which changes no ranking and is left out here.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> logits``, any JAX function.
        params: pytree of parameters; half precision is widened to float32, and the inputs' too.
        inputs: one batch, leading axis = examples.
        labels: what ``loss_fn`` takes; integers (batch,) for the default.
        loss_fn: ``loss_fn(logits, labels) -> scalar``.
        prunable: which leaves are scored, ``(path, leaf) -> bool``; by default ``is_kernel``.

    Returns:
        Pytree like ``params``, float32 or wider, larger = keep; None where not scored.

    Example:
        >>> import jax.numpy as jnp
        >>> from prune_jax import scores
        >>> params = {"kernel": jnp.array([[1.0, -1.0], [0.0, 2.0]])}
        >>> s = scores.snip(lambda p, x: x @ p["kernel"], params, jnp.ones((1, 2)), jnp.array([0]))
        >>> s["kernel"]
        Array([[0.5, 0.5], [0. , 1. ]], dtype=float32)

    Reference: Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity, arXiv:1810.02340.
    """
    params, inputs = widen((params, inputs))
    weights = select(params, prunable)
    gradient = jax.grad(lambda w: loss_fn(apply_fn(merge(w, params), inputs), labels))(weights)
    return jax.tree.map(lambda g, w: jnp.abs(g * w), gradient, weights)
