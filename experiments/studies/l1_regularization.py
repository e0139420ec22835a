"""A trained ViT or Swin trained on with an L1 penalty: what it costs, how many weights it brings to zero.

References: Tibshirani 1996; report A, section 2.6.1 and Table 4.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax

from experiments import finetuning, plots, training
from experiments.classification import percent
from experiments.config import Preset
from experiments.finetuning import FineTuning
from experiments.parts import recorded
from experiments.published import published_number
from experiments.runs import Run
from experiments.tables import counted
from experiments.trained import Base, load_base
from experiments.training import PyTree
from prune_jax import apply_masks, l1_penalty, l1_proximal, make_masks, scores

SUMMARY = "Train a ViT on with an L1 penalty of several strengths, and see what it can then do without"
_EDGES = np.linspace(-8, 1, 91)  # of the histogram of log10 |w|


@dataclasses.dataclass(frozen=True)
class Config:
    """What decides the result of a run.

    Attributes:
      base: name of a finished run of the study `vit`.
      seed: of the order of the images.
      strengths: lambda, the weight of the L1 norm of all kernels in the loss.
      form: "gradient" adds lambda sign(w) to the gradient, as the report does; "proximal" shrinks by lambda times the
        learning rate after the optimizer's step, which leaves exact zeros.
      epochs: of training with each strength.
      batch_size: images a step.
      learning_rate: at the start.
      near_zero: weights of a smaller absolute value are counted.
      cut: fractions of the weights then removed by size, without training.
    """

    base: str = "cpu-0"
    seed: int = 0
    strengths: tuple[float, ...] = (0.0, 5e-8, 5e-7, 5e-6, 5e-5, 5e-4, 5e-3, 5e-2)
    form: Literal["gradient", "proximal"] = "gradient"
    epochs: float = 1.0
    batch_size: int = 64
    learning_rate: float = 3e-4
    near_zero: float = 1e-3
    cut: tuple[float, ...] = (0.5, 0.7, 0.9)


PRESETS = {
    "cpu": Preset(
        Config(epochs=0.25),
        "the small ViT of `vit cpu`, report A's eight strengths, a quarter of an epoch each",
        "22 min on one core of a busy machine",
        "strengths up to 5e-4 cost 0.6 points (report A: 1.5), and 70 % of the weights can go for 1.9 more, not 5.5",
    ),
    "cpu-proximal": Preset(
        Config(epochs=0.25, form="proximal", strengths=(0.0, 5e-3, 5e-2, 5e-1)),
        "the same by the proximal map, which leaves exact zeros",
        "11 min on one core of a busy machine",
        "strength 0.5: 30 % of the weights exactly zero for 1.9 points, and half of them gone for 0.1 more, not 0.7",
    ),
    "gpu": Preset(
        Config(base="gpu-0", epochs=5.0, batch_size=512, learning_rate=1e-3),
        "ViT-S/4 of `vit gpu`, eight strengths, five epochs each",
        "20 min on a GPU (not run here)",
        "as on a CPU",
    ),
    "published": Preset(
        Config(base="published-0", epochs=2.0, batch_size=128, learning_rate=3e-5),
        "ViT-B/16 of `vit published`, as in report A",
        "an hour on a GPU (not run here)",
        "report A: 98.52 % without the penalty to 86.78 % with the largest",
    ),
    "tiny": Preset(
        Config(base="tiny-0", strengths=(0.0, 5e-2), form="proximal", epochs=0.5, batch_size=32, cut=(0.5,)),
        "to try the machinery, on `vit tiny`",
        "20 s on one CPU core",
        "nothing worth a look",
    ),
}


def run(config: Config, run: Run) -> dict[str, Any]:
    """Trains with each strength; returns metrics, table, comparisons and figures for `result.json`."""
    check(config)
    base = load_base(run.options, config.base, training.data_mesh())
    finetuning.check(_plan(config), len(base.train.labels))
    metrics = {
        "base_accuracy": 100 * base.result["metrics"]["test_accuracy"],
        "dataset": base.config.dataset,
        "parts": [recorded(run, f"strength-{x:g}", partial(_part, config, base, x)) for x in config.strengths],
    }
    return {
        "metrics": metrics,
        "table": _table(config, metrics),
        "comparisons": _comparisons(config, base, metrics),
        "figures": ["accuracy.png", "weights.png"],
    }


def check(config: Config) -> None:
    """Refuses, before anything is loaded, numbers that make no sense.

    Raises:
      ValueError: names the field, its value and what would be right.
    """
    if bad := [x for x in config.strengths if not x >= 0]:
        raise ValueError(f"strengths must be at least 0, got {bad}")
    if bad := [x for x in config.cut if not 0 <= x <= 1]:
        raise ValueError(f"cut holds fractions removed, in [0, 1], got {bad}")


def _plan(config: Config) -> FineTuning:
    return FineTuning(config.epochs, config.batch_size, config.learning_rate)


def _part(config: Config, base: Base, strength: float, run: Run) -> dict[str, Any]:
    """One strength: accuracies in % of the test split, and where the weights are."""

    def penalised(adamw: optax.GradientTransformation, rate: optax.Schedule) -> optax.GradientTransformation:
        if config.form == "gradient":
            return optax.chain(l1_penalty(strength), adamw)
        return optax.chain(adamw, l1_proximal(strength, rate))

    params = finetuning.finetune(run, base, base.params, _plan(config), seed=config.seed, wrap=penalised)
    sizes = _sizes(params)
    magnitudes = scores.magnitude(params)
    cut = {
        f"{fraction:g}": 100
        * base.measure(apply_masks(params, make_masks(magnitudes, fraction)), base.test)["accuracy"]
        for fraction in config.cut
    }
    floor = 10.0 ** _EDGES[0]
    return {
        "strength": strength,
        **percent(base.measure(params, base.test)),
        "zero": float(np.mean(sizes == 0)),
        "near_zero": float(np.mean(sizes < config.near_zero)),
        "l1_norm": float(sizes.sum(dtype=np.float64)),
        "histogram": (np.histogram(np.log10(np.maximum(sizes, floor)), _EDGES)[0] / len(sizes)).tolist(),
        "cut": cut,
    }


def _sizes(params: PyTree) -> np.ndarray:
    """Absolute values of all penalised weights."""
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(scores.magnitude(params))])


def _table(config: Config, metrics: dict[str, Any]) -> dict[str, Any]:
    columns = ["L1 strength", "accuracy, %", "top-5 accuracy, %", f"|w| < {config.near_zero:g}, %", "w = 0, %"]
    columns += [f"then {fraction:.0%} cut: accuracy, %" for fraction in config.cut]
    rows = [
        [
            part["strength"],
            *(round(part[name], 2) for name in ("accuracy", "top5_accuracy")),
            *(round(100 * part[name], 2) for name in ("near_zero", "zero")),
            *(round(part["cut"][f"{fraction:g}"], 2) for fraction in config.cut),
        ]
        for part in metrics["parts"]
    ]
    title = f"{metrics['dataset']}: {counted(config.epochs, 'epoch')} with an L1 penalty ({config.form})"
    return {"title": title, "columns": columns, "rows": rows}


def _comparisons(config: Config, base: Base, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    if base.config.dataset != "cifar10" or base.config.model != "vit" or config.form != "gradient":
        return []
    parts = {part["strength"]: part for part in metrics["parts"]}
    if 0.0 not in parts:
        return []
    without = 100 * published_number("A", 4, row=0, column="accuracy")
    listed = (5e-8, 5e-7, 5e-6, 5e-5, 5e-4, 5e-3, 5e-2)
    return [
        {
            "quantity": f"points lost with an L1 penalty of {strength:g}",
            "setting": f"{config.base}, {counted(config.epochs, 'epoch')}",
            "ours": parts[0.0]["accuracy"] - parts[strength]["accuracy"],
            "report": "A",
            "table": 4,
            "published": without - 100 * published_number("A", 4, row=strength, column="accuracy"),
            "published_setting": "ViT-B/16",
            "higher_is_better": False,
            "note": "Each relative to strength 0. The report does not say how long it trained, nor how sparse it got.",
        }
        for strength in listed
        if strength in parts
    ]


def draw(directory: Path, result: dict[str, Any]) -> None:
    """Draws the figures of a finished run from its result."""
    config, metrics = result["config"], result["metrics"]
    parts = [part for part in metrics["parts"] if part["strength"] > 0]
    strengths = [part["strength"] for part in parts]
    without = next((part["accuracy"] for part in metrics["parts"] if part["strength"] == 0), metrics["base_accuracy"])
    series = {"nothing cut": (strengths, [part["accuracy"] for part in parts])}
    for fraction in config["cut"]:
        series[f"{fraction:.0%} of the weights cut"] = (strengths, [part["cut"][f"{fraction:g}"] for part in parts])
    plots.curves(
        series,
        directory / "accuracy.png",
        title=f"{config['base']} on {metrics['dataset']}, trained on with an L1 penalty ({config['form']})",
        x_label="L1 strength",
        y_label="accuracy on test, %",
        levels={"no penalty, nothing cut": round(without, 2)},
        log_x=True,
    )
    plots.histogram(
        _EDGES.tolist(),
        {f"{part['strength']:g}": [100 * share for share in part["histogram"]] for part in metrics["parts"]},
        directory / "weights.png",
        title=f"Sizes of the weights after training with each L1 strength; zeros are at {_EDGES[0]:g}",
        x_label="log10 |w|",
        y_label="% of the weights",
        means={f"{part['strength']:g}": _mean(part["histogram"]) for part in metrics["parts"]},
    )


def _mean(shares: list[float]) -> float:
    """Mean of log10 |w|, as the histogram has it."""
    return float(np.dot(shares, (_EDGES[:-1] + _EDGES[1:]) / 2) / max(sum(shares), 1e-30))
