"""Meta-learning: train the shared network, and the inner learning rates, so that a few steps fit any image.

Reference: Dupont et al. 2022, arXiv:2201.12204, algorithm 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from functa_jax.inner_loop import Apply, fit_latents

PyTree = Any


def meta_loss(
    apply_fn: Apply,
    params: PyTree,
    coords: Array,
    targets: Array,
    latent_init: PyTree,
    *,
    steps: int,
    learning_rate: PyTree,
    second_order: bool = True,
    inner_loss_weight: float = 0.0,
    **options: Any,
) -> Array:
    """Outer loss: the mean squared error after the inner steps, averaged over the batch.

    mean_b loss_b(z_K) + inner_loss_weight * mean_b mean_k loss_b(z_k), k = 0 ... K - 1. The second term is report A's
    "meta-loss" (its Figure 1, with weight 1 and first order, where it reaches the learning rates only).

    Args:
      apply_fn, params, coords, targets, latent_init, steps, learning_rate, second_order: as in `fit_latents`.
      inner_loss_weight: weight of the mean of the losses before each step.
      **options: the other options of `fit_latents`.

    Returns:
      scalar, differentiable in `params`, `learning_rate` and `latent_init`.

    Raises:
      ValueError: as `fit_latents`; `inner_loss_weight` without inner steps.

    Example:
      >>> f = lambda params, coords, latent: params * (coords @ latent)[..., None]
      >>> coords, targets = jnp.eye(2), jnp.ones((1, 2, 1))
      >>> loss = lambda rate: meta_loss(f, 1.0, coords, targets, jnp.zeros(2), steps=1, learning_rate=rate)
      >>> float(loss(0.5)), float(jax.grad(loss)(0.5))  # (1 - rate)^2
      (0.25, -1.0)

    Reference: Dupont et al. 2022, arXiv:2201.12204, algorithm 1, line 8.
    """
    if inner_loss_weight and steps == 0:
        raise ValueError(f"inner_loss_weight is {inner_loss_weight}, but with steps=0 there are no inner losses")
    _, losses = fit_latents(
        apply_fn,
        params,
        coords,
        targets,
        latent_init,
        steps=steps,
        learning_rate=learning_rate,
        second_order=second_order,
        **options,
    )
    loss = jnp.mean(losses[:, -1])
    if inner_loss_weight:
        loss = loss + inner_loss_weight * jnp.mean(losses[:, :-1])
    return loss


class MetaParams(NamedTuple):
    """What the outer loop trains: the network's parameters and the inner learning rates."""

    model: PyTree
    rates: PyTree


class MetaState(NamedTuple):
    """State of meta-learning: number of outer steps made (int32), parameters, optimizer state."""

    step: Array
    params: MetaParams
    opt_state: optax.OptState


def init_meta(model_params: PyTree, rates: PyTree, optimizer: optax.GradientTransformation) -> MetaState:
    """State before the first outer step.

    Args:
      model_params: parameters of the network.
      rates: inner learning rates, as `learning_rate` of `fit_latents`.
      optimizer: optax transform of the outer loop, over `MetaParams`.

    Returns:
      The state, in arrays of its own.
    """
    # Copies: donating the state must not delete the caller's arrays. Of strong type: no step may change a type.
    params = jax.tree.map(lambda x: jnp.array(x, jnp.result_type(x)), MetaParams(model_params, rates))
    return MetaState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def meta_step(
    loss_fn: Callable[[MetaParams, Array, Array], Array],
    optimizer: optax.GradientTransformation,
    *,
    rate_bounds: tuple[float, float] | None = None,
    rate_limit: Callable[[PyTree, Array], Array] | None = None,
    microbatch: int | None = None,
) -> Callable[[MetaState, Array, Array], tuple[MetaState, dict[str, Array]]]:
    """One outer step, as a pure function to jit.

    Args:
      loss_fn: (params, coords, targets) -> mean loss over the batch; usually a `meta_loss` with its options set.
      optimizer: optax transform over `MetaParams`.
      rate_bounds: the learned rates are clipped into these bounds after every update.
      rate_limit: (model parameters, coords) -> largest rate allowed now, applied last (it may undercut the bounds).
        With c / `curvature`, rates cannot outgrow the network that they serve, which is how meta-learning collapses:
        the inner steps diverge, the outer gradient explodes, and the network is thrown to where nothing is learned.
      microbatch: images whose gradient is computed at once; gradients are averaged over the batch in a `lax.scan`.
        Small ones keep activations in a CPU's cache, which is faster there; None takes the whole batch.

    Returns:
      step(state, coords, targets) -> (state, {"loss": scalar, "grad_norm": scalar}).

    Raises:
      ValueError: reversed `rate_bounds`; (by step) a batch that is not a multiple of `microbatch`.

    Example:
      >>> apply_fn = lambda params, coords, latent: params * (coords @ latent)[..., None]
      >>> def loss(params, coords, targets):
      ...     return meta_loss(
      ...         apply_fn, params.model, coords, targets, jnp.zeros(2), steps=1, learning_rate=params.rates
      ...     )
      >>> optimizer = optax.sgd(0.1)
      >>> step = jax.jit(meta_step(loss, optimizer, rate_bounds=(0.0, 1.0)))
      >>> state, metrics = step(init_meta(1.0, 0.5, optimizer), jnp.eye(2), jnp.ones((1, 2, 1)))
      >>> float(metrics["loss"])
      0.25
    """
    if rate_bounds is not None and not rate_bounds[0] <= rate_bounds[1]:
        raise ValueError(f"rate_bounds must be (lowest, highest), got {rate_bounds}")
    value_and_grad = jax.value_and_grad(loss_fn)

    def step(state: MetaState, coords: Array, targets: Array) -> tuple[MetaState, dict[str, Array]]:
        loss, gradients = _accumulate(value_and_grad, state.params, coords, targets, microbatch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if rate_bounds is not None:
            params = params._replace(rates=jax.tree.map(lambda r: jnp.clip(r, *rate_bounds), params.rates))
        if rate_limit is not None:
            largest = rate_limit(params.model, coords)
            params = params._replace(rates=jax.tree.map(lambda r: jnp.minimum(r, largest), params.rates))
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradients)}
        return MetaState(state.step + 1, params, opt_state), metrics

    return step


def _accumulate(
    value_and_grad: Callable[..., tuple[Array, PyTree]],
    params: MetaParams,
    coords: Array,
    targets: Array,
    microbatch: int | None,
) -> tuple[Array, PyTree]:
    batch = targets.shape[0]
    if microbatch is None or microbatch >= batch:
        return value_and_grad(params, coords, targets)
    if microbatch < 1:
        raise ValueError(f"microbatch must be at least 1, got {microbatch}")
    if batch % microbatch:
        raise ValueError(f"a batch of {batch} images is not a multiple of microbatch={microbatch}")

    def split(x: Array) -> Array:
        # The images of one microbatch are taken with a stride, so that a batch sharded over devices stays sharded.
        return x.reshape(microbatch, batch // microbatch, *x.shape[1:]).swapaxes(0, 1)

    own_points = coords.ndim == targets.ndim

    def body(total: tuple[Array, PyTree], block: tuple[Array, ...]) -> tuple[tuple[Array, PyTree], None]:
        part = value_and_grad(params, block[1] if own_points else coords, block[0])
        return jax.tree.map(jnp.add, total, part), None

    blocks = (split(targets), split(coords)) if own_points else (split(targets),)
    like = jax.eval_shape(value_and_grad, params, coords, targets)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    total, _ = lax.scan(body, zero, blocks)
    return jax.tree.map(lambda x: x * (microbatch / batch), total)
