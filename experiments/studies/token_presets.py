"""What decides a comparison of token methods, and its presets."""

import dataclasses
from dataclasses import replace

from experiments.config import Preset
from experiments.token_methods import Series

ALL: tuple[Series, ...] = ("tome", "cp", "cp-merge", "dynamic", "dynamic-merge", "skip")
NINE = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


@dataclasses.dataclass(frozen=True)
class Config:
    """What decides the result of a run.

    Attributes:
      base: name of a finished run of the study `vit`.
      seed: of what is drawn, and of the order of the images.
      series: the methods to compare.
      keep_rates: at which each is measured without training the ViT.
      classifier: keep rates at which DynamicViT's classifier alone is trained behind frozen predictors (report A).
      joint: keep rates at which DynamicViT is trained as a whole, predictors and ViT: from the largest down, each on
        from the one before.
      finetuned: keep rates at which the ViT behind CP-ViT is trained on (report B).
      others_finetuned: the same for ToMe, patch skipping, and CP-ViT and DynamicViT (predictors frozen) that merge.
      predictor_keep: keep rate that DynamicViT's predictors are first trained for, the ViT being frozen.
      cosine_thresholds: of report C's labels; scorers are trained for each, those of the last skip at all keep rates.
      scorer_images: of the train split, which scorers learn from; the dense model runs on each once.
      scorer_steps: of training the scorers of one threshold.
      learn_epochs: of training predictors.
      joint_epochs: of training DynamicViT as a whole, at each keep rate.
      epochs: of training on what another method leaves, or the classifier.
      batch_size: images a step.
      learning_rate: at the start, of the ViT or its classifier.
      joint_learning_rate: of ViT and predictors, where they are trained jointly.
      own_learning_rate: of predictors, where they are trained alone.
      scorer_learning_rate: of scorers.
      sharpness: of CP-ViT's ratios, by which blocks of long attention range drop more; see `layer_ratios`.
      calibration_images: from which attention ranges and capacities are taken.
      test_images: only the first so many of the test split; None: all.
      timed: keep rates, among `keep_rates`, at which latency is measured.
      batches: batch sizes of the latency.
      repeats: batches timed at each.
    """

    base: str = "cpu-0"
    seed: int = 0
    series: tuple[Series, ...] = ALL
    keep_rates: tuple[float, ...] = NINE
    classifier: tuple[float, ...] = NINE
    joint: tuple[float, ...] = NINE
    finetuned: tuple[float, ...] = (1.0, *NINE)
    others_finetuned: tuple[float, ...] = NINE
    predictor_keep: float = 0.5
    cosine_thresholds: tuple[float, ...] = (0.95, 0.9)
    scorer_images: int = 4096
    scorer_steps: int = 1000
    learn_epochs: float = 1.0
    joint_epochs: float = 1.0
    epochs: float = 1.0
    batch_size: int = 64
    learning_rate: float = 3e-4
    joint_learning_rate: float = 5e-4
    own_learning_rate: float = 1e-3
    scorer_learning_rate: float = 1e-2
    sharpness: float = 4.0
    calibration_images: int = 256
    test_images: int | None = None
    timed: tuple[float, ...] = (0.9, 0.7, 0.5, 0.3)
    batches: tuple[int, ...] = (1, 64)
    repeats: int = 20


_CPU = Config(
    learn_epochs=0.2,
    joint_epochs=0.25,
    epochs=0.15,
    learning_rate=2e-4,
    test_images=4000,
    timed=(0.9, 0.7, 0.5, 0.3),
    repeats=10,
)
_GPU = Config(
    base="gpu-0",
    batch_size=512,
    learning_rate=1e-3,
    joint_learning_rate=1e-3,
    learn_epochs=5,
    joint_epochs=4,
    epochs=5,
    batches=(1, 64, 256),
)

PRESETS = {
    "cpu": Preset(
        _CPU,
        "all methods on the small ViT of `vit cpu`, with and without training; the first 4,000 test images",
        "an hour and a half on one core of a busy machine",
        "half of the patches gone for 0.3 to 1.1 points by CP-ViT merging, ToMe and patch skipping, trained on",
    ),
    "training-free": Preset(
        replace(_CPU, series=("tome", "cp", "cp-merge"), classifier=(), joint=(), finetuned=(), others_finetuned=()),
        "ToMe and CP-ViT, dropping and merging, on the small ViT of `vit cpu`: nothing is trained",
        "4 min on one CPU core",
        "67.7 % dense; at keep rate 0.5 CP-ViT loses 0.4 points if it merges, 6.6 if it drops; ToMe loses 1.0",
    ),
    "merging": Preset(
        replace(
            _CPU,
            series=("cp-merge",),
            others_finetuned=(1.0, 0.8, 0.7, 0.6),
            epochs=0.5,
            learning_rate=5e-5,
            timed=(),
        ),
        "what CP-ViT would drop is merged; the ViT behind it trained on for half an epoch, and so is the dense one",
        "10 min on one core of a busy machine",
        "half an epoch of training gives back all that is lost down to keep rate 0.6",
    ),
    "gpu": Preset(
        _GPU,
        "all methods on ViT-S/4 of `vit gpu`, all keep rates, all test images",
        "three hours on a GPU (not run here)",
        "jointly trained DynamicViT loses less than 2 points at keep rate 0.7",
    ),
    "frozen": Preset(
        replace(_GPU, series=("dynamic",), joint=(), epochs=20),
        "report A's setting, Table 8: frozen predictors, the classifier alone trained for 20 epochs",
        "20 min on a GPU (not run here)",
        "report A: 19 points lost at sparsity 0.5",
    ),
    "joint": Preset(
        replace(_GPU, series=("dynamic",), classifier=(), joint_epochs=10),
        "DynamicViT's predictors and ViT trained together at nine keep rates",
        "an hour on a GPU (not run here)",
        "less lost than in the preset `frozen` at every keep rate",
    ),
    "cifar100": Preset(
        replace(_GPU, base="cifar100", series=("skip",), others_finetuned=(0.5,)),
        "report C's setting: patch skipping on a base made by `run vit gpu --dataset cifar100 --run-name cifar100`",
        "10 min on a GPU (not run here)",
        "report C: 20 % fewer FLOPs for 4.6 points",
    ),
    "digits": Preset(
        replace(
            _CPU,
            base="digits-0",
            keep_rates=(0.8, 0.6, 0.4),
            classifier=(0.4,),
            joint=(0.4,),
            finetuned=(0.6,),
            others_finetuned=(0.4,),
            learn_epochs=8.0,
            joint_epochs=8.0,
            epochs=8.0,
            learning_rate=3e-4,
            test_images=None,
            timed=(0.6,),
        ),
        "all methods on the tiny ViT of `vit digits`; needs no download",
        "6 min on one CPU core",
        "trained on, all that merge or skip lose less than a point at keep rate 0.4, DynamicViT that drops 17 to 26",
    ),
    "tiny": Preset(
        replace(
            _CPU,
            base="tiny-0",
            keep_rates=(0.5,),
            classifier=(0.5,),
            joint=(0.5, 0.75),
            finetuned=(0.5,),
            others_finetuned=(0.5,),
            cosine_thresholds=(0.95,),
            batch_size=32,
            scorer_images=64,
            scorer_steps=16,
            calibration_images=32,
            test_images=64,
            timed=(0.5,),
            batches=(1,),
            repeats=1,
        ),
        "to try the machinery, on `vit tiny`",
        "1 min on one CPU core",
        "nothing worth a look",
    ),
}
