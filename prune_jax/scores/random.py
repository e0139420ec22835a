"""Random: the baseline every criterion has to beat."""

from __future__ import annotations

import jax

from prune_jax.tree import Prunable, PyTree, is_kernel, select


def random(key: jax.Array, params: PyTree, *, prunable: Prunable = is_kernel) -> PyTree:
    """Score every weight by an independent uniform number in [0, 1).

    Args:
        key: typed PRNG key, ``jax.random.key(seed)``.
        params: pytree of parameters; only shapes are used.
        prunable: which leaves are scored, ``(path, leaf) -> bool``; by default ``is_kernel``.

    Returns:
        Pytree like ``params`` of float32, larger = keep; None where not scored.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from prune_jax import scores
        >>> scores.random(jax.random.key(0), {"kernel": jnp.zeros((2, 3))})["kernel"].shape
        (2, 3)
    """
    leaves, treedef = jax.tree.flatten(select(params, prunable))
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        treedef, [jax.random.uniform(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    )
