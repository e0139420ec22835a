"""Numbers of the DessiLBI studies: the table of a run, and what stands beside the published ones."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.optimizers import is_path, titles
from experiments.path_figures import figures
from experiments.published import published, table
from experiments.tables import counted

Records = Mapping[str, Sequence[Mapping[str, Any]]]


def content(config: Any, arms: Records, comparisons: list[dict[str, Any]]) -> dict[str, Any]:
    """What `result.json` holds: metrics, table, comparisons, figures.

    Args:
      config: of the run.
      arms: arm -> the records of its seeds.
      comparisons: see `compare`.
    """
    seconds = sum(record["train_seconds"] for records in arms.values() for record in records)
    metrics = {f"{arm}_accuracy": mean(records, "accuracy") for arm, records in arms.items()}
    return {
        "metrics": {**metrics, "train_seconds": seconds, "arms": arms},
        "table": _table(config, arms),
        "comparisons": comparisons,
        "figures": figures(arms),
    }


def _table(config: Any, arms: Records) -> dict[str, Any]:
    rows: list[list[Any]] = []

    def add(quantity: str, *keys: Any) -> None:
        rows.append([quantity, *(_summary([value_of(record, *keys) for record in arms[arm]]) for arm in arms)])

    add("test accuracy, %", "accuracy")
    rows.append(["mu; thresholds of filters, of weights", *(_thresholds(config, arm) for arm in arms)])
    add("zero in Gamma (in W without a path), % of all parameters", "support_removed")
    add("W where Gamma is nonzero: accuracy, %", "support_accuracy")
    for group in config.prune:
        for i, fraction in enumerate(config.fractions):
            if fraction > 0:
                add(f"{group} cut by {100 * fraction:g} %: accuracy, %", "cut", group, i, "accuracy")
                add(f"the same, {config.retrain_steps} steps later", "cut", group, i, "retrained")
    if config.total is not None:
        add(f"cut of all parameters, from {config.prune[-1]}, %", "total", "removed")
        add("accuracy after it, %", "total", "accuracy")
        add(f"the same, {config.retrain_steps} steps later", "total", "retrained")
    for layer in next(iter(arms.values()))[0]["each_layer"]:
        add(f"only {layer} cut by {100 * config.each_layer:g} %: accuracy, %", "each_layer", layer, "accuracy")
        add(f"the same, {config.retrain_steps} steps later", "each_layer", layer, "retrained")
    rows.append(["training time of one seed, s", *(round(mean(r, "train_seconds"), 1) for r in arms.values())])
    images = f" (cuts: its first {config.cut_images} images)" if config.cut_images else ""
    seeds = f", mean ± sample standard deviation of {config.seeds} seeds" if config.seeds > 1 else ""
    return {
        "title": f"{config.model} on {config.dataset}, test split{images}{seeds}; cut by path, else by magnitude",
        "columns": ["quantity", *(titles(config.weight_decay)[arm] for arm in arms)],
        "rows": rows,
    }


def compare(
    config: Any,
    arms: Records,
    arm: str,
    keys: Sequence[Any],
    *,
    quantity: str,
    setting: str,
    cite: tuple[str, int | str, Any, str],
    note: str = "",
    **more: Any,
) -> dict[str, Any]:
    """One of our numbers, the mean over the seeds, beside a published one.

    Args:
      config: of the run; its settings are noted beside the number.
      arms: arm -> the records of its seeds.
      arm: whose number.
      keys: path of the number in a record.
      quantity: what it measures.
      setting: ours.
      cite: report, table, row and column.
      note: what a reader must know.
      **more: further entries, for the figures.
    """
    report, number, row, column = cite
    return {
        "quantity": quantity,
        "setting": setting,
        "ours": mean(arms[arm], *keys),
        "report": report,
        "table": number,
        "published": published(report, number, row=row, column=column),
        "published_setting": f"{row}, {column}",
        "higher_is_better": True,
        "note": f"{_settings(config, arm)} {note}".rstrip(),
        **more,
    }


def compare_cuts(
    config: Any,
    arms: Records,
    group: str,
    cite: tuple[str, int, str],
    *,
    arm: str = "dessilbi",
    note: str = "",
    caveat: str = "",
) -> list[dict[str, Any]]:
    """A published table of accuracies after cutting: one comparison for each fraction that both have.

    Args:
      config: of the run.
      arms: arm -> the records of its seeds.
      group: the layers that were cut.
      cite: report, table and column; its rows are percentages.
      arm: whose numbers.
      note: for all.
      caveat: of the published numbers, for the figure's legend.
    """
    report, number, column = cite
    rows = [row[0] for row in table(report, number).rows]
    return [
        compare(
            config,
            arms,
            arm,
            ("cut", group, i, "accuracy"),
            quantity=f"accuracy after cutting {group}, without retraining, %",
            setting=f"{titles(config.weight_decay)[arm]}, {100 * fraction:g} % cut",
            cite=(report, number, round(100 * fraction), column),
            note=note,
            cut=group,
            percent=100 * fraction,
            caveat=caveat,
        )
        for i, fraction in enumerate(config.fractions)
        if group in config.prune and round(100 * fraction) in rows
    ]


def _settings(config: Any, arm: str) -> str:
    """How an arm was trained, for a note: the reports' settings are others."""
    rate = config.of(arm).rate
    text = f"Ours: {config.model}, {counted(config.epochs, 'epoch')}, {config.schedule} schedule from {rate:g}"
    if is_path(arm):
        text += f", mu and thresholds (filters; weights) {_thresholds(config, arm)}"
    return text + "."


def _thresholds(config: Any, arm: str) -> str | None:
    """mu and what Gamma's groups must exceed; 1 and 1 in the official code."""
    if not is_path(arm):
        return None
    of = config.of(arm)
    return f"{of.mu:g}; {of.filters:g}, {of.dense:g}"


def value_of(record: Any, *keys: Any) -> float | None:
    """A number inside a record, in %; None where the arm has none."""
    for key in keys:
        if isinstance(record, Mapping) and key not in record:
            return None
        record = record[key]
    return 100 * record if keys[-1] in ("removed", "support_removed") else record


def mean(records: Sequence[Mapping[str, Any]], *keys: Any) -> float:
    """Mean over the seeds.

    Raises:
      KeyError: a seed has no such number.
    """
    values = [value for record in records if (value := value_of(record, *keys)) is not None]
    if len(values) < len(records):
        raise KeyError(f"no {'/'.join(map(str, keys))} in the records")
    return statistics.fmean(values)


def _summary(values: Sequence[float | None]) -> str | float | None:
    present = [value for value in values if value is not None]
    if not present:
        return None
    if len(present) == 1:
        return round(present[0], 2)
    return f"{statistics.fmean(present):.2f} ± {statistics.stdev(present):.2f}"
