"""Pruning before training: six criteria on ResNet-20 and VGG, what they keep of each layer, and how that trains.

References: Iurada et al. 2024, arXiv:2406.01820 (PX; report E); Lee et al. 2019, arXiv:1810.02340 (SNIP); Wang et al.
2020, arXiv:2002.07376 (GraSP); Tanaka et al. 2020, arXiv:2006.05467 (SynFlow).
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import classification, data, foresight, logs, optimizers, parts, pictures, plots, training
from experiments.foresight import TITLES, Initial
from experiments.models.conv import for_steps
from experiments.models.resnet import ResNet
from experiments.models.vgg import scale, vgg19, vgg_a
from experiments.runs import Run
from experiments.studies.prune_at_init_presets import PRESETS as PRESETS
from experiments.studies.prune_at_init_presets import Config
from prune_jax import apply_masks, keep_masks, layer_statistics

SUMMARY = "Prune ResNet-20 and VGG before training by six criteria: layers kept, tangent kernel, accuracy"
NORMALISED = {"frozen": "by the whole network's statistics", "own": "by its own"}  # the kernel's network
FIGURES = ["accuracy.png", "collapse.png", "layers.png", "spectrum.png"]


def run(config: Config, run: Run) -> dict[str, Any]:
    """Prunes by every criterion to every sparsity, and trains what is left; each in a folder of its own.

    Returns:
      metrics, table, comparisons and figures for `result.json`.
    """
    check(config)
    train, validation, test = _splits(config, run.options.data_dir)
    prepare = classification.standardise(train.images)
    model = network(config, int(train.labels.max()) + 1)
    variables = jax.jit(model.init)(jax.random.key(config.seed), prepare(jnp.asarray(train.images[:1])))
    initial = Initial(
        model,
        variables["params"],
        variables["batch_stats"],
        prepare(jnp.asarray(train.images[: config.score_images])),
        jnp.asarray(train.labels[: config.score_images]),
        jax.random.key(config.seed),
    )
    mesh = training.data_mesh()

    def one(method: Any, sparsity: float, own: Run) -> dict[str, Any]:
        started = time.monotonic()
        if method == "dense":
            masks = jax.tree.map(lambda w: jnp.ones(w.shape, bool) if w.ndim > 1 else None, initial.params)
        else:
            masks = foresight.kept_masks(
                own.directory / "masks.npz",
                initial.params,
                lambda: foresight.keep(initial, method, sparsity, config.rounds),
            )
        seconds = time.monotonic() - started
        layers = {path.removesuffix("/kernel"): found for path, found in layer_statistics(masks).items()}
        record: dict[str, Any] = {
            "method": method,
            "sparsity": sparsity,
            "kept": {name: layer.kept for name, layer in layers.items()},
            "total": {name: layer.total for name, layer in layers.items()},
            "pruning_seconds": seconds,
        }
        if sparsity in (config.spectrum, 0.0):
            for name in NORMALISED:
                eigenvalues = foresight.spectrum(initial, masks, config.ntk_images, frozen=name == "frozen")
                record[f"spectrum_{name}"] = [float(f"{x:.5g}") for x in eigenvalues]
        if sparsity in (*config.trained, 0.0):
            state, times = _train(config, own, initial, masks, prepare, train, validation, mesh)
            found = classification.measure(model, state.variables, test.images, test.labels, prepare, mesh)
            record |= {"test_accuracy": found["accuracy"], "test_loss": found["loss"], **times}
        return record

    jobs = [("dense", 0.0), *((method, s) for s in config.sparsities for method in config.methods)]
    records = [parts.recorded(run, f"{method}-{s:g}", partial(one, method, s)) for method, s in jobs]
    return _content(config, sorted(records, key=lambda record: record["sparsity"]))


def check(config: Config) -> None:
    """Refuses, before any training, numbers that make no sense.

    Raises:
      ValueError: names the field, its value and what would be right.
    """
    for name, values in (("sparsities", config.sparsities), ("trained", config.trained)):
        if not values or not all(0 < value < 1 for value in values):
            raise ValueError(f"{name} must be some numbers in (0, 1), got {values}")
    for name, chosen in (("trained", config.trained), ("spectrum", (config.spectrum,))):
        if not set(chosen) <= set(config.sparsities):
            raise ValueError(f"{name} must be among sparsities={config.sparsities}, got {getattr(config, name)}")
    if not config.methods:
        raise ValueError("methods must name at least one criterion, got ()")
    for name in ("rounds", "epochs", "score_images", "steps_per_call"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 1 <= config.ntk_images <= config.score_images:
        raise ValueError(f"ntk_images must be from 1 to score_images={config.score_images}, got {config.ntk_images}")


def network(config: Config, classes: int) -> nn.Module:
    """The network; every normalisation starts with scale 1, so that criteria see all of its branches."""

    if config.model.startswith("resnet"):
        depth = {"resnet8": 1, "resnet20": 3}[config.model]
        (features,) = scale((16,), config.width)
        return ResNet((depth,) * 3, features, classes=classes)
    return {"vgg-a": vgg_a, "vgg19": vgg19}[config.model](config.width, classes=classes, hidden=())


def _splits(config: Config, data_dir: Path | None) -> list[data.Split]:
    found = data.load_splits(config.dataset, images=config.images, data_dir=data_dir)
    if config.image_size is None:
        return list(found)
    return [data.Split(pictures.resize(s.images, config.image_size), s.labels) for s in found]


def _train(
    config: Config,
    own: Run,
    initial: Initial,
    masks: Any,
    prepare: classification.Prepare,
    train: data.Split,
    validation: data.Split,
    mesh: jax.sharding.Mesh,
) -> tuple[classification.State, dict[str, float]]:
    """Trains what is left of the network; what is cut stays zero."""
    per_epoch = len(train.labels) // config.batch_size
    steps = config.epochs * per_epoch
    rate = optimizers.schedule("linear", config.learning_rate, steps=steps, steps_per_epoch=per_epoch)
    sgd = optax.chain(optax.add_decayed_weights(config.weight_decay), optax.sgd(rate, config.momentum))
    optimizer = keep_masks(masks, sgd)
    params = apply_masks(initial.params, masks)

    def evaluate(state: classification.State, step: int, log: logs.Log) -> dict[str, float]:
        del step, log
        found = classification.measure(
            initial.model, state.variables, validation.images, validation.labels, prepare, mesh
        )
        return {f"validation_{name}": value for name, value in found.items()}

    per_call = config.steps_per_call or max(1, per_epoch // 4)
    every = max(1, per_epoch // per_call) * per_call
    return training.fit(
        own,
        classification.train_step(
            for_steps(initial.model, per_call),
            optimizer,
            prepare,
            augment=classification.crop_and_flip if config.augment else None,
        ),
        classification.State(params, initial.batch_stats, optimizer.init(params), jnp.zeros([], jnp.int32)),
        {"image": train.images, "label": train.labels},
        training.Plan(steps, config.batch_size, per_call, every, every),
        seed=config.seed,
        mesh=mesh,
        evaluate=evaluate,
    )


def empty(record: dict[str, Any]) -> int:
    """How many layers are left without a weight."""
    return sum(kept == 0 for kept in record["kept"].values())


def _content(config: Config, records: list[dict[str, Any]]) -> dict[str, Any]:
    dense = records[0]

    def trace(record: dict[str, Any], name: str) -> float | None:
        spectrum = f"spectrum_{name}"
        return round(100 * sum(record[spectrum]) / sum(dense[spectrum]), 1) if spectrum in record else None

    rows = []
    for record in records:
        accuracy = record.get("test_accuracy")
        layers = record["kept"]
        least = min(layers, key=lambda name: (layers[name], name))
        rows.append(
            [
                TITLES[record["method"]],
                f"{100 * record['sparsity']:g}",
                None if accuracy is None else round(100 * accuracy, 2),
                empty(record),
                f"{layers[least]} in {least}",
                *(trace(record, name) for name in NORMALISED),
                round(record["pruning_seconds"], 1),
            ]
        )
    size = f" at {config.image_size}x{config.image_size}" if config.image_size else ""
    metrics = {
        f"{record['method']}_{record['sparsity']:g}_{name}": value
        for record in records
        for name, value in (("accuracy", record.get("test_accuracy")), ("empty_layers", empty(record)))
        if value is not None
    }
    return {
        "metrics": {
            **metrics,
            "train_seconds": sum(record.get("train_seconds", 0.0) for record in records),
            "records": records,
        },
        "table": {
            "title": f"{config.model} on {config.dataset}{size}, {config.epochs} epoch{'s' * (config.epochs > 1)} each",
            "columns": [
                "criterion",
                "removed, %",
                "test accuracy, %",
                "layers without a weight",
                "fewest weights in a layer",
                *(f"trace of the NTK, % of dense, normalised {title}" for title in NORMALISED.values()),
                "pruning, s",
            ],
            "rows": rows,
        },
        "comparisons": [],  # report E states no measurement
        "figures": FIGURES,
    }


def draw(directory: Path, result: dict[str, Any]) -> None:
    """Draws the figures of a finished run from its result."""
    config, records = result["config"], result["metrics"]["records"]
    title = result["table"]["title"]

    def over_sparsity(method: str, value: Any) -> tuple[list[float], list[float]]:
        found = [record for record in records if record["method"] == method and value(record) is not None]
        found.sort(key=lambda record: -record["sparsity"])
        return [100 * (1 - record["sparsity"]) for record in found], [value(record) for record in found]

    def percent(record: dict[str, Any]) -> float | None:
        return 100 * record["test_accuracy"] if "test_accuracy" in record else None

    plots.curves(
        {TITLES[m]: over_sparsity(m, percent) for m in config["methods"]},
        directory / "accuracy.png",
        title=f"{title}: accuracy of what is left",
        x_label="weights left, %",
        y_label="test accuracy, %",
        levels={"dense": round(percent(records[0]) or 0.0, 2)},
        log_x=True,
        last=False,
    )
    plots.curves(
        {TITLES[m]: over_sparsity(m, empty) for m in config["methods"]},
        directory / "collapse.png",
        title=f"{title}: layer collapse",
        x_label="weights left, %",
        y_label=f"layers without a weight, of {len(records[0]['kept'])}",
        log_x=True,
        last=False,
    )
    shown = {record["method"]: record for record in records if record["sparsity"] == config["spectrum"]}
    plots.matrix(
        {
            name: [100 * shown[m]["kept"][name] / shown[m]["total"][name] for m in config["methods"]]
            for name in _in_order(list(records[0]["kept"]))
        },
        [TITLES[m] for m in config["methods"]],
        directory / "layers.png",
        title=f"{title}: left of each layer, %, where {100 * config['spectrum']:g} % are removed; zero in red",
        x_label="criterion",
        log=True,
    )
    plots.panels(
        {
            f"normalised {normalised}": _spectra([*shown.values(), records[0]], f"spectrum_{name}")
            for name, normalised in NORMALISED.items()
        },
        directory / "spectrum.png",
        title=f"{title}: tangent kernel before training, {100 * config['spectrum']:g} % removed",
        x_label="rank of the eigenvalue",
        y_label="eigenvalue",
        log_x=True,
        log_y=True,
    )


def _spectra(records: list[dict[str, Any]], name: str) -> dict[str, tuple[range, list[float]]]:
    """Title -> ranks and eigenvalues; float32 knows no smaller share of the dense network's largest."""
    floor = 1e-7 * max(records[-1][name])
    return {
        TITLES[record["method"]]: (
            range(1, len(record[name]) + 1),
            [value if value > floor else np.nan for value in record[name]],
        )
        for record in records
    }


def _in_order(layers: list[str]) -> list[str]:
    """Layers from the input on: stem, stages, head; numbers in names as numbers."""

    def place(name: str) -> tuple[bool, bool, list[Any]]:
        pieces = name.replace("_", "/").split("/")
        digits = [int("".join(c for c in piece if c.isdigit()) or 0) for piece in pieces]
        return name.startswith("fc"), name.startswith("stage"), digits

    return sorted(layers, key=place)
