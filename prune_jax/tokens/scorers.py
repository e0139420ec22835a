"""What patch skipping learns: a scorer for each block, its labels, its loss, and how right it is.

All functions take a ViT's arrays, blocks along an axis, and a Swin's tuples, an array a block, alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from prune_jax.models.layers import exact_gelu
from prune_jax.tokens import state

Blocks = Any  # an array (B, depth, patches, ...), or for each block (B, its patches, ...)


class Scorer(nn.Module):
    """D -> hidden -> 1 for each token, beside the mean of all: a logit, above 0 where the block would change it.

    ::

        score = W_2 gelu(W_1 x + W_c mean(x) + b_1) + b_2

    Report C's MLP sees the token alone and is said to suffer from it; the mean costs one more row of tokens. Kernels
    start at unit gain and not at a ViT's 0.02, from where so small a network first learns its bias and little else.

    Attributes:
      hidden: channels between.
      compute_dtype: dtype of the matmuls; None keeps float32.
    """

    hidden: int
    compute_dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, mean: Array) -> Array:
        """Normalised tokens (..., patches, D) and the mean over all patches (..., D) -> (..., patches), float32."""
        dtype = self.compute_dtype
        context = nn.Dense(self.hidden, use_bias=False, dtype=dtype, name="context")(mean)
        x = exact_gelu(nn.Dense(self.hidden, dtype=dtype, name="fc1")(x) + context[..., None, :])
        return nn.Dense(1, dtype=dtype, name="fc2")(x)[..., 0].astype(jnp.float32)

    def of_all(self, x: Array) -> Array:
        """Normalised tokens of all patches (..., patches, D) -> (..., patches)."""
        return self(x, x.mean(axis=-2))


class Observed(NamedTuple):
    """What scorers learn from: a dense run, seen at each block.

    Attributes:
      tokens: the normalised tokens of patches that the block's attention reads, (B, depth, patches, D).
      means: over all patches (B, depth, D).
      similarity: scaled cosine of each patch's token before and after the block (B, depth, patches), in [0, 1].
    """

    tokens: Blocks
    means: Blocks
    similarity: Blocks


class Skipping(NamedTuple):
    """What the scorers say of a dense run, and what is true.

    Attributes:
      scores: logits that a patch is to be kept (B, depth, patches).
      similarity: scaled cosine of each patch's token before and after each block (B, depth, patches), in [0, 1].
    """

    scores: Blocks
    similarity: Blocks


def scaled_cosine(a: Array, b: Array) -> Array:
    """(1 + cos(a, b)) / 2 along the last axis, in [0, 1], float32.

    Example:
      >>> scaled_cosine(jnp.array([[1.0, 0.0]] * 3), jnp.array([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])).tolist()
      [1.0, 0.5, 0.0]
    """
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return 0.5 * (1 + (a * b).sum(axis=-1) / jnp.maximum(norms, 1e-12))


def keep_labels(similarity: Blocks, cosine_threshold: float) -> Blocks:
    """Where a block leaves a patch less similar than the threshold, so that it is to be kept: bool of the same form."""
    return jax.tree.map(lambda s: s < cosine_threshold, similarity)


def skip_loss(skipping: Skipping, cosine_threshold: float) -> Array:
    """Cross-entropy of the scorers against `keep_labels`.

    Args:
      skipping: of `PatchSkip.watch`.
      cosine_threshold: of the scaled cosine.

    Returns:
      A scalar in nats, mean over images, blocks and patches; of a Swin each block weighs as much.
    """

    def entropy(scores: Array, keep: Array) -> Array:
        return optax.losses.sigmoid_binary_cross_entropy(scores, keep.astype(jnp.float32)).mean()

    labels = keep_labels(skipping.similarity, cosine_threshold)
    return jnp.stack(jax.tree.leaves(jax.tree.map(entropy, skipping.scores, labels))).mean()


def skip_accuracy(skipping: Skipping, cosine_threshold: float) -> Array:
    """Fraction of patches for which the scorers, at one half, say what the labels say: for each block (depth,)."""
    return _each_block(lambda says, keep: (says == keep).mean(axis=(0, -1)), skipping, cosine_threshold)


def balanced_skip_accuracy(skipping: Skipping, cosine_threshold: float) -> Array:
    """Mean of the accuracy on patches to be kept and on patches to be skipped, for each block (depth,).

    A scorer that always gives the same answer has 0.5 here, however common that answer is. Where a block has only one
    kind of patch, this is the accuracy on that kind.

    Example:
      >>> seen = Skipping(jnp.array([[[1.0, 1.0, 1.0, -1.0]]]), jnp.array([[[0.5, 0.5, 0.99, 0.99]]]))
      >>> float(balanced_skip_accuracy(seen, 0.95)[0])
      0.75
    """

    def balanced(says: Array, keep: Array) -> Array:
        right = says == keep
        total, count = jnp.zeros(keep.shape[1:-1]), jnp.zeros(keep.shape[1:-1])
        for kind in (keep, ~keep):
            number = kind.sum(axis=(0, -1))
            share = (right & kind).sum(axis=(0, -1)) / jnp.maximum(number, 1)
            total, count = total + jnp.where(number > 0, share, 0), count + (number > 0)
        return total / count

    return _each_block(balanced, skipping, cosine_threshold)


def keep_share(similarity: Blocks, cosine_threshold: float) -> Array:
    """Fraction of patches labelled keep, for each block (depth,); s or 1 - s is what the commoner answer alone gets."""
    return _stacked(jax.tree.map(lambda keep: keep.mean(axis=(0, -1)), keep_labels(similarity, cosine_threshold)))


def start_at_shares(params: Any, shares: Sequence[float] | Array) -> Any:
    """A method's parameters with scorers whose bias says what is common, so that training begins with what is not.

    Args:
      params: of `PatchSkip` or `SwinPatchSkip`, ``{"model": ..., "scorers_0": ...}``.
      shares: of patches to be kept, of each block, `keep_share`.

    Returns:
      The parameters; the last bias of scorer i is log(s_i / (1 - s_i)), with s_i kept within [0.001, 0.999].
    """
    inside = jnp.clip(jnp.asarray(shares), 1e-3, 1 - 1e-3)
    biases = jnp.log(inside / (1 - inside))
    scorers = {}
    for i, bias in enumerate(biases):
        scorer = params[f"scorers_{i}"]
        scorers[f"scorers_{i}"] = {**scorer, "fc2": {**scorer["fc2"], "bias": bias[None]}}
    return {**params, **scorers}


def capacities(scores: Blocks, keep: float) -> tuple[float, ...]:
    """Spreads a keep rate over blocks: each computes as many patches as it has among the highest scores of all blocks.

    Where the last ones chosen have equal scores, each block gets the same fraction of its patches with that score.

    Args:
      scores: of calibration images, `Skipping.scores`.
      keep: fraction of the patches of all blocks that is computed, in (0, 1]; of a ViT the mean over blocks.

    Returns:
      `PatchSkip.capacity` or `SwinPatchSkip.capacity`, for each block at least one patch.

    Raises:
      ValueError: a fraction outside (0, 1], or scores that are NaN.

    Example:
      >>> capacities(jnp.array([[[1.0, 2.0, 3.0, 4.0], [4.5, 5.0, 6.0, 0.0]]]), 0.5)
      (0.25, 0.75)
    """
    state.check_fraction("keep", keep)
    blocks = [np.asarray(x) for x in (scores if isinstance(scores, tuple) else np.moveaxis(np.asarray(scores), 1, 0))]
    if any(np.isnan(x).any() for x in blocks):
        raise ValueError("scores are NaN: the model or its scorers were not trained well, or an image holds NaN")
    ranked = np.sort(np.concatenate([x.ravel() for x in blocks]))[::-1]
    wanted = max(1, round(keep * len(ranked)))
    cut = ranked[wanted - 1]
    share = (wanted - (ranked > cut).sum()) / (ranked == cut).sum()  # of those with equal scores
    fractions = [(x > cut).mean() + share * (x == cut).mean() for x in blocks]
    return tuple(max(float(f), 1 / x.shape[1]) for f, x in zip(fractions, blocks, strict=True))


def _each_block(measure: Callable[[Array, Array], Array], skipping: Skipping, cosine_threshold: float) -> Array:
    """A measure of what scorers say (B, [depth,] patches) and the labels, for each block."""
    labels = keep_labels(skipping.similarity, cosine_threshold)
    return _stacked(jax.tree.map(lambda scores, keep: measure(scores > 0, keep), skipping.scores, labels))


def _stacked(blocks: Blocks) -> Array:
    """One number a block: as they are, or of a tuple."""
    return jnp.stack(blocks) if isinstance(blocks, tuple) else blocks
