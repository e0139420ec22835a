"""Exact selection of the smallest scores over many arrays, inside jit, without sorting or copying them together."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

MAX_GROUP_SIZE = 2**32 - 1  # counts are uint32
# Bits of the threshold found in one pass. Three counts in one reduction are vectorised on CPU and take a fifth of the
# time of one count alone; seven or fifteen take longer than the passes they save.
_DIGIT = 2


@jax.jit
def keep_largest(leaves: Sequence[jax.Array], cut: jax.Array) -> list[jax.Array]:
    """Masks that are False at exactly the ``cut`` smallest entries of all ``leaves`` together.

    Among equal scores the earlier ones are cut: leaves in their order, and row-major order within a leaf. That is what
    ``numpy.argsort(kind="stable")[:cut]`` cuts. NaN counts as larger than infinity.

    The threshold is found two bits at a time on the scores' bit patterns (radix select): 16 passes that only count,
    so memory stays at the scores and their masks, and sharded scores are never gathered.

    Args:
        leaves: floating-point scores of any shapes.
        cut: how many to cut, uint32 scalar, at most the number of entries.

    Returns:
        Bool arrays shaped like ``leaves``, True = keep.
    """
    if not leaves:
        return []
    # float64 scores need 64 bits for an exact order; everything narrower is exact in float32.
    wide = any(leaf.dtype == jnp.float64 for leaf in leaves)
    bits, key_type = (64, jnp.uint64) if wide else (32, jnp.uint32)

    def keys(leaf: jax.Array) -> jax.Array:
        return _ordered_bits(leaf.astype(jnp.float64 if wide else jnp.float32), key_type)

    def undecided(state: tuple) -> jax.Array:
        _, below, bit = state
        return (bit >= 0) & (below != cut)

    def next_digit(state: tuple) -> tuple:
        threshold, below, bit = state
        digits = jnp.arange(1, 1 << _DIGIT, dtype=key_type)
        candidates = threshold | (digits << bit.astype(key_type))
        counts = _total([_count([keys(leaf) < candidate for candidate in candidates]) for leaf in leaves])
        fits = counts <= cut  # the counts rise, so the first ones
        digit = jnp.sum(fits, dtype=key_type)
        return (
            threshold | (digit << bit.astype(key_type)),
            jnp.max(jnp.where(fits, counts, below)),
            bit - _DIGIT,
        )

    start = (jnp.asarray(0, key_type), jnp.asarray(0, jnp.uint32), jnp.asarray(bits - _DIGIT, jnp.int32))
    threshold, below, _ = lax.while_loop(undecided, next_digit, start)

    # Everything below the threshold goes; `ties` more are cut among the entries that equal it, earliest first.
    ties = cut - below
    masks = []
    for leaf in leaves:
        (tied,) = _count([keys(leaf) == threshold])
        ties_here = jnp.minimum(tied, ties)
        ties = ties - ties_here
        masks.append(
            lax.cond(
                (ties_here > 0) & (ties_here < tied),
                lambda leaf, n: _cut_first_ties(keys(leaf), threshold, n),
                lambda leaf, n: (keys(leaf) > threshold) | ((keys(leaf) == threshold) & (n == 0)),
                leaf,
                ties_here,
            )
        )
    return masks


def _ordered_bits(x: jax.Array, key_type: type) -> jax.Array:
    """Unsigned integers that are ordered as the floats are."""
    x = jnp.where(x == 0, 0, x)  # -0.0 and 0.0 are the same score
    pattern = lax.bitcast_convert_type(x, key_type)
    sign = jnp.asarray(1, key_type) << (8 * np.dtype(key_type).itemsize - 1)
    return jnp.where(pattern >= sign, ~pattern, pattern | sign)


def _cut_first_ties(keys: jax.Array, threshold: jax.Array, n: jax.Array) -> jax.Array:
    tied = keys == threshold
    rank = jnp.cumsum(tied.ravel(), dtype=jnp.uint32).reshape(tied.shape)
    return (keys > threshold) | (tied & (rank > n))


def _count(conditions: Sequence[jax.Array]) -> jax.Array:
    """How often each of some conditions of one shape holds, uint32 (len(conditions),), in one pass over them all."""
    zeros = (jnp.uint32(0),) * len(conditions)
    ones = tuple(condition.astype(jnp.uint32) for condition in conditions)
    axes = tuple(range(conditions[0].ndim))
    return jnp.stack(lax.reduce(ones, zeros, lambda a, b: tuple(map(operator.add, a, b)), axes))


def _total(counts: list[jax.Array]) -> jax.Array:
    return jnp.sum(jnp.stack(counts), axis=0, dtype=jnp.uint32)
