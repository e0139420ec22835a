"""DynamicViT: predictors between the blocks decide, image by image, which patch tokens go on.

Reference: Rao et al. 2021, DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification (2106.02034).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from prune_jax.models.layers import dense, exact_gelu, plain
from prune_jax.models.vit import ViT
from prune_jax.tokens import state
from prune_jax.tokens.protocol import TokenMethod, Trace, check_model, patches_of
from prune_jax.tree import check_count

DROP, KEEP = 0, 1  # the two outcomes that a predictor gives probabilities of


class Predictor(nn.Module):
    """Log-probabilities that each patch token is dropped or kept, from itself and from all that are left.

    ::

        h = gelu(W norm(x)),  local f^l = first half of h
        global f^g = sum_i M_i h_i / sum_i M_i over the second half
        log p = log softmax(MLP(f^l, f^g))

    Attributes:
      features: F, of each of the two halves.
      compute_dtype: dtype of the matmuls; None keeps float32.
    """

    features: int
    compute_dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Patch tokens (B, N, D), and which are left (B, N) or None for all -> (B, N, 2) float32: drop, keep."""
        dtype = self.compute_dtype
        h = nn.LayerNorm(epsilon=1e-5, dtype=dtype, name="norm")(x)
        h = exact_gelu(dense(2 * self.features, dtype, name="token")(h))
        local, whole = jnp.split(h, 2, axis=-1)
        if mask is None:
            whole = whole.mean(axis=1)
        else:
            share = mask / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
            whole = jnp.einsum("bn,bnf->bf", share.astype(whole.dtype), whole)
        # a layer on the concatenation of both, whose second half is the same for all tokens
        h = dense(self.features, dtype, name="local")(local)
        h = exact_gelu(h + dense(self.features, dtype, use_bias=False, name="global")(whole)[:, None])
        h = exact_gelu(dense(max(self.features // 2, 1), dtype, name="hidden")(h))
        return jax.nn.log_softmax(dense(2, dtype, name="out")(h).astype(jnp.float32))


class Masked(NamedTuple):
    """What the training form computes.

    Attributes:
      logits: (B, num_classes), float32.
      patches: patch tokens after the last norm, dropped ones too (B, N, D).
      decisions: mask after each stage, 1 = kept (B, stages, N), float32; gradients flow through it to the predictors.
    """

    logits: Array
    patches: Array
    decisions: Array


class DynamicViT(TokenMethod):
    """A ViT that drops patch tokens for good before some of its blocks, as predictors decide.

    At each stage a predictor sees the tokens that are left, and their mask is updated: M <- M * M_c. Two forms share
    the parameters:

    - `__call__` and `trace`, for inference: a fixed number of tokens with the largest keep probability is gathered, so
      that later blocks are truly smaller, and every batch runs the same compiled program. Also trains the classifier
      behind frozen predictors.
    - `masked`, for training: decisions are drawn with Gumbel noise (rng "gumbel"), straight through to the
      predictors, and dropped tokens are cut out of the attention:
      A_ij = G_ij exp(l_ij) / sum_k G_ik exp(l_ik), with G_ij = M_j for j != i, and 1 for j = i.

    Given the same decisions both compute the same.

    Attributes:
      model: the ViT.
      stages: blocks before which a predictor decides, ascending.
      keep: fraction of its tokens that each stage keeps, rho, so that rho, rho^2, rho^3 of the patches are left; or,
        for each stage, the fraction of all patches left after it, falling. What is 1 needs no predictor and is the
        dense model exactly.
      merge: whether tokens that are to be dropped are merged into the kept ones most similar to them instead;
        attention is then proportional to the patches a token stands for.
      features: width of the predictors' local and of their global features; None is half of the ViT's width.
      temperature: of the Gumbel-softmax whose gradient is used.

    Raises:
      ValueError: stages that are not ascending blocks of the model; fractions outside (0, 1] or rising; `features`
        below 1; a temperature that is not above 0.
      TypeError: a model that is not a ViT.

    Example:
      >>> from prune_jax.models import vit
      >>> DynamicViT(vit("S", num_classes=1000), keep=0.7).tokens
      (197, 197, 197, 138, 138, 138, 97, 97, 97, 68, 68, 68)
    """

    model: ViT
    stages: Sequence[int] = (3, 6, 9)
    keep: float | Sequence[float] = 0.7
    merge: bool = False
    features: int | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        self.stages, self.keep = plain(self.stages), plain(self.keep)
        super().__post_init__()
        check_model(self, ViT)
        _ = self.fractions  # says now what is wrong
        if self.features is not None:
            check_count("features", self.features, 1)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0 and finite, got {self.temperature}")

    @property
    def fractions(self) -> tuple[float, ...]:
        """Fraction of all patches that is left after each stage."""
        depth = self.model.depth
        if not isinstance(self.stages, Sequence):
            raise ValueError(f"stages must be a tuple of blocks, such as (3, 6, 9), got {self.stages!r}")
        stages = tuple(check_count("stages", stage, 0) for stage in self.stages)
        if not stages or any(not 0 <= s < depth for s in stages) or any(a >= b for a, b in pairwise(stages)):
            raise ValueError(f"stages must be ascending blocks from 0 to {depth - 1}, got {stages}")
        if not isinstance(self.keep, Sequence):
            state.check_fraction("keep", self.keep)
            return tuple(self.keep ** (s + 1) for s in range(len(stages)))
        for fraction in self.keep:
            state.check_fraction("keep", fraction)
        if len(self.keep) != len(stages) or any(a < b for a, b in pairwise(self.keep)):
            raise ValueError(f"keep must be one number or {len(stages)} falling fractions, got {tuple(self.keep)}")
        return tuple(self.keep)

    @property
    def counts(self) -> tuple[int, ...]:
        """Patch tokens left after each stage."""
        return state.counts(self.fractions, patches_of(self.model))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens, prefix included, that each block computes."""
        left = (patches_of(self.model), *self.counts)
        passed = (sum(s <= i for s in self.stages) for i in range(self.model.depth))
        return tuple(self.model.prefix + left[n] for n in passed)

    def setup(self) -> None:
        """Declares the predictors."""
        features = self.model.width // 2 if self.features is None else self.features
        self.predictors = [Predictor(max(features, 1), self.model.compute_dtype) for _ in self.stages]

    def trace(self, images: Array, *, train: bool = False) -> Trace:
        """Images (B, H, W, C) -> logits, and which patches each block computed."""
        stage_of = {block: stage for stage, block in enumerate(self.stages)}
        tokens = state.start(self.model.embed(images, train=train), self.model.prefix)
        owners = []
        for i, block in enumerate(self.model.blocks):
            if i in stage_of:
                tokens = self._decide(stage_of[i], tokens)
            tokens = tokens._replace(x=block(tokens.x, weights=tokens.weights, train=train))
            owners.append(tokens.owner)
        return Trace(self.model.head(tokens.x, weights=tokens.size), jnp.stack(owners, axis=1))

    def masked(self, images: Array, *, decisions: Array | None = None, train: bool = False) -> Masked:
        """The training form: all tokens are computed, and those that are dropped are cut out of the attention.

        Args:
          images: (B, H, W, C).
          decisions: masks after each stage (B, stages, N), bool or 0 and 1 (between the two only where a derivative
            is taken); what a stage has dropped no later one brings back. None draws them by Gumbel-softmax, from rng
            "gumbel", at the stages at which `trace` drops any.
          train: whether the ViT drops units and branches.

        Returns:
          Logits, patch tokens and decisions.

        Raises:
          ValueError: decisions of another shape.
        """
        prefix = self.model.prefix
        x = self.model.embed(images, train=train)
        mask = jnp.ones((x.shape[0], x.shape[1] - prefix))
        if decisions is not None:
            shape = (mask.shape[0], len(self.stages), mask.shape[1])
            state.check_decisions("decisions", decisions, shape, "(images, stages, patches)")
            if not jnp.issubdtype(decisions.dtype, jnp.inexact):
                decisions = decisions > 0  # 0 and 255 too
        size, weights = mask, None
        left = (mask.shape[1], *self.counts)
        masks: list[Array] = []
        for i, block in enumerate(self.model.blocks):
            if i in self.stages:
                stage = len(masks)
                if decisions is not None:
                    now = mask * decisions[:, stage].astype(jnp.float32)
                elif left[stage + 1] == left[stage]:
                    now = mask
                else:
                    scores = self.predictors[stage](x[:, prefix:], mask)
                    now = mask * gumbel_keep(self.make_rng("gumbel"), scores, self.temperature)
                patches = x[:, prefix:]
                if self.merge:
                    patches, size = merge_masked(patches, size, mask, now)
                # a dropped token's weight is 0, and 0 times infinity or NaN would reach the others; finite tokens stay,
                # as the gradient of a weight that is 0 is made of them
                patches = jnp.where((now > 0)[..., None] | jnp.isfinite(patches), patches, 0)
                x = jnp.concatenate([x[:, :prefix], patches], axis=1)
                mask = now
                masks.append(mask)
                weights = policy(mask, size, prefix)
            x = block(x, weights=weights, train=train)
        patches = self.model.norm(x)[:, prefix:]
        return Masked(self.model.head(x, weights=mask * size), patches, jnp.stack(masks, axis=1))

    def _decide(self, stage: int, tokens: state.Tokens) -> state.Tokens:
        """The tokens that a stage keeps."""
        count = self.counts[stage]
        if count == tokens.patch.shape[1] and not self.is_initializing():  # which makes all predictors' parameters
            return tokens
        scores = self.predictors[stage](tokens.x[:, tokens.prefix :])
        return state.keep(tokens, scores[..., KEEP] - scores[..., DROP], count, merge=self.merge)


def gumbel_keep(key: Array, log_probabilities: Array, temperature: float = 1.0) -> Array:
    """Decisions drawn by the Gumbel-max trick, whose gradient is that of the softmax with the same noise.

    Args:
      key: PRNG key.
      log_probabilities: of drop and keep (..., 2).
      temperature: of the softmax that gives the gradient; decisions do not depend on it.

    Returns:
      1 where kept, 0 where dropped (...), exactly; kept with its probability.

    Example:
      >>> probabilities = jnp.tile(jnp.array([0.2, 0.8]), (10000, 1))
      >>> drawn = gumbel_keep(jax.random.key(0), jnp.log(probabilities))
      >>> sorted(set(drawn.tolist())), round(float(drawn.mean()), 1)
      ([0.0, 1.0], 0.8)
    """
    noisy = log_probabilities + jax.random.gumbel(key, log_probabilities.shape, log_probabilities.dtype)
    hard = (noisy[..., KEEP] > noisy[..., DROP]).astype(noisy.dtype)
    soft = jax.nn.softmax(noisy / temperature)[..., KEEP]
    return hard + (soft - lax.stop_gradient(soft))


def policy(mask: Array, size: Array, prefix: int) -> Array:
    """Attention weights G of masked tokens: others only see what is kept, each by its size; everybody sees itself.

    Args:
      mask: 1 = kept (B, N).
      size: patches that each token stands for (B, N).
      prefix: tokens before the patches, always kept.

    Returns:
      (B, 1, prefix + N, prefix + N).
    """
    ahead = ((0, 0), (prefix, 0))
    mask, size = (jnp.pad(x, ahead, constant_values=1) for x in (mask, size))
    itself = jnp.eye(mask.shape[1], dtype=bool)[None]
    return jnp.where(itself, size[:, None], (mask * size)[:, None])[:, None]


def merge_masked(x: Array, size: Array, before: Array, now: Array) -> tuple[Array, Array]:
    """Merging as `state.keep` does it, where tokens that are gone keep their place.

    Args:
      x: patch tokens (B, N, D).
      size: patches that each stands for (B, N).
      before: which were kept until now (B, N).
      now: which are kept from now on (B, N).

    Returns:
      The tokens and sizes; those of tokens that are not kept mean nothing.
    """
    # A kept token moves nothing, but the gradient asks where it would go: not into itself, as if dropping were free.
    others = (now[:, None] > 0) & ~jnp.eye(x.shape[1], dtype=bool)[None]
    similarity = jnp.where(others, state.cosines(x, x), -jnp.inf)
    return state.absorb(x, size, x, size * (before - now), jnp.argmax(similarity, axis=-1))


def teach(model: ViT, images: Array) -> tuple[Array, Array]:
    """What the dense model teaches: logits (B, num_classes) and its patch tokens after the last norm (B, N, D).

    A function of the bound module: ``model.apply(variables, images, method=teach)``.
    """
    x = model.encode(images)
    return model.head(x), model.norm(x)[:, model.prefix :]
