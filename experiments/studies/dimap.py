"""The weights of a trained Swin removed module by module, as DIMAP ranks them, beside three other rankings by size.

References: He and Zhou 2024, arXiv:2404.13648 (DIMAP; report D); Lee et al. 2021, arXiv:2010.07611 (LAMP).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import flax
import jax.numpy as jnp

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
from prune_jax import apply_masks, count_parameters, flops, keep_masks, make_masks, scores

SUMMARY = "Remove the weights of a trained Swin by DIMAP, LAMP and magnitude, before and after fine-tuning"

Method = Literal["uniform", "global", "lamp", "dimap"]
TITLES: dict[str, str] = {
    "uniform": "magnitude, uniform",
    "global": "magnitude, global",
    "lamp": "LAMP",
    "dimap": "DIMAP",
}
ALL: tuple[Method, ...] = ("uniform", "global", "lamp", "dimap")
MODULES = {"qkv": "QKV", "prj": "PRJ", "mlp": "MLP", "aux": "AUX"}


@dataclasses.dataclass(frozen=True)
class Config:
    """What decides the result of a run.

    Attributes:
      base: name of a finished run of the study `vit`, of a Swin.
      seed: of the order of the images.
      methods: rankings: "uniform" by size, the same share of every layer; "global" by size, all layers together;
        "lamp" by distortion, all together; "dimap" by distortion, each module over all blocks by itself.
      sparsities: fractions of the modules' weights to remove; norms, patch embedding, patch merging and head stay.
      epochs: of training after each, fractions allowed.
      batch_size: images a step.
      learning_rate: at the start.
    """

    base: str = "swin-cpu-0"
    seed: int = 0
    methods: tuple[Method, ...] = ALL
    sparsities: tuple[float, ...] = (0.3, 0.5, 0.7)
    epochs: float = 0.25
    batch_size: int = 64
    learning_rate: float = 5e-4


PRESETS = {
    "cpu": Preset(
        Config(),
        "the small Swin of `vit swin-cpu`, a quarter of an epoch of fine-tuning each",
        "12 min on one CPU core",
        "0.2 points lost with half of the weights gone, 4.0 with 70 %, 1.1 once trained; LAMP 1.7 and 1.2",
    ),
    "gpu": Preset(
        Config(base="swin-gpu-0", epochs=10.0, batch_size=512, learning_rate=1e-3),
        "the Swin of three stages of `vit swin-gpu`, ten epochs of fine-tuning each",
        "20 min on a GPU (not run here)",
        "at most 1 point lost at 50 %",
    ),
    "published": Preset(
        Config(base="published-swin-0", epochs=5.0, batch_size=128, learning_rate=3e-5),
        "a published Swin-T, fine-tuned before by `vit published-swin --weights PATH`",
        "2 h on a GPU (not run here)",
        "report D, on ImageNet: 0.81 points lost with half of the FLOPs",
    ),
    "digits": Preset(
        Config(base="swin-digits-0", sparsities=(0.3, 0.5, 0.7, 0.9), epochs=5.0),
        "the tiny Swin of `vit swin-digits`, five epochs of fine-tuning each",
        "2 min on one CPU core",
        "after training 88 to 91 % up to 70 % removed; LAMP best at 50 and 90 %",
    ),
    "tiny": Preset(
        Config(base="tiny-swin-0", methods=("global", "dimap"), sparsities=(0.5,), epochs=0.5, batch_size=32),
        "to try the machinery, on `vit tiny-swin`",
        "20 s on one CPU core",
        "nothing worth a look",
    ),
}


def run(config: Config, run: Run) -> dict[str, Any]:
    """Prunes by every ranking to every sparsity, and trains on; returns what `result.json` holds."""
    check(config)
    base = load_base(run.options, config.base, training.data_mesh())
    if base.config.model != "swin":
        raise ValueError(f"base must be a Swin, got {config.base!r}, a {base.config.model}; such as `vit swin-cpu`")
    finetuning.check(_plan(config), len(base.train.labels))
    image = base.prepare(jnp.asarray(base.train.images[:1]))
    metrics = {
        "base": percent(base.measure(base.params, base.test)),
        "base_parameters": count_parameters(base.params),
        "base_flops": flops(base.model.apply, {"params": base.params}, image),
        "dataset": base.config.dataset,
        "modules": _sizes(base.params),
        "parts": [
            recorded(run, f"{method}-{sparsity:g}", partial(_part, config, base, method, sparsity, image))
            for sparsity in config.sparsities
            for method in config.methods
        ],
    }
    return {
        "metrics": metrics,
        "table": _table(config, metrics),
        "comparisons": _comparisons(config, base, metrics),
        "figures": ["accuracy.png", "modules.png"],
    }


def check(config: Config) -> None:
    """Refuses, before anything is loaded, numbers that make no sense.

    Raises:
      ValueError: names the field, its value and what would be right.
    """
    if not config.methods:
        raise ValueError(f"methods must name at least one of {', '.join(ALL)}, got ()")
    if not config.sparsities or not all(0 <= s < 1 for s in config.sparsities):
        raise ValueError(f"sparsities must be some fractions removed, in [0, 1), got {config.sparsities}")


def module_of(path: str) -> str:
    """The module of a parameter: "qkv", "prj", "mlp", or "aux" for what is never pruned."""
    return scores.dimap_modules(path) or "aux"


def masks_of(method: Method, params: PyTree, sparsity: float) -> PyTree:
    """Masks that leave the modules' kernels together with this sparsity, as nearly as each ranking counts."""

    def never(path: str) -> bool:
        return module_of(path) == "aux"

    found: dict[str, Callable[[], PyTree]] = {
        "uniform": lambda: make_masks(scores.magnitude(params), sparsity, "local", exclude=never),
        "global": lambda: make_masks(scores.magnitude(params), sparsity, exclude=never),
        "lamp": lambda: make_masks(scores.lamp(params), sparsity, exclude=never),
        "dimap": lambda: make_masks(scores.dimap(params), sparsity, scores.dimap_modules),
    }
    return found[method]()


