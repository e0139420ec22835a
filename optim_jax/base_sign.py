"""Whether a base's updates lead downhill, as an optimizer's do, or follow the gradient, as a bare direction does."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optim_jax.penalties import leaf_name

_HOW = (
    "say it by base_is_direction=False if its updates lead downhill, as those of optax.sgd(1.0) do, or "
    "base_is_direction=True if they follow the gradient, as those of optax.trace(0.9) do"
)


def base_sign(base: optax.GradientTransformation, is_direction: bool | None, params: Any) -> int:
    """Return what the base's updates must be multiplied by to lead downhill: 1, or -1 for a bare direction.

    Args:
      base: any optax transform.
      is_direction: the answer where the caller knows it; None: try the base for two steps, on a small tree that has the
        structure of `params` and at most two entries along each axis.
      params: pytree of parameters; only structure, shapes and dtypes count.

    Raises:
      ValueError: if the base cannot be tried so, if it moves nothing, or if it leads downhill on some leaves and uphill
        on others.

    Example:
      >>> params = {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}
      >>> [base_sign(base, None, params) for base in (optax.sgd(1.0), optax.trace(0.9))]
      [1, -1]
    """
    if is_direction is not None:
        return -1 if is_direction else 1
    leaves, tree = jax.tree.flatten(params)
    small = [(tuple(min(size, 2) for size in jnp.shape(leaf)), jnp.result_type(leaf)) for leaf in leaves]
    return _tried(base, tree, tuple(small))


@functools.lru_cache(maxsize=64)
def _tried(base: optax.GradientTransformation, tree: Any, leaves: tuple[tuple[tuple[int, ...], Any], ...]) -> int:
    if not leaves:
        return 1
    try:
        downhill, uphill = _leads(base, tree, leaves)
    except Exception as error:  # whatever a base may raise that needs other arrays, or extra arguments
        raise ValueError(
            f"base_is_direction is needed: trying base on a small tree like params raised "
            f"{type(error).__name__}: {error}; {_HOW}."
        ) from error
    if downhill and uphill:
        raise ValueError(
            f"base leads downhill for {downhill} and uphill for {uphill}: give all parts of it a learning rate of 1, "
            f"or none of them."
        )
    if not downhill and not uphill:
        raise ValueError(f"base_is_direction is needed: base, when tried, moved nothing in two steps; {_HOW}.")
    return 1 if downhill else -1


def _leads(base: optax.GradientTransformation, tree: Any, leaves: Any) -> tuple[list[str], list[str]]:
    """Return the names of the leaves that the base moves downhill and uphill, in the first step that moves them."""
    names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree.unflatten(range(len(leaves))))]
    with jax.ensure_compile_time_eval():
        params = tree.unflatten([jnp.zeros(shape, dtype) for shape, dtype in leaves])
        values = [np.cos(1 + np.arange(np.prod(shape, dtype=int))).reshape(shape) for shape, _ in leaves]
        gradient = tree.unflatten([jnp.asarray(x, dtype) for x, (_, dtype) in zip(values, leaves, strict=True)])
        state, slopes = base.init(params), np.zeros(len(leaves))
        for _ in range(2):  # the first step of a warm-up moves nothing
            updates, state = base.update(gradient, state, params)
            moves = [np.asarray(update).astype(complex).real for update in tree.flatten_up_to(updates)]
            now = np.array([np.sum(move * x) for move, x in zip(moves, values, strict=True)])
            slopes = np.where(slopes == 0, now, slopes)
    downhill, uphill = (
        [name for name, found in zip(names, side, strict=True) if found] for side in (slopes < 0, slopes > 0)
    )
    return downhill, uphill
