"""Training a trained network on: what is left after pruning, or a penalty that makes it prunable."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from experiments import classification, logs, optimizers, training
from experiments.classification import State, Teacher
from experiments.runs import Run
from experiments.trained import Base
from experiments.training import PyTree


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """How to train on; images are shifted and mirrored where the base was trained so.

    Attributes:
      epochs: over the train split, fractions allowed.
      batch_size: images a step.
      learning_rate: of AdamW at the start; falls to zero by a cosine.
      weight_decay: of the kernels.
      distillation: share of the loss that is the distance to the dense model's answers, in [0, 1].
      temperature: of the distillation.
    """

    epochs: float = 2.0
    batch_size: int = 64
    learning_rate: float = 3e-4
    weight_decay: float = 0.05
    distillation: float = 0.0
    temperature: float = 2.0


def check(plan: FineTuning, examples: int) -> None:
    """Refuses numbers that make no sense.

    Args:
      plan: how to train on.
      examples: images in the train split.

    Raises:
      ValueError: names the field, its value and what would be right.
    """
    if not plan.epochs > 0:
        raise ValueError(f"epochs must be above 0, got {plan.epochs}")
    if not 1 <= plan.batch_size <= examples:
        raise ValueError(f"batch_size must be from 1 to the {examples} train images, got {plan.batch_size}")
    if not 0 <= plan.distillation <= 1:
        raise ValueError(f"distillation must be in [0, 1], got {plan.distillation}")


def steps_of(plan: FineTuning, examples: int) -> int:
    """Number of steps, at least one."""
    return max(1, round(plan.epochs * (examples // plan.batch_size)))


def finetune(run: Run, base: Base, params: PyTree, plan: FineTuning, **options: Any) -> PyTree:
    """`finetune_variables` for a network without batch statistics: parameters to parameters."""
    return finetune_variables(run, base, {"params": params}, plan, **options)["params"]


def finetune_variables(
    run: Run,
    base: Base,
    variables: PyTree,
    plan: FineTuning,
    *,
    seed: int,
    model: Any = None,
    wrap: Callable[[optax.GradientTransformation, optax.Schedule], optax.GradientTransformation] | None = None,
    validate: bool = True,
) -> PyTree:
    """Trains a network on the base's train split, to the last step; resumes if it was interrupted.

    Args:
      run: whose folder takes logs and checkpoints; a part of its own, as `parts.part` makes it.
      base: the trained network, its data and its devices.
      variables: to start from: {"params"} and, where the network has them, {"batch_stats"}.
      plan: how.
      seed: of the order of the images.
      model: another module than the base's, such as a narrower one, that `variables` belong to.
      wrap: makes the optimizer from AdamW and its learning rate, such as `lambda adamw, _: keep_masks(masks, adamw)`.
      validate: measure on the validation split at the end of every epoch.

    Returns:
      The variables after the last step.
    """
    examples = len(base.train.labels)
    check(plan, examples)
    steps, per_epoch = steps_of(plan, examples), examples // plan.batch_size
    rate = optax.cosine_decay_schedule(plan.learning_rate, steps)
    optimizer = optimizers.adamw(rate, plan.weight_decay)
    if wrap is not None:
        optimizer = wrap(optimizer, rate)
    network, params = model or base.model, variables["params"]
    teacher = None
    if plan.distillation:
        teacher = Teacher(base.logits, plan.distillation, plan.temperature)

    def evaluate(state: State, step: int, log: logs.Log) -> dict[str, float]:
        del step, log
        found = base.measure_variables(state.variables, base.validation, model=network) if validate else {}
        return {f"validation_{name}": value for name, value in found.items()}

    per_call = max(1, min(per_epoch, steps) // 4)
    state, _ = training.fit(
        run,
        classification.train_step(
            network,
            optimizer,
            base.prepare,
            augment=classification.crop_and_flip if base.config.augment else None,
            teacher=teacher,
        ),
        State(params, variables.get("batch_stats", {}), optimizer.init(params), jnp.zeros([], jnp.int32)),
        {"image": base.train.images, "label": base.train.labels},
        training.Plan(steps, plan.batch_size, per_call, 4 * per_call, 4 * per_call),
        seed=seed,
        mesh=base.mesh,
        evaluate=evaluate,
    )
    return {name: state.variables[name] for name in variables}
