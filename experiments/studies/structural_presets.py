"""What decides the study of structural pruning, and its presets."""

import dataclasses
from dataclasses import replace
from typing import Literal

from experiments.config import Preset

Arm = Literal["global", "local", "magnitude", "regularised"]
Way = Literal["recovered", "cut", "distilled"]

_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclasses.dataclass(frozen=True)
class Config:
    """What decides the result of a run.

    Attributes:
      network: "trained" is the ViT or Swin of the run `base`; a CNN is trained first, in a folder of this run.
        Its name says which share of the channels it has; "vgg-small" is for images of 8x8.
      base: name of a finished run of the study `vit`.
      dataset: of a CNN.
      images: of a CNN: only the first so many of each split, to try things out; None: all.
      augment: of a CNN: shift and mirror the training images.
      base_epochs: a CNN's training.
      base_rate: its learning rate at the start.
      seed: of the order of the images; of a CNN's initialisation too.
      arms: how units are chosen. "global": the least by Taylor scores among all layers, "local": the same fraction of
        each layer (report A's Tables 6 and 7). "magnitude": among all layers by report A's equation 12; "regularised":
        likewise, after sparse training with the group regulariser of its equations 10 and 11.
      ratios: fractions of the units to remove, in the first two arms.
      compared: those of the ratios for the other arms, too.
      finetuned: those of the ratios after which "global" and "local" are trained on, from the recovered weights.
      contrasted: those at which the other arms are trained on as well, and "global" in all `ways`.
      ways: to train on: from the weights "recovered" in closed form, from those the "cut" leaves, or "distilled": from
        the recovered ones with the dense network as a teacher.
      calibration: training images for scores and recovery.
      ridge: see `prune_jax.graph.recover`.
      round_to: widths left are multiples of this.
      sparse_epochs: of training with the group regulariser.
      sparse_strength: of the regulariser.
      epochs: of training after each cut.
      batch_size: images a step.
      learning_rate: at the start.
      distillation: share of the teacher in the loss.
      latency_batch: images a timed call.
      latency_calls: timed calls of the dense and of the cut network, in turns.
    """

    network: Literal["trained", "resnet20", "resnet20-half", "vgg-a", "vgg-a-quarter", "vgg-small"] = "trained"
    base: str = "cpu-0"
    dataset: str = "cifar10"
    images: int | None = None
    augment: bool = True
    base_epochs: float = 30.0
    base_rate: float = 2e-3
    seed: int = 0
    arms: tuple[Arm, ...] = ("global", "local", "magnitude", "regularised")
    ratios: tuple[float, ...] = _RATIOS
    compared: tuple[float, ...] = _RATIOS
    finetuned: tuple[float, ...] = _RATIOS
    contrasted: tuple[float, ...] = (0.3, 0.5, 0.7)
    ways: tuple[Way, ...] = ("recovered", "cut", "distilled")
    calibration: int = 1024
    ridge: float = 1e-3
    round_to: int = 1
    sparse_epochs: float = 2.0
    sparse_strength: float = 1e-4
    epochs: float = 20.0
    batch_size: int = 64
    learning_rate: float = 3e-4
    distillation: float = 0.5
    latency_batch: int = 32
    latency_calls: int = 20


_CPU = Config(
    compared=(0.5, 0.7),
    contrasted=(0.5, 0.7),
    calibration=512,
    sparse_epochs=0.5,
    epochs=0.5,
    latency_calls=10,
)
_CPU_SHORT = replace(
    _CPU,
    arms=("global", "local"),
    ratios=(0.3, 0.5, 0.7),
    compared=(),
    finetuned=(0.5, 0.7),
    contrasted=(),
    ways=("recovered",),
    epochs=0.25,
)
_CPU_CNN = replace(
    _CPU, base_epochs=3.0, epochs=0.25, learning_rate=2e-3, finetuned=(0.3, 0.5, 0.7, 0.9), contrasted=(0.5,)
)
_GPU = Config(base="gpu-0", calibration=4096, round_to=8, batch_size=512, learning_rate=1e-3, latency_batch=256)

