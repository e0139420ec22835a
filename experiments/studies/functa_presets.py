"""Config and presets of the functa study."""

from dataclasses import dataclass, replace
from typing import Literal

from experiments.config import Preset
from experiments.folder import Fit
from functa_jax.modulation import Modulate
from functa_jax.spatial import Coordinates, Interpolation


@dataclass(frozen=True)
class Config:
    """What decides the result of a run.

    Attributes:
      dataset: name of a data set (see `data list`), or "folder": the pictures in the folder given by --data-dir.
      image_size: side of the squares that the pictures of a folder are brought to, pixels.
      fit: how they become squares: what is too long cut off, or distorted.
      seed: of initialisation, data order and subsampling.
      train_images: how many images of the train split to use; None: all.
      width: units in each hidden layer.
      depth: number of linear layers, the output layer included.
      latent: size of the latent; or height, width and channels of a grid of latents (Spatial Functa).
      interpolation: of a grid's modulations at the points.
      kernel_size: of the convolution from a grid of latents to its modulations, 1 or 3.
      coordinates: what a network with a grid reads: positions in the image, or in the cell.
      w0: frequency factor of the sines.
      modulate: what the latent does to each layer.
      hidden: hidden widths of the latent-to-modulation MLP; () is a linear map.
      modulation_scale: factor on the initialisation of that map.
      inner_steps: gradient steps to fit a latent.
      inner_rate: rate of the inner steps; None: `inner_rate_scale` / curvature of the inner loss at the start.
      inner_rate_scale: see inner_rate; below 2 the first steps are stable whatever the network's size.
      rate_limit: learned rates are kept below this / curvature of the network as it is; None: no limit.
      meta_sgd: learn a rate for each dimension of the latent.
      rates_per_step: learn them for each inner step.
      second_order: differentiate through the inner gradients.
      inner_loss_weight: weight of report A's extra meta-loss term.
      updates: "relative" scales outer updates to the weights they change (stable at every size); "adam" is plain Adam.
      learning_rate: of the outer loop; a fraction of each weight's size a step for "relative".
      schedule: of the outer learning rate; "linear" warms up over a twentieth of the steps and decays to zero.
      points: random pixels of each image a step; None: all of them.
      batch_size: images a step.
      microbatch: images whose gradient is computed at once on a CPU, for its cache; accelerators take the whole batch.
      matmul: dtype of the big matrix products; sines and parameters stay float32.
      steps: outer steps.
      steps_per_call: steps in one call of the compiled loop.
      evaluate_every: steps between evaluations on held-out images of the train split.
      checkpoint_every: steps between checkpoints.
      validation_images: images of each evaluation.
      host_data: feed batches from the host, for a set that does not fit on the device.
    """

    dataset: str = "mnist"
    image_size: int = 64
    fit: Fit = "crop"
    seed: int = 0
    train_images: int | None = None
    width: int = 256
    depth: int = 6
    latent: int | tuple[int, int, int] = 256
    interpolation: Interpolation = "nearest"
    kernel_size: Literal[1, 3] = 1
    coordinates: Coordinates = "image"
    w0: float = 30.0
    modulate: Modulate = "shift"
    hidden: tuple[int, ...] = ()
    modulation_scale: float = 1.0
    inner_steps: int = 3
    inner_rate: float | None = None
    inner_rate_scale: float = 1.4
    rate_limit: float | None = 8.0
    meta_sgd: bool = True
    rates_per_step: bool = False
    second_order: bool = True
    inner_loss_weight: float = 0.0
    updates: Literal["relative", "adam"] = "relative"
    learning_rate: float = 0.04
    schedule: Literal["constant", "linear"] = "linear"
    points: int | None = None
    batch_size: int = 16
    microbatch: int = 2
    matmul: Literal["float32", "bfloat16"] = "float32"
    steps: int = 1000
    steps_per_call: int = 20
    evaluate_every: int = 200
    checkpoint_every: int = 200
    validation_images: int = 512
    host_data: bool = False


# Stable on every network size tried; see `functa_jax.relative_adam` and `rate_limit` for why.
_SMALL = Config(
    width=64,
    depth=4,
    latent=256,
    w0=10.0,
    modulate="both",
    modulation_scale=0.4,
    rates_per_step=True,
    points=392,
    batch_size=4,
    microbatch=4,
    steps=3_000,
    steps_per_call=50,
    evaluate_every=200,
    checkpoint_every=200,
    validation_images=256,
)
_CIFAR10 = replace(
    _SMALL,
    dataset="cifar10",
    width=128,
    modulate="shift",
    points=512,
    steps=20_000,
    evaluate_every=1_000,
    checkpoint_every=500,
)
_TINY = replace(
    _SMALL,
    dataset="digits",
    width=16,
    depth=3,
    latent=8,
    points=None,
    batch_size=8,
    steps=60,
    steps_per_call=5,
    evaluate_every=20,
    checkpoint_every=10,
    validation_images=16,
)
# Report A's code: first order, with the mean of the inner losses added.
_A1 = Config(
    width=256,
    depth=6,
    latent=256,
    w0=30.0,
    inner_rate=0.01,
    rate_limit=None,
    meta_sgd=False,
    second_order=False,
    inner_loss_weight=1.0,
    updates="adam",
    learning_rate=3e-5,
    schedule="constant",
    batch_size=128,
    steps=200_000,
    steps_per_call=50,
    evaluate_every=5_000,
    checkpoint_every=1_000,
)
_A2 = replace(_A1, width=512, depth=16, latent=512, meta_sgd=True, learning_rate=3e-6, batch_size=32)
_A3 = replace(_A1, dataset="cifar10", latent=(8, 8, 16), w0=10.0, meta_sgd=True, batch_size=64, steps=300_000)

