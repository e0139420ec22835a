"""What decides a run of pruning before training, and its presets."""

import dataclasses
from dataclasses import replace
from typing import Literal

from experiments.config import Preset
from experiments.foresight import Method

ALL: tuple[Method, ...] = ("random", "magnitude", "snip", "grasp", "synflow", "px", "px-balanced")


@dataclasses.dataclass(frozen=True)
class Config:
    """What decides the result of a run.

    Attributes:
      dataset: name of a data set (see `data list`).
      images: only the first so many of each split, to try things out; None: all.
      image_size: images are resized to this; None: as they are.
      model: the network; the VGGs have one dense layer.
      width: share of the model's channels.
      seed: of initialisation, random scores and data order.
      methods: the criteria.
      sparsities: fractions of the kernels' weights to remove, in the order in which the run takes them.
      trained: those of them at which what is left is trained.
      rounds: of SynFlow and PX.
      score_images: train images that the criteria see.
      spectrum: the sparsity whose tangent kernels are shown, one of `sparsities`.
      ntk_images: train images the tangent kernel is of.
      epochs: over the train split.
      batch_size: images a step.
      steps_per_call: steps in one compiled call; None: a quarter of an epoch. One is best for large CNNs on a CPU.
      learning_rate: of SGD, the largest; it rises over a twentieth of the steps and falls linearly to zero.
      momentum: of SGD.
      weight_decay: of all parameters.
      augment: shift and mirror the training images.
    """

    dataset: str = "cifar10"
    images: int | None = None
    image_size: int | None = None
    model: Literal["resnet8", "resnet20", "vgg-a", "vgg19"] = "resnet20"
    width: float = 1.0
    seed: int = 0
    methods: tuple[Method, ...] = ALL
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
    trained: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
    rounds: int = 100
    score_images: int = 128
    spectrum: float = 0.99
    ntk_images: int = 24
    epochs: int = 160
    batch_size: int = 128
    steps_per_call: int | None = None
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    augment: bool = True


_CPU = Config(
    images=30_000,
    image_size=16,
    sparsities=(0.99, 0.95, 0.8, 0.999),
    trained=(0.99, 0.95, 0.8),
    score_images=64,
    epochs=1,
    batch_size=32,
    steps_per_call=1,
    learning_rate=0.05,
)

PRESETS = {
    "resnet20-cpu": Preset(
        _CPU,
        "ResNet-20 on CIFAR-10 at 16x16, one epoch of 30,000 images for each criterion and sparsity",
        "40 min on one core of a busy machine",
        "PX keeps the most of the tangent kernel's trace of all scores, and no layer of it is without a weight even at "
        "99.9 %; one epoch says little of accuracy: the dense network has 41 %, GraSP's 1 % of it 36, PX's 28",
    ),
    "resnet20-99-cpu": Preset(
        replace(_CPU, sparsities=(0.99,), trained=(0.99,), epochs=3),
        "the same at 99 % alone, three epochs each",
        "45 min on one CPU core (not run here)",
        "which criterion's hundredth of the weights learns best when there is some time to learn",
    ),
    "vgg-cpu": Preset(
        replace(_CPU, images=20_000, image_size=None, model="vgg-a", width=0.25, trained=(0.99, 0.8)),
        "VGG-A of a quarter of the width, one epoch of 20,000 images for each criterion and sparsity",
        "20 min on one core of a busy machine",
        "at 99 % PX 42 %, GraSP 41, SynFlow 40, SNIP and magnitude at chance; dense 48",
    ),
    "resnet20-gpu": Preset(
        Config(),
        "ResNet-20 on CIFAR-10 in full: 160 epochs for each criterion and sparsity",
        "6 h on a GPU (not run here)",
        "dense over 91 %; PX best at 99 %",
    ),
    "vgg-gpu": Preset(
        Config(model="vgg19", weight_decay=5e-4),
        "VGG-19 on CIFAR-10 in full: 160 epochs for each criterion and sparsity",
        "12 h on a GPU (not run here)",
        "dense over 93 %; PX best at 99 %",
    ),
    "tiny": Preset(
        Config(
            dataset="digits",
            images=96,
            model="resnet8",
            width=0.25,
            methods=("random", "snip", "px"),
            sparsities=(0.5, 0.9),
            trained=(0.9,),
            rounds=3,
            score_images=8,
            spectrum=0.9,
            ntk_images=3,
            epochs=1,
            batch_size=32,
        ),
        "to try the machinery: all it does, too short to be of use",
        "1 min on one CPU core, most of it compilation",
        "nothing worth a look",
    ),
}
