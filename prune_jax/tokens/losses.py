"""What DynamicViT is trained on: labels, the dense model's logits and tokens, and how many tokens are kept."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from prune_jax.distillation import distillation_loss
from prune_jax.scores.loss import cross_entropy
from prune_jax.tokens.dynamic_vit import Masked
from prune_jax.tree import widen


def dynamic_vit_loss(
    output: Masked,
    labels: Array,
    teacher_logits: Array,
    teacher_patches: Array,
    fractions: Sequence[float],
    *,
    ratio: float = 2.0,
    distillation: float = 0.5,
    tokens: float = 0.5,
) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy + ratio L_ratio + distillation KL(teacher || student) + tokens L_tokens: equation 13 of the paper.

    Args:
      output: of `DynamicViT.masked`.
      labels: (B,) integers.
      teacher_logits: of the dense model (B, num_classes).
      teacher_patches: its patch tokens after the last norm (B, N, D), of `teach`.
      fractions: what each stage shall leave, `DynamicViT.fractions`.
      ratio: weight of `ratio_loss`.
      distillation: weight of the distillation of classes.
      tokens: weight of `token_distillation`.

    Returns:
      The scalar loss, and its four parts before weighting: "labels", "ratio", "classes", "tokens".
    """
    parts = {
        "labels": cross_entropy(output.logits, labels),
        "ratio": ratio_loss(output.decisions, fractions),
        "classes": distillation_loss(output.logits, teacher_logits).mean(),
        "tokens": token_distillation(output.patches, teacher_patches, output.decisions[:, -1]),
    }
    total = parts["labels"] + ratio * parts["ratio"] + distillation * parts["classes"] + tokens * parts["tokens"]
    return total, parts


def ratio_loss(decisions: Array, fractions: Sequence[float]) -> Array:
    """Squared distance of the fraction of kept patches from the wanted one, mean over images and stages.

    Args:
      decisions: masks after each stage (B, stages, N).
      fractions: wanted after each stage.

    Returns:
      A scalar.

    Raises:
      ValueError: not one fraction a stage.

    Example:
      >>> float(ratio_loss(jnp.array([[[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]]), (0.5, 0.75)))
      0.125
    """
    if decisions.ndim != 3 or np.shape(fractions) != decisions.shape[1:2]:
        raise ValueError(
            f"decisions must be (B, stages, N) with a fraction for each stage, got decisions {decisions.shape} and "
            f"{np.size(fractions)} fractions"
        )
    return jnp.mean((decisions.mean(axis=-1) - jnp.asarray(fractions)[None]) ** 2)


def token_distillation(patches: Array, teacher_patches: Array, mask: Array) -> Array:
    """Mean squared difference of the kept patch tokens from the dense model's, over all kept tokens of the batch.

    Args:
      patches: (B, N, D).
      teacher_patches: (B, N, D); no gradient flows to them.
      mask: 1 = kept (B, N); no gradient flows to it.

    Returns:
      A scalar, 0 if nothing is kept.

    Raises:
      ValueError: shapes that do not belong together.
    """
    if patches.ndim != 3 or patches.shape != teacher_patches.shape or mask.shape != patches.shape[:2]:
        raise ValueError(
            f"patches and teacher_patches must be (B, N, D) with a mask (B, N), got {patches.shape}, "
            f"{teacher_patches.shape} and {mask.shape}"
        )
    patches, teacher_patches = widen((patches, teacher_patches))
    kept = lax.stop_gradient(mask) > 0
    squares = ((patches - lax.stop_gradient(teacher_patches)) ** 2).mean(axis=-1)
    return jnp.where(kept, squares, 0).sum() / jnp.maximum(kept.sum(), 1)
