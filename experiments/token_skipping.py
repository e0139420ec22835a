"""Training the scorers of patch skipping on what a dense run shows, and measuring how right they are."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments import optimizers, training
from experiments.classification import State
from experiments.runs import Run
from experiments.token_methods import own_parts
from experiments.trained import Base
from experiments.training import Batch, PyTree
from prune_jax.tokens import (
    PatchSkip,
    Skipping,
    balanced_skip_accuracy,
    keep_share,
    skip_accuracy,
    skip_loss,
    start_at_shares,
)

PATCHES = 16  # of each image, drawn anew for each image; its neighbours tell little more
IMAGES_A_CALL = 128


class Plan(NamedTuple):
    """How scorers are trained.

    Attributes:
      steps: in number.
      batch_size: images a step, of each of which `PATCHES` patches are seen.
      learning_rate: at the start; falls to zero by a cosine.
    """

    steps: int
    batch_size: int
    learning_rate: float


def observe(method: PatchSkip, base: Base, images: int, seed: int) -> dict[str, np.ndarray]:
    """Runs the dense model once on the first images of the train split: scorers of all thresholds learn from this.

    Returns:
      tokens (images, depth, PATCHES, D), their means over all patches (images, depth, D), similarity (images, depth,
      PATCHES).
    """
    rng, found = np.random.default_rng(seed), []
    params = {"params": {"model": base.params}}
    look = jax.jit(lambda params, x: method.apply(params, base.prepare(x), method="observe"))
    chosen = base.train.images[:images]
    for first in range(0, len(chosen), IMAGES_A_CALL):
        seen = jax.device_get(look(params, chosen[first : first + IMAGES_A_CALL]))
        everyone = np.broadcast_to(np.arange(seen.similarity.shape[2]), (len(seen.means), seen.similarity.shape[2]))
        index = rng.permuted(everyone, axis=1)[:, None, :PATCHES]
        found.append(
            {
                "tokens": np.take_along_axis(seen.tokens, index[..., None], axis=2),
                "means": seen.means,
                "similarity": np.take_along_axis(seen.similarity, index, axis=2),
            }
        )
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def learn(
    run: Run,
    base: Base,
    method: PatchSkip,
    params: PyTree,
    seen: Mapping[str, np.ndarray],
    cosine_threshold: float,
    plan: Plan,
    *,
    seed: int,
) -> PyTree:
    """Trains the scorers for one cosine threshold; resumes if it was interrupted.

    Args:
      run: whose folder takes logs and checkpoints; a part of its own.
      base: for its devices.
      method: whose scorers are trained.
      params: of the method, to start from.
      seen: of `observe`.
      cosine_threshold: of the labels.
      plan: how.
      seed: of the order of the images.

    Returns:
      The method's parameters with the trained scorers.
    """
    rate = optax.cosine_decay_schedule(plan.learning_rate, plan.steps)
    optimizer = optimizers.adamw(rate, 0.05)
    own = own_parts(start_at_shares(params, jnp.asarray(keep_share(seen["similarity"], cosine_threshold))))

    def loss(own: PyTree, batch: Batch) -> tuple[Array, Array]:
        scores = method.apply({"params": own}, batch["tokens"], batch["means"], method="score")
        said = Skipping(scores, batch["similarity"])
        return skip_loss(said, cosine_threshold), skip_accuracy(said, cosine_threshold).mean()

    def step(state: State, batch: Batch, key: Array) -> tuple[State, dict[str, Array]]:
        del key
        (value, accuracy), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, batch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        state = State(optax.apply_updates(state.params, updates), {}, opt_state, state.step + 1)
        return state, {"loss": value, "accuracy": accuracy}

    per_call = max(1, plan.steps // 8)
    state, _ = training.fit(
        run,
        step,
        State(own, {}, optimizer.init(own), jnp.zeros([], jnp.int32)),
        seen,
        training.Plan(plan.steps, plan.batch_size, per_call, 8 * per_call, 8 * per_call),
        seed=seed,
        mesh=base.mesh,
    )
    return {**params, **state.params}


def quality(said: Skipping, cosine_threshold: float) -> dict[str, Any]:
    """How right scorers are about a dense run, for each block: beside what always giving the commoner answer gets."""
    share = np.asarray(keep_share(said.similarity, cosine_threshold))
    return {
        "keep_share": share.tolist(),
        "commoner": np.maximum(share, 1 - share).tolist(),
        "accuracy": np.asarray(skip_accuracy(said, cosine_threshold)).tolist(),
        "balanced_accuracy": np.asarray(balanced_skip_accuracy(said, cosine_threshold)).tolist(),
    }
