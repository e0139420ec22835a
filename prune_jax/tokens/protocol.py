"""What all token methods have in common: they wrap a ViT or Swin, and say what they computed and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from prune_jax.costs import flops
from prune_jax.models.vit import ViT
from prune_jax.timing import Latency, latencies
from prune_jax.tokens.state import NOBODY, positions
from prune_jax.tree import check_count


class Trace(NamedTuple):
    """What a token method did with a batch.

    Attributes:
      logits: (B, num_classes), float32.
      owner: for each image, block and patch, the patch whose token carried it through the block: itself, the patch it
        was merged into, or -1, nobody: dropped, or skipped by this block. (B, depth, patches) int32; of a Swin, whose
        stages have fewer and fewer patches, a tuple of (B, patches of the block), as are `kept` and `seen`.
    """

    logits: Array
    owner: Any

    @property
    def kept(self) -> Any:
        """Which patches have a token of their own in each block: (B, depth, patches) bool."""
        return jax.tree.map(lambda owner: owner == positions(owner), self.owner)

    @property
    def seen(self) -> Any:
        """Which patches some token carries through each block: (B, depth, patches) bool."""
        return jax.tree.map(lambda owner: owner != NOBODY, self.owner)


class TokenMethod(nn.Module):
    """A ViT or Swin that computes fewer tokens. Every method is such a module around any model, also a narrowed one.

    Its parameters are ``{"model": the model's, ...its own}``: `wrap` makes them from trained ones. Being an ordinary
    module, it trains, takes masks (`prune_jax.apply_masks`), is counted by `prune_jax.flops` and timed by
    `prune_jax.latency`. What is returned but not used costs nothing under jit.

    Attributes:
      model: the ViT; `SwinPatchSkip` wraps a Swin.
    """

    model: Any

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that `tokens` is said for: those that the ViT takes."""
        rows, columns = self.model.grid
        return rows * self.model.patch, columns * self.model.patch

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens, prefix included, that the MLP of each block computes: they are counted before anything runs."""
        raise NotImplementedError

    def trace(self, images: Array, *, train: bool = False) -> Trace:
        """Images (B, H, W, C) -> logits, and which tokens each block computed."""
        raise NotImplementedError

    def __call__(self, images: Array, *, train: bool = False) -> Array:
        """Images (B, H, W, C) -> logits (B, num_classes), float32."""
        return self.trace(images, train=train).logits


def check_model(method: TokenMethod, kind: type[nn.Module]) -> None:
    """Raises TypeError unless the method's model is of this kind."""
    if not isinstance(method.model, kind):
        raise TypeError(f"{type(method).__name__} wraps a {kind.__name__}, got {type(method.model).__name__}")


class TokenCosts(NamedTuple):
    """What a method costs beside its dense model.

    Attributes:
      tokens: per block, prefix included.
      flops: of one image, as `prune_jax.flops` counts.
      dense_flops: of one image, of the model alone.
      latency: for each batch size, seconds a batch.
      dense_latency: likewise, of the model alone.
    """

    tokens: tuple[int, ...]
    flops: int
    dense_flops: int
    latency: dict[int, Latency]
    dense_latency: dict[int, Latency]


def wrap(method: TokenMethod, variables: Any, key: Array) -> dict[str, Any]:
    """The variables of a method around a trained model: the model's as they are, the method's own drawn at random.

    Args:
      method: the method; its ``model`` is the trained one.
      variables: ``{"params": ...}`` of the model.
      key: for the method's own parts (predictors); used only where it has any.

    Returns:
      ``{"params": {"model": ..., ...}}``.

    Raises:
      ValueError: parameters of another model, or not of a model alone.

    Example:
      >>> from prune_jax.models import ViT
      >>> from prune_jax.tokens import DynamicViT
      >>> model = ViT(num_classes=3, image_size=8, patch=2, width=8, depth=2, heads=2)
      >>> variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
      >>> method = DynamicViT(model, stages=(1,), keep=0.5)
      >>> small = wrap(method, variables, jax.random.key(1))
      >>> sorted(small["params"]), method.tokens, jax.jit(method.apply)(small, jnp.zeros((5, 8, 8, 3))).shape
      (['model', 'predictors_0'], (17, 9), (5, 3))
    """
    given = params_of(variables)
    if "model" in given:
        raise ValueError("variables are those of a method; wrap takes the model's alone: {'params': params['model']}")
    images = jnp.zeros((1, *image_shape(method, variables)))
    wanted = jax.eval_shape(method.init, key, images)["params"]
    shapes = [
        {jax.tree_util.keystr(p, simple=True, separator="/"): np.shape(x) for p, x in jax.tree.leaves_with_path(tree)}
        for tree in (wanted["model"], given)
    ]
    if shapes[0] != shapes[1]:
        wrong = sorted(k for k in shapes[0].keys() | shapes[1].keys() if shapes[0].get(k) != shapes[1].get(k))
        first = wrong[0]
        raise ValueError(
            f"variables are not those of the method's model: {first!r} is {shapes[1].get(first, 'missing')}, "
            f"the model has {shapes[0].get(first, 'no such leaf')}"
        )
    own = jax.jit(method.init)(key, images)["params"] if wanted.keys() != {"model"} else {}
    return {"params": {**own, "model": given}}


def token_costs(
    method: TokenMethod, variables: Any, *, batches: tuple[int, ...] = (1, 64), repeats: int = 10
) -> TokenCosts:
    """Tokens per block, FLOPs, and measured latency of a method and of its model alone.

    The dense model and the method take turns, call by call, so that both meet the same machine.

    Args:
      method: the method.
      variables: its variables.
      batches: batch sizes to time; empty times nothing.
      repeats: measured calls of each.

    Returns:
      The costs.

    Raises:
      ValueError: variables that are not a method's, a batch size or `repeats` below 1.
    """
    params = params_of(variables)
    if "model" not in params:
        raise ValueError(f"variables must be the method's, as wrap makes them, got params of {', '.join(params)}")
    check_count("repeats", repeats, 1)
    for batch in batches:
        check_count("batches", batch, 1)
    dense = {"params": params["model"]}
    shape = image_shape(method, dense)
    one = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    times: dict[int, Latency] = {}
    dense_times: dict[int, Latency] = {}
    for batch in batches:
        images = jnp.zeros((batch, *shape))
        calls = {"dense": (method.model.apply, (dense, images)), "method": (method.apply, (variables, images))}
        found = latencies(calls, repeats=repeats)
        dense_times[batch], times[batch] = found["dense"], found["method"]
    return TokenCosts(
        method.tokens,
        flops(method.apply, variables, one),
        flops(method.model.apply, dense, one),
        times,
        dense_times,
    )


def image_shape(method: TokenMethod, variables: Any) -> tuple[int, int, int]:
    """Height, width and channels of the images that a method takes, its model having these variables.

    Raises:
      ValueError: they have no patch embedding.
    """
    params = params_of(variables)
    if "embedding" not in params:
        raise ValueError(f"variables must be those of a ViT or Swin, got params of {', '.join(params) or 'nothing'}")
    channels = np.shape(params["embedding"]["kernel"])[0] // method.model.patch**2
    return *method.image_size, channels


def params_of(variables: Any) -> Mapping[str, Any]:
    """The parameters among variables.

    Raises:
      ValueError: there are none, as where the bare parameters are given.
    """
    if not isinstance(variables, Mapping) or not isinstance(variables.get("params"), Mapping):
        got = ", ".join(map(str, variables)) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(f"variables must be {{'params': ...}}, got {got or 'nothing'}")
    return variables["params"]


def patches_of(model: ViT) -> int:
    """Number of patches of an image."""
    return math.prod(model.grid)
