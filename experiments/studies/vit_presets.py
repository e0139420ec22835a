"""What decides the base of the pruning studies, and its presets."""

import dataclasses
from dataclasses import replace
from typing import Literal

from experiments.config import Preset


@dataclasses.dataclass(frozen=True)
class Config:
    """What decides the result of a run.

    Attributes:
      dataset: name of a data set (see `data list`).
      images: only the first so many of each split, to try things out; None: all.
      seed: of initialisation and data order.
      model: "vit" or "swin".
      size: a published size: "Ti", "S", "B", "L" of ViT, "T", "S", "B" of Swin; None: by the fields below.
      weights: path of a published checkpoint to fine-tune (`.npz`, `.safetensors`); empty: from scratch.
      image_size: images are resized to this, as checkpoints want it; None: as they are.
      patch: side of a patch, pixels.
      width: channels of a token; in Swin of the first stage.
      depth: blocks of a ViT.
      heads: heads of a ViT's blocks.
      depths: blocks of Swin's stages.
      swin_heads: heads of Swin's stages.
      window: side of Swin's windows.
      epochs: over the train split.
      batch_size: images a step.
      learning_rate: the largest; of AdamW.
      warmup: share of the steps over which the rate rises.
      weight_decay: of the kernels.
      label_smoothing: share of the target spread over all classes.
      augment: shift and mirror the training images.
      cutmix: alpha of CutMix; 0: none.
      drop_path: stochastic depth, the rate of the last block.
      average: decay of the moving average of the parameters, which is what is tested; 0: the last parameters are.
      compute_dtype: of the matmuls.
    """

    dataset: str = "cifar10"
    images: int | None = None
    seed: int = 0
    model: Literal["vit", "swin"] = "vit"
    size: str | None = None
    weights: str = ""
    image_size: int | None = None
    patch: int = 4
    width: int = 96
    depth: int = 6
    heads: int = 3
    depths: tuple[int, ...] = (2, 2, 2)
    swin_heads: tuple[int, ...] = (2, 4, 8)
    window: int = 4
    epochs: int = 12
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.05
    label_smoothing: float = 0.0
    augment: bool = True
    cutmix: float = 0.0
    drop_path: float = 0.0
    average: float = 0.0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"


_CPU = Config()
_GPU = replace(
    _CPU,
    size="S",
    epochs=120,
    batch_size=512,
    learning_rate=2e-3,
    weight_decay=0.1,
    label_smoothing=0.1,
    cutmix=1.0,
    drop_path=0.1,
    average=0.999,
    compute_dtype="bfloat16",
)
_PUBLISHED = replace(
    _GPU,
    size="B",
    image_size=224,
    patch=16,
    epochs=5,
    batch_size=128,
    learning_rate=3e-5,
    weight_decay=0.01,
    cutmix=0.0,
    average=0.0,
)

PRESETS = {
    "cpu": Preset(
        _CPU,
        "a small ViT on CIFAR-10, from scratch: 64 patches, width 96, 6 blocks of 3 heads",
        "70 min on one core of a busy machine",
        "67.4 % on the test images",
    ),
    "swin-cpu": Preset(
        replace(_CPU, model="swin", patch=2, width=32, epochs=4),
        "a small Swin on CIFAR-10, from scratch: three stages of two blocks, width 32",
        "20 min on one CPU core",
        "48 % on the test images",
    ),
    "gpu": Preset(
        _GPU,
        "ViT-S/4 on CIFAR-10, from scratch, with CutMix, stochastic depth and a moving average",
        "10 min on a GPU (not run here)",
        "over 90 % on the test images",
    ),
    "swin-gpu": Preset(
        replace(_GPU, model="swin", size=None, patch=2, width=96, depths=(2, 2, 6), swin_heads=(3, 6, 12)),
        "a Swin of three stages on CIFAR-10, from scratch",
        "20 min on a GPU (not run here)",
        "over 91 % on the test images",
    ),
    "published": Preset(
        _PUBLISHED,
        "ViT-B/16 from a published checkpoint, given by --weights PATH, fine-tuned as in report A",
        "20 min on a GPU (not run here)",
        "report A: 98.52 %",
    ),
    "published-swin": Preset(
        replace(_PUBLISHED, model="swin", size="T", patch=4),
        "Swin-T from a published checkpoint, given by --weights PATH",
        "20 min on a GPU (not run here)",
        "over 97 %",
    ),
    "digits": Preset(
        replace(_CPU, dataset="digits", patch=2, width=48, depth=4, heads=3, epochs=40, augment=False),
        "a tiny ViT on scikit-learn's handwritten digits; needs no download",
        "1 min on one CPU core",
        "over 95 % on the test images",
    ),
    "swin-digits": Preset(
        replace(
            _CPU,
            dataset="digits",
            model="swin",
            patch=1,
            width=24,
            depths=(2, 2),
            swin_heads=(2, 4),
            epochs=60,
            learning_rate=2e-3,
            augment=False,
        ),
        "a tiny Swin on scikit-learn's handwritten digits; needs no download",
        "2 min on one CPU core",
        "over 90 % on the test images",
    ),
    "tiny-swin": Preset(
        replace(
            _CPU,
            dataset="digits",
            images=128,
            model="swin",
            patch=2,
            width=8,
            depths=(1, 1),
            swin_heads=(1, 2),
            window=2,
            epochs=1,
            batch_size=32,
        ),
        "to try the machinery on a Swin, too short to be of use",
        "20 s on one CPU core",
        "nothing worth a look",
    ),
    "tiny": Preset(
        replace(
            _CPU, dataset="digits", images=128, patch=2, width=16, depth=2, heads=2, epochs=2, batch_size=32, cutmix=1.0
        ),
        "to try the machinery: all it does, too short to be of use",
        "20 s on one CPU core",
        "nothing worth a look",
    ),
}