PRESETS = {
    "cpu": Preset(
        _CPU_SHORT,
        "the small ViT of `vit cpu`: three ratios, two of them trained on for a quarter of an epoch",
        "6 min on one CPU core",
        "at most 4 points lost at 50 % of the units, at most 12 at 70 %",
    ),
    "cpu-full": Preset(
        _CPU,
        "the same at nine ratios, with other scores, with the group regulariser and with a teacher",
        "80 min on one core of a busy machine",
        "0.4 points lost at 50 % of the units by recovery alone, 3.2 at 70 %; with a teacher 0.1 and 2.1",
    ),
    "gpu": Preset(
        _GPU,
        "ViT-S/4 of `vit gpu`: nine ratios, each trained on for 20 epochs, as in report A",
        "an hour on a GPU (not run here)",
        "at most 4 points lost at 50 % of the units, at most 12 at 70 %",
    ),
    "published": Preset(
        replace(_GPU, base="published-0", batch_size=128, learning_rate=3e-5, latency_batch=32),
        "ViT-B/16 of `vit published`, as in report A",
        "a day on a GPU (not run here)",
        "report A: 91.04 % at 50 % (global), 78.99 % (local)",
    ),
    "swin-cpu": Preset(
        replace(_CPU, base="swin-cpu-0", finetuned=(0.3, 0.5, 0.7, 0.9), contrasted=(0.5,)),
        "the small Swin of `vit swin-cpu`",
        "40 min on one core of a busy machine",
        "half of the units gone for nothing once recovered; 70 % for 1.4 points, 0.3 after half an epoch",
    ),
    "swin-gpu": Preset(
        replace(_GPU, base="swin-gpu-0"),
        "the Swin of three stages of `vit swin-gpu`",
        "an hour on a GPU (not run here)",
        "at most 4 points lost at 50 % of the units",
    ),
    "resnet20-cpu": Preset(
        replace(_CPU_CNN, network="resnet20-half"),
        "ResNet-20 of half the channels on CIFAR-10, trained here for 3 epochs first",
        "50 min on one core of a busy machine",
        "half of the units gone for 49 points at once, 10 recovered, 6.6 after a quarter of an epoch",
    ),
    "vgg-a-cpu": Preset(
        replace(_CPU_CNN, network="vgg-a-quarter"),
        "VGG-A of a quarter of the channels on CIFAR-10, trained here for 3 epochs first",
        "25 min on one core of a busy machine",
        "half of the units gone for 58 points at once, 2.0 recovered, 1.5 after a quarter of an epoch with a teacher",
    ),
    "resnet20": Preset(
        replace(_GPU, network="resnet20", batch_size=128, epochs=5.0),
        "ResNet-20 on CIFAR-10, trained here for 30 epochs first",
        "half an hour on a GPU (not run here)",
        "over 91 % before the cut",
    ),
    "vgg-a": Preset(
        replace(_GPU, network="vgg-a", batch_size=128, epochs=5.0),
        "VGG-A with batch normalisation on CIFAR-10, trained here for 30 epochs first",
        "half an hour on a GPU (not run here)",
        "over 91 % before the cut",
    ),
    "digits": Preset(
        replace(
            _CPU,
            base="digits-0",
            arms=("global",),
            ratios=(0.7,),
            compared=(),
            finetuned=(0.7,),
            contrasted=(),
            ways=("recovered",),
            calibration=256,
            epochs=4.0,
            latency_batch=64,
        ),
        "the tiny ViT of `vit digits`; needs no download",
        "40 s on one CPU core",
        "70 % of the units gone, and 3 points of the accuracy before any training",
    ),
    "tiny": Preset(
        Config(
            base="tiny-0",
            ratios=(0.5,),
            compared=(0.5,),
            finetuned=(0.5,),
            contrasted=(0.5,),
            calibration=64,
            sparse_epochs=0.5,
            epochs=0.5,
            batch_size=32,
            latency_batch=2,
            latency_calls=2,
        ),
        "to try the machinery, on `vit tiny`",
        "1 min on one CPU core, most of it compilation",
        "nothing worth a look",
    ),
    "tiny-cnn": Preset(
        Config(
            network="vgg-small",
            dataset="digits",
            images=64,
            augment=False,
            base_epochs=1.0,
            arms=("global",),
            ratios=(0.5,),
            compared=(),
            finetuned=(0.5,),
            contrasted=(),
            ways=("recovered",),
            calibration=32,
            epochs=0.5,
            batch_size=32,
            latency_batch=2,
            latency_calls=2,
        ),
        "to try the machinery on a CNN, which is trained here first",
        "1 min on one CPU core, most of it compilation",
        "nothing worth a look",
    ),
}
