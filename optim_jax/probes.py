"""How smooth the loss is around one point: loss, gradient predictiveness and effective beta-smoothness."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optim_jax.dtypes import wide


class GradientProbe(NamedTuple):
    """What `probe_gradients` measures along the negative gradient; vectors have one entry a step size.

    Attributes:
      loss: L(w(eta)).
      gradient_distance: ||grad L(w(eta)) - g||_2, the gradient predictiveness (small = predictive).
      beta: gradient_distance / ||w(eta) - w||_2; NaN where the step moves nothing.
      cosine: cosine of the angle between grad L(w(eta)) and g; NaN where either is zero.
      start_loss: L(w), a scalar.
      gradient_norm: ||g||_2, a scalar.
    """

    loss: Array
    gradient_distance: Array
    beta: Array
    cosine: Array
    start_loss: Array
    gradient_norm: Array

    @property
    def loss_range(self) -> tuple[Array, Array]:
        """Smallest and largest loss over the step sizes."""
        return jnp.min(self.loss), jnp.max(self.loss)

    @property
    def predictiveness_range(self) -> tuple[Array, Array]:
        """Smallest and largest gradient distance over the step sizes."""
        return jnp.min(self.gradient_distance), jnp.max(self.gradient_distance)

    @property
    def effective_beta(self) -> Array:
        """Largest beta over the step sizes: the effective beta-smoothness."""
        return jnp.max(self.beta)


def probe_gradients(loss_fn: Callable[[Any, Any], Array], params: Any, batch: Any, step_sizes: Any) -> GradientProbe:
    """Probe loss and gradient along the negative gradient, at one point and on one batch.

    With g = grad L(w) and w(eta) = w - eta * g, for every step size eta (Santurkar et al., 2018, section 3.2):

        loss               L(w(eta))
        gradient distance  ||grad L(w(eta)) - g||_2
        beta               ||grad L(w(eta)) - g||_2 / ||w(eta) - w||_2, whose maximum is the effective beta

    Both gradients are of the same batch, the displacement is the true one after rounding, norms are summed in float32
    at least, and nothing outlives the call. On a quadratic loss beta is the curvature along g: the largest eigenvalue
    if g is its eigenvector.

    Costs one gradient of `loss_fn` more than there are step sizes, one after the other, and the memory of one training
    step and three copies of the parameters. Compiled once for each `loss_fn`: define it outside of the training loop.

    BatchNorm is probed as it trains, on the batch's statistics, if `loss_fn` drops the update of the running ones:

        def loss_fn(variables, batch):
            logits, _ = model.apply(
                {"params": variables, "batch_stats": stats}, batch["image"], train=True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    where any `stats` of the right shapes will do, since training mode does not read them.

    Args:
      loss_fn: function of parameters and batch that returns a scalar; it must be hashable, as functions are.
      params: pytree of weights w.
      batch: pytree of arrays, handed to `loss_fn` as it is.
      step_sizes: 1-d array of step sizes eta > 0, in units of the learning rate.

    Returns:
      A `GradientProbe`.

    Raises:
      ValueError: if `step_sizes` is not a vector of positive numbers or `loss_fn` does not return a scalar.

    Example:
      >>> loss_fn = lambda w, scale: 0.5 * jnp.sum(scale * w**2)
      >>> probe = probe_gradients(loss_fn, jnp.array([0.0, 1.0]), jnp.array([1.0, 4.0]), [0.125, 0.25, 0.5])
      >>> print(probe.loss, probe.beta)
      [0.5 0. 2. ] [4. 4. 4.]

    Reference: Santurkar, Tsipras, Ilyas and Madry, "How Does Batch Normalization Help Optimization?", NeurIPS 2018,
    arXiv:1805.11604.
    """
    step_sizes = jnp.asarray(step_sizes, float)
    if step_sizes.ndim != 1 or not step_sizes.size:
        raise ValueError(f"step_sizes must be a vector, got shape {step_sizes.shape}.")
    if not isinstance(step_sizes, jax.core.Tracer) and not np.all(np.asarray(step_sizes) > 0):
        raise ValueError(f"step_sizes must be > 0, got {step_sizes}.")
    returned = jax.eval_shape(loss_fn, params, batch)
    if getattr(returned, "shape", None) != ():
        raise ValueError(f"loss_fn must return a scalar loss alone, without auxiliary values, got {returned}.")
    return _probe(loss_fn, params, batch, step_sizes)


@functools.partial(jax.jit, static_argnums=0)
def _probe(loss_fn: Callable[[Any, Any], Array], params: Any, batch: Any, step_sizes: Array) -> GradientProbe:
    loss_and_gradient = jax.value_and_grad(loss_fn)
    start_loss, gradient = loss_and_gradient(params, batch)
    norm = _norm(gradient)

    def at(step_size: Array) -> tuple[Array, Array, Array, Array]:
        moved = jax.tree.map(lambda w, g: w - step_size.astype(w.dtype) * g, params, gradient)
        loss, there = loss_and_gradient(moved, batch)
        distance = _norm(_difference(there, gradient))
        displacement = _norm(_difference(moved, params))
        return loss, distance, _ratio(distance, displacement), _ratio(_dot(there, gradient), norm * _norm(there))

    # One step size after the other: the memory of a training step, however many there are.
    loss, distance, beta, cosine = jax.lax.map(at, step_sizes)
    return GradientProbe(loss, distance, beta, cosine, start_loss, norm)


def _difference(a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: wide(x) - wide(y), a, b)


def _dot(a: Any, b: Any) -> Array:
    # Wide, since in float16 the squares of a network's gradient overflow, or vanish. Sums of products, not matrix
    # products, which accelerators compute in a lower precision by default.
    products = jax.tree.map(lambda x, y: jnp.sum((jnp.conj(wide(x)) * wide(y)).real), a, b)
    return jax.tree.reduce(jnp.add, products)


def _norm(tree: Any) -> Array:
    return jnp.sqrt(_dot(tree, tree))


def _ratio(numerator: Array, denominator: Array) -> Array:
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), jnp.nan)
