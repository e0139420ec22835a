"""What decides a DessiLBI study, and what all its trainings share."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax

from experiments import classification, cut, data
from experiments.models.lenet import LeNet
from experiments.models.resnet import resnet50
from experiments.models.vgg import vgg19, vgg_a
from experiments.optimizers import Arm

MODELS: dict[str, Callable[[], nn.Module]] = {
    "lenet": LeNet,
    "lenet-digits": partial(LeNet, kernel_size=3, padding="SAME"),
    "vgg-a": vgg_a,
    "vgg-a-quarter": partial(vgg_a, width=0.25),
    "vgg19": vgg19,
    "resnet50": resnet50,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What decides the result of a run.

    Attributes:
      dataset: name of a data set (see `data list`).
      images: only the first so many of each split, to try things out; None: all.
      model: the network; "lenet-digits" has 3x3 kernels, for images of 8x8, "vgg-a-quarter" a quarter of the channels.
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
    model: Literal["lenet", "lenet-digits", "vgg-a", "vgg-a-quarter", "vgg19", "resnet50"] = "lenet"
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

    def of(self, arm: str) -> "ArmNumbers":
        """The numbers of one arm: Adam and what is built around it have their own."""
        if arm.endswith("adam"):
            return ArmNumbers(self.adam_rate, self.adam_mu, self.adam_dense, self.adam_filters)
        return ArmNumbers(self.learning_rate, self.mu, self.dense, self.filters)


class ArmNumbers(NamedTuple):
    """Learning rate, and DessiLBI's mu and thresholds; see `Config`."""

    rate: float
    mu: float
    dense: float
    filters: float


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
