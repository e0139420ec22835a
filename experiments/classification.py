"""Training and measuring classifiers: what all classification studies have in common."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.training import Batch, PyTree, StepFunction, replicate
from prune_jax import distillation_loss

PadMode = Literal["constant", "reflect"]
Prepare = Callable[[Array], Array]
Mix = Callable[[Array, Array, Array], tuple[Array, Array, Array]]


class State(NamedTuple):
    """What training changes.

    Attributes:
      params: parameters of the model.
      batch_stats: running statistics of its batch normalisations; empty if it has none.
      opt_state: the optimizer's state.
      step: steps done, int32.
    """

    params: PyTree
    batch_stats: PyTree
    opt_state: optax.OptState
    step: Array

    @property
    def variables(self) -> dict[str, PyTree]:
        """What `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


class Teacher(NamedTuple):
    """A trained network whose answers training comes near to, beside the labels.

    Attributes:
      logits: prepared inputs -> logits.
      share: of the loss that is the distance to them, in [0, 1].
      temperature: see `prune_jax.distillation_loss`.
    """

    logits: Callable[[Array], Array]
    share: float
    temperature: float


def standardise(inputs: np.ndarray) -> Prepare:
    """A function that brings each channel to mean 0 and variance 1 over `inputs`, the training split.

    Args:
      inputs: uint8 images (N, H, W, C), or float arrays (N, ..., C) such as latents.

    Returns:
      (B, ..., C) of the same kind -> float32 of the same shape. A channel that never changes comes out as zeros.
    """
    axes = tuple(range(inputs.ndim - 1))
    mean = inputs.mean(axes, dtype=np.float64)
    deviation = np.sqrt(inputs.var(axes, dtype=np.float64))
    scale = np.where(deviation > 0, 1 / np.where(deviation > 0, deviation, 1), 0)
    shape = (1,) * (inputs.ndim - 1) + mean.shape
    shift, factor = (array.astype(np.float32).reshape(shape) for array in (mean, scale))
    return lambda x: (x.astype(jnp.float32) - shift) * factor


def initialise(model: nn.Module, optimizer: optax.GradientTransformation, inputs: Array, key: Array) -> State:
    """The state to start from.

    Args:
      model: called as `model.apply(variables, x, train=...)`.
      optimizer: of the parameters.
      inputs: a prepared batch, of any length.
      key: of the parameters.
    """

    def make(key: Array) -> State:
        variables = model.init(key, inputs, train=False)
        params = variables["params"]
        return State(params, variables.get("batch_stats", {}), optimizer.init(params), jnp.zeros([], jnp.int32))

    return jax.jit(make)(key)


def train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    prepare: Prepare,
    *,
    label_smoothing: float = 0.0,
    augment: Callable[[Array, Array], Array] | None = None,
    mix: Mix | None = None,
    teacher: Teacher | None = None,
    watch: Callable[[State], Mapping[str, Array]] | None = None,
) -> StepFunction:
    """One step on the cross entropy, for `training.fit`: (state, {"image", "label"}, key) -> (state, metrics).

    Args:
      model: called as `model.apply(variables, x, train=True)`; it may have batch statistics, and draw dropout masks.
      optimizer: of the parameters.
      prepare: inputs to what the model takes, as `standardise` makes it.
      label_smoothing: share of the target spread evenly over all classes.
      augment: (key, inputs) -> inputs, before `prepare`; such as `crop_and_flip`.
      mix: (key, inputs, labels) -> inputs, the labels of what was mixed in, and the share of the first ones' that is
        left; after `augment`; such as `cutmix`.
      teacher: a network to learn from beside the labels.
      watch: further scalars to record, of the state after the step.

    Returns:
      The step. Its metrics are `loss` and `accuracy` of the batch as seen in training, and what `watch` gives.
    """

    def step(state: State, batch: Batch, key: Array) -> tuple[State, dict[str, Array]]:
        augment_key, dropout_key = jax.random.split(key)
        inputs, labels = batch["image"], batch["label"]
        if augment is not None:
            inputs = augment(augment_key, inputs)
        mixed_in, share = labels, jnp.ones(len(labels))
        if mix is not None:
            inputs, mixed_in, share = mix(jax.random.fold_in(augment_key, 1), inputs, labels)
        inputs = prepare(inputs)

        def loss_of(params: PyTree) -> tuple[Array, tuple[Array, PyTree]]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updated = model.apply(
                variables, inputs, train=True, rngs={"dropout": dropout_key}, mutable=["batch_stats"]
            )
            both = [jax.nn.one_hot(of, logits.shape[-1]) for of in (labels, mixed_in)]
            hard = share[:, None] * both[0] + (1 - share[:, None]) * both[1] if mix is not None else both[0]
            targets = optax.smooth_labels(hard, label_smoothing)
            loss = optax.softmax_cross_entropy(logits, targets).mean()
            if teacher is not None:
                distance = distillation_loss(logits, teacher.logits(inputs), teacher.temperature).mean()
                loss = (1 - teacher.share) * loss + teacher.share * distance
            return loss, (logits, updated.get("batch_stats", {}))

        (loss, (logits, batch_stats)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        state = State(optax.apply_updates(state.params, updates), batch_stats, opt_state, state.step + 1)
        metrics = {"loss": loss, "accuracy": jnp.mean(logits.argmax(-1) == labels, dtype=jnp.float32)}
        return state, {**metrics, **(watch(state) if watch is not None else {})}

    return step


def crop_and_flip(key: Array, images: Array, *, pad: int = 4, flip: bool = True, mode: PadMode = "constant") -> Array:
    """Shifts each image by up to `pad` pixels and mirrors half of them: (B, H, W, C), any dtype.

    Args:
      key: typed PRNG key.
      images: (B, H, W, C).
      pad: largest shift, pixels.
      flip: whether to mirror.
      mode: what moves in: black ("constant") or the mirrored image ("reflect").
    """
    batch, height, width, channels = images.shape
    keys = jax.random.split(key, 3)
    tops, lefts = (jax.random.randint(k, (batch,), 0, 2 * pad + 1) for k in keys[:2])
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode)

    def crop(image: Array, top: Array, left: Array) -> Array:
        return jax.lax.dynamic_slice(image, (top, left, 0), (height, width, channels))

    cropped = jax.vmap(crop)(padded, tops, lefts)
    if not flip:
        return cropped
    mirrored = jax.random.bernoulli(keys[2], shape=(batch, 1, 1, 1))
    return jnp.where(mirrored, cropped[:, :, ::-1], cropped)


def cutmix(key: Array, images: Array, labels: Array, *, alpha: float = 1.0) -> tuple[Array, Array, Array]:
    """CutMix: a rectangle of each image is replaced by that of its neighbour in the batch (arXiv:1905.04899).

    Args:
      key: typed PRNG key.
      images: (B, H, W, C), any dtype.
      labels: int (B,).
      alpha: the share of an image that stays is drawn from Beta(alpha, alpha), before the rectangle is clipped.

    Returns:
      Images; the labels of what was put in, (B,); and the share of each image that is left of it, exactly, (B,).
    """
    batch, height, width, _ = images.shape
    share_key, row_key, column_key = jax.random.split(key, 3)
    side = jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha, (batch,)))

    def inside(key: Array, length: int) -> Array:
        """Which of `length` positions are in the rectangle, (B, length)."""
        half = side * length / 2
        middle = jax.random.uniform(key, (batch,)) * length
        position = jnp.arange(length)[None] + 0.5
        return jnp.abs(position - middle[:, None]) < half[:, None]

    cut = inside(row_key, height)[:, :, None] & inside(column_key, width)[:, None, :]
    mixed = jnp.where(cut[..., None], jnp.roll(images, 1, axis=0), images)
    return mixed, jnp.roll(labels, 1), 1 - cut.mean((1, 2), dtype=jnp.float32)


def measure(
    model: nn.Module,
    variables: PyTree,
    inputs: np.ndarray,
    labels: np.ndarray,
    prepare: Prepare,
    mesh: Mesh,
    *,
    block: int = 250,
) -> dict[str, float]:
    """Accuracy and top-5 accuracy, fractions, and mean cross entropy over a whole split.

    Args:
      model: called as `model.apply(variables, x, train=False)`.
      variables: as `State.variables`.
      inputs: (N, ...), not prepared.
      labels: int (N,).
      prepare: as in training.
      mesh: devices, along one axis `data`.
      block: examples at once on each device; compiled once for each shape, model and `prepare`.
    """
    logits = predict(model, variables, inputs, prepare, mesh, block=block).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    rank = (logits > logits[np.arange(len(labels)), labels][:, None]).sum(axis=1)
    return {
        "accuracy": float(np.mean(logits.argmax(axis=1) == labels)),
        "top5_accuracy": float(np.mean(rank < 5)),
        "loss": float(losses.mean()),
    }


def percent(measured: Mapping[str, float]) -> dict[str, float]:
    """Accuracy and top-5 accuracy of what `measure` gives, in %."""
    return {name: 100 * measured[name] for name in ("accuracy", "top5_accuracy")}


def accuracy(*arguments: Any, **options: Any) -> float:
    """The accuracy of `measure`, a fraction."""
    return measure(*arguments, **options)["accuracy"]


def predict(
    model: nn.Module, variables: PyTree, inputs: np.ndarray, prepare: Prepare, mesh: Mesh, *, block: int = 250
) -> np.ndarray:
    """Logits (N, classes) of a whole split; arguments as of `measure`."""
    size = block * mesh.size
    missing = -len(inputs) % size
    padded = np.concatenate([inputs, np.repeat(inputs[:1], missing, axis=0)])
    blocks = replicate(padded.reshape(-1, size, *inputs.shape[1:]), mesh)
    logits = jax.device_get(_logits(model, prepare, mesh, variables, blocks))
    return np.asarray(logits).reshape(len(padded), -1)[: len(inputs)]


@partial(jax.jit, static_argnames=("model", "prepare", "mesh"))
def _logits(model: nn.Module, prepare: Prepare, mesh: Mesh, variables: PyTree, blocks: Array) -> Array:
    shared = jax.lax.with_sharding_constraint(blocks, NamedSharding(mesh, P(None, "data")))
    logits = jax.lax.map(lambda x: model.apply(variables, prepare(x), train=False), shared)
    return jax.lax.with_sharding_constraint(logits, NamedSharding(mesh, P()))
