"""The DessiLBI studies: the same network trained by several optimizers, then cut along the path or by magnitude."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from experiments import classification, cut, data, logs, optimizers, path_figures, path_records, training
from experiments.models.conv import for_steps
from experiments.optimizers import Arm, is_path
from experiments.parts import recorded
from experiments.path_config import MODELS, Config, Setting, check
from experiments.runs import Run
from optim_jax import layer_sparsity


def run(config: Config, run: Run) -> dict[str, Any]:
    """Trains every arm with every seed, each in a folder of its own, and cuts what was trained.

    Returns:
      For each arm the records of its seeds, as `_record` makes them.
    """
    train, validation, test = data.load_splits(config.dataset, images=config.images, data_dir=run.options.data_dir)
    setting = Setting(
        config,
        MODELS[config.model](),
        classification.standardise(train.images),
        train,
        validation,
        test,
        training.data_mesh(),
    )
    image = setting.prepare(jnp.asarray(train.images[:1]))
    check(config, jax.eval_shape(setting.model.init, jax.random.key(0), image)["params"])
    seeds = range(config.seed, config.seed + config.seeds)
    return {
        arm: [recorded(run, f"{arm}-{seed}", partial(_one, setting, arm, seed)) for seed in seeds]
        for arm in config.arms
    }


def _one(setting: Setting, arm: Arm, seed: int, own: Run) -> dict[str, Any]:
    """Trains one arm with one seed and returns its record."""
    config = setting.config
    steps = config.epochs * setting.steps_per_epoch
    rate, mu, dense, filters = config.of(arm)
    optimizer = optimizers.make(
        arm,
        optimizers.schedule(config.schedule, rate, steps=steps, steps_per_epoch=setting.steps_per_epoch),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        kappa=config.kappa,
        mu=mu,
        dense=dense,
        filters=filters,
        strength=config.strength,
    )
    augment = classification.crop_and_flip if config.augment else None

    def zeros(state: classification.State) -> dict[str, Array]:
        """The path: which part of each layer of Gamma is zero; nothing for an arm without one."""
        if is_path(arm):
            found = jax.tree_util.tree_leaves_with_path(layer_sparsity(state.opt_state))
            return {"zero " + cut.leaf_name(path).removesuffix("/kernel"): value for path, value in found}
        return {}

    def evaluate(state: classification.State, step: int, log: logs.Log) -> dict[str, float]:
        return {f"validation_{k}": v for k, v in setting.measure(state.variables, setting.validation).items()}

    per_call = config.steps_per_call or max(1, setting.steps_per_epoch // 8)
    every = max(1, setting.steps_per_epoch // per_call) * per_call
    state, times = training.fit(
        own,
        classification.train_step(
            for_steps(setting.model, per_call),
            optimizer,
            setting.prepare,
            label_smoothing=config.label_smoothing,
            augment=augment,
            watch=zeros,
        ),
        classification.initialise(
            setting.model, optimizer, setting.prepare(jnp.asarray(setting.train.images[:2])), jax.random.key(seed)
        ),
        {"image": setting.train.images, "label": setting.train.labels},
        training.Plan(steps, config.batch_size, per_call, every, every),
        seed=seed,
        mesh=setting.mesh,
        evaluate=evaluate,
    )
    retraining = cut.Retraining(
        setting.model,
        setting.prepare,
        augment,
        arm.endswith("adam"),
        config.retrain_rate * rate,
        config.retrain_steps,
        config.batch_size,
    )
    record = {**path_records.record(setting, arm, state, retraining, seed), **times, "steps": steps}
    if own.first_process:
        path_figures.log_arrays(own.directory, steps, path_records.arrays(setting, arm, state))
    return record
