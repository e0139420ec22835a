"""Magnitude: the absolute value of a weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from prune_jax.tree import Prunable, PyTree, is_kernel, select


def magnitude(params: PyTree, *, prunable: Prunable = is_kernel) -> PyTree:
    """Score by absolute value: ``|w|`` (Han et al. 2015, section 3).

    Args:
        params: pytree of parameters.
        prunable: which leaves are scored, ``(path, leaf) -> bool``; by default ``is_kernel``.

    Returns:
        Pytree like ``params``, larger = keep; None where not scored.

    Example:
        >>> import jax.numpy as jnp
        >>> from prune_jax import scores
        >>> scores.magnitude({"kernel": jnp.array([[-2.0, 1.0]]), "bias": jnp.array([3.0])})
        {'bias': None, 'kernel': Array([[2., 1.]], dtype=float32)}

    Reference: Han et al., Learning both Weights and Connections for Efficient Neural Networks, arXiv:1506.02626.
    """
    return jax.tree.map(jnp.abs, select(params, prunable))
