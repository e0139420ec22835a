"""Config and presets of the study `classify`."""

from dataclasses import dataclass, replace
from typing import Literal

from experiments.config import Preset


@dataclass(frozen=True)
class Config:
    """What decides the result of a run.

    Attributes:
      functaset: name of a finished run of the study `functaset`.
      seed: of initialisation, data order, dropout and noise.
      copies: augmented copies of the train split to train on besides itself; None: all that the functaset has.
      head: "mlp" for vectors; "conv" (report A's) or "residual" for grids.
      widths: of the hidden layers, the convolutions or the stages.
      activation: of the mlp.
      dropout: of the mlp and of the last layer of "residual".
      cell_dropout: share of the grid's cells that "residual" does not see in training.
      noise: standard deviation of Gaussian noise on the normalised latents in training.
      optimizer: "adamw", or "adam", where weight decay is a part of the gradient, as in PyTorch.
      learning_rate: at the start.
      schedule: "constant", or "cosine" down to zero.
      weight_decay: as the optimizer has it.
      label_smoothing: share of the target spread evenly over all classes.
      batch_size: latents a step.
      epochs: passes over as many latents as the train split has images.
      evaluate_every: epochs between evaluations on the validation split, which choose the state that is tested.
      curve_every: epochs between measurements of train and test accuracy, to set beside a published curve; they
        choose nothing. None: test is measured at the end alone.
      table_b: number of report B's table with that curve.
    """

    functaset: str = "mnist-0"
    seed: int = 0
    copies: int | None = None
    head: Literal["mlp", "conv", "residual"] = "mlp"
    widths: tuple[int, ...] = (1024,)
    activation: Literal["silu", "relu"] = "silu"
    dropout: float = 0.2
    cell_dropout: float = 0.0
    noise: float = 0.0
    optimizer: Literal["adam", "adamw"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = 0.1
    label_smoothing: float = 0.1
    batch_size: int = 256
    epochs: int = 100
    evaluate_every: int = 5
    curve_every: int | None = None
    table_b: Literal[3, 4, 5] | None = None


_A = Config()
_A_CONV = replace(_A, functaset="cifar10-spatial-0", copies=0, head="conv", widths=(64, 64), dropout=0.0)
_B = Config(
    functaset="cifar10-0",
    copies=0,
    widths=(256, 128),
    activation="relu",
    dropout=0.0,
    optimizer="adam",
    weight_decay=0.0,
    label_smoothing=0.0,
    batch_size=128,
    epochs=600,
    evaluate_every=50,
    curve_every=100,
    table_b=3,
)

PRESETS = {
    "digits": Preset(
        replace(_A, functaset="digits-0", widths=(256,), batch_size=64, epochs=60),
        "the 8x8 digits from latents of 16 values, by report A's head, narrower",
        "10 s on two CPU cores",
        "98.6 % of the test images",
    ),
    "mnist": Preset(
        _A,
        "MNIST by report A's head and settings",
        "6 min on one CPU core",
        "98 % of the test images (report A: 96.94)",
    ),
    "cifar10": Preset(
        replace(_A, functaset="cifar10-0"),
        "CIFAR-10 vectors by report A's head and settings, with the augmented copies of the functaset",
        "6 min on one CPU core",
        "57 % of the test images (report A: 51.56)",
    ),
    "cifar10-spatial-conv": Preset(
        replace(_A_CONV, epochs=12),
        "CIFAR-10 grids by report A's head and settings, 12 epochs instead of 100",
        "5 min on one CPU core",
        "53 % of the test images, overfitted (report A: 56.24)",
    ),
    "cifar10-spatial": Preset(
        Config(
            functaset="cifar10-spatial-0",
            head="residual",
            widths=(48, 96),
            cell_dropout=0.1,
            schedule="cosine",
            learning_rate=3e-3,
            epochs=12,
            evaluate_every=1,
        ),
        "CIFAR-10 grids by a residual network, with the augmented copies of the functaset",
        "15 min on one core of a busy machine",
        "64 % of the test images (report A: 56.24)",
    ),
    "cifar10-b-mlp1": Preset(
        _B,
        "CIFAR-10 vectors by report B's MLP1, 600 epochs",
        "3 min on one CPU core",
        "50.8 % of the test images (report B: 43.76 % after 600 epochs)",
    ),
    "cifar10-b-mlp2": Preset(
        replace(_B, widths=(256, 128, 64), table_b=4),
        "CIFAR-10 vectors by report B's MLP2, 600 epochs",
        "5 min on one CPU core",
        "49.4 % of the test images (report B: 43.07 % after 600 epochs)",
    ),
    "cifar10-b-mlp1-decay": Preset(
        replace(_B, weight_decay=1e-4, epochs=500, table_b=5),
        "CIFAR-10 vectors by report B's MLP1 with weight decay 1e-4, 500 epochs",
        "3 min on one CPU core",
        "51.3 % of the test images (report B: 43.21 % after 500 epochs)",
    ),
    "tiny": Preset(
        replace(_A, functaset="tiny-0", widths=(32,), batch_size=64, epochs=20, curve_every=10),
        "to try the machinery, on functaset/tiny-0",
        "10 s on two CPU cores, most of it compilation",
        "70 % of the test images",
    ),
}
