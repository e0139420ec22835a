"""Fit latents to images in a few gradient steps, with the network held fixed: the inner loop of meta-learning.

Reference: Dupont et al. 2022, arXiv:2201.12204, algorithm 1; rates learned per dimension as in Li et al., "Meta-SGD",
2017, arXiv:1707.09835.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

PyTree = Any
Apply = Callable[..., Any]  # (params, coords (..., d), latent) -> prediction (..., C)

# Up to this many steps are written out by default: faster code, at a few seconds of compilation.
_UNROLLED_STEPS = 4


def fit_latents(
    apply_fn: Apply,
    params: PyTree,
    coords: Array,
    targets: Array,
    latent_init: PyTree,
    *,
    steps: int,
    learning_rate: PyTree,
    second_order: bool = True,
    batched: bool = False,
    rates_per_step: bool = False,
    latent_penalty: float = 0.0,
    unroll: bool | None = None,
    checkpoint: bool = False,
) -> tuple[PyTree, Array]:
    """Fits one latent to each image of a batch by gradient descent.

    For every image y_b, with the mean over pixels and channels and gradients taken in the latent only:
    z_{k+1} = z_k - rate * d/dz [mean (f(x; z) - y_b)^2 + latent_penalty |z|^2]  at z = z_k,  k = 0 ... steps - 1.

    Args:
      apply_fn: (params, coords, latent) -> prediction; any JAX function.
      params: its parameters.
      coords: (..., d), shared by all images, or (B, ..., d), each image its own points.
      targets: (B, ..., C), the images at those coordinates.
      latent_init: one latent (a pytree), where every image starts.
      steps: number of gradient steps, 0 or more.
      learning_rate: a scalar, or a pytree like one latent (meta-SGD); with `rates_per_step`, leading axes of `steps`.
      second_order: whether derivatives of the result pass through the inner gradients. If not, inner gradients are
        constants (derivatives in `learning_rate` stay) and nothing inside depends on `params`, as in report A.
      batched: `apply_fn` takes latents (B, ...) with coords (N, d) or (B, N, d) and returns (B, N, C), as this
        library's modules do. Faster than the vmap over single images used otherwise.
      rates_per_step: whether `learning_rate` has values of its own for each step.
      latent_penalty: weight of the squared norm of the latent in the inner loss.
      unroll: write the steps out (faster code) or use one `lax.scan` (faster compilation); None: write out up to 4,
        unless `checkpoint`, which saves memory on CPU in the scan only.
      checkpoint: recompute each step in the backward pass instead of storing it (less memory, more time).

    Returns:
      latents, like `latent_init` with a leading axis B; and the mean squared error of each image before each step and
      at the end, (B, steps + 1).

    Raises:
      ValueError: shapes that do not go together, a negative number of steps, rates unlike the latent.

    Example:
      >>> f = lambda params, coords, latent: params * (coords @ latent)[..., None]
      >>> coords = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> targets = jnp.array([[[3.0], [4.0]]])
      >>> latents, losses = fit_latents(f, 1.0, coords, targets, jnp.zeros(2), steps=20, learning_rate=0.5)
      >>> [round(float(v), 3) for v in latents[0]]
      [3.0, 4.0]

    Reference: Dupont et al. 2022, arXiv:2201.12204, algorithm 1, lines 4-7.
    """
    own_points = _check(coords, targets, steps)
    rates = _rates_of_steps(learning_rate, latent_init, steps, rates_per_step)
    if batched:
        coords = coords.reshape(*coords.shape[:1][: int(own_points)], -1, coords.shape[-1])
        targets = targets.reshape(targets.shape[0], -1, targets.shape[-1])
        predict = apply_fn
    else:
        predict = jax.vmap(apply_fn, in_axes=(None, 0 if own_points else None, 0))
    inner_params = params if second_order else lax.stop_gradient(params)

    def losses(p: PyTree, latents: PyTree) -> Array:
        error = predict(p, coords, latents) - targets
        return jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))

    def objective(latents: PyTree) -> tuple[Array, Array]:
        # Summed over the batch: the gradient in each latent is then that of its own image alone.
        per_image = losses(inner_params, latents)
        penalty = latent_penalty * sum(jnp.sum(jnp.square(z)) for z in jax.tree.leaves(latents))
        return jnp.sum(per_image) + penalty, per_image

    def step(latents: PyTree, rate: PyTree) -> tuple[PyTree, Array]:
        gradients, per_image = jax.grad(objective, has_aux=True)(latents)
        if not second_order:
            gradients = lax.stop_gradient(gradients)
        return jax.tree.map(lambda z, r, g: (z - r * g).astype(z.dtype), latents, rate, gradients), per_image

    if checkpoint:
        step = jax.checkpoint(step)
    latents = jax.tree.map(lambda z: jnp.broadcast_to(z, (targets.shape[0], *jnp.shape(z))), latent_init)
    if unroll is None:  # XLA on CPU merges the recomputation of written-out steps with what it was to replace
        unroll = steps <= _UNROLLED_STEPS and not checkpoint
    if unroll:
        history = []
        for k in range(steps):
            latents, per_image = step(latents, jax.tree.map(lambda r, k=k: r[k], rates))
            history.append(per_image)
        before = history
    else:
        latents, stacked = lax.scan(step, latents, rates)
        before = list(stacked)
    return latents, jnp.stack([*before, losses(params, latents)], axis=1)


def curvature(
    apply_fn: Apply, params: PyTree, coords: Array, latent: PyTree, key: Array, *, iterations: int = 20
) -> Array:
    """Largest eigenvalue of the Gauss-Newton matrix of the inner loss in the latent, (2 / NC) J^T J, at one latent.

    Gradient descent on the latent is stable for rates below 2 / curvature: that is how inner rates have to follow
    width, depth, w0 and the latent's size. Found by power iteration through jvp and vjp, from below, without forming
    any matrix. A `latent_penalty` would add twice its weight.

    Args:
      apply_fn: (params, coords, latent) -> prediction, for one latent.
      params: its parameters.
      coords: (..., d).
      latent: one latent (a pytree of floats).
      key: typed PRNG key, for the start of the iteration.
      iterations: number of power iterations.

    Returns:
      scalar.

    Example:
      >>> f = lambda params, coords, latent: coords @ (params * latent)[:, None]
      >>> coords = jnp.eye(2)  # the loss is then (1/2) sum (params * z - y)^2
      >>> value = curvature(f, jnp.array([3.0, 1.0]), coords, jnp.zeros(2), jax.random.key(0))
      >>> round(float(value), 3)
      9.0
    """
    flat, unflatten = ravel_pytree(latent)
    prediction, jacobian = jax.linearize(lambda z: apply_fn(params, coords, unflatten(z)), flat)
    transposed = jax.linear_transpose(jacobian, flat)

    def multiply(v: Array) -> Array:
        return transposed(jacobian(v))[0] * (2 / prediction.size)

    def iterate(_: int, v: Array) -> Array:
        w = multiply(v)
        return w / jnp.maximum(jnp.linalg.norm(w), jnp.finfo(w.dtype).tiny)

    v = jax.random.normal(key, flat.shape, flat.dtype)
    v = lax.fori_loop(0, iterations, iterate, v / jnp.linalg.norm(v))
    return jnp.vdot(v, multiply(v))


def _check(coords: Array, targets: Array, steps: int) -> bool:
    """Whether every image has its own points; raises ValueError for shapes that do not go together."""
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, got {steps}")
    if targets.shape[1:-1] == coords.shape[:-1]:
        return False
    if targets.shape[:-1] == coords.shape[:-1]:
        return True
    raise ValueError(
        f"targets {targets.shape} do not go with coords {coords.shape}: targets must be (B, ..., C) with coords "
        f"(..., d), shared, or (B, ..., d); here coords of shape {(*targets.shape[1:-1], coords.shape[-1])} would do"
    )


def _rates_of_steps(learning_rate: PyTree, latent: PyTree, steps: int, per_step: bool) -> PyTree:
    """Rates as a pytree like the latent, leaves (steps, 1, ...): step, batch, latent."""
    structure: Any = jax.tree.structure(latent)
    given: Any = jax.tree.structure(learning_rate)
    if given != structure:
        if given.num_leaves != 1:
            raise ValueError(f"learning_rate must be a scalar or a pytree like one latent ({structure}), got {given}")
        learning_rate = jax.tree.unflatten(structure, jax.tree.leaves(learning_rate) * structure.num_leaves)

    def expand(rate: Array, z: Array) -> Array:
        rate, shape = jnp.asarray(rate), jnp.shape(z)
        lead = (steps,) if per_step else ()
        if rate.shape not in (lead, lead + shape):
            raise ValueError(
                f"learning_rate has shape {rate.shape}; a latent of shape {shape} needs {lead} or {lead + shape}"
                + (f" (rates_per_step, {steps} steps)" if per_step else "")
            )
        rate = rate if per_step else rate[None]
        tail = rate.shape[1:] or (1,) * len(shape)
        return jnp.broadcast_to(rate.reshape(rate.shape[0], 1, *tail), (steps, 1, *tail))

    return jax.tree.map(expand, learning_rate, latent)
