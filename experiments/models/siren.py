"""One SIREN for one image: fitting many of them at once, and rendering them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import functa_jax as fj
from experiments import training
from experiments.logs import Log, curve, read_lines
from experiments.pictures import to_bytes
from experiments.runs import Run

PyTree = Any

_CHUNK = 8192  # points rendered at once


@dataclass(frozen=True)
class Recipe:
    """How a SIREN is fitted.

    Attributes:
      steps: of Adam.
      marks: steps after which the fit is measured; the last one is `steps`.
      points: random pixels a step, without repetition within an epoch; None: all of them.
      learning_rate: of Adam.
      schedule: "constant", or "cosine" down to zero.
      steps_per_call: steps in one call of the compiled loop.
      checkpoint_every: steps between checkpoints.
    """

    steps: int
    marks: tuple[int, ...]
    points: int | None
    learning_rate: float
    schedule: Literal["constant", "cosine"]
    steps_per_call: int
    checkpoint_every: int


@dataclass(frozen=True)
class Fitted:
    """SIRENs of a batch of images.

    Attributes:
      model: the network.
      params: its variables, with a leading axis of images.
      psnr: step -> mean over the images of the PSNR at their own pixels, dB, on [0, 1].
      train_seconds: time spent in steps.
    """

    model: fj.Siren
    params: PyTree
    psnr: dict[int, float]
    train_seconds: float

    def render(self, shape: Sequence[int], *, limit: float = 1.0) -> np.ndarray:
        """float32 images (N, H, W, C) on [0, 1], not clipped."""
        coords = fj.coordinate_grid(shape, limit=limit)
        return np.asarray(_render(self.model, self.params, coords))


def fit(run: Run, recipe: Recipe, model: fj.Siren, images: np.ndarray, *, seed: int) -> Fitted:
    """Fits a SIREN to each image, from the newest checkpoint of the run if there is one.

    All networks are trained at once, by the same pixels of their images in each step. Pixels are the examples of the
    training loop, and are what is sharded over devices. On a CPU the networks take turns within a step, since the
    activations of one fit its cache; an accelerator takes them together.

    Args:
      run: the run, or the part of a run, that the fit belongs to.
      recipe: how.
      model: the network of one image.
      images: uint8 (N, H, W, C).
      seed: of initialisation and of the order of the pixels.

    Returns:
      The networks, and how well they fit.

    Raises:
      ValueError: marks that do not end with `steps`.
      and what `training.fit` raises.
    """
    if not recipe.marks or sorted(set(recipe.marks)) != list(recipe.marks) or recipe.marks[-1] != recipe.steps:
        raise ValueError(f"marks must rise to steps={recipe.steps}, got {recipe.marks}")
    count, height, width, channels = images.shape
    grid = fj.coordinate_grid((height, width))
    targets = images.astype(np.float32) / 255
    values = targets.reshape(count, -1, channels).swapaxes(0, 1)
    apply_fn: Callable[..., Any] = model.apply
    optimizer = optax.adam(
        optax.cosine_decay_schedule(recipe.learning_rate, recipe.steps)
        if recipe.schedule == "cosine"
        else recipe.learning_rate
    )

    def step(state: PyTree, batch: training.Batch, key: Array) -> tuple[PyTree, dict[str, Array]]:
        del key  # the pixels of the batch are random as they are

        def one(arguments: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
            (params, opt_state), y = arguments
            loss, gradients = jax.value_and_grad(lambda p: jnp.mean((apply_fn(p, batch["point"]) - y) ** 2))(params)
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        state, losses = _for_each(one)((state, batch["value"].swapaxes(0, 1)))
        return state, {"loss": jnp.mean(losses)}

    def evaluate(state: PyTree, step: int, log: Log) -> dict[str, float]:
        found = _render(model, state[0], grid)
        log.images(step, "reconstructions", to_bytes(np.asarray(found[:8])))
        return {"psnr": float(jnp.mean(fj.psnr(found, jnp.asarray(targets))))}

    pixels, devices = height * width, jax.device_count()
    plan = training.Plan(
        steps=recipe.steps,
        batch_size=min(recipe.points or pixels, pixels) // devices * devices,
        steps_per_call=recipe.steps_per_call,
        evaluate_every=math.gcd(*recipe.marks),
        checkpoint_every=recipe.checkpoint_every,
    )
    keys = jax.random.split(jax.random.key(seed), count)
    params = jax.jit(jax.vmap(lambda key: model.init(key, grid[:1, :1])))(keys)
    (params, _), times = training.fit(
        run,
        step,
        (params, jax.vmap(optimizer.init)(params)),
        {"point": np.asarray(grid).reshape(pixels, 2), "value": values},
        plan,
        seed=seed,
        mesh=training.data_mesh(),
        evaluate=evaluate,
    )
    steps, psnr = curve(read_lines(run.directory / "metrics.jsonl"), "psnr")
    return Fitted(model, params, dict(zip(steps, psnr, strict=True)), times["train_seconds"])


def _for_each(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`f` for each network of a batch: in turn on a CPU, elsewhere together."""
    return partial(lax.map, f) if jax.default_backend() == "cpu" else jax.vmap(f)


@partial(jax.jit, static_argnums=0)
def _render(model: fj.Siren, params: PyTree, coords: Array) -> Array:
    *shape, dimensions = coords.shape
    points = coords.reshape(-1, dimensions)
    chunk = min(_CHUNK, len(points))
    blocks = jnp.pad(points, ((0, -len(points) % chunk), (0, 0))).reshape(-1, chunk, dimensions)

    def one(variables: PyTree) -> Array:
        found = lax.map(lambda block: model.apply(variables, block), blocks)
        return found.reshape(-1, model.out_features)[: len(points)].reshape(*shape, model.out_features)

    return _for_each(one)(params)
