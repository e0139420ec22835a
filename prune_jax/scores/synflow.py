"""SynFlow: each weight's share of the synaptic flow, without data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from prune_jax.tree import Prunable, PyTree, is_kernel, merge, select, widen


def synflow(
    apply_fn: Callable,
    params: PyTree,
    input_shape: Sequence[int],
    *,
    prunable: Prunable = is_kernel,
) -> PyTree:
    """Synaptic saliency ``|dR/dw * w|`` with ``R = sum(f(|params|, ones))`` (Tanaka et al. 2020, eqs. 1-2).

    All floating-point parameters are made absolute, not only the scored ones. Meant to be iterated, 100 rounds in the
    paper: see ``prune_jax.iterative_masks``. BatchNorm must be frozen; whatever ``apply_fn`` holds besides ``params``
    enters as it is, so running statistics should be those of initialisation (mean 0, variance 1).

    R is a product over layers: in a deep, wide network it can leave float32's range, and scores are then NaN, which
    ``make_masks`` and ``iterative_masks`` refuse. Compute in float64 (``jax_enable_x64``) then.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs``, any JAX function.
        params: pytree of parameters; half precision is widened to float32.
        input_shape: full shape of an input, such as (1, 32, 32, 3); the ones take the widened parameters' dtype.
        prunable: which leaves are scored, ``(path, leaf) -> bool``; by default ``is_kernel``.

    Returns:
        Pytree like ``params``, float32 or wider, larger = keep; None where not scored.

    Example:
        >>> import jax.numpy as jnp
        >>> from prune_jax import scores
        >>> params = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([[3.0], [1.0]])}
        >>> scores.synflow(lambda p, x: x @ p["a"] @ p["b"], params, (1, 1))["a"]
        Array([[3., 2.]], dtype=float32)

    Reference: Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow,
    arXiv:2006.05467.
    """
    params = widen(params)
    floating = select(params, lambda path, leaf: True)
    absolute = merge(jax.tree.map(jnp.abs, floating), params)
    dtype = jnp.result_type(*jax.tree.leaves(floating)) if jax.tree.leaves(floating) else jnp.float32
    ones = jnp.ones(tuple(input_shape), dtype)
    weights = select(absolute, prunable)
    gradient = jax.grad(lambda w: apply_fn(merge(w, absolute), ones).sum())(weights)
    scores = jax.tree.map(lambda g, w: jnp.abs(g * w), gradient, weights)
    return jax.tree.map(lambda s: jnp.where(jnp.isfinite(s), s, jnp.nan), scores)
