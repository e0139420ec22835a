"""The smallest weights of a trained ViT or Swin removed, then what is left trained on.

Reference: Han et al. 2015, arXiv:1506.02626; report A, section 2.6.1 and Table 5.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, Literal

from experiments import finetuning, plots, training
from experiments.classification import percent
from experiments.config import Preset
from experiments.finetuning import FineTuning
from experiments.parts import recorded
from experiments.published import published_number
from experiments.runs import Run
from experiments.tables import counted
from experiments.trained import Base, load_base
from prune_jax import apply_masks, count_parameters, keep_masks, layer_statistics, make_masks, scores

SUMMARY = "Remove the smallest weights of a trained ViT, at any sparsity, and train what is left"


@dataclasses.dataclass(frozen=True)
class Config:
    """What decides the result of a run.

    Attributes:
      base: name of a finished run of the study `vit`.
      seed: of the order of the images.
      sparsities: fractions of the kernels' weights to remove; with 0 the whole network is trained on as the others are.
      finetuned: those of them after which what is left is trained.
      scope: what competes: "global" all weights, "local" those of a kernel.
      epochs: of training after each.
      batch_size: images a step.
      learning_rate: at the start.
    """

    base: str = "cpu-0"
    seed: int = 0
    sparsities: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    finetuned: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    scope: Literal["global", "local"] = "global"
    epochs: float = 2.0
    batch_size: int = 64
    learning_rate: float = 3e-4


PRESETS = {
    "cpu": Preset(
        Config(),
        "the small ViT of `vit cpu`, whole and at nine sparsities, two epochs each, as in report A",
        "100 min on one core of a busy machine",
        "beside the whole network, trained as long: nothing lost up to 70 %, 0.9 points at 80 %, 4.2 at 90 %",
    ),
    "gpu": Preset(
        Config(base="gpu-0", batch_size=512, learning_rate=1e-3),
        "ViT-S/4 of `vit gpu`, nine sparsities, two epochs each, as in report A",
        "10 min on a GPU (not run here)",
        "at most 0.5 points lost up to 40 %, at most 3 at 60 %",
    ),
    "published": Preset(
        Config(base="published-0", batch_size=128, learning_rate=3e-5),
        "ViT-B/16 of `vit published`, as in report A",
        "an hour on a GPU (not run here)",
        "report A: 97.72 % at 40 %, 94.03 % at 60 %",
    ),
    "tiny": Preset(
        Config(base="tiny-0", sparsities=(0.0, 0.5, 1.0), finetuned=(0.5,), epochs=0.5, batch_size=32),
        "to try the machinery, on `vit tiny`",
        "20 s on one CPU core",
        "nothing worth a look",
    ),
}


def run(config: Config, run: Run) -> dict[str, Any]:
    """Prunes and trains; returns metrics, table, comparisons and figures for `result.json`."""
    check(config)
    base = load_base(run.options, config.base, training.data_mesh())
    finetuning.check(_plan(config), len(base.train.labels))
    parts = [recorded(run, f"sparsity-{s:g}", partial(_part, config, base, s)) for s in config.sparsities]
    metrics = {
        "base": {name: 100 * base.result["metrics"][f"test_{name}"] for name in ("accuracy", "top5_accuracy")},
        "base_parameters": count_parameters(base.params),
        "dataset": base.config.dataset,
        "parts": parts,
    }
    return {
        "metrics": metrics,
        "table": _table(config, metrics),
        "comparisons": _comparisons(config, base, metrics),
        "figures": ["accuracy.png", "layers.png"],
    }


def check(config: Config) -> None:
    """Refuses, before anything is loaded, sparsities that make no sense.

    Raises:
      ValueError: names the field, its value and what would be right.
    """
    if bad := [s for s in config.sparsities if not 0 <= s <= 1]:
        raise ValueError(f"sparsities are fractions removed, in [0, 1], got {bad}")
    if missing := [s for s in config.finetuned if s not in config.sparsities]:
        raise ValueError(f"finetuned={missing} are not among sparsities={config.sparsities}")


def _plan(config: Config) -> FineTuning:
    return FineTuning(config.epochs, config.batch_size, config.learning_rate)


def _part(config: Config, base: Base, sparsity: float, run: Run) -> dict[str, Any]:
    """One sparsity: accuracies in % of the test split, before and after training."""
    masks = make_masks(scores.magnitude(base.params), sparsity, config.scope)
    params = apply_masks(base.params, masks)
    record = {
        "sparsity": sparsity,
        "parameters": count_parameters(base.params, masks),
        "layers": {name: layer.sparsity for name, layer in layer_statistics(masks).items()},
        "before": percent(base.measure(params, base.test)),
    }
    if sparsity in config.finetuned:
        trained = finetuning.finetune(
            run, base, params, _plan(config), seed=config.seed, wrap=lambda adamw, _: keep_masks(masks, adamw)
        )
        record["after"] = percent(base.measure(trained, base.test))
    return record


def _table(config: Config, metrics: dict[str, Any]) -> dict[str, Any]:
    columns = ["sparsity", "parameters left", "accuracy at once, %", "after training, %", "top-5 after, %"]
    rows = [["base", metrics["base_parameters"], round(metrics["base"]["accuracy"], 2), "", ""]]
    for part in metrics["parts"]:
        after = part.get("after")
        trained = [round(after[name], 2) for name in ("accuracy", "top5_accuracy")] if after else ["", ""]
        rows.append([part["sparsity"], part["parameters"], round(part["before"]["accuracy"], 2), *trained])
    title = f"{metrics['dataset']}: smallest weights removed ({config.scope}), {counted(config.epochs, 'epoch')} after"
    return {"title": title, "columns": columns, "rows": rows}


def _comparisons(config: Config, base: Base, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    if base.config.dataset != "cifar10" or base.config.model != "vit":
        return []
    dense = metrics["base"]["accuracy"]
    theirs = published_number("A", 5, row="base", column="accuracy, %")
    return [
        {
            "quantity": f"points lost at {part['sparsity']:.0%} sparsity",
            "setting": f"{config.base}, {counted(config.epochs, 'epoch')} of fine-tuning",
            "ours": dense - part["after"]["accuracy"],
            "report": "A",
            "table": 5,
            "published": theirs - published_number("A", 5, row=part["sparsity"], column="accuracy, %"),
            "published_setting": "ViT-B/16, 2 epochs of fine-tuning",
            "higher_is_better": False,
            "note": f"Each relative to its own dense network: ours has {dense:.2f} %, the report's {theirs:g} %.",
        }
        for part in metrics["parts"]
        if "after" in part and any(abs(part["sparsity"] - row / 10) < 1e-9 for row in range(1, 10))
    ]


def draw(directory: Path, result: dict[str, Any]) -> None:
    """Draws the figures of a finished run from its result."""
    metrics, config = result["metrics"], result["config"]
    parts = metrics["parts"]
    trained = [part for part in parts if "after" in part]
    removed = [100 * part["sparsity"] for part in parts]
    series = {
        "at once": (removed, [part["before"]["accuracy"] for part in parts]),
        f"after {counted(config['epochs'], 'epoch')}": (
            [100 * part["sparsity"] for part in trained],
            [part["after"]["accuracy"] for part in trained],
        ),
    }
    plots.curves(
        series,
        directory / "accuracy.png",
        title=f"{config['base']} on {metrics['dataset']}: smallest weights removed",
        x_label="weights removed, %",
        y_label="accuracy on test, %",
        levels={"dense": round(metrics["base"]["accuracy"], 2)},
    )
    plots.matrix(
        {name: [100 * part["layers"][name] for part in parts] for name in parts[0]["layers"]},
        [f"{value:g}" for value in removed],
        directory / "layers.png",
        title=f"{config['base']}: removed from each kernel, %",
        x_label="removed in all, %",
    )
