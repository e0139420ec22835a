"""Pruning along DessiLBI's path: what came alive late, and is small, goes first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optim_jax.dtypes import wide
from optim_jax.path import activation_order, masked
from optim_jax.penalties import leaf_name


def path_masks(
    params: Any,
    state: Any,
    fraction: float,
    *,
    scope: str = "local",
    layers: Callable[[str], bool] | None = None,
    resolution: int = 1,
    biases: bool = False,
) -> Any:
    """Return masks that cut the groups lowest on the path: late to come alive, and of small norm.

    A group's place is ||W_g||_2 - record_g, as in the official code, where the record counts epochs. Here it counts
    `resolution` steps, computed so that the norm still tells apart groups of one record after millions of steps.

    Args:
      params: the weights W.
      state: as for `sparse_params`.
      fraction: what to cut, in [0, 1].
      scope: "local" cuts int(fraction * groups) groups of each leaf; "global" ranks the groups of all leaves together
        and cuts as many as fit into int(fraction * weights) weights.
      layers: which leaves to prune, a function of the path such as `"conv3/kernel"`; by default all structured ones.
      resolution: steps that count as one in the record; the steps of an epoch make the official order.
      biases: also cut the bias of every output unit none of whose weights is left, so that it puts out exactly 0: the
        leaf `bias` beside the kernel, where there is one, and with one entry for each index of the kernel's last axis.
        The official code has it for convolutions, as `prune_bias`, and its pruning example turns it on. The shift of a
        normalisation that comes after is another leaf, and stays.

    Returns:
      A pytree of bool arrays like `params`, True = keep; None at leaves that are not pruned.

    Raises:
      ValueError: if `fraction`, `scope` or `resolution` is out of range, if `layers` picks no structured leaf, or if
        the optimizer was built with `record=False`.

    Example:
      >>> import optax, optim_jax
      >>> params = {"kernel": jnp.array([[3.0, 0.1], [1.5, 0.2]])}
      >>> optimizer = optim_jax.dessilbi(optax.sgd(1.0), 0.1, mu=0.2)
      >>> state = optimizer.init(params)
      >>> for _ in range(2):  # with weights that the loss holds
      ...     _, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
      >>> print(path_masks(params, state, 0.5)["kernel"])  # 3 came alive in the first step, 1.5 in the second
      [[ True False] [ True False]]
      >>> print(path_masks(params, state, 0.75)["kernel"])
      [[ True False] [False False]]

    Reference: Fu et al., "DessiLBI", ICML 2020, arXiv:2007.02010, and its published code.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], got {fraction}.")
    if scope not in ("local", "global"):
        raise ValueError(f"scope must be 'local' or 'global', got {scope!r}.")
    if resolution < 1:
        raise ValueError(f"resolution must be a number of steps >= 1, got {resolution}.")
    tree: Any = jax.tree.structure(params)
    names = tree.flatten_up_to(jax.tree_util.tree_map_with_path(lambda path, _: leaf_name(path), params))
    weights, records = tree.flatten_up_to(params), tree.flatten_up_to(activation_order(state))
    structured = [i for i, record in enumerate(records) if record is not None]
    pruned = [i for i in structured if layers is None or layers(names[i])]
    if not pruned:
        raise ValueError(f"layers picks no structured leaf; they are {[names[i] for i in structured]}.")

    masks: list[Array | None] = [None] * len(names)
    for ranked in [pruned] if scope == "global" else [[i] for i in pruned]:
        keys = [_rank_keys(weights[i], records[i], resolution) for i in ranked]
        counts = [records[i].size for i in ranked]
        size_of = {i: weights[i].size // records[i].size if scope == "global" else 1 for i in ranked}
        sizes = np.repeat([size_of[i] for i in ranked], counts)
        whole, rest = (jnp.concatenate(parts) for parts in zip(*keys, strict=True))
        keep = jnp.split(~_cut_lowest(whole, rest, sizes, fraction), np.cumsum(counts)[:-1])
        for i, part in zip(ranked, keep, strict=True):
            masks[i] = jnp.broadcast_to(part.reshape(records[i].shape), weights[i].shape)
    for i in pruned if biases else []:
        bias, mask = _beside(names, i, "bias"), masks[i]
        units = jnp.any(mask, axis=tuple(range(mask.ndim - 1))) if mask is not None else None
        if bias is not None and units is not None and weights[bias].shape == units.shape:
            other = masks[bias]
            masks[bias] = units if other is None else units & other
    return tree.unflatten(masks)


def prune_by_path(
    params: Any,
    state: Any,
    fraction: float,
    *,
    scope: str = "local",
    layers: Callable[[str], bool] | None = None,
    resolution: int = 1,
    biases: bool = False,
) -> Any:
    """Return the weights with the groups lowest on the path set to zero.

    Args:
      params: the weights W.
      state: as for `sparse_params`.
      fraction: what to cut, in [0, 1].
      scope: as for `path_masks`, like `layers`, `resolution` and `biases`.
      layers: see there.
      resolution: see there.
      biases: see there.

    Returns:
      A pytree like `params`; its masks are `path_masks` of the same arguments.

    Raises:
      ValueError: as `path_masks`.

    Example:
      >>> import optax, optim_jax
      >>> params = {"kernel": jnp.array([[3.0, 0.1], [1.5, 0.2]])}
      >>> optimizer = optim_jax.dessilbi(optax.sgd(1.0), 0.1, mu=0.2)
      >>> state = optimizer.init(params)
      >>> for _ in range(2):  # with weights that the loss holds
      ...     _, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
      >>> print(prune_by_path(params, state, 0.75)["kernel"])
      [[3. 0.] [0. 0.]]
    """
    masks = path_masks(params, state, fraction, scope=scope, layers=layers, resolution=resolution, biases=biases)
    return masked(params, masks)


def _beside(names: list[str], index: int, last: str) -> int | None:
    """Return where the leaf is whose path is that of leaf `index` but for its last part, or None."""
    parent, slash, _ = names[index].rpartition("/")
    sibling = parent + slash + last
    return names.index(sibling) if sibling in names else None


def _rank_keys(w: Array, record: Array, resolution: int) -> tuple[Array, Array]:
    """Return norm - record, one entry a group, exactly: its whole part as int32 and its fraction in [0, 1)."""
    summed = tuple(axis for axis in range(w.ndim) if record.shape[axis] == 1)
    norm = jnp.sqrt(jnp.sum(jnp.square(jnp.abs(wide(w))), axis=summed)).ravel()
    whole = jnp.floor(norm)
    return whole.astype(jnp.int32) - (record.ravel() - 1) // resolution, norm - whole


def _cut_lowest(whole: Array, rest: Array, sizes: np.ndarray, fraction: float) -> Array:
    """Return which groups to cut: from the lowest up, while their sizes sum to int(fraction * all) at most."""
    lowest_first = jnp.lexsort((rest, whole))
    fits = jnp.cumsum(jnp.asarray(sizes)[lowest_first]) <= int(fraction * sizes.sum())
    return jnp.zeros(sizes.shape, bool).at[lowest_first].set(fits)
