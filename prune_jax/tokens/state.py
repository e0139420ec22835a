"""The tokens that are left while a ViT runs: which patches they are, how many each stands for; and how to keep some.

Every count is known before the program is compiled, so that shapes are static: one compilation serves all batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from prune_jax.tree import is_real, widen

NOTHING_LEFT = 1 - 1e-9  # ratios that are 1 in decimals may sum to a little less
NOBODY = -1  # owner of a patch that no token carries


class Tokens(NamedTuple):
    """What the blocks work on, with T of N patches left.

    Attributes:
      x: prefix and patch tokens (B, prefix + T, D).
      patch: which patch each patch token is (B, T).
      owner: for each of the N patches, the patch whose token carries it: itself, the one it was merged into, or
        `NOBODY` (B, N).
      size: patches that each patch token stands for (B, T), float32; None where nothing was merged: one each.
    """

    x: Array
    patch: Array
    owner: Array
    size: Array | None = None

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return self.x.shape[1] - self.patch.shape[1]

    @property
    def weights(self) -> Array | None:
        """Proportional attention: the factors for `Attention.exponentials`, (B, 1, 1, prefix + T), or None."""
        if self.size is None:
            return None
        return jnp.pad(self.size, ((0, 0), (self.prefix, 0)), constant_values=1)[:, None, None]


def start(x: Array, prefix: int) -> Tokens:
    """All tokens that the embedding gives (B, prefix + N, D)."""
    patch = jnp.broadcast_to(jnp.arange(x.shape[1] - prefix), (x.shape[0], x.shape[1] - prefix))
    return Tokens(x, patch, patch)


def split(scores: Array, count: int) -> tuple[Array, Array]:
    """Indices of the `count` largest scores of each row (B, T), and of the others; both in ascending order.

    Among equal scores the first go first.
    """
    order = lax.top_k(scores, scores.shape[1])[1]
    return jnp.sort(order[:, :count]), jnp.sort(order[:, count:])


def take(x: Array, index: Array) -> Array:
    """Entries of each example: (B, T, ...) at (B, K) -> (B, K, ...)."""
    return jax.vmap(lambda row, i: row.at[i].get(mode="promise_in_bounds"))(x, index)


def with_prefix(index: Array, prefix: int) -> Array:
    """Indices of all prefix tokens and of these patch tokens (B, K) -> (B, prefix + K)."""
    ahead = jnp.broadcast_to(jnp.arange(prefix), (index.shape[0], prefix))
    return jnp.concatenate([ahead, index + prefix], axis=1)


def put(x: Array, index: Array, values: Array) -> Array:
    """`x` (B, T, D) with the entries at ascending indices (B, K) replaced by `values` (B, K, D)."""
    here = chosen(index, x.shape[1])
    place = jnp.maximum(jnp.cumsum(here, axis=1) - 1, 0)  # on a CPU a gather of rows is faster than a scatter
    return jnp.where(here[..., None], take(values, place), x)


def chosen(index: Array, length: int) -> Array:
    """Indices (B, K) as a mask (B, length) bool."""
    return (index[..., None] == jnp.arange(length)[None, None]).any(axis=1)


def keep(tokens: Tokens, scores: Array, count: int, *, merge: bool) -> Tokens:
    """The `count` patch tokens with the largest scores (B, T); the others are dropped, or merged into the kept ones.

    Args:
      tokens: T patch tokens.
      scores: of each patch token.
      count: how many stay.
      merge: whether a token that goes is averaged into the kept token that it is most similar to (by the cosine),
        each weighted by the patches it stands for.

    Returns:
      `count` patch tokens in their old order.
    """
    kept, gone = split(scores, count)
    left = take(tokens.x, with_prefix(kept, tokens.prefix))
    patch, gone_patch = take(tokens.patch, kept), take(tokens.patch, gone)
    if not merge:
        owner = hand_over(tokens.owner, gone_patch, jnp.full_like(gone_patch, NOBODY))
        return Tokens(left, patch, owner, None if tokens.size is None else take(tokens.size, kept))
    size = jnp.ones(tokens.patch.shape, jnp.float32) if tokens.size is None else tokens.size
    source = take(tokens.x[:, tokens.prefix :], gone)
    target = jnp.argmax(cosines(source, left[:, tokens.prefix :]), axis=-1)
    merged, total = absorb(left[:, tokens.prefix :], take(size, kept), source, take(size, gone), target)
    x = jnp.concatenate([left[:, : tokens.prefix], merged], axis=1)
    return Tokens(x, patch, hand_over(tokens.owner, gone_patch, take(patch, target)), total)


def absorb(x: Array, size: Array, source: Array, source_size: Array, target: Array) -> tuple[Array, Array]:
    """Averages tokens into others, weighted by size.

    Args:
      x: tokens that stay (B, T, D).
      size: of those (B, T).
      source: tokens that go (B, M, D).
      source_size: of those (B, M).
      target: which token each goes into (B, M).

    Returns:
      The tokens that stay and their sizes.
    """
    into = jax.nn.one_hot(target, x.shape[1], axis=1)  # (B, T, M)
    # these products only select and add up; accelerators would round what they add to 8 or 10 bits
    total = size + jnp.einsum("btm,bm->bt", into, source_size, precision="highest")
    mixed = size[..., None] * x + jnp.matmul(into, source_size[..., None] * source, precision="highest")
    return (mixed / total[..., None]).astype(x.dtype), total


def positions(x: Array) -> Array:
    """The index along the last axis, in the shape of x, int32."""
    return lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)


def hand_over(owner: Array, old: Array, new: Array) -> Array:
    """Owners (B, N) after what the patches `old` carried goes to the patches `new`, each (B, M)."""
    moved = owner[:, None] == old[..., None]  # (B, M, N)
    target = jnp.where(moved, new[..., None], NOBODY).max(axis=1, initial=NOBODY)
    return jnp.where(moved.any(axis=1), target, owner)


def cosines(a: Array, b: Array) -> Array:
    """Cosine of every token of one set with every token of another: (B, M, D), (B, T, D) -> (B, M, T).

    In float32 at least, whatever the tokens are in: similar tokens' cosines differ by less than bfloat16 resolves, and
    the sum of squares overflows float16.
    """
    a, b = (x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6) for x in widen((a, b)))
    return jnp.einsum("bmd,btd->bmt", a, b, precision="highest")  # accelerators would round them to 8 or 10 bits


def counts(fractions: Sequence[float], patches: int) -> tuple[int, ...]:
    """Fractions of the patches as whole numbers of them, at least one."""
    return tuple(max(1, round(fraction * patches)) for fraction in fractions)


def check_decisions(name: str, decisions: Array, shape: tuple[int, ...], axes: str) -> None:
    """Raises ValueError unless decisions have this shape, whose axes are called so."""
    if jnp.shape(decisions) != shape:
        raise ValueError(f"{name} must be {axes} = {shape}, got {jnp.shape(decisions)}")


def check_fraction(name: str, value: float) -> None:
    """Raises ValueError unless 0 < value <= 1."""
    if not (is_real(value) and 0 < value <= 1):
        raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")


def check_ratios(ratios: Sequence[float]) -> None:
    """Raises ValueError unless the fractions that blocks drop are not negative and leave something."""
    if not (all(is_real(r) and r >= 0 for r in ratios) and sum(ratios) < NOTHING_LEFT):  # nor NaN
        raise ValueError(f"ratios must be numbers that are not negative and sum to less than 1, got {ratios}")
