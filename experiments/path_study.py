"""The DessiLBI studies: the same network trained by several optimizers, then cut along the path or by magnitude."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments import classification, cut, data, logs, optimizers, path_figures, training
from experiments.models.conv import for_steps
from experiments.models.lenet import LeNet
from experiments.models.resnet import resnet50
from experiments.models.vgg import vgg19, vgg_a
from experiments.optimizers import Arm, is_path
from experiments.parts import recorded
from experiments.runs import Run
from optim_jax import layer_sparsity, restrict_to_support, sparse_params, support_masks
from prune_jax import apply_masks

MODELS: dict[str, Callable[[], nn.Module]] = {
    "lenet": LeNet,
    "lenet-digits": partial(LeNet, kernel_size=3, padding="SAME"),
    "vgg-a": vgg_a,
    "vgg19": vgg19,
    "resnet50": resnet50,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What decides the result of a run.

    Attributes:
      dataset: name of a data set (see `data list`).
      images: only the first so many of each split, to try things out; None: all.
      model: the network; "lenet-digits" has 3x3 kernels, for images of 8x8.
      seed: the first seed, of initialisation and data order.
      seeds: how many seeds each optimizer is trained with.
      arms: the optimizers.
      epochs: over the train split.
      batch_size: images a step.
      steps_per_call: steps in one compiled call; None: an eighth of an epoch. One is best for large CNNs on a CPU.
      learning_rate: of SGD, DessiLBI and proximal SGD.
      adam_rate: of Adam and DessiLBI+Adam.
      schedule: of both; see `optimizers.schedule`.
      momentum: of SGD, also inside DessiLBI and proximal SGD.
      weight_decay: decoupled, of all arms.
      kappa: of DessiLBI.
      mu: of DessiLBI.
      adam_mu: of DessiLBI+Adam, whose rates are of another size; so are its thresholds.
      dense: see `optimizers.make`; 1 in the official code.
      filters: see there; 1 in the official code.
      adam_dense: of DessiLBI+Adam, like
      adam_filters: see `optimizers.make`.
      strength: of the penalty in proximal SGD.
      label_smoothing: share of the target spread over all classes.
      augment: shift and mirror the training images.
      prune: sets of layers that are cut at `fractions`; layers of a set are joined by "+".
      fractions: of each layer's filters, or of a dense layer's weights, to cut.
      each_layer: cut from every layer alone, where there are at most 12.
      total: also cut this fraction of all parameters, taken from the layers of the last set; None: do not.
      cut_images: how many test images to measure the cut networks on; None: all.
      retrain_steps: length of the short retraining after each cut.
      retrain_rate: its learning rate, as a share of the arm's.
      kernels: layer whose kernels are drawn.
      features: layers whose feature maps are drawn.
    """

    dataset: str = "mnist"
    images: int | None = None
    model: Literal["lenet", "lenet-digits", "vgg-a", "vgg19", "resnet50"] = "lenet"
    seed: int = 0
    seeds: int = 3
    arms: tuple[Arm, ...] = ("sgd", "proximal", "dessilbi", "adam", "dessilbi-adam")
    epochs: int = 8
    batch_size: int = 128
    steps_per_call: int | None = None
    learning_rate: float = 0.05
    adam_rate: float = 2e-3
    schedule: Literal["linear", "step", "constant"] = "linear"
    momentum: float = 0.9
    weight_decay: float = 0.0
    kappa: float = 1.0
    mu: float = 30.0
    adam_mu: float = 1.25
    dense: float = 0.1
    filters: float = 1.0
    adam_dense: float = 0.1
    adam_filters: float = 1.0
    strength: float = 0.02
    label_smoothing: float = 0.0
    augment: bool = False
    prune: tuple[str, ...] = ("conv3", "conv3+fc1")
    fractions: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8)
    each_layer: float = 0.8
    total: float | None = 0.825
    cut_images: int | None = None
    retrain_steps: int = 100
    retrain_rate: float = 0.2
    kernels: str = "conv3"
    features: tuple[str, ...] = ("conv1", "conv2", "conv3")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all arms and seeds of a run share.

    Attributes:
      config: of the run.
      model: the network.
      prepare: brings images to what it takes.
      train: split to train on, like
      validation: to watch, and
      test: for the final numbers.
      mesh: devices.
    """

    config: Config
    model: nn.Module
    prepare: classification.Prepare
    train: data.Split
    validation: data.Split
    test: data.Split
    mesh: jax.sharding.Mesh

    @property
    def steps_per_epoch(self) -> int:
        """Of the train split, the remainder dropped."""
        return len(self.train.labels) // self.config.batch_size

    def measure(self, variables: Any, split: data.Split) -> dict[str, float]:
        """Accuracy, a fraction, and loss."""
        return classification.measure(
            self.model, variables, split.images, split.labels, self.prepare, self.mesh, block=100
        )

    def percent(self, variables: Any) -> float:
        """Test accuracy of a cut network, %."""
        count = self.config.cut_images
        some = data.Split(self.test.images[:count], self.test.labels[:count])
        return 100 * self.measure(variables, some)["accuracy"]


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


def check(config: Config, params: Any) -> None:
    """Refuses, before any training, layers that the network does not have and numbers that make no sense.

    Args:
      config: of the run.
      params: the network's parameters, or their shapes.

    Raises:
      ValueError: names the field, its value and what would be right.
    """
    layers = cut.layers_of(params)
    for name in [*(layer for group in config.prune for layer in group.split("+")), config.kernels, *config.features]:
        data.check_choice(f"layer of {config.model}", name, layers)
    for name, values in {"fractions": config.fractions, "each_layer": (config.each_layer,)}.items():
        if not all(0 <= value < 1 for value in values):
            raise ValueError(f"{name} must be in [0, 1), got {values}")
    if config.total is not None:
        cut.fraction_of_all(params, config.prune[-1].split("+"), config.total)
    for name in ("seeds", "epochs", "retrain_steps", "steps_per_call"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


def _one(setting: Setting, arm: Arm, seed: int, own: Run) -> dict[str, Any]:
    """Trains one arm with one seed and returns its record."""
    config = setting.config
    steps = config.epochs * setting.steps_per_epoch
    adam = arm.endswith("adam")
    rate = config.adam_rate if adam else config.learning_rate
    optimizer = optimizers.make(
        arm,
        optimizers.schedule(config.schedule, rate, steps=steps, steps_per_epoch=setting.steps_per_epoch),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        kappa=config.kappa,
        mu=config.adam_mu if adam else config.mu,
        dense=config.adam_dense if adam else config.dense,
        filters=config.adam_filters if adam else config.filters,
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
        adam,
        config.retrain_rate * rate,
        config.retrain_steps,
        config.batch_size,
    )
    record = {**_record(setting, arm, state, retraining, seed), **times, "steps": steps}
    if own.first_process:
        path_figures.log_arrays(own.directory, steps, _arrays(setting, arm, state))
    return record


def _record(
    setting: Setting, arm: str, state: classification.State, retraining: cut.Retraining, seed: int
) -> dict[str, Any]:
    """All numbers of one trained network; accuracies in % of the test split."""
    config, params = setting.config, state.params
    images, labels = training.replicate((setting.train.images, setting.train.labels), setting.mesh)

    def masks(layers: list[str], fraction: float) -> Any:
        if is_path(arm):
            return cut.path_cut(params, state.opt_state, layers, fraction)
        return cut.magnitude_cut(params, layers, fraction)

    def after(layers: list[str], fraction: float, *, again: bool) -> dict[str, float]:
        keep = masks(layers, fraction)
        found = {
            "fraction": fraction,
            "removed": cut.removed(params, keep),
            "accuracy": setting.percent({**state.variables, "params": apply_masks(params, keep)}),
        }
        if again:
            retrained = cut.retrain(retraining, state.variables, keep, images, labels, jax.random.key(seed))
            found["retrained"] = setting.percent(retrained)
        return found

    layers = list(cut.layers_of(params))
    record: dict[str, Any] = {
        "accuracy": 100 * setting.measure(state.variables, setting.test)["accuracy"],
        "cut": {
            group: [after(group.split("+"), fraction, again=True) for fraction in config.fractions]
            for group in config.prune
        },
        "each_layer": {},
    }
    if len(layers) <= 12:
        record["each_layer"] = {layer: after([layer], config.each_layer, again=False)["accuracy"] for layer in layers}
    if config.total is not None:
        largest = config.prune[-1].split("+")
        record["total"] = after(largest, cut.fraction_of_all(params, largest, config.total), again=True)
    if is_path(arm):
        sparse = restrict_to_support(params, state.opt_state)
        record["support_accuracy"] = setting.percent({**state.variables, "params": sparse})
        record["support_removed"] = cut.removed(params, support_masks(state.opt_state))
    else:
        record["support_removed"] = cut.removed(params, jax.tree.map(lambda w: w != 0, params))
    return record


def _arrays(setting: Setting, arm: str, state: classification.State) -> Mapping[str, np.ndarray]:
    """What the figures show of one network: kernels, and feature maps of the first test image."""
    config = setting.config
    variables = jax.device_get(state.variables)
    arrays = {"kernels W": _leaf(variables["params"], config.kernels)}
    if is_path(arm):
        arrays["kernels Gamma"] = _leaf(jax.device_get(sparse_params(state.opt_state)), config.kernels)
    image = setting.prepare(jnp.asarray(setting.test.images[:1]))
    _, found = setting.model.apply(
        variables,
        image,
        train=False,
        capture_intermediates=lambda module, _: "/".join(module.path) in config.features,
        mutable=["intermediates"],
    )
    for layer in config.features:
        node: Any = found["intermediates"]
        for part in layer.split("/"):
            node = node[part]
        arrays[f"features {layer}"] = np.maximum(np.asarray(node["__call__"][0])[0], 0)
    return arrays


def _leaf(params: Any, layer: str) -> np.ndarray:
    for part in layer.split("/"):
        params = params[part]
    return np.asarray(params["kernel"])
