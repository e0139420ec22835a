"""CP-ViT: cascade pruning of patches, and of heads, by how much attention they have received so far; no training.

`attention_profile` looks at a trained ViT, `layer_ratios` spreads a pruning ratio over its blocks, `CPViT` drops
patches and `cut_heads` heads.

Reference: Song et al. 2022, CP-ViT: Cascade Vision Transformer Pruning via Progressive Sparsity Prediction
(2203.04570).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import Array

from prune_jax.models.layers import each_layer, normalised, plain
from prune_jax.models.vit import ViT
from prune_jax.tokens import state
from prune_jax.tokens.protocol import TokenMethod, Trace, check_model, params_of, patches_of
from prune_jax.tree import is_real

Queries = Literal["all", "prefix"]
NOTHING_LEFT = 1 - 1e-9  # ratios that are 1 in decimals may sum to a little less


class CPViT(TokenMethod):
    """A ViT that drops, in each block, the patches that have received the least attention in all blocks so far.

    Informativeness of patch p in head h of a block is the largest attention probability that any query gives it,
    max_j A_h[j, p]; that of the block is the sum over heads. (Rows of A sum to 1, so that what p itself attends to says
    nothing about p when it is summed up, and the maximum over the column is what is left of the sum criterion.) Scores
    add up over blocks. After the attention of block l, the L r_l patches with the smallest sums are dropped, and no
    later computation sees them: neither the MLP of block l nor any block after it. No gradient flows through the
    choice, so that fine-tuning trains the model that is left, at its price.

    Attributes:
      model: the ViT.
      ratios: r_l, the fraction of all L patches that each block drops, one number or one a block; 0 drops nothing.
        `layer_ratios` finds them.
      merge: whether what is to be dropped is merged into the kept tokens most similar to it instead; attention is then
        proportional to the patches a token stands for.
      queries: whose attention counts: "all" tokens' (as published) or only that of the "prefix" (class token).

    Raises:
      ValueError: a negative ratio, ratios that leave no patch, or "prefix" without prefix tokens.
      TypeError: a model that is not a ViT.

    Example:
      >>> from prune_jax.models import vit
      >>> CPViT(vit("S", num_classes=1000), ratios=(0, 0, 0, 0.3, 0, 0, 0.2, 0, 0, 0.1, 0, 0)).tokens
      (197, 197, 197, 138, 138, 138, 99, 99, 99, 79, 79, 79)
    """

    model: ViT
    ratios: float | Sequence[float] = 0.0
    merge: bool = False
    queries: Queries = "all"

    def __post_init__(self) -> None:
        self.ratios = plain(self.ratios)
        super().__post_init__()
        check_model(self, ViT)
        _ = self.counts  # says now what is wrong
        if self.queries not in ("all", "prefix"):
            raise ValueError(f"queries must be 'all' or 'prefix', got {self.queries!r}")
        if self.queries == "prefix" and self.model.prefix == 0:
            raise ValueError("queries='prefix' needs a model with a class token or registers")

    @property
    def counts(self) -> tuple[int, ...]:
        """Patch tokens left after each block's cut."""
        ratios = each_layer("ratios", self.ratios, self.model.depth)
        _check_ratios(ratios)
        return state.counts([float(1 - fraction) for fraction in np.cumsum(ratios)], patches_of(self.model))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens, prefix included, that the MLP of each block computes."""
        return tuple(self.model.prefix + n for n in self.counts)

    def trace(self, images: Array, *, train: bool = False) -> Trace:
        """Images (B, H, W, C) -> logits, and which patches each block computed."""
        tokens = state.start(self.model.embed(images, train=train), self.model.prefix)
        scores: Array = jnp.zeros(tokens.patch.shape)
        owners = []
        for block, count in zip(self.model.blocks, self.counts, strict=True):
            q, k, v = block.attention.project(block.norm1(tokens.x))
            e = block.attention.exponentials(q, k, weights=tokens.weights)
            tokens = tokens._replace(x=block.add(tokens.x, block.attention.combine(e, v), train=train))
            scores = scores + self._informativeness(normalised(e))
            if count < tokens.patch.shape[1]:
                kept, _ = state.split(scores, count)
                tokens, scores = state.keep(tokens, scores, count, merge=self.merge), state.take(scores, kept)
            tokens = tokens._replace(x=block.feed_forward(tokens.x, train=train))
            owners.append(tokens.owner)
        return Trace(self.model.head(tokens.x, weights=tokens.size), jnp.stack(owners, axis=1))

    def _informativeness(self, p: Array) -> Array:
        """Of each patch in a block, from its probabilities (B, heads, N, N): (B, patches)."""
        prefix = self.model.prefix
        seen = p[:, :, :prefix] if self.queries == "prefix" else p
        return patch_informativeness(jax.lax.stop_gradient(seen), prefix).sum(axis=1)


def _check_ratios(ratios: Sequence[float]) -> None:
    if not (all(is_real(r) and r >= 0 for r in ratios) and sum(ratios) < NOTHING_LEFT):  # nor NaN
        raise ValueError(f"ratios must be numbers that are not negative and sum to less than 1, got {ratios}")


def patch_informativeness(probabilities: Array, prefix: int) -> Array:
    """Largest probability that each patch receives in each head: (B, heads, N, prefix + L) -> (B, heads, L)."""
    return probabilities[..., prefix:].max(axis=2)


class AttentionProfile(NamedTuple):
    """What a ViT attends to, on some images.

    Attributes:
      maps: attention among patches, rows normalised to 1, mean over images and heads (depth, L, L).
      ranges: `attention_range` of each block, mean over images and heads (depth,).
      patches: informativeness of each patch in each block, sum over heads (B, depth, L).
      heads: for each block informativeness of its heads, the sum over patches, mean over images (heads,).
    """

    maps: Array
    ranges: Array
    patches: Array
    heads: tuple[Array, ...]


def attention_profile(model: ViT, images: Array) -> AttentionProfile:
    """Runs a ViT and looks at its attention; a function of the bound module.

    Args:
      model: the bound ViT.
      images: (B, H, W, C); a few dozen calibrate the ratios well.

    Returns:
      The profile.

    Raises:
      ValueError: no images.

    Example:
      >>> model = ViT(num_classes=3, image_size=8, patch=2, width=8, depth=2, heads=2)
      >>> variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
      >>> profile = jax.jit(lambda v, x: model.apply(v, x, method=attention_profile))(variables, jnp.ones((5, 8, 8, 3)))
      >>> profile.maps.shape, profile.ranges.shape, profile.patches.shape, profile.heads[0].shape
      ((2, 16, 16), (2,), (5, 2, 16), (2,))
    """
    if images.shape[0] == 0:
        raise ValueError("images must be at least one, to be looked at, got none")
    prefix = model.prefix
    x = model.embed(images)
    maps, ranges, patches, heads = [], [], [], []
    for block in model.blocks:
        q, k, v = block.attention.project(block.norm1(x))
        e = block.attention.exponentials(q, k)
        x = block.feed_forward(block.add(x, block.attention.combine(e, v)))
        p = normalised(e)
        among = p[:, :, prefix:, prefix:]
        among = among / jnp.maximum(among.sum(axis=-1, keepdims=True), jnp.finfo(among.dtype).tiny)
        informativeness = patch_informativeness(p, prefix)
        maps.append(among.mean(axis=(0, 1)))
        ranges.append(attention_range(among, model.grid).mean())
        patches.append(informativeness.sum(axis=1))
        heads.append(informativeness.sum(axis=2).mean(axis=0))
    return AttentionProfile(jnp.stack(maps), jnp.stack(ranges), jnp.stack(patches, axis=1), tuple(heads))


def attention_range(attention: Array, grid: Sequence[int]) -> Array:
    """How far attention reaches: 0 if it stays near the diagonal, 1 if it lies on vertical stripes.

    With c_j = mean_i A_ij, the attention that patch j gets from all, of L patches::

        stripes  = 1/2 sum_j |c_j - 1/L|                             how unlike the patches are in what they get
        diagonal = max(0, mean_i sum over j near i of (A_ij - c_j))  what near patches get beyond that
        range    = stripes / (stripes + diagonal)                    1/2 where both are 0

    Near are the patch itself and its up to eight neighbours on the grid. The published method looks at a picture of the
    attention: a bright diagonal says that informative patches cannot be told yet, bright vertical lines say which they
    are. This is that look as a number.

    Args:
      attention: probabilities among patches, rows sum to 1 (..., L, L).
      grid: rows and columns of patches.

    Returns:
      (...).

    Raises:
      ValueError: attention of another number of patches.

    Example:
      >>> diagonal, stripe = jnp.eye(16), jnp.zeros((16, 16)).at[:, 5].set(1.0)
      >>> [round(float(attention_range(a, (4, 4))), 2) for a in (diagonal, stripe, (diagonal + stripe) / 2)]
      [0.0, 1.0, 0.61]
    """
    patches = grid[0] * grid[1]
    if attention.shape[-2:] != (patches, patches):
        raise ValueError(f"attention must be (..., {patches}, {patches}) on this grid, got {attention.shape}")
    rows, columns = np.divmod(np.arange(patches), grid[1])
    near = (abs(rows[:, None] - rows) <= 1) & (abs(columns[:, None] - columns) <= 1)
    received = attention.mean(axis=-2)
    stripes = 0.5 * jnp.abs(received - 1 / len(rows)).sum(axis=-1)
    beyond = (
        jnp.where(jnp.broadcast_to(near, attention.shape), attention - received[..., None, :], 0)
        .sum(axis=-1)
        .mean(axis=-1)
    )
    diagonal = jnp.maximum(beyond, 0)
    total = stripes + diagonal
    return jnp.where(total > 1e-6, stripes / jnp.maximum(total, 1e-6), 0.5)


def layer_ratios(ranges: Sequence[float] | Array, ratio: float, *, sharpness: float = 1.0) -> tuple[float, ...]:
    """Spreads a pruning ratio over the blocks, by attention range: long-range blocks drop more, short-range ones less.

    r_l is proportional to a power of the range of block l, as long as patches are left: at most 95 % are dropped in
    all. The scale is such that the fraction of patches gone, averaged over blocks, is the ratio.

    Args:
      ranges: of each block, not negative.
      ratio: mean over blocks of the fraction of patches gone after a block's cut, the share of patch computations
        saved.
      sharpness: the power. Ranges of a trained ViT lie close together; the larger it is, the more they tell apart.

    Returns:
      r_l of each block, for `CPViT` (and, with heads in place of patches, for `least_heads`).

    Raises:
      ValueError: a ratio that is negative or that dropping nearly all patches in the first blocks cannot reach;
        ranges that are negative, infinite or NaN; a sharpness that is not above 0 and finite.

    Example:
      >>> [round(r, 3) for r in layer_ratios([0.1, 0.1, 0.4, 0.4], 0.3)]
      [0.063, 0.063, 0.253, 0.253]
    """
    most = 0.95
    if not 0 < sharpness < math.inf:
        raise ValueError(f"sharpness must be above 0 and finite, got {sharpness}")
    found = np.asarray(ranges, float)
    if found.ndim != 1 or not found.size or not all(0 <= r < math.inf for r in found.tolist()):
        raise ValueError(f"ranges must be one of each block, finite and not negative, got {found.tolist()}")
    shape = np.cumsum((found / (found.max() or 1.0)) ** sharpness)
    limit = float((most * (shape > 0)).mean())
    if not 0 <= ratio <= limit:
        raise ValueError(f"ratio must be from 0 to {limit:.2f} with these ranges, got {ratio}")
    gone = np.zeros_like(shape)
    for full in range(len(shape) if ratio else 0):  # blocks, the last ones, after which all are gone that may go
        free = shape[: len(shape) - full]
        gone = np.full_like(shape, most)
        gone[: len(free)] = (ratio * len(shape) - most * full) * free / free.sum()
        if gone[len(free) - 1] <= most * (1 + 1e-9):
            break
    return tuple(np.diff(np.minimum(gone, most), prepend=0.0).tolist())


def least_heads(heads: Sequence[Array], ratios: float | Sequence[float]) -> tuple[tuple[int, ...], ...]:
    """The heads that each block keeps: those with the least informativeness so far go, from all later blocks.

    Args:
      heads: informativeness of each block's heads, `AttentionProfile.heads`; every block has as many.
      ratios: fraction of the heads that goes after each block, one number or one a block; they add up, and what adds
        up to less than a whole head waits.

    Returns:
      For each block the heads it keeps, ascending; the first block keeps all.

    Raises:
      ValueError: blocks with different numbers of heads, negative ratios, or ratios that leave no head.

    Example:
      >>> least_heads([jnp.array([3.0, 1.0]), jnp.array([0.0, 3.0]), jnp.array([1.0, 1.0])], (0, 0.5, 0))
      ((0, 1), (0, 1), (1,))
    """
    numbers = [len(h) for h in heads]
    if len(set(numbers)) != 1:
        raise ValueError(f"heads must be as many in every block to add up over blocks, got {numbers or 'no block'}")
    ratios = each_layer("ratios", ratios, len(heads))
    _check_ratios(ratios)
    if int(sum(ratios) * numbers[0] + 1e-6) >= numbers[0]:
        raise ValueError(f"ratios must sum to less than 1, so that one of {numbers[0]} heads is left, got {ratios}")
    alive, kept = list(range(numbers[0])), []
    scores, gone = np.zeros(numbers[0]), 0.0
    for informativeness, ratio in zip(heads, ratios, strict=True):
        kept.append(tuple(alive))
        scores, gone = scores + np.asarray(informativeness), gone + ratio
        left = numbers[0] - int(gone * numbers[0] + 1e-6)
        alive = sorted(sorted(alive, key=lambda head: -scores[head])[:left])
    return tuple(kept)


def cut_heads(model: ViT, variables: Any, kept: Sequence[Sequence[int]]) -> tuple[ViT, dict[str, Any]]:
    """The ViT that has only these heads, and its variables: ordinary narrower matrices, so that nothing is computed.

    CP-ViT chooses heads for each image. In a batch, that would take each image's own slices of the weights, which
    costs more than it saves; here all images share the choice, made on calibration images.

    Args:
      model: the ViT.
      variables: its ``{"params": ...}``.
      kept: for each block the heads it keeps, at least one.

    Returns:
      The narrower ViT and its variables.

    Raises:
      ValueError: a block without heads, heads that a block does not have, or the same head twice; variables that are
        not the model's.
      TypeError: a model that is not a ViT.

    Example:
      >>> model = ViT(num_classes=3, image_size=8, patch=2, width=8, depth=2, heads=2)
      >>> variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
      >>> small, cut = cut_heads(model, variables, ((0, 1), (1,)))
      >>> small.heads, cut["params"]["blocks_1"]["attention"]["qkv"]["kernel"].shape
      ((2, 1), (8, 12))
    """
    if not isinstance(model, ViT):
        raise TypeError(f"heads are cut out of a ViT, got {type(model).__name__}")
    widths = model.block_widths
    if len(kept) != model.depth:
        raise ValueError(f"kept must list the heads of {model.depth} blocks, got {len(kept)}")
    params = dict(params_of(variables))
    for i, (heads, width) in enumerate(zip(kept, widths, strict=True)):
        index = np.asarray(heads)
        if index.size == 0 or index.dtype.kind not in "iu" or not set(index.tolist()) <= set(range(width["heads"])):
            raise ValueError(f"kept[{i}] must name one or more of {width['heads']} heads, got {tuple(heads)}")
        if len(set(index.tolist())) < index.size:
            raise ValueError(f"kept[{i}] must name each head once, got {tuple(heads)}")
        block = params.get(f"blocks_{i}")
        if block is None:
            raise ValueError(f"variables must be those of the ViT, which have blocks_{i}, got params of {[*params]}")
        expected = width["width"], width["heads"] * (2 * width["qk_dim"] + width["v_dim"])
        found = block["attention"]["qkv"]["kernel"].shape
        if found != expected:
            raise ValueError(
                f"variables are not the model's: the qkv kernel of block {i} must be {expected}, got {found}"
            )
        qkv, proj = block["attention"]["qkv"], block["attention"]["proj"]
        ours = {n: rearrange(x, "... (h c) -> ... h c", h=width["heads"])[..., index, :] for n, x in qkv.items()}
        rows = rearrange(proj["kernel"], "(h c) d -> h c d", h=width["heads"])[index]
        attention = {
            "qkv": {name: rearrange(x, "... h c -> ... (h c)") for name, x in ours.items()},
            "proj": {**proj, "kernel": rearrange(rows, "h c d -> (h c) d")},
        }
        params[f"blocks_{i}"] = {**block, "attention": attention}
    settings: dict[str, Any] = {
        name: tuple(w[name] for w in widths) for name in ("qk_dim", "v_dim", "mlp_hidden", "scale")
    }
    return model.clone(heads=tuple(len(h) for h in kept), **settings), {"params": params}
