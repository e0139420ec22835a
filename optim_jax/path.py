"""What DessiLBI's path tells: the sparse weights, the order in which groups came alive, and pruning by that order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from optim_jax.dessilbi import DessiLBIState
from optim_jax.penalties import Penalty, leaf_name, map_structured


def sparse_params(state: Any) -> Any:
    """Return Gamma = kappa * prox(Z), the sparse shadow of the weights.

    Args:
      state: a `DessiLBIState`, or any optimizer state that holds exactly one (`optax.chain`, `optax.masked`, ...).

    Returns:
      A pytree like the parameters, in Z's dtype; None at unstructured leaves.

    Raises:
      ValueError: if `state` holds no `DessiLBIState`, or more than one.

    Example:
      >>> import optax, optim_jax
      >>> state = optim_jax.dessilbi(optax.sgd(1.0), 0.1).init({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)})
      >>> jax.tree.map(jnp.shape, sparse_params(state))
      {'bias': None, 'kernel': (2, 2)}

    Reference: Fu et al., "DessiLBI", ICML 2020, arXiv:2007.02010.
    """
    state = _find(state)
    return map_structured(lambda p, z: state.gamma_scale.astype(z.dtype) * p.prox(z), state.penalty, state.z)


def support_masks(state: Any) -> Any:
    """Return where Gamma is nonzero.

    Args:
      state: as for `sparse_params`.

    Returns:
      A pytree of bool arrays like the parameters, True = keep; None at unstructured leaves.

    Example:
      >>> import optax, optim_jax
      >>> state = optim_jax.dessilbi(optax.sgd(1.0), 0.1).init({"kernel": jnp.ones((2, 2))})
      >>> print(support_masks(state)["kernel"])
      [[False False] [False False]]
    """
    return jax.tree.map(lambda gamma: gamma != 0, sparse_params(state))


def restrict_to_support(params: Any, state: Any) -> Any:
    """Return W* : the weights where Gamma is nonzero, zero elsewhere; unstructured leaves as they are.

    Args:
      params: the weights W.
      state: as for `sparse_params`.

    Returns:
      A pytree like `params`.

    Example:
      >>> import optax, optim_jax
      >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
      >>> state = optim_jax.dessilbi(optax.sgd(1.0), 0.1).init(params)
      >>> print(restrict_to_support(params, state))
      {'bias': Array([1., 1.], dtype=float32), 'kernel': Array([[0., 0.], [0., 0.]], dtype=float32)}
    """
    return _masked(params, support_masks(state))


def layer_sparsity(state: Any) -> Any:
    """Return the fraction of each leaf's Gamma that is zero: the solution path, one point a call.

    Costs one proximal map of Z. Return it from the body of a `lax.scan` and the whole path comes out stacked, one
    float32 a leaf and step.

    Args:
      state: as for `sparse_params`.

    Returns:
      A pytree like the parameters of float32 scalars in [0, 1]; None at unstructured leaves.

    Example:
      >>> import optax, optim_jax
      >>> optimizer, params = optim_jax.dessilbi(optax.sgd(1.0), 0.1, mu=0.1), {"kernel": jnp.array([[1.0, 0.2]])}
      >>> def body(carry, _):
      ...     params, state = carry
      ...     updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
      ...     return (optax.apply_updates(params, updates), state), layer_sparsity(state)
      >>> _, path = jax.lax.scan(body, (params, optimizer.init(params)), length=4)
      >>> print(path["kernel"])
      [1. 1. 1. 1.]
    """
    state = _find(state)
    return map_structured(lambda p, z: jnp.mean(p.prox(z) == 0, dtype=jnp.float32), state.penalty, state.z)


def activation_order(state: Any) -> Any:
    """Return after how many steps each group's Gamma was first nonzero: the smaller, the more important.

    Args:
      state: as for `sparse_params`.

    Returns:
      A pytree like the parameters of int32 arrays that broadcast to them, one entry a group: (1, 1, 1, filters) for the
      output filters of an HWIO kernel. `NEVER` (the largest int32) for a group that has not been active; None at
      unstructured leaves.

    Raises:
      ValueError: if the optimizer was built with `record=False`.

    Example:
      >>> import optax, optim_jax
      >>> state = optim_jax.dessilbi(optax.sgd(1.0), 0.1).init({"kernel": jnp.ones((3, 3, 4, 2))})
      >>> bool(jnp.all(activation_order(state)["kernel"] == optim_jax.NEVER))
      True
    """
    state = _find(state)
    if state.first_active is None:
        raise ValueError("state has no record of activations: build it with dessilbi(..., record=True).")

    # The update records the activation it finds in the old Z, whose proximal map it needs anyway; the newest is here.
    def newest(p: Penalty, first: Array, z: Array) -> Array:
        return jnp.where(p.active(z), jnp.minimum(first, state.step), first)

    return map_structured(newest, state.penalty, state.first_active, state.z)


def path_masks(
    params: Any,
    state: Any,
    fraction: float,
    *,
    scope: str = "local",
    layers: Callable[[str], bool] | None = None,
    resolution: int = 1,
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

    Returns:
      A pytree of bool arrays like `params`, True = keep; None at leaves that are not pruned.

    Raises:
      ValueError: if `fraction`, `scope` or `resolution` is out of range, if `layers` picks no structured leaf, or if
        the optimizer was built with `record=False`.

    Example:
      >>> import optax, optim_jax
      >>> params = {"kernel": jnp.array([[3.0, 1.0], [2.0, 4.0]])}
      >>> state = optim_jax.dessilbi(optax.sgd(1.0), 0.1).init(params)
      >>> print(path_masks(params, state, 0.5)["kernel"])
      [[ True False] [False  True]]

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
    return tree.unflatten(masks)


def prune_by_path(
    params: Any,
    state: Any,
    fraction: float,
    *,
    scope: str = "local",
    layers: Callable[[str], bool] | None = None,
    resolution: int = 1,
) -> Any:
    """Return the weights with the groups lowest on the path set to zero.

    Args:
      params: the weights W.
      state: as for `sparse_params`.
      fraction: what to cut, in [0, 1].
      scope: as for `path_masks`, like `layers` and `resolution`.
      layers: see there.
      resolution: see there.

    Returns:
      A pytree like `params`; its masks are `path_masks` of the same arguments.

    Raises:
      ValueError: as `path_masks`.

    Example:
      >>> import optax, optim_jax
      >>> params = {"kernel": jnp.array([[3.0, 1.0], [2.0, 4.0]])}
      >>> state = optim_jax.dessilbi(optax.sgd(1.0), 0.1).init(params)
      >>> print(prune_by_path(params, state, 0.5)["kernel"])
      [[3. 0.] [0. 4.]]
    """
    masks = path_masks(params, state, fraction, scope=scope, layers=layers, resolution=resolution)
    return _masked(params, masks)


def _find(state: Any) -> DessiLBIState:
    is_ours = lambda node: isinstance(node, DessiLBIState)  # noqa: E731
    found = [node for node in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(node)]
    if len(found) != 1:
        raise ValueError(f"state must hold exactly one DessiLBIState, got {len(found)} in a {type(state).__name__}.")

    def unmasked(tree: Any) -> Any:
        """Turn the holes that `optax.masked` and `optax.partition` leave into unstructured leaves."""
        is_hole = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
        return jax.tree.map(lambda node: None if is_hole(node) else node, tree, is_leaf=is_hole)

    own = found[0]
    return own._replace(z=unmasked(own.z), first_active=unmasked(own.first_active), penalty=unmasked(own.penalty))


def _masked(params: Any, masks: Any) -> Any:
    return jax.tree.map(lambda w, m: w if m is None else jnp.where(m, w, jnp.zeros_like(w)), params, masks)


def _rank_keys(w: Array, record: Array, resolution: int) -> tuple[Array, Array]:
    """Return norm - record, one entry a group, exactly: its whole part as int32 and its fraction in [0, 1)."""
    summed = tuple(axis for axis in range(w.ndim) if record.shape[axis] == 1)
    norm = jnp.sqrt(
        jnp.sum(jnp.square(jnp.abs(w.astype(jnp.promote_types(w.dtype, jnp.float32)))), axis=summed)
    ).ravel()
    whole = jnp.floor(norm)
    return whole.astype(jnp.int32) - (record.ravel() - 1) // resolution, norm - whole


def _cut_lowest(whole: Array, rest: Array, sizes: np.ndarray, fraction: float) -> Array:
    """Return which groups to cut: from the lowest up, while their sizes sum to int(fraction * all) at most."""
    lowest_first = jnp.lexsort((rest, whole))
    fits = jnp.cumsum(jnp.asarray(sizes)[lowest_first]) <= int(fraction * sizes.sum())
    return jnp.zeros(sizes.shape, bool).at[lowest_first].set(fits)