PRESETS = {
    "digits": Preset(
        replace(
            _SMALL,
            dataset="digits",
            width=48,
            depth=3,
            latent=16,
            points=None,
            batch_size=16,
            microbatch=16,
            steps=8_000,
        ),
        "scikit-learn's handwritten digits, 8x8; needs no download",
        "1 min on two CPU cores",
        "24 dB with a latent a quarter of the image",
    ),
    "mnist-small": Preset(
        _SMALL,
        "MNIST with a net of width 64",
        "2 min on two CPU cores, one of them training",
        "25.4 dB on the test images (report A: 21.37)",
    ),
    "mnist-medium": Preset(
        replace(_SMALL, width=96, steps=20_000, evaluate_every=1_000, checkpoint_every=500),
        "MNIST with a net of width 96",
        "10 min on two CPU cores",
        "29.6 dB on the test images (report A: 21.37)",
    ),
    "mnist-large": Preset(
        replace(_SMALL, width=96, steps=32_000, evaluate_every=1_000, checkpoint_every=500),
        "MNIST with a net of width 96, trained longer than mnist-medium",
        "48 min on one core of a busy machine",
        "30.1 dB on the test images (report A: 21.37)",
    ),
    "mnist-half": Preset(
        replace(_SMALL, train_images=27_000, steps=5_000, evaluate_every=500, checkpoint_every=500),
        "MNIST, half of the training images: for fitting images of another kind (report A: 18.97 dB)",
        "11 min on one core of a busy machine",
        "26.4 dB on the test images",
    ),
    "mnist-c1": Preset(
        _A1,
        "report A's configuration 1: width 256, depth 6, SGD inside, first order",
        "hours on a GPU, days on two CPU cores (not run here)",
        "report A: 21.37 dB",
    ),
    "mnist-c2": Preset(
        _A2,
        "report A's configuration 2: width 512, depth 16, meta-SGD, first order",
        "about a day on a GPU (not run here)",
        "report A: 19.36 dB",
    ),
    "cifar10-c1": Preset(
        replace(_A1, dataset="cifar10", steps=300_000),
        "report A's configuration 1 on CIFAR-10",
        "hours on a GPU (not run here)",
        "report A: 20.25 dB",
    ),
    "cifar10-c3": Preset(
        _A3,
        "report A's configuration 3: Spatial Functa on a grid of 8x8x16, width 256, depth 6, first order",
        "hours on a GPU (not run here)",
        "report A: 22.42 dB",
    ),
    "cifar10-spatial-paper": Preset(
        replace(
            _A3,
            inner_rate=None,
            rate_limit=8.0,
            second_order=True,
            inner_loss_weight=0.0,
            updates="relative",
            learning_rate=0.04,
            schedule="linear",
            batch_size=128,
        ),
        "the network and inner loop of the Spatial Functa paper: 8x8x16, nearest, w0 10, meta-SGD, second order",
        "hours on a GPU (not run here)",
        "the paper: 39.0 dB (as quoted by LH-NeF)",
    ),
    "cifar10-paper": Preset(
        replace(
            _A2,
            dataset="cifar10",
            depth=15,
            latent=1024,
            second_order=True,
            inner_loss_weight=0.0,
            batch_size=128,
            steps=500_000,
        ),
        "the network and inner loop of the Functa paper: 1024, width 512, depth 15, meta-SGD, second order",
        "days on a GPU (not run here)",
        "the paper: 38.1 dB (as quoted by LH-NeF)",
    ),
    "tiny-grid": Preset(
        replace(_TINY, latent=(4, 4, 2), interpolation="bilinear", kernel_size=3),
        "as tiny, with a grid of latents",
        "20 s on two CPU cores, most of it compilation",
        "nothing worth a look",
    ),
    "cifar10-small": Preset(
        _CIFAR10,
        "CIFAR-10 with a net of width 128 and a vector of 256",
        "45 min on one core of a busy machine",
        "25.3 dB on the test images (report A: 20.25)",
    ),
    "cifar10-spatial-small": Preset(
        replace(_CIFAR10, width=64, latent=(8, 8, 16), points=None),
        "CIFAR-10 with a net of width 64 and a grid of 8x8x16",
        "43 min on one core of a busy machine",
        "36.9 dB on the test images (report A: 22.42)",
    ),
    "cifar10-cells-small": Preset(
        replace(_CIFAR10, width=64, latent=(8, 8, 16), coordinates="cell", points=None, steps=8_000),
        "as cifar10-spatial-small, but one function draws every cell, so that a latent means the same everywhere",
        "10 min on one core of a busy machine",
        "39.8 dB on the test images (report A: 22.42)",
    ),
    "folder": Preset(
        replace(
            _CIFAR10,
            dataset="folder",
            width=64,
            latent=(16, 16, 12),
            coordinates="cell",
            points=2_048,
            batch_size=1,
            steps=4_000,
            steps_per_call=20,
            evaluate_every=200,
            checkpoint_every=200,
        ),
        "a person's own pictures: --data-dir FOLDER",
        "4 min on one CPU core",
        "what the pictures allow; a latent of a quarter of their values",
    ),
    "tiny": Preset(
        _TINY,
        "to try the machinery: all it does, on a net too small to be of use",
        "20 s on two CPU cores, most of it compilation",
        "nothing worth a look",
    ),
}
