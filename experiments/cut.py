"""Cutting parts of a trained classifier: which weights go, and a short retraining of what is left."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments import classification
from experiments.classification import Prepare
from experiments.training import PyTree
from optim_jax import path_masks
from optim_jax.penalties import leaf_name
from prune_jax import apply_masks, keep_masks, make_masks


class Retraining(NamedTuple):
    """A short retraining; hashable, so that it is compiled once.

    Attributes:
      model: the network.
      prepare: as in training.
      augment: as in training.
      adam: with Adam instead of SGD with momentum 0.9.
      rate: learning rate at the start; decays to zero.
      steps: how many.
      batch_size: examples a step, drawn at random.
    """

    model: nn.Module
    prepare: Prepare
    augment: Callable[[Array, Array], Array] | None
    adam: bool
    rate: float
    steps: int
    batch_size: int


def layers_of(params: PyTree) -> dict[str, tuple[int, ...]]:
    """The layers that can be cut, in the order of the network, and the shapes of their kernels."""
    named = jax.tree_util.tree_leaves_with_path(params)
    return {leaf_name(path).removesuffix("/kernel"): leaf.shape for path, leaf in named if leaf.ndim in (2, 4)}


def path_cut(params: PyTree, opt_state: Any, layers: Collection[str], fraction: float) -> PyTree:
    """Masks that cut a fraction of each layer's groups, the lowest on DessiLBI's path first; None elsewhere."""
    return path_masks(params, opt_state, fraction, layers=_among(layers))


def magnitude_cut(params: PyTree, layers: Collection[str], fraction: float) -> PyTree:
    """As `path_cut`, by size: filters of convolutions by their norm, weights of dense layers by themselves."""
    chosen = _among(layers)

    def score(path: Any, w: Array) -> Array | None:
        if w.ndim not in (2, 4) or not chosen(leaf_name(path)):
            return None
        return jnp.abs(w) if w.ndim == 2 else jnp.sqrt(jnp.sum(jnp.square(w), (0, 1, 2), keepdims=True))

    masks = make_masks(jax.tree_util.tree_map_with_path(score, params), fraction, scope="local")
    return jax.tree.map(lambda w, m: None if m is None else jnp.broadcast_to(m, w.shape), params, masks)


def fraction_of_all(params: PyTree, layers: Collection[str], total: float) -> float:
    """The smallest fraction which, cut from each of the layers, removes at least `total` of all parameters.

    Raises:
      ValueError: the layers do not have as many.
    """
    shapes = [shape for name, shape in layers_of(params).items() if name in layers]
    groups = [
        (shape[-1], int(np.prod(shape[:-1]))) if len(shape) == 4 else (int(np.prod(shape)), 1) for shape in shapes
    ]
    everything = sum(leaf.size for leaf in jax.tree.leaves(params))
    for fraction in np.linspace(0, 1, 10_001):
        if sum(int(fraction * count) * size for count, size in groups) >= total * everything:
            return float(fraction)
    raise ValueError(
        f"total={total}: {', '.join(layers)} hold {sum(c * s for c, s in groups) / everything:.3f} of all parameters"
    )


def removed(params: PyTree, masks: PyTree) -> float:
    """Fraction of all parameters that the masks cut."""
    cut = sum(int(mask.size - jnp.sum(mask)) for mask in jax.tree.leaves(masks))
    return cut / sum(leaf.size for leaf in jax.tree.leaves(params))


@partial(jax.jit, static_argnames="plan")
def retrain(plan: Retraining, variables: PyTree, masks: PyTree, images: Array, labels: Array, key: Array) -> PyTree:
    """Trains what the masks leave; what they cut stays zero.

    Args:
      plan: how.
      variables: {"params", "batch_stats"}.
      masks: as `path_cut` gives them.
      images: the training split, (N, ...).
      labels: int (N,).
      key: of the batches.

    Returns:
      The variables after it.
    """
    rate = optax.linear_schedule(plan.rate, 0.0, plan.steps)
    optimizer = keep_masks(masks, optax.adam(rate) if plan.adam else optax.sgd(rate, momentum=0.9))
    step = classification.train_step(plan.model, optimizer, plan.prepare, augment=plan.augment)
    params = apply_masks(variables["params"], masks)
    state = classification.State(params, variables["batch_stats"], optimizer.init(params), jnp.zeros([], jnp.int32))

    def body(state: classification.State, key: Array) -> tuple[classification.State, None]:
        batch_key, step_key = jax.random.split(key)
        index = jax.random.randint(batch_key, (plan.batch_size,), 0, len(labels))
        return step(state, {"image": images[index], "label": labels[index]}, step_key)[0], None

    return jax.lax.scan(body, state, jax.random.split(key, plan.steps))[0].variables


def _among(layers: Collection[str]) -> Callable[[str], bool]:
    return lambda path: path.removesuffix("/kernel") in layers and path.endswith("/kernel")
