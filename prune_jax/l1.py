"""optax transforms for the L1 norm: its gradient, or its proximal map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from prune_jax.tree import Prunable, PyTree, cast_like, is_kernel, is_none, require_params, select

Strength = float | jax.Array | Callable[[jax.Array], jax.Array]


class L1State(NamedTuple):
    """State of the L1 transforms: steps done."""

    step: jax.Array


def l1_penalty(strength: Strength, *, prunable: Prunable | None = None) -> optax.GradientTransformationExtraArgs:
    """The gradient of ``strength * ||w||_1`` added to the loss's: ``g + strength * sign(w)``.

    Stands before the base optimizer: ``optax.chain(l1_penalty(5e-6), optax.adam(1e-3))``. Weights come near zero, not
    to it; for exact zeros see ``l1_proximal``. Zeros get no push, so masked weights stay where they are.

    Args:
        strength: lambda >= 0, or a schedule of it by step.
        prunable: which leaves are penalised, ``(path, leaf) -> bool``; None = ``is_kernel``.

    Returns:
        A transform whose ``update`` needs ``params``; gradients keep their dtype.

    Raises:
        ValueError: strength is negative; (from ``update``) params is None.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from prune_jax import l1_penalty
        >>> params = {"kernel": jnp.array([[2.0, -3.0, 0.0]])}
        >>> penalty = l1_penalty(0.5)
        >>> penalty.update({"kernel": jnp.zeros((1, 3))}, penalty.init(params), params)[0]
        {'kernel': Array([[ 0.5, -0.5,  0. ]], dtype=float32)}

    Reference: Tibshirani, Regression Shrinkage and Selection via the Lasso, 1996.
    """
    _check_not_negative(strength=strength)

    def add_gradient(weight: jax.Array, update: jax.Array, step: jax.Array) -> jax.Array:
        return (update + _at(strength, step) * jnp.sign(weight)).astype(update.dtype)

    return _on_weights(add_gradient, prunable, "l1_penalty")


def l1_proximal(
    strength: Strength, learning_rate: Strength, *, prunable: Prunable | None = None
) -> optax.GradientTransformationExtraArgs:
    """The proximal step of ``strength * ||w||_1``: ``w' = soft(w + u, learning_rate * strength)``, exact zeros.

    ``u`` is the base optimizer's update and ``soft(z, t) = sign(z) max(|z| - t, 0)``. Stands after the base optimizer:
    ``optax.chain(optax.sgd(lr), l1_proximal(5e-6, lr))``; with plain SGD this is proximal gradient descent (ISTA).

    Args:
        strength: lambda >= 0, or a schedule of it by step.
        learning_rate: the base optimizer's, a number or a schedule by step.
        prunable: which leaves are penalised, ``(path, leaf) -> bool``; None = ``is_kernel``.

    Returns:
        A transform whose ``update`` needs ``params``; updates have the parameters' dtype, which they are ready for.

    Raises:
        ValueError: strength or learning_rate is negative; (from ``update``) params is None.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from prune_jax import l1_proximal
        >>> params = {"kernel": jnp.array([[2.0, -0.25]])}
        >>> prox = l1_proximal(1.0, learning_rate=0.5)
        >>> updates, _ = prox.update({"kernel": jnp.zeros((1, 2))}, prox.init(params), params)
        >>> optax.apply_updates(params, updates)
        {'kernel': Array([[1.5, 0. ]], dtype=float32)}

    Reference: Daubechies et al., An iterative thresholding algorithm for linear inverse problems,
    arXiv:math/0307152.
    """
    _check_not_negative(strength=strength, learning_rate=learning_rate)

    def shrink(weight: jax.Array, update: jax.Array, step: jax.Array) -> jax.Array:
        threshold = _at(learning_rate, step) * _at(strength, step)
        target = weight + update  # in the wider dtype of the two
        moved = jnp.sign(target) * jnp.maximum(jnp.abs(target) - threshold, 0)
        # weight + (0 - weight) is 0 exactly, so that a weight that is shrunk to zero lands there.
        return moved - weight

    return _on_weights(shrink, prunable, "l1_proximal", last=True)


def _on_weights(
    function: Callable, prunable: Prunable | None, name: str, *, last: bool = False
) -> optax.GradientTransformationExtraArgs:
    """``function(weight, update, step)`` on every prunable leaf; ``last``: all in the parameters' dtype."""
    # The default is resolved here: optax.inject_hyperparams takes a function among the arguments for a schedule.
    chosen = is_kernel if prunable is None else prunable

    def update_fn(
        updates: PyTree, state: L1State, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, L1State]:
        del extra
        require_params(params, name)
        updates = jax.tree.map(
            lambda weight, update: update if weight is None else function(weight, update, state.step),
            select(params, chosen),
            updates,
            is_leaf=is_none,
        )
        if last:
            updates = cast_like(updates, params)
        return updates, L1State(optax.safe_increment(state.step))

    return optax.GradientTransformationExtraArgs(lambda params: L1State(jnp.zeros((), jnp.int32)), update_fn)


def _at(value: Strength, step: jax.Array) -> Any:
    return value(step) if callable(value) else value


def _check_not_negative(**values: Strength) -> None:
    for name, value in values.items():
        if callable(value) or isinstance(value, jax.core.Tracer):
            continue
        if not float(value) >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