def _plan(config: Config) -> FineTuning:
    return FineTuning(config.epochs, config.batch_size, config.learning_rate)


def _part(config: Config, base: Base, method: Method, sparsity: float, image: Any, run: Run) -> dict[str, Any]:
    """One ranking at one sparsity: accuracies in % of the test split, before and after training."""
    masks = masks_of(method, base.params, sparsity)
    params = apply_masks(base.params, masks)
    kernels = flax.traverse_util.flatten_dict(masks, sep="/")
    sizes = _sizes(base.params)
    layers = {path: float(1 - mask.mean()) for path, mask in kernels.items() if mask is not None}
    record = {
        "method": method,
        "sparsity": sparsity,
        "parameters": count_parameters(base.params, masks),
        "flops": flops(base.model.apply, {"params": params}, image, masks={"params": masks}),
        "modules": {name: 1 - kept / sizes[name] for name, kept in _sizes(params, masks).items()},
        "layers": layers,
        "before": percent(base.measure(params, base.test)),
    }
    trained = finetuning.finetune(
        run, base, params, _plan(config), seed=config.seed, wrap=lambda adamw, _: keep_masks(masks, adamw)
    )
    return record | {"after": percent(base.measure(trained, base.test))}


def _sizes(params: PyTree, masks: PyTree | None = None) -> dict[str, int]:
    """Numbers in each module, those that masks keep where there are any."""
    found = dict.fromkeys(MODULES, 0)
    kept = flax.traverse_util.flatten_dict(masks, sep="/") if masks is not None else {}
    for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items():
        # Biases of the pruned layers stay, and count as auxiliary.
        module = module_of(path) if leaf.ndim > 1 else "aux"
        mask = kept.get(path)
        found[module] += leaf.size if mask is None else int(mask.sum())
    return found


