"""DessiLBI on CIFAR-10: VGG-A, VGG-19 and ResNet-50 with and without it, then cut along the path or by magnitude.

Reference: Fu et al. 2020, arXiv:2007.02010; report A, section 3.3.2; report B, section 3.3.
"""

from dataclasses import replace
from typing import Any

from experiments import path_figures, path_study, path_tables
from experiments.config import Preset
from experiments.path_config import Config
from experiments.runs import Run

SUMMARY = "DessiLBI on CIFAR-10: which filters of VGG and ResNet matter, found while they train"

_VGG_A = Config(
    dataset="cifar10",
    model="vgg-a",
    seeds=1,
    arms=("dessilbi", "sgd"),
    epochs=6,
    batch_size=64,
    learning_rate=0.03,
    momentum=0.9,
    mu=20.0,
    augment=True,
    label_smoothing=0.05,
    fractions=(0.0, 0.2, 0.4, 0.6, 0.8),
    prune=("conv3", "conv8+fc1"),
    total=None,
    cut_images=2_000,
    retrain_steps=20,
    kernels="conv8",
    features=("conv1", "conv3", "conv8"),
)
# Report A, Table 11; its rates are in its text.
_A = replace(
    _VGG_A,
    arms=("adam", "dessilbi-adam"),
    epochs=30,
    batch_size=128,
    schedule="constant",
    weight_decay=0.01,
    kappa=1.0,
    adam_mu=20.0,
    augment=False,
    label_smoothing=0.0,
    cut_images=None,
    retrain_steps=390,
    dense=1.0,
    adam_dense=1.0,
)

PRESETS = {
    "vgg-a-bn-cpu": Preset(
        replace(_VGG_A, arms=("dessilbi",), steps_per_call=1),
        "VGG-A with batch normalisation, 6 epochs: what a CPU can do in the time",
        "80 min on one CPU core",
        "80.9 % (report B: 80.57 after 20 epochs); 80.8 with 80 % of fc1 cut, 28.2 with 40 % of conv3 (B: 34.54)",
    ),
    "vgg-a-bn-quarter": Preset(
        replace(
            _VGG_A,
            model="vgg-a-quarter",
            seeds=3,
            arms=("sgd", "proximal", "dessilbi", "adam", "dessilbi-adam"),
            epochs=2,
            steps_per_call=1,
        ),
        "VGG-A of a quarter of the channels for two epochs, five optimizers with three seeds each",
        "75 min on one core of a busy machine",
        "DessiLBI 68 %, two to four points before its base, and more than its rivals after most cuts",
    ),
    "vgg-a-bn": Preset(
        replace(
            _VGG_A,
            arms=("sgd", "proximal", "dessilbi"),
            seeds=3,
            epochs=30,
            batch_size=128,
            learning_rate=0.1,
            mu=200.0,
            cut_images=None,
            retrain_steps=390,
        ),
        "the same for an accelerator: 30 epochs, three seeds",
        "half an hour on a GPU (not run here)",
        "over 90 % on the test images",
    ),
    "report-b": Preset(
        replace(
            _VGG_A,
            arms=("adam", "dessilbi", "dessilbi-adam"),
            epochs=20,
            batch_size=128,
            learning_rate=0.01,
            adam_rate=0.01,
            schedule="step",
            momentum=0.0,
            mu=10.0,
            adam_mu=10.0,
            dense=1.0,
            adam_dense=1.0,
            cut_images=None,
            augment=False,
            label_smoothing=0.0,
        ),
        "VGG-A with report B's settings: 20 epochs, rate 0.01, mu 10",
        "a quarter of an hour on a GPU (not run here)",
        "report B: 80.30 (Adam), 80.57 (DessiLBI), 80.66 (DessiLBI+Adam)",
    ),
    "vgg19": Preset(
        replace(_A, model="vgg19", adam_rate=1e-5, kernels="conv16", features=("conv1", "conv4", "conv16")),
        "report A's VGG-19: AdamW and DessiLBI-AdamW, 30 epochs at rate 1e-5",
        "half an hour on a GPU (not run here)",
        "report A gives figures only (its 19 to 21)",
    ),
    "resnet50": Preset(
        replace(
            _A,
            model="resnet50",
            adam_rate=3e-4,
            prune=("stage4_block3/conv2", "stage4_block3/conv2+stage4_block3/conv3"),
            kernels="stage4_block3/conv2",
            features=("conv1", "stage2_block1/conv2", "stage4_block3/conv2"),
        ),
        "report A's ResNet-50: AdamW and DessiLBI-AdamW, 30 epochs at rate 3e-4",
        "two hours on a GPU (not run here)",
        "report A gives figures only (its 17 and 18)",
    ),
    "tiny": Preset(
        replace(
            _VGG_A,
            images=64,
            epochs=1,
            batch_size=16,
            fractions=(0.0, 0.5),
            prune=("conv3",),
            cut_images=16,
            retrain_steps=2,
        ),
        "to try the machinery on VGG-A, with 64 images of each split",
        "2 min on one CPU core, most of it compilation",
        "nothing worth a look",
    ),
}

_B_LAYERS = {"classifier.0": "fc1", "classifier.3": "fc2", "classifier.6": "fc3"}


def run(config: Config, run: Run) -> dict[str, Any]:
    """Trains and cuts; returns metrics, table, comparisons and figures for `result.json`."""
    arms = path_study.run(config, run)
    published = config.dataset == "cifar10" and config.model.startswith("vgg-a")
    return path_tables.content(config, arms, _comparisons(config, arms) if published else [])


draw = path_figures.draw


def _comparisons(config: Config, arms: path_tables.Records) -> list[dict[str, Any]]:
    titles = {"adam": "Adam", "dessilbi": "DessiLBI", "dessilbi-adam": "DessiLBI+Adam"}
    found = [
        path_tables.compare(
            config,
            arms,
            arm,
            ("accuracy",),
            quantity="VGG-A's test accuracy on CIFAR-10, %",
            setting=titles[arm],
            cite=("B", 9, titles[arm], "test accuracy, %"),
            note="" if config.epochs == 20 else "The report trained for 20 epochs.",
        )
        for arm in arms
        if arm in titles
    ]
    if "dessilbi" not in arms:
        return found
    some = "" if config.cut_images is None else f"Measured on the first {config.cut_images} test images. "
    which = f"{some}The report does not say which of the eight convolutions it means; ours are the first five."
    found += path_tables.compare_cuts(config, arms, "conv3", ("B", 12, "accuracy, %"), note=which)
    layers = [f"conv{i}" for i in range(1, 6)] + list(_B_LAYERS)
    found += [
        path_tables.compare(
            config,
            arms,
            "dessilbi",
            ("each_layer", _B_LAYERS.get(layer, layer), "accuracy"),
            quantity="accuracy after cutting one layer by 80 %, without retraining, %",
            setting=f"DessiLBI, {_B_LAYERS.get(layer, layer)}",
            cite=("B", 13, layer, "accuracy, %"),
            note=which,
        )
        for layer in layers
        if config.each_layer == 0.8
    ]
    return found
