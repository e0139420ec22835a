"""DessiLBI on MNIST: LeNet trained by several optimizers, then cut along the path or by magnitude.

Reference: Fu et al. 2020, arXiv:2007.02010; report A, section 3.3.1; report B, section 3.3.
"""

from typing import Any

from experiments import path_figures, path_study, path_tables
from experiments.config import Preset
from experiments.path_config import Config
from experiments.runs import Run
from experiments.tables import counted

SUMMARY = "DessiLBI finds which parts of LeNet matter while it trains on MNIST; beside SGD, Adam and proximal SGD"

PRESETS = {
    "digits": Preset(
        Config(
            dataset="digits",
            model="lenet-digits",
            seeds=1,
            arms=("sgd", "dessilbi"),
            epochs=60,
            batch_size=64,
            mu=10.0,
            features=("conv1", "conv2"),
        ),
        "scikit-learn's handwritten digits, 8x8; needs no download",
        "1 min on one CPU core",
        "DessiLBI 98.9 % on the test images; 96.7 % with 80 % of conv3 cut, where SGD has 94.4",
    ),
    "lenet": Preset(
        Config(mu=10.0, dense=0.2, filters=2.5, retrain_steps=200, retrain_rate=0.4),
        "LeNet on MNIST, five optimizers with three seeds each",
        "30 min on one CPU core",
        "DessiLBI 99.0 %, as much with 60 % of conv3 cut (report B: 99.02 and 97.72), 98.6 with 80 % (B: 93.42); 98.7 "
        "with 83 % of all parameters gone and 200 steps of training after",
    ),
    "report-a": Preset(
        Config(
            seeds=1,
            epochs=30,
            schedule="step",
            learning_rate=0.1,
            momentum=0.0,
            adam_rate=1e-3,
            mu=20.0,
            adam_mu=20.0,
            dense=1.0,
            adam_dense=1.0,
        ),
        "the same with report A's settings, the official thresholds and no momentum: 30 epochs, rate 0.1, mu 20",
        "20 min on one CPU core (not run here)",
        "report A: 96.88 %, and 96.10 % with 60 % of conv3 cut",
    ),
    "report-b": Preset(
        Config(
            seeds=1,
            epochs=20,
            schedule="step",
            learning_rate=0.01,
            momentum=0.0,
            adam_rate=0.01,
            mu=10.0,
            adam_mu=10.0,
            dense=1.0,
            adam_dense=1.0,
        ),
        "the same with report B's settings, the official thresholds and no momentum: 20 epochs, rate 0.01, mu 10",
        "15 min on one CPU core (not run here)",
        "report B: DessiLBI 99.02 %, and 97.72 % with 60 % of conv3 cut",
    ),
    "tiny": Preset(
        Config(
            dataset="digits",
            model="lenet-digits",
            seeds=2,
            arms=("sgd", "dessilbi"),
            epochs=2,
            batch_size=128,
            fractions=(0.0, 0.5),
            retrain_steps=2,
            features=("conv1", "conv2"),
        ),
        "to try the machinery: all it does, too short to be of use",
        "1 min on two CPU cores, most of it compilation",
        "nothing worth a look",
    ),
}


def run(config: Config, run: Run) -> dict[str, Any]:
    """Trains and cuts; returns metrics, table, comparisons and figures for `result.json`."""
    arms = path_study.run(config, run)
    return path_tables.content(config, arms, _comparisons(config, arms) if config.dataset == "mnist" else [])


draw = path_figures.draw


def _comparisons(config: Config, arms: path_tables.Records) -> list[dict[str, Any]]:
    found = [
        path_tables.compare(
            config,
            arms,
            arm,
            ("accuracy",),
            quantity="LeNet's test accuracy on MNIST, %",
            setting=title,
            cite=("B", 8, title, "test accuracy, %"),
        )
        for arm, title in (("adam", "Adam"), ("dessilbi", "DessiLBI"), ("dessilbi-adam", "DessiLBI+Adam"))
        if arm in arms
    ]
    if "dessilbi" not in arms:
        return found
    found += path_tables.compare_cuts(config, arms, "conv3", ("A", 10, "conv3: accuracy, %"))
    found += path_tables.compare_cuts(config, arms, "conv3", ("B", 10, "accuracy, %"))
    found += path_tables.compare_cuts(
        config,
        arms,
        "conv3+fc1",
        ("A", 10, "conv3 + fc1: accuracy, %"),
        note="The report printed conv3's numbers in this column too.",
        caveat="\n(printed as for conv3 alone)",
    )
    found += [
        path_tables.compare(
            config,
            arms,
            "dessilbi",
            ("each_layer", layer, "accuracy"),
            quantity="accuracy after cutting one layer by 80 %, without retraining, %",
            setting=f"DessiLBI, {layer}",
            cite=("B", 11, layer, "accuracy, %"),
        )
        for layer in arms["dessilbi"][0]["each_layer"]
        if config.each_layer == 0.8
    ]
    if config.total is not None:
        found.append(
            path_tables.compare(
                config,
                arms,
                "dessilbi",
                ("total", "retrained"),
                quantity="accuracy with over 82 % of all parameters gone, %",
                setting=f"DessiLBI, {counted(config.retrain_steps, 'step')} of training after the cut",
                cite=("papers", "DessiLBI", "LeNet on MNIST", "accuracy, %"),
            )
        )
    return found
