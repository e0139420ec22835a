"""What a comparison of token methods says in numbers: its table, and the reports' beside it."""

from typing import Any

from experiments.published import published_number
from experiments.published import table as published_table
from experiments.studies.token_presets import Config
from experiments.token_methods import TITLES

TRAINED = {"none": "", "classifier": "classifier", "joint": "all, jointly", "ViT": "ViT"}
FORMS = {"threshold": "by threshold, all computed", "capacity": "fixed capacity"}


def table(base: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """One row for each method, keep rate and way of training."""
    dense = metrics["dense"]
    timed = [row for row in (*metrics["rows"], *metrics["thresholds"]) if "latency" in row]
    batches = sorted({int(batch) for row in timed for batch in row["latency"]})
    columns = ["method", "keep rate", "trained", "MFLOP", "FLOPs saved, %", "accuracy, %", "points lost"]
    columns += [f"speed-up, batch {batch}" for batch in batches]

    def speed_ups(row: dict[str, Any]) -> list[Any]:
        times = [row.get("latency", {}).get(str(batch)) for batch in batches]
        return [round(t["speed_up"], 2) if t else "" for t in times]

    rows: list[list[Any]] = [["dense", "", "", *_numbers(dense, dense), *[1.0] * len(batches)]]
    for row in metrics["rows"]:
        name = [TITLES[row["series"]], row["keep"], TRAINED[row["trained"]]]
        rows.append([*name, *_numbers(row, dense), *speed_ups(row)])
    for row in metrics["thresholds"]:
        said = f"cosine {row['cosine_threshold']:g}, to {row['attend']}, {FORMS[row['form']]}"
        rows.append([f"patch skipping, {said}", "", "", *_numbers(row, dense), *speed_ups(row)])
    if metrics["heads"]:
        rows.append(["CP-ViT, heads", "", "", *_numbers(metrics["heads"]["alone"], dense), *[""] * len(batches)])
        rows.append(["CP-ViT, merging, heads", 0.8, "", *_numbers(metrics["heads"], dense), *[""] * len(batches)])
    title = f"{metrics['dataset']}, {base}: fewer tokens, {dense['images']} test images"
    return {"title": title, "columns": columns, "rows": rows}


def _numbers(row: dict[str, Any], dense: dict[str, Any]) -> list[float]:
    saved = 100 * (1 - row["flops"] / dense["flops"])
    lost = dense["accuracy"] - row["accuracy"]
    return [round(row["flops"] / 1e6, 1), round(saved, 1), round(row["accuracy"], 2), round(lost, 2)]


def comparisons(config: Config, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Points lost, ours and the reports', each relative to its own dense network."""
    found = []
    if metrics["dataset"] == "cifar10":
        beside = [of(row, metrics) for row in metrics["rows"] for of in (_beside_a, _beside_b)]
        found += [entry for entry in beside if entry]
    if metrics["dataset"] in ("cifar10", "cifar100"):
        found += [entry for row in metrics["thresholds"] for entry in _beside_c(row, metrics)]
    return [{"setting": f"{config.base}, {entry.pop('setting')}", **entry} for entry in found]


def _lost(row: dict[str, Any], metrics: dict[str, Any]) -> float:
    return metrics["dense"]["accuracy"] - row["accuracy"]


def _beside_a(row: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any] | None:
    settings = {
        ("dynamic", "classifier"): "frozen predictors, classifier trained",
        ("dynamic", "joint"): "trained jointly",
        ("dynamic-merge", "none"): "frozen predictors, merging what they would drop, nothing else trained",
        ("dynamic-merge", "ViT"): "frozen predictors, merging what they would drop, ViT trained on",
    }
    kind, sparsity = (row["series"], row["trained"]), round(1 - row["keep"], 3)
    if kind not in settings or sparsity not in published_table("A", 8).column("sparsity"):
        return None
    dense = published_number("A", 8, row="base", column="accuracy, %")
    return {
        "quantity": f"points lost at sparsity {sparsity:g}",
        "setting": settings[kind],
        "ours": _lost(row, metrics),
        "report": "A",
        "table": 8,
        "published": dense - published_number("A", 8, row=sparsity, column="accuracy, %"),
        "published_setting": "ViT-B/16, frozen predictors, classifier trained for 20 epochs",
        "higher_is_better": False,
        "note": f"Sparsity at each of three stages. Dense: {metrics['dense']['accuracy']:.2f} and {dense} %.",
    }


def _beside_b(row: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any] | None:
    ratio, tables = round(1 - row["keep"], 3), {"none": 6, "ViT": 7}
    if row["series"] not in ("cp", "cp-merge") or ratio not in (0.2, 0.3, 0.4) or row["trained"] not in tables:
        return None
    number = tables[row["trained"]]
    kind = "merging" if row["series"] == "cp-merge" else "dropping"
    dense = published_number("B", number, row="baseline", column="accuracy, %")
    saved = 100 * (1 - row["flops"] / metrics["dense"]["flops"])
    return {
        "quantity": f"points lost at pruning ratio {ratio:g}",
        "setting": f"{kind}, {'not trained' if row['trained'] == 'none' else 'ViT trained on'}",
        "ours": _lost(row, metrics),
        "report": "B",
        "table": number,
        "published": dense - published_number("B", number, row=ratio, column="accuracy, %"),
        "published_setting": "ViT-B/16, 224 px",
        "higher_is_better": False,
        "note": f"Ours: mean over blocks of the patches gone; {saved:.0f} % fewer FLOPs.",
    }


def _beside_c(row: dict[str, Any], metrics: dict[str, Any]) -> list[dict[str, Any]]:
    threshold, figure = row["cosine_threshold"], {"kept": "Figure 3", "all": "Figure 4"}[row["attend"]]
    if threshold not in ((0.95, 0.9) if row["attend"] == "kept" else (0.95,)):
        return []
    dense = published_number("C", "text", row="accuracy without skipping, %", column="value")
    saved = 100 * (1 - row["flops"] / metrics["dense"]["flops"])
    right = _scorers_right(metrics["similarity"]["scorers"][f"{threshold:g}"])
    common = {
        "setting": f"{metrics['dataset']}, kept patches attend to {row['attend']}, {FORMS[row['form']]}",
        "report": "C",
        "table": figure,
        "published_setting": "ViT on CIFAR-100",
        "note": f"{row['patches_skipped']:.1f} of {row['patches']} patches skipped, mean over blocks. {right}",
    }
    column = {"lost": "accuracy, %", "saved": "FLOPs saved, %"}
    found = [
        {
            "quantity": f"points lost at cosine threshold {threshold:g}",
            "ours": _lost(row, metrics),
            "published": dense - published_number("C", figure, row=threshold, column=column["lost"]),
            "higher_is_better": False,
            **common,
        }
    ]
    if row["form"] == "capacity":  # by threshold all is computed, and then selected
        found.append(
            {
                "quantity": f"FLOPs saved at cosine threshold {threshold:g}, %",
                "ours": saved,
                "published": published_number("C", figure, row=threshold, column=column["saved"]),
                "higher_is_better": True,
                **common,
            }
        )
    return found


def _scorers_right(scorer: dict[str, list[float]]) -> str:
    names = {"accuracy": "The MLP is right on", "commoner": "the commoner answer on", "balanced_accuracy": "balanced"}
    return ", ".join(f"{name} {100 * sum(scorer[n]) / len(scorer[n]):.1f} %" for n, name in names.items()) + "."
