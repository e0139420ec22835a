"""What DessiLBI's path tells: the sparse weights, and the order in which groups came alive."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from optim_jax.dessilbi import DessiLBIState
from optim_jax.penalties import Penalty, map_structured


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
      >>> params = {"bias": jnp.ones(2), "kernel": jnp.array([[3.0, 0.1], [1.5, 0.2]])}
      >>> optimizer = optim_jax.dessilbi(optax.sgd(1.0), 0.1, mu=0.2)
      >>> state = optimizer.init(params)
      >>> for _ in range(2):  # with weights that the loss holds
      ...     _, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
      >>> sparse_params(state)
      {'bias': None, 'kernel': Array([[1.75, 0.  ], [0.5 , 0.  ]], dtype=float32)}

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
      >>> params = {"kernel": jnp.array([[3.0, 0.1], [1.5, 0.2]])}
      >>> optimizer = optim_jax.dessilbi(optax.sgd(1.0), 0.1, mu=0.2)
      >>> state = optimizer.init(params)
      >>> for _ in range(2):  # with weights that the loss holds
      ...     _, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
      >>> print(support_masks(state)["kernel"])
      [[ True False] [ True False]]
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
      >>> params = {"bias": jnp.ones(2), "kernel": jnp.array([[3.0, 0.1], [1.5, 0.2]])}
      >>> optimizer = optim_jax.dessilbi(optax.sgd(1.0), 0.1, mu=0.2)
      >>> state = optimizer.init(params)
      >>> for _ in range(2):  # with weights that the loss holds
      ...     _, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
      >>> restrict_to_support(params, state)
      {'bias': Array([1., 1.], dtype=float32), 'kernel': Array([[3. , 0. ], [1.5, 0. ]], dtype=float32)}
    """
    return masked(params, support_masks(state))


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
      >>> params = {"kernel": jnp.array([[3.0, 0.1], [2.0, 1.5]])}
      >>> loss = lambda params: jnp.sum(jnp.square(params["kernel"] - jnp.array([[3.0, 0.1], [2.0, 1.5]])))
      >>> optimizer = optim_jax.dessilbi(optax.sgd(1.0), 0.1, mu=1.0)
      >>> def body(carry, _):
      ...     params, state = carry
      ...     updates, state = optimizer.update(jax.grad(loss)(params), state, params)
      ...     return (optax.apply_updates(params, updates), state), layer_sparsity(state)
      >>> _, path = jax.lax.scan(body, (params, optimizer.init(params)), length=12)
      >>> print(path["kernel"])
      [1.   1.   1.   0.75 0.75 0.75 0.5  0.5  0.25 0.25 0.25 0.25]
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
      >>> params = {"kernel": jnp.array([[3.0, 0.1], [1.5, 0.2]])}
      >>> optimizer = optim_jax.dessilbi(optax.sgd(1.0), 0.1, mu=0.2)
      >>> state = optimizer.init(params)
      >>> for _ in range(2):  # with weights that the loss holds
      ...     _, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
      >>> activation_order(state)["kernel"].tolist() == [[1, optim_jax.NEVER], [2, optim_jax.NEVER]]
      True
    """
    state = _find(state)
    if state.first_active is None:
        raise ValueError("state has no record of activations: build it with dessilbi(..., record=True).")

    # The update records the activation it finds in the old Z, whose proximal map it needs anyway; the newest is here.
    def newest(p: Penalty, first: Array, z: Array) -> Array:
        return jnp.where(p.active(z), jnp.minimum(first, state.step), first)

    return map_structured(newest, state.penalty, state.first_active, state.z)


def masked(params: Any, masks: Any) -> Any:
    """Return `params` with zeros where a mask is False; leaves whose mask is None as they are."""
    return jax.tree.map(lambda w, m: w if m is None else jnp.where(m, w, jnp.zeros_like(w)), params, masks)


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
