"""Whole units of a trained network removed by its dependency graph, made up for in closed form, then trained on.

References: Fang et al. 2023, arXiv:2301.12900 (DepGraph); report A, sections 2.4 and 2.6.2, Tables 6 and 7.
"""

import dataclasses
import functools
import json
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments import classification, data, finetuning, structural, structural_figures, training
from experiments.files import write_atomically
from experiments.finetuning import FineTuning, finetune_variables
from experiments.parts import part, recorded
from experiments.published import published_number
from experiments.runs import Run
from experiments.studies.structural_presets import PRESETS as PRESETS
from experiments.studies.structural_presets import Arm, Config, Way
from experiments.tables import counted
from experiments.trained import Base, load_base
from prune_jax import count_parameters, flops, latencies, speed_up
from prune_jax.graph import apply_plan, group_regulariser, prune, recover

SUMMARY = "Cut whole units out of a trained ViT, Swin or CNN, recover without training, then fine-tune"

TABLES: dict[Arm, int] = {"global": 6, "local": 7}  # of report A
WAYS: dict[str, str] = {"recovered": "", "cut": ", as cut", "distilled": ", taught"}  # as the table says it


class Subject(NamedTuple):
    """A dense network to cut, and what its cuts need.

    Attributes:
      base: the network.
      scores: of its variables, larger = keep.
      normalise: of the units' scores within a group, see `prune`.
      batches: calibration inputs and labels.
    """

    base: Base
    scores: Any
    normalise: Any
    batches: list[Any]


def run(config: Config, run: Run) -> dict[str, Any]:
    """Cuts, recovers and trains; returns metrics, table, comparisons and figures for `result.json`."""
    check(config)
    base = _base(config, run)
    finetuning.check(_plan(config, config.epochs), len(base.train.labels))
    if not 1 <= config.calibration <= len(base.train.labels):
        raise ValueError(
            f"calibration must be from 1 to the {len(base.train.labels)} train images, got {config.calibration}"
        )
    dense = recorded(run, "dense", partial(_dense, config, base))
    batches = structural.calibration(base, config.calibration)
    subject_of = functools.cache(partial(_subject, config, run, base, batches))
    made = {}
    for arm in config.arms:
        subject = subject_of("taylor" if arm in TABLES else arm)
        for ratio in config.ratios if arm in TABLES else config.compared:
            name = f"{arm}-{ratio:g}"
            made[name] = recorded(run, name, partial(_part, config, subject, arm, ratio))
            run.console.print(_summary(made[name]), markup=False, highlight=False, soft_wrap=True)
    plans = {name: run.directory / name / "plan.json" for name in made}
    times = recorded(run, "latency", partial(_latencies, config, base, plans))
    parts = [record | {"latency": times[name]} for name, record in made.items()]
    metrics = {"dense": dense, "parts": parts, "name": _name(config), "coupled": structural.coupled_layers(base)}
    return {
        "metrics": metrics,
        "table": _table(config, base, metrics),
        "comparisons": _comparisons(config, base, metrics),
        "figures": structural_figures.names(config.arms),
    }


def draw(directory: Path, result: dict[str, Any]) -> None:
    """Draws the figures of a finished run from its result."""
    structural_figures.draw(directory, result)


