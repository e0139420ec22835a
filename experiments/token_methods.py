"""The token methods that a study compares, each at any keep rate on one trained ViT."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from experiments.trained import Base
from experiments.training import PyTree
from prune_jax.models import ViT
from prune_jax.tokens import (
    CPViT,
    DynamicViT,
    PatchSkip,
    TokenMethod,
    ToMe,
    attention_profile,
    capacities,
    merge_counts,
    wrap,
)

Ratios = Callable[[float], tuple[float, ...]]
Series = Literal["tome", "cp", "cp-merge", "dynamic", "dynamic-merge", "skip"]
TITLES: dict[str, str] = {
    "tome": "ToMe",
    "cp": "CP-ViT",
    "cp-merge": "CP-ViT, merging",
    "dynamic": "DynamicViT",
    "dynamic-merge": "DynamicViT, merging",
    "skip": "patch skipping",
}


class Profile(NamedTuple):
    """What calibration images show of a base.

    Attributes:
      ranges: attention range of each block.
      maps: attention among patches, mean over images and heads (depth, L, L).
      patches: informativeness of each patch in each block (B, depth, L).
      heads: informativeness of each block's heads.
    """

    ranges: tuple[float, ...]
    maps: np.ndarray
    patches: np.ndarray
    heads: tuple[np.ndarray, ...]


def vit_of(base: Base) -> ViT:
    """The base's model.

    Raises:
      ValueError: it is a Swin.
    """
    if not isinstance(base.model, ViT):
        raise ValueError("this study compares token methods on a ViT; the base is a Swin")
    return base.model


def calibration(base: Base, images: int) -> jax.Array:
    """The first prepared images of the train split."""
    return base.prepare(jnp.asarray(base.train.images[:images]))


def profile(base: Base, images: int) -> Profile:
    """Looks at the base's attention on so many images."""
    model, inputs = vit_of(base), calibration(base, images)
    seen = jax.jit(lambda params, x: model.apply({"params": params}, x, method=attention_profile))(base.params, inputs)
    seen = jax.device_get(seen)
    return Profile(tuple(map(float, seen.ranges)), seen.maps, seen.patches, tuple(seen.heads))


def stages(model: ViT) -> tuple[int, ...]:
    """The blocks before which DynamicViT decides: as soon as a quarter, half and three quarters of them have run."""
    return tuple(sorted({min(math.ceil(model.depth * quarter / 4), model.depth - 1) for quarter in (1, 2, 3)}))


def scorers_of(model: ViT) -> PatchSkip:
    """The patch-skipping method whose scorers are trained."""
    return PatchSkip(model)


def predictors_of(model: ViT, keep: float, *, merge: bool = False) -> DynamicViT:
    """The DynamicViT whose predictors are trained."""
    return DynamicViT(model, stages(model), keep, merge)


def build(series: Series, keep: float, model: ViT, ratios: Ratios, scores: np.ndarray) -> TokenMethod:
    """A method at a keep rate.

    What the rate means: DynamicViT keeps that fraction of its tokens at each of its stages (report A); of the others it
    is the fraction of patches that a block computes, mean over blocks.

    Args:
      series: which method.
      keep: the rate, in (0, 1].
      model: the base's ViT.
      ratios: CP-ViT's of each block, of the fraction that is gone in the mean.
      scores: of the scorers on calibration images (B, depth, patches).
    """
    if series == "tome":
        return ToMe(model, merge_counts(model.grid[0] * model.grid[1], model.depth, keep))
    if series in ("cp", "cp-merge"):
        return CPViT(model, ratios(1 - keep), merge=series == "cp-merge")
    if series in ("dynamic", "dynamic-merge"):
        return predictors_of(model, keep, merge=series == "dynamic-merge")
    return PatchSkip(model, capacities(scores, keep))


def reaches(series: Series, keep: float, model: ViT) -> bool:
    """Whether a method can keep so few: only ToMe has a least."""
    return series != "tome" or keep >= least_merged(model)


def least_merged(model: ViT) -> float:
    """The lowest keep rate of ToMe, which halves the tokens at most, block by block."""
    patches = model.grid[0] * model.grid[1]
    left = [patches]
    for _ in range(model.depth):
        left.append(left[-1] - left[-1] // 2)
    return sum(left[1:]) / (model.depth * patches)


def own_parts(params: PyTree) -> dict[str, Any]:
    """What a method has beside the ViT."""
    return {name: part for name, part in params.items() if name != "model"}


def begin(method: TokenMethod, base: Base, seed: int) -> PyTree:
    """A method's parameters around the base's, its own drawn at random."""
    return cast(PyTree, wrap(method, {"params": base.params}, jax.random.key(seed))["params"])
