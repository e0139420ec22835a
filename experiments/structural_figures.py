"""The figures of the study of structural pruning: accuracy, costs, what is left of each layer, coupled layers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments import plots
from experiments.dependency_figures import dependency_graph, dependency_matrix
from experiments.published import table

_TABLES = {"global": 6, "local": 7}  # of report A: its Figures 11 and 10
_CRITERIA = {
    "global": "Taylor",
    "magnitude": "magnitude",
    "regularised": "magnitude, after sparse training",
    "local": "Taylor, the same fraction of each layer",
}

Parts = list[dict[str, Any]]
Curve = tuple[list[float], list[float]]


def names(arms: Sequence[str]) -> list[str]:
    """The figures of a run with these arms."""
    compared = ["criteria.png"] if len(arms) > 1 else []
    return ["accuracy.png", "costs.png", *compared, "layers.png", "graph.png", "matrix.png"]


def draw(directory: Path, result: dict[str, Any]) -> None:
    """Draws the figures of a result."""
    metrics, config = result["metrics"], result["config"]
    arms = {arm: [p for p in metrics["parts"] if p["arm"] == arm] for arm in config["arms"]}
    tables = {arm: parts for arm, parts in arms.items() if arm in _TABLES} or arms
    dense, name = metrics["dense"], metrics["name"]
    trained = f"trained, {config['epochs']:g} epochs"
    draw_accuracy(
        directory / "accuracy.png",
        tables,
        dense,
        trained,
        title=f"{name}: {_dense_text(dense)}",
        published=bool(result["comparisons"]),
    )
    draw_costs(directory / "costs.png", tables, dense, trained, title=f"{name}: {_dense_text(dense)}")
    if len(arms) > 1:
        draw_criteria(
            directory / "criteria.png", arms, dense, title=f"{name}: which units go, no training after the cut"
        )
    first = next(iter(tables))
    plots.matrix(
        {layer: [100 * p["widths"][layer] for p in tables[first]] for layer in tables[first][0]["widths"]},
        [f"{100 * p['ratio']:g}" for p in tables[first]],
        directory / "layers.png",
        title=f"{name}, {first}: outputs left of each kernel, %",
        x_label="units removed in all, %",
    )
    for kind, figure in (("graph", dependency_graph), ("matrix", dependency_matrix)):
        figure(
            metrics["coupled"],
            directory / f"{kind}.png",
            title=f"Dependency {kind}: {name}, with as few layers as show it",
        )


def draw_accuracy(
    path: Path, arms: dict[str, Parts], dense: dict[str, Any], trained: str, *, title: str, published: bool
) -> None:
    """Accuracy over the fraction removed, relative to the dense network: report A's Figures 10 and 11."""

    series, marks = {}, {}
    for arm, parts in arms.items():
        curves = {name: _over_ratio(parts, name) for name in ("cut", "recovered")}
        curves = {name: _from_dense(dense["accuracy"], curve) for name, curve in curves.items()}
        curves[trained] = _over_ratio(parts, "trained")
        series[arm] = {name: (x, [value - dense["accuracy"] for value in y]) for name, (x, y) in curves.items()}
        if published and arm in _TABLES:
            base, *rows = table("A", _TABLES[arm]).rows
            marks[arm] = {
                "report A, 20 epochs": (
                    [100 * float(row[0]) for row in rows],  # type: ignore[arg-type]
                    [float(row[1]) - float(base[1]) for row in rows],  # type: ignore[arg-type]
                )
            }
    plots.panels(
        series,
        path,
        title=title,
        x_label="units removed, %",
        y_label="accuracy minus dense, points",
        marks=marks,
    )


def draw_costs(path: Path, arms: dict[str, Parts], dense: dict[str, Any], trained: str, *, title: str) -> None:
    """Accuracy against parameters, FLOPs and measured latency, in % of the dense network's."""
    costs: dict[str, Callable[[dict[str, Any]], float]] = {
        "parameters": lambda p: 100 * p["parameters"] / dense["parameters"],
        "FLOPs": lambda p: 100 * p["flops"] / dense["flops"],
        "measured latency": lambda p: 100 / p["latency"]["speed_up"],
    }
    series: dict[str, dict[str, Any]] = {}
    for panel, cost in costs.items():
        series[panel] = {}
        for arm, parts in arms.items():
            at, y = [cost(p) for p in parts], [p["recovered"]["accuracy"] for p in parts]
            series[panel][f"{arm}, recovered"] = _from_dense(dense["accuracy"], (at, y), at=100.0)
            at = [cost(p) for p in parts if "recovered" in p["after"]]
            series[panel][f"{arm}, {trained}"] = (at, _over_ratio(parts, "trained")[1])
    plots.panels(series, path, title=title, x_label="left of the dense network, %", y_label="accuracy on test, %")


def draw_criteria(path: Path, arms: dict[str, Parts], dense: dict[str, Any], *, title: str) -> None:
    """Accuracy of the cut and of the recovered networks, by how units are chosen; each from what was cut on."""
    plots.panels(
        {
            state: {
                _CRITERIA[arm]: _from_dense(parts[0].get("before", dense)["accuracy"], _over_ratio(parts, state))
                for arm, parts in arms.items()
                if parts
            }
            for state in ("cut", "recovered")
        },
        path,
        title=title,
        x_label="units removed, %",
        y_label="accuracy on test, %",
        y_limits=(0, min(100.0, 1.1 * dense["accuracy"])),
    )


def _over_ratio(parts: Parts, state: str) -> Curve:
    """Accuracy in %, over % of the units removed, of the "cut", "recovered" or "trained" networks."""
    if state == "trained":
        found = [(p["ratio"], p["after"]["recovered"]) for p in parts if "recovered" in p["after"]]
    else:
        found = [(p["ratio"], p[state]) for p in parts]
    return [100 * ratio for ratio, _ in found], [measured["accuracy"] for _, measured in found]


def _from_dense(value: float, curve: Curve, *, at: float = 0.0) -> Curve:
    """The curve, begun at the dense network."""
    return [at, *curve[0]], [value, *curve[1]]


def _dense_text(dense: dict[str, Any]) -> str:
    size, work = dense["parameters"] / 1e6, dense["flops"] / 1e6
    return f"{dense['accuracy']:.2f} % on test, {size:.3g} M parameters, {work:.3g} MFLOP an image"
