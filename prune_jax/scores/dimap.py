"""DIMAP and LAMP: the distortion that cutting a weight adds, relative to what its layer has left."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
from jax import lax

from prune_jax.tree import Prunable, PyTree, is_kernel, select, widen


def dimap(params: PyTree, *, prunable: Prunable = is_kernel) -> PyTree:
    """Data-independent module-aware importance (He and Zhou 2024, section 3.2).

    ``Imp(w_j) = w_j^2 / sum(w_i^2 over the same layer, where |w_i| >= |w_j|)``.

    The formula is LAMP's score. What differs is who competes: DIMAP ranks each module over all blocks by itself
    (``make_masks(..., scope=dimap_modules)``), LAMP ranks the whole network (``scope="global"``). Within a layer the
    ranking is that of magnitude.

    Args:
        params: pytree of parameters; each leaf is one layer.
        prunable: which leaves are scored, ``(path, leaf) -> bool``; by default ``is_kernel``.

    Returns:
        Pytree like ``params``, float32 or wider, in [0, 1], larger = keep; None where not scored. The largest weight
        of a layer scores exactly 1, equal magnitudes score equally, zeros score 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from prune_jax import scores
        >>> scores.dimap({"kernel": jnp.array([[1.0, -2.0], [2.0, 4.0]])})["kernel"]
        Array([[0.04      , 0.16666667], [0.16666667, 1.        ]], dtype=float32)

    Reference: He and Zhou, Data-independent Module-aware Pruning for Hierarchical Vision Transformers,
    arXiv:2404.13648.
    """
    return jax.tree.map(_relative_distortion, select(params, prunable))


def lamp(params: PyTree, *, prunable: Prunable = is_kernel) -> PyTree:
    """Layer-adaptive magnitude (Lee et al. 2021, eq. 3): the formula of ``dimap``, to be ranked globally.

    Args:
        params: pytree of parameters; each leaf is one layer.
        prunable: which leaves are scored, ``(path, leaf) -> bool``; by default ``is_kernel``.

    Returns:
        As ``dimap``. The paper's formula breaks ties of equal magnitude by position; here they score equally.

    Example:
        >>> import jax.numpy as jnp
        >>> from prune_jax import make_masks, scores
        >>> make_masks(scores.lamp({"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[10.0, 30.0]])}), 0.5)["b"]
        Array([[False,  True]], dtype=bool)

    Reference: Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, arXiv:2010.07611.
    """
    return dimap(params, prunable=prunable)


# First match wins: an attention block's output projection is "proj" or "out", and so may be a name inside the MLP.
_MODULES = (
    ("aux", r"norm|embed|merging|downsample|reduction|relative_position|(^|/)head"),
    ("mlp", r"mlp|fc1|fc2"),
    ("qkv", r"qkv|query|key|value"),
    ("prj", r"attn.*proj|attention.*(proj|out)|prj"),
)


def dimap_modules(path: str) -> str | None:
    """The module of a transformer's leaf, for ``make_masks(dimap(params), sparsity, scope=dimap_modules)``.

    Query, key and value are ``"qkv"``, the attention's output projection ``"prj"``, both MLP layers ``"mlp"``, each
    over all blocks together. Norms, patch embedding, patch merging and head are never pruned. Knows the names that
    timm, the original Swin and Flax ViTs use; for other names pass a function of your own.

    Args:
        path: a leaf's path, such as ``layers_0/blocks_1/attn/qkv/kernel``.

    Returns:
        ``"qkv"``, ``"prj"``, ``"mlp"``, or None = leave alone.

    Example:
        >>> from prune_jax.scores import dimap_modules
        >>> [dimap_modules(f"layers_0/blocks_0/{name}/kernel") for name in ("attn/proj", "mlp/fc1", "norm1")]
        ['prj', 'mlp', None]
    """
    for module, pattern in _MODULES:
        if re.search(pattern, path.rpartition("/")[0].lower()):
            return None if module == "aux" else module
    return None


def _relative_distortion(leaf: jax.Array) -> jax.Array:
    if leaf.size == 0:
        return leaf
    size = jnp.abs(widen(leaf))
    size = size / jnp.where(size.max() > 0, size.max(), 1)  # squares of tiny weights would vanish
    # Bit patterns of positive floats are ordered as the floats are, and integers sort several times faster.
    bits = lax.bitcast_convert_type(size, jnp.uint64 if size.dtype == jnp.float64 else jnp.uint32)
    ascending = jnp.sort(bits.ravel())
    squares = lax.bitcast_convert_type(ascending, size.dtype) ** 2
    # Summed from the largest down, so that the largest scores exactly 1. A parallel sum may fall in its last bit;
    # the running maximum keeps the ranking inside a layer that of magnitude.
    total = lax.cummax(jnp.cumsum(squares[::-1]))[::-1]
    total = total[jnp.searchsorted(ascending, bits)]
    return jnp.where(total > 0, size**2 / jnp.where(total > 0, total, 1), 0)
