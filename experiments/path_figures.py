"""Figures of the DessiLBI studies, from the logs and records of a run's arms and seeds."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import image_plots, logs, pictures, plots
from experiments.optimizers import is_path, titles

_LAYERS_SHOWN = 8
_FILTERS_SHOWN = 64
_POINTS = 100  # of a curve
_LEAST_ERROR = 0.1  # of a band on a logarithmic axis, %


def figures(arms: Iterable[str]) -> list[str]:
    """The names of a run's figures; the path's only where an arm has one."""
    path = ["path.png"] if any(map(is_path, arms)) else []
    return ["convergence.png", "pruning.png", *path, "kernels.png", "features.png"]


def log_arrays(directory: Path, step: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes kernels and feature maps as pictures into the image log.

    Args:
      directory: of one arm and seed.
      step: they belong to.
      arrays: "kernels ..." -> (height, width, channels, filters) or (in, out); "features ..." -> (H, W, channels).
    """
    log = logs.Log(directory, step)
    for name, array in arrays.items():
        shown = _kernels(array, arrays["kernels W"]) if name.startswith("kernels") else _features(array)
        log.images(step, name, shown[None])
    log.close()


def _kernels(kernel: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The strongest filters by the slice of their strongest input channel in `weights`, strongest filter first."""
    if kernel.ndim == 2:
        return pictures.diverging(kernel, np.abs(kernel).max())
    strength = np.square(weights).sum((0, 1))  # (channels, filters)
    filters = np.argsort(-strength.sum(0), kind="stable")[:_FILTERS_SHOWN]
    slices = kernel[:, :, strength.argmax(0)[filters], filters]
    return pictures.mosaic(pictures.diverging(np.moveaxis(slices, -1, 0), np.abs(slices).max()))


def _features(maps: np.ndarray) -> np.ndarray:
    """Every channel's map, black where it is largest, on one scale."""
    maps = np.moveaxis(maps, -1, 0)[..., None]
    return pictures.mosaic(np.rint(255 * (1 - maps / max(maps.max(), 1e-30))).astype(np.uint8))


def draw(directory: Path, result: dict[str, Any]) -> None:
    """Draws all figures of a finished run."""
    config, arms = result["config"], result["metrics"]["arms"]
    named = titles(config["weight_decay"])
    seeds = range(config["seed"], config["seed"] + config["seeds"])
    title = f"{config['model']} on {config['dataset']}"
    spread = f", mean and standard deviation of {len(seeds)} seeds" if len(seeds) > 1 else ""
    records = {arm: [logs.read_lines(directory / f"{arm}-{seed}" / "metrics.jsonl") for seed in seeds] for arm in arms}

    def over_seeds(arm: str, name: str, scale: float = 100.0) -> Sequence[Sequence[float]]:
        found = [_thinned(*logs.curve(one, name)) for one in records[arm]]
        return _line(found[0][0], [scale * np.asarray(y) for _, y in found])

    plots.panels(
        {
            "training batches": {named[arm]: over_seeds(arm, "accuracy") for arm in arms},
            "validation split": {named[arm]: over_seeds(arm, "validation_accuracy") for arm in arms},
        },
        directory / "convergence.png",
        title=f"{title}: convergence{spread}",
        x_label="steps",
        y_label="accuracy, %",
        y_limits=_limits(records),
        band_limits=(0, 100),
    )
    _draw_pruning(directory / "pruning.png", result, f"{title}: test error after cutting layers{spread}")
    if paths := [arm for arm in arms if is_path(arm)]:
        names = [name for name in records[paths[0]][0][0] if name.startswith("zero ")]
        cut = {f"zero {layer}" for group in config["prune"] for layer in group.split("+")}
        even = {names[round(i)] for i in np.linspace(0, len(names) - 1, max(2, _LAYERS_SHOWN - len(cut)))}
        shown = [name for name in names if name in cut | even]
        plots.panels(
            {named[arm]: {name.removeprefix("zero "): over_seeds(arm, name) for name in shown} for arm in paths},
            directory / "path.png",
            title=f"{title}: the path{spread}",
            x_label="steps",
            y_label="part of Gamma that is zero, %",
            y_limits=(-3, 103),
            band_limits=(0, 100),
        )
    _draw_pictures(directory, config, list(arms), title)


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """Means over neighbours where every step is logged, so that some hundred points are left."""
    size = max(1, len(x) // _POINTS)
    ends = range(size, len(x) + 1, size)
    return [x[end - 1] for end in ends], [float(np.mean(y[end - size : end])) for end in ends]


def _draw_pruning(path: Path, result: dict[str, Any], title: str) -> None:
    config, arms = result["config"], result["metrics"]["arms"]
    named = titles(config["weight_decay"])
    lines: dict[str, dict[str, Any]] = {}
    marks: dict[str, dict[str, Any]] = {}
    for group in config["prune"]:
        for kind, label in (("accuracy", group), ("retrained", f"{group}, {config['retrain_steps']} steps later")):
            lines[label] = {
                f"{named[arm]}, by {'path' if is_path(arm) else 'magnitude'}": _line(
                    [100 * entry["fraction"] for entry in found[0]["cut"][group]],
                    [[100 - entry[kind] for entry in one["cut"][group]] for one in found],
                )
                for arm, found in arms.items()
            }
        marks[group] = {}
        for comparison in result["comparisons"]:
            if comparison.get("cut") == group:
                name = f"report {comparison['report']}, DessiLBI{comparison.get('caveat', '')}"
                x, y = marks[group].setdefault(name, ([], []))
                x.append(comparison["percent"])
                y.append(100 - comparison["published"])
    plots.panels(
        lines,
        path,
        title=title,
        x_label="cut, %",
        y_label="wrong on the test split, %",
        band_limits=(_LEAST_ERROR, 100),
        log_y=True,
        marks=marks,
    )


def _draw_pictures(directory: Path, config: dict[str, Any], arms: list[str], title: str) -> None:
    def picture(arm: str, name: str) -> np.ndarray | None:
        found = logs.read_images(directory / f"{arm}-{config['seed']}" / "images.jsonl", name)
        return found[max(found)][0] if found else None

    named = titles(config["weight_decay"])
    rows: dict[str, dict[str, np.ndarray]] = {}
    for row, name in (("W", "kernels W"), ("Gamma", "kernels Gamma")):
        rows[row] = {named[arm]: image for arm in arms if (image := picture(arm, name)) is not None}
    image_plots.image_table(
        {row: images for row, images in rows.items() if images},
        directory / "kernels.png",
        title=f"{title}: the {_FILTERS_SHOWN} strongest filters of {config['kernels']} at most, each by its strongest "
        "slice; red is positive, blue negative, and every picture has its own scale",
    )
    features = {
        layer: {named[arm]: image for arm in arms if (image := picture(arm, f"features {layer}")) is not None}
        for layer in config["features"]
    }
    image_plots.image_table(
        features,
        directory / "features.png",
        title=f"{title}: feature maps of the first test image, each picture on its own scale",
    )


def _line(x: Sequence[float], values: Sequence[Any]) -> Sequence[Any]:
    """x, mean and, for several seeds, the sample standard deviation."""
    y = np.asarray(values, float)
    return (x, y.mean(0), y.std(0, ddof=1)) if len(y) > 1 else (x, y[0])


def _limits(records: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> tuple[float, float]:
    """The accuracy axis: from a little below the worst validation, so that the first steps do not rule it, to the best
    of any curve."""
    every = [r for arm in records.values() for one in arm for r in one]
    worst = min(r["validation_accuracy"] for r in every if "validation_accuracy" in r)
    best = max(r[name] for r in every for name in ("accuracy", "validation_accuracy") if name in r)
    return max(0.0, 100 * worst - 5), min(100.2, 100 * best + 2)
