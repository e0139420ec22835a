"""Training what token methods learn: predictors, and the ViT behind them; for scorers see `token_skipping.py`."""

from collections.abc import Callable, Mapping
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jax import Array

from experiments import classification, optimizers, training
from experiments.classification import State
from experiments.finetuning import FineTuning, steps_of
from experiments.runs import Run
from experiments.trained import Base
from experiments.training import Batch, PyTree
from prune_jax.tokens import DynamicViT, Masked, dynamic_vit_loss, teach

Loss = Callable[[PyTree, Array, Array, Array], tuple[Array, Mapping[str, Array]]]


def only(
    names: Callable[[str], bool], params: PyTree
) -> Callable[[optax.GradientTransformation, optax.Schedule], optax.GradientTransformation]:
    """Makes an optimizer change nothing but the parameters whose top-level path is named; for `finetuning.finetune`."""

    def label(path: tuple, leaf: Array) -> str:
        del leaf
        return "trained" if names(jax.tree_util.keystr(path, simple=True, separator="/")) else "frozen"

    labels = jax.tree_util.tree_map_with_path(label, params)
    return lambda optimizer, rate: optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def classifier(path: str) -> bool:
    """Whether a parameter belongs to a head of the wrapped ViT: that of classes or, if distilled, of distillation."""
    return path.startswith(("model/class_head/", "model/distillation_head/"))


def of_the_vit(path: str) -> bool:
    """Whether a parameter belongs to the wrapped ViT."""
    return path.startswith("model/")


def of_the_method(path: str) -> bool:
    """Whether a parameter is the method's own."""
    return not of_the_vit(path)


def everything(path: str) -> bool:
    """All parameters."""
    del path
    return True


def dynamic_loss(method: DynamicViT, base: Base) -> Loss:
    """DynamicViT's loss, the base being the teacher."""

    def loss(params: PyTree, inputs: Array, labels: Array, key: Array) -> tuple[Array, Mapping[str, Array]]:
        gumbel, dropout = jax.random.split(key)
        rngs = {"gumbel": gumbel, "dropout": dropout}
        output = cast(Masked, method.apply({"params": params}, inputs, method="masked", train=True, rngs=rngs))
        logits, patches = cast(tuple[Array, Array], base.model.apply({"params": base.params}, inputs, method=teach))
        value, parts = dynamic_vit_loss(output, labels, logits, patches, method.fractions)
        kept = output.decisions[:, -1].mean()
        correct = jnp.mean(output.logits.argmax(-1) == labels, dtype=jnp.float32)
        losses = {f"loss_{name}": part for name, part in parts.items()}
        return value, {"accuracy": correct, "kept_at_last": kept, **losses}

    return loss


def train(
    run: Run, base: Base, params: PyTree, loss: Loss, plan: FineTuning, trained: Callable[[str], bool], *, seed: int
) -> PyTree:
    """Trains on the base's train split, to the last step; resumes if it was interrupted.

    Args:
      run: whose folder takes logs and checkpoints; a part of its own.
      base: the trained network, its data and its devices.
      params: of the method, to start from.
      loss: (params, prepared images, labels, key) -> loss and what to log.
      plan: how; its distillation is not used.
      trained: which parameters change, by path.
      seed: of the order of the images and of what is drawn.

    Returns:
      The parameters after the last step.
    """
    examples = len(base.train.labels)
    steps = steps_of(plan, examples)
    rate = optax.cosine_decay_schedule(plan.learning_rate, steps)
    optimizer = only(trained, params)(optimizers.adamw(rate, plan.weight_decay), rate)

    def step(state: State, batch: Batch, key: Array) -> tuple[State, dict[str, Array]]:
        augment_key, loss_key = jax.random.split(key)
        images = classification.crop_and_flip(augment_key, batch["image"]) if base.config.augment else batch["image"]
        inputs = base.prepare(images)
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, watched), gradients = gradient(state.params, inputs, batch["label"], loss_key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        state = State(optax.apply_updates(state.params, updates), {}, opt_state, state.step + 1)
        return state, {"loss": value, **watched}

    per_call = max(1, steps // 8)
    state, _ = training.fit(
        run,
        step,
        State(params, {}, optimizer.init(params), jnp.zeros([], jnp.int32)),
        {"image": base.train.images, "label": base.train.labels},
        training.Plan(steps, plan.batch_size, per_call, 8 * per_call, 8 * per_call),
        seed=seed,
        mesh=base.mesh,
    )
    return state.params
