"""Pruning before training: a network as it is initialised, what each criterion keeps of it, and its tangent kernel."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.files import write_atomically
from experiments.training import PyTree
from prune_jax import apply_masks, exponential, iterative_masks, make_masks, ntk_spectrum, scores

Method = Literal["random", "magnitude", "snip", "grasp", "synflow", "px", "px-balanced"]
TITLES: dict[str, str] = {
    "dense": "dense",
    "random": "random",
    "magnitude": "magnitude",
    "snip": "SNIP",
    "grasp": "GraSP",
    "synflow": "SynFlow",
    "px": "PX",
    "px-balanced": "PX, balanced",
}
ITERATIVE = ("synflow", "px", "px-balanced")  # scored anew round by round, as published; the others in one shot
_MOMENTUM = 0.9  # of the running averages in all of `experiments.models`


class Initial(NamedTuple):
    """A network as it is initialised, and the examples that it is judged by.

    Attributes:
      model: called as `model.apply(variables, x, train=...)`.
      params: its parameters.
      batch_stats: running statistics as they start, mean 0 and variance 1; empty without batch normalisation.
      inputs: prepared examples (B, ...).
      labels: int (B,).
      key: of the random scores.
    """

    model: nn.Module
    params: PyTree
    batch_stats: PyTree
    inputs: Array
    labels: Array
    key: Array

    def logits(self, params: PyTree, inputs: Array, batch_stats: PyTree | None = None) -> Array:
        """(B, ...) -> (B, classes), normalised by given statistics, else by the running ones as they start."""
        stats = self.batch_stats if batch_stats is None else batch_stats
        apply: Callable[..., Any] = self.model.apply
        found: Array = apply({"params": params, "batch_stats": stats}, inputs, train=False)
        return found

    def training_logits(self, params: PyTree, inputs: Array) -> Array:
        """(B, ...) -> (B, classes), normalised by the batch as in training; nothing is dropped at random."""
        return self._train(params, inputs, self.batch_stats)[0]

    def statistics(self, params: PyTree) -> PyTree:
        """The mean and variance of the examples at each batch normalisation, of a network with these parameters."""
        averages = self._train(params, self.inputs, jax.tree.map(jnp.zeros_like, self.batch_stats))[1]
        return jax.tree.map(lambda average: average / (1 - _MOMENTUM), averages)

    def _train(self, params: PyTree, inputs: Array, stats: PyTree) -> tuple[Array, PyTree]:
        apply: Callable[..., Any] = self.model.apply
        logits, updated = apply({"params": params, "batch_stats": stats}, inputs, train=True, mutable=["batch_stats"])
        return logits, updated.get("batch_stats", {})


def keep(initial: Initial, method: Method, sparsity: float, rounds: int) -> PyTree:
    """Masks that leave the kernels of a network with this sparsity, all layers competing.

    SNIP and GraSP see the loss of training, with batch statistics. SynFlow sees the normalisations as they start, mean
    0 and variance 1, as published. PX needs each normalisation to be a fixed factor: here that of the examples'
    statistics in the network as it is in each round, so that a branch keeps, among the paths, the weight that
    normalisation gives it.

    Args:
      initial: the network.
      method: the criterion.
      sparsity: fraction of the kernels' weights to remove, in [0, 1].
      rounds: of the criteria in `ITERATIVE`.
    """
    score = scorer(initial, method)
    if method in ITERATIVE:
        return iterative_masks(score, initial.params, exponential(sparsity, rounds))
    return make_masks(jax.jit(score)(initial.params), sparsity)


def scorer(initial: Initial, method: Method) -> Callable[[PyTree], PyTree]:
    """The criterion as a function of the parameters alone."""

    def px(params: PyTree, *, balance: bool) -> PyTree:
        stats = initial.statistics(params)
        return scores.px(lambda p, x: initial.logits(p, x, stats), params, initial.inputs, balance=balance)

    found: dict[str, Callable[[PyTree], PyTree]] = {
        "random": lambda params: scores.random(initial.key, params),
        "magnitude": scores.magnitude,
        "snip": lambda params: scores.snip(initial.training_logits, params, initial.inputs, initial.labels),
        "grasp": lambda params: scores.grasp(initial.training_logits, params, initial.inputs, initial.labels),
        "synflow": lambda params: scores.synflow(initial.logits, params, (1, *initial.inputs.shape[1:])),
        "px": partial(px, balance=False),
        "px-balanced": partial(px, balance=True),
    }
    return found[method]


def spectrum(initial: Initial, masks: PyTree, examples: int, *, frozen: bool = False, chunk: int = 8) -> np.ndarray:
    """Eigenvalues of the neural tangent kernel of what is left of a network, largest first: (examples * classes,).

    Args:
      initial: the network.
      masks: what is left.
      examples: how many of its examples the kernel is of.
      frozen: normalise by the statistics that all the network's examples have in the whole network, as the paths that
        PX sums do at first; else by those in what is left, as training does, which magnifies what is nearly dead.
      chunk: examples at a time.
    """

    @jax.jit
    def eigenvalues(masked: PyTree, whole: PyTree, inputs: Array) -> Array:
        stats = initial.statistics(whole if frozen else masked)
        # A cut weight does not move: its derivative is zero through the masks.
        return ntk_spectrum(lambda p, x: initial.logits(apply_masks(p, masks), x, stats), masked, inputs, chunk=chunk)

    return np.asarray(eigenvalues(apply_masks(initial.params, masks), initial.params, initial.inputs[:examples]))


def kept_masks(path: Path, params: PyTree, make: Callable[[], PyTree]) -> PyTree:
    """Masks of a file, made and written if it is not there.

    Args:
      path: `.npz` file.
      params: what they mask.
      make: makes them.
    """

    def name(leaf_path: tuple[Any, ...]) -> str:
        return jax.tree_util.keystr(leaf_path, simple=True, separator="/")

    if not path.exists():
        masks = jax.device_get(make())
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{name(p): mask for p, mask in jax.tree_util.tree_leaves_with_path(masks)})
        write_atomically(path, buffer.getvalue())
    with np.load(path) as arrays:
        found = {key: jnp.asarray(arrays[key]) for key in arrays.files}
    return jax.tree_util.tree_map_with_path(lambda p, _: found.get(name(p)), params)