def _table(config: Config, metrics: dict[str, Any]) -> dict[str, Any]:
    columns = [
        "removed, %",
        "ranking",
        "accuracy at once, %",
        "after training, %",
        "top-5 after, %",
        "FLOPs removed, %",
    ]
    columns += [f"{name} removed, %" for name in MODULES.values()]
    dense = [round(metrics["base"][name], 2) for name in ("accuracy", "top5_accuracy")]
    rows = [["0", "dense", dense[0], None, dense[1], 0.0, *[0.0] * len(MODULES)]]
    for part in metrics["parts"]:
        rows.append(
            [
                f"{100 * part['sparsity']:g}",
                TITLES[part["method"]],
                round(part["before"]["accuracy"], 2),
                round(part["after"]["accuracy"], 2),
                round(part["after"]["top5_accuracy"], 2),
                round(100 * (1 - part["flops"] / metrics["base_flops"]), 1),
                *(round(100 * part["modules"][name], 1) for name in MODULES),
            ]
        )
    title = (
        f"{config.base} on {metrics['dataset']}: weights removed, {counted(config.epochs, 'epoch')} of training after"
    )
    return {"title": title, "columns": columns, "rows": rows}


def _comparisons(config: Config, base: Base, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """DIMAP at half of the weights beside report D's, where about half of the FLOPs is gone too."""
    if base.config.dataset != "cifar10":
        return []
    rows = [
        (
            "top-1",
            "accuracy",
            model,
            published_number("D", "top-1", row=model, column="pruned accuracy, %")
            - published_number("D", "top-1", row=model, column="dense accuracy, %"),
        )
        for model in ("Swin-B", "Swin-T")
    ]
    rows.append(
        ("top-5", "top5_accuracy", "Swin-B", published_number("D", "top-5", row="Swin-B", column="top-5 change, %"))
    )
    return [
        {
            "quantity": f"change of {kind} accuracy by removing half of the weights, points",
            "setting": f"{config.base}, CIFAR-10, {counted(config.epochs, 'epoch')} of fine-tuning",
            "ours": part["after"][name] - metrics["base"][name],
            "report": "D",
            "table": kind,
            "published": theirs,
            "published_setting": f"{model}, ImageNet",
            "higher_is_better": True,
            "note": f"Ours removes {1 - part['flops'] / metrics['base_flops']:.1%} of the FLOPs of a small Swin, and "
            "fine-tunes for less than the paper's 30 epochs.",
        }
        for part in metrics["parts"]
        if part["method"] == "dimap" and part["sparsity"] == 0.5
        for kind, name, model, theirs in rows
    ]


def draw(directory: Path, result: dict[str, Any]) -> None:
    """Draws the figures of a finished run from its result."""
    config, metrics = result["config"], result["metrics"]

    def lines(when: str) -> dict[str, tuple[list[float], list[float]]]:
        found = {method: [p for p in metrics["parts"] if p["method"] == method] for method in config["methods"]}
        dense = metrics["base"]["accuracy"]
        return {
            TITLES[method]: (
                [0.0, *(100 * part["sparsity"] for part in parts)],
                [dense, *(part[when]["accuracy"] for part in parts)],
            )
            for method, parts in found.items()
        }

    plots.panels(
        {"at once": lines("before"), f"after {counted(config['epochs'], 'epoch')} of training": lines("after")},
        directory / "accuracy.png",
        title=f"{config['base']} on {metrics['dataset']}: weights of QKV, PRJ and MLP removed",
        x_label="removed, %",
        y_label="test accuracy, %",
    )
    largest = max(config["sparsities"])
    shown = [part for part in metrics["parts"] if part["sparsity"] == largest]
    modules = {f"{MODULES[m]}, all blocks": [100 * part["modules"][m] for part in shown] for m in MODULES if m != "aux"}
    layers = {path: [100 * part["layers"][path] for part in shown] for path in shown[0]["layers"]}
    plots.matrix(
        modules | {path.removesuffix("/kernel"): values for path, values in layers.items()},
        [TITLES[part["method"]].replace(", ", ",\n") for part in shown],
        directory / "modules.png",
        title=f"{config['base']}: removed from each module and layer, %, where {100 * largest:g} % are removed in all",
        x_label="ranking",
    )