def check(config: Config) -> None:
    """Refuses, before anything is loaded, what makes no sense.

    Raises:
      ValueError: names the field, its value and what would be right.
    """
    if bad := [ratio for ratio in config.ratios if not 0 <= ratio < 1]:
        raise ValueError(f"ratios are fractions removed, in [0, 1), got {bad}")
    for name in ("compared", "finetuned", "contrasted"):
        if missing := [ratio for ratio in getattr(config, name) if ratio not in config.ratios]:
            raise ValueError(f"{name}={missing} are not among ratios={config.ratios}")
    if not config.arms:
        raise ValueError("arms must name at least one of global, local, magnitude and regularised")
    if not config.sparse_strength >= 0:
        raise ValueError(f"sparse_strength must be at least 0, got {config.sparse_strength}")
    if not 0 <= config.distillation <= 1:
        raise ValueError(f"distillation is a share of the loss, in [0, 1], got {config.distillation}")
    for name in ("sparse_epochs", "epochs", "base_epochs"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be above 0, got {getattr(config, name)}")
    if not 0 < config.ridge < math.inf:
        raise ValueError(f"ridge must be above 0 and finite, got {config.ridge}")


def _name(config: Config) -> str:
    return config.base if config.network == "trained" else config.network


def _plan(config: Config, epochs: float, *, distillation: float = 0.0) -> FineTuning:
    return FineTuning(epochs, config.batch_size, config.learning_rate, distillation=distillation)


def _base(config: Config, run: Run) -> Base:
    """The network to prune: of a finished run, or a CNN trained in a folder of this one."""
    mesh = training.data_mesh()
    if config.network == "trained":
        return load_base(run.options, config.base, mesh)
    splits = data.load_splits(config.dataset, images=config.images, data_dir=run.options.data_dir)
    train = splits[0]
    model = structural.CNNS[config.network](classes=int(train.labels.max()) + 1)
    prepare = classification.standardise(train.images)
    variables = jax.jit(partial(model.init, train=False))(
        jax.random.key(config.seed), prepare(jnp.asarray(train.images[:1]))
    )
    begun = Base(model, variables["params"], prepare, *splits, config, {}, mesh, variables["batch_stats"])
    plan = dataclasses.replace(_plan(config, config.base_epochs), learning_rate=config.base_rate)
    trained = finetune_variables(part(run, "base"), begun, variables, plan, seed=config.seed)
    return begun._replace(**trained)


def _subject(config: Config, run: Run, base: Base, batches: list[Any], kind: str) -> Subject:
    """The network to cut, with scores by "taylor" or "magnitude", or "regularised" before those by magnitude."""
    if kind == "taylor":
        return Subject(base, structural.taylor_scores(base, batches), "none", batches)
    if kind == "regularised":
        regulariser = group_regulariser(structural.width_groups(base), config.sparse_strength)
        sparse = finetune_variables(
            part(run, "sparse"),
            base,
            base.variables,
            _plan(config, config.sparse_epochs),
            seed=config.seed,
            wrap=lambda adamw, _: optax.chain(regulariser, adamw),
        )
        base = base._replace(**sparse)
    return Subject(base, structural.magnitude_scores(base), "top", batches)


def _dense(config: Config, base: Base, run: Run) -> dict[str, Any]:
    """The network as it is."""
    del run
    return {**_costs(base.model, base.variables, base), **_percent(base, base.model, base.variables)}


def _part(config: Config, subject: Subject, arm: Arm, ratio: float, run: Run) -> dict[str, Any]:
    """One cut: what it costs, and accuracies in % of the test split before and after recovery and training."""
    base = subject.base
    pruned = prune(
        structural.evaluated(base.model),
        base.variables,
        subject.batches[0][0][:1],
        ratio=ratio,
        scope="local" if arm == "local" else "global",
        importance=subject.scores,
        normalise=subject.normalise,
        round_to=config.round_to,
    )
    if run.first_process:
        run.directory.mkdir(parents=True, exist_ok=True)
        write_atomically(run.directory / "plan.json", json.dumps(pruned.plan) + "\n")
    model = structural.cut_model(base, pruned.plan)
    inputs = [batch for batch, _ in subject.batches]
    recovered = recover(pruned, structural.evaluated(base.model), base.variables, inputs, ridge=config.ridge)
    record: dict[str, Any] = {
        "arm": arm,
        "ratio": ratio,
        **_costs(model, pruned.params, base),
        "widths": structural.kept_widths(pruned.plan),
        "cut": _percent(base, model, pruned.params),
        "recovered": _percent(base, model, recovered),
        "after": {},
    }
    if arm == "regularised":
        record["before"] = _percent(base, base.model, base.variables)
    for way in _ways(config, arm, ratio):
        trained = finetune_variables(
            part(run, way),
            base,
            pruned.params if way == "cut" else recovered,
            _plan(config, config.epochs, distillation=config.distillation if way == "distilled" else 0.0),
            seed=config.seed,
            model=model,
            validate=False,
        )
        record["after"][way] = _percent(base, model, trained)
    return record


def _ways(config: Config, arm: Arm, ratio: float) -> tuple[Way, ...]:
    """How the network that a cut left is trained on."""
    if arm == "global" and ratio in config.contrasted:
        return config.ways
    wanted = config.finetuned if arm in TABLES else config.contrasted
    return ("recovered",) if ratio in wanted else ()


def _costs(model: Any, variables: Any, base: Base) -> dict[str, int]:
    example = base.prepare(jnp.asarray(base.train.images[:1]))
    return {
        "parameters": count_parameters(variables["params"]),
        "flops": flops(structural.evaluated(structural.computed(model, "xla")), variables, example),
    }


def _latencies(config: Config, base: Base, plans: dict[str, Path], run: Run) -> dict[str, dict[str, float]]:
    """For each cut median milliseconds of a batch through the dense network and the cut one, and the speed-up.

    A part of its own, measured after all training: where the machine was busy, this part alone can be made again.
    """
    del run
    inputs = base.prepare(jnp.asarray(base.train.images[: config.latency_batch]))

    def timed(model: Any) -> Any:
        return structural.evaluated(structural.computed(model, "no-loop"))

    dense = timed(base.model), (base.variables, inputs)
    measured = {}
    for name, path in plans.items():
        plan = json.loads(path.read_text(encoding="utf-8"))
        cut = timed(structural.cut_model(base, plan)), (apply_plan(plan, base.variables), inputs)
        found = latencies({"dense": dense, "cut": cut}, repeats=config.latency_calls)
        milliseconds = {kind: 1e3 * times.median for kind, times in found.items()}
        measured[name] = milliseconds | {"speed_up": speed_up(found["dense"], found["cut"])}
    return measured


def _percent(base: Base, model: Any, variables: Any) -> dict[str, float]:
    return classification.percent(base.measure_variables(variables, base.test, model=model))


def _summary(record: dict[str, Any]) -> str:
    after = "".join(f", {way} and trained {found['accuracy']:.2f}" for way, found in record["after"].items())
    return (
        f"{record['arm']} {record['ratio']:g}: {record['parameters']:,} parameters; "
        f"cut {record['cut']['accuracy']:.2f} %, recovered {record['recovered']['accuracy']:.2f}{after}"
    )


def _table(config: Config, base: Base, metrics: dict[str, Any]) -> dict[str, Any]:
    columns = ["units chosen", "ratio", "M", "MFLOP", "faster", "cut", "recovered", "trained", "top-5"]
    dense = metrics["dense"]
    rows: list[list[Any]] = [
        ["dense", 0, *_sizes(dense), 1.0, round(dense["accuracy"], 2), None, None, round(dense["top5_accuracy"], 2)]
    ]
    for record in metrics["parts"]:
        accuracies = [round(record[name]["accuracy"], 2) for name in ("cut", "recovered")]
        common = [record["ratio"], *_sizes(record), round(record["latency"]["speed_up"], 2), *accuracies]
        for way, found in record["after"].items() or (("recovered", None),):
            trained = [round(found[name], 2) for name in ("accuracy", "top5_accuracy")] if found else [None, None]
            rows.append([record["arm"] + WAYS[way], *common, *trained])
    after = counted(config.epochs, "epoch")
    title = f"{_name(config)} on {base.config.dataset}: % right on test, at once, recovered, after {after}"
    return {"title": title, "columns": columns, "rows": rows}


def _sizes(record: dict[str, Any]) -> list[float]:
    return [round(record["parameters"] / 1e6, 4), round(record["flops"] / 1e6, 2)]


def _share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else f"{share:.1%}"


def _comparisons(config: Config, base: Base, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    if config.network != "trained" or base.config.dataset != "cifar10" or base.config.model != "vit":
        return []
    dense = metrics["dense"]["accuracy"]
    found = []
    for record in metrics["parts"]:
        table = TABLES.get(record["arm"])
        if table is None or "recovered" not in record["after"]:
            continue
        if not any(abs(record["ratio"] - row / 10) < 1e-9 for row in range(1, 10)):
            continue
        theirs = partial(published_number, "A", table)
        base_accuracy, base_size = (theirs(row="base", column=c) for c in ("accuracy, %", "parameters, M"))
        share = theirs(row=record["ratio"], column="parameters, M") / base_size
        ours = record["parameters"] / metrics["dense"]["parameters"]
        found.append(
            {
                "quantity": f"points lost, {record['ratio']:.0%} of the units removed",
                "setting": f"{config.base}, {record['arm']}, {counted(config.epochs, 'epoch')} of fine-tuning",
                "ours": dense - record["after"]["recovered"]["accuracy"],
                "report": "A",
                "table": table,
                "published": base_accuracy - theirs(row=record["ratio"], column="accuracy, %"),
                "published_setting": "ViT-B/16, 20 epochs of fine-tuning",
                "higher_is_better": False,
                "note": f"Each relative to its own dense network: ours has {dense:.2f} %, the report's "
                f"{base_accuracy:g} %. Parameters left: ours {_share(ours)}, the report's {_share(share)}.",
            }
        )
    return found
