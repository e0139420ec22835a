"""Classify: train a head on the latents of a functaset.

Reference: Dupont et al. 2022, arXiv:2201.12204, section 4.4; report A, section 1.4 and Table 3; report B, section 1.3
and Tables 3-5.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import functa_jax as fj
from experiments import classification, data, logs, plots, runs, training
from experiments.checkpoints import Checkpoints
from experiments.published import published, table
from experiments.runs import Run
from experiments.studies.classify_presets import PRESETS as PRESETS
from experiments.studies.classify_presets import Config
from experiments.studies.functaset import part_name
from functa_jax import functaset

SUMMARY = "Train a classifier on latents, the images themselves never seen"


def run(config: Config, run: Run) -> dict[str, Any]:
    """Trains, takes the state that is best on the validation split, and tests it.

    Returns:
      metrics, table, comparisons and figures for `result.json`.
    """
    directory, of_functaset = runs.finished_run(run.options, "functaset", config.functaset)
    missing = {"validation", "test"} - set(of_functaset["config"]["splits"])
    if missing:
        raise ValueError(f"functaset={config.functaset!r} has no {' and no '.join(sorted(missing))} split")
    inputs, labels = _latents(config, directory, of_functaset["metrics"])
    per_epoch = of_functaset["metrics"]["train_images"] // config.batch_size
    _check(config, per_epoch)
    mesh = training.data_mesh()
    head = _head(config, classes=int(labels["train"].max()) + 1)
    optimizer = _optimizer(config, per_epoch * config.epochs)
    state = classification.initialise(head, optimizer, jnp.asarray(inputs["train"][:1]), jax.random.key(config.seed))

    def accuracy(state: classification.State, split: str) -> float:
        return classification.accuracy(head, state.variables, inputs[split], labels[split], _as_it_is, mesh)

    def evaluate(state: classification.State, step: int, log: logs.Log) -> dict[str, float]:
        del log
        found = {"validation_accuracy": accuracy(state, "validation")}
        if config.curve_every and step % (config.curve_every * per_epoch) == 0:
            found |= {"curve_train_accuracy": accuracy(state, "train"), "curve_test_accuracy": accuracy(state, "test")}
        return found

    plan = training.Plan(
        steps=config.epochs * per_epoch,
        batch_size=config.batch_size,
        steps_per_call=per_epoch,
        evaluate_every=config.evaluate_every * per_epoch,
        checkpoint_every=config.evaluate_every * per_epoch,
    )
    step_fn = classification.train_step(
        head,
        optimizer,
        _as_it_is,
        label_smoothing=config.label_smoothing,
        augment=_noise(config.noise) if config.noise else None,
    )
    state, times = training.fit(
        run,
        step_fn,
        state,
        {"image": inputs["train"], "label": labels["train"]},
        plan,
        seed=config.seed,
        mesh=mesh,
        evaluate=evaluate,
        best_metric="validation_accuracy",
    )
    checkpoints = Checkpoints(run.directory / "checkpoints", best_metric="validation_accuracy")
    try:
        best, state = checkpoints.best(state)
    finally:
        checkpoints.close()
    answers = classification.predict(head, state.variables, inputs["test"], _as_it_is, mesh).argmax(axis=1)
    matrix = np.zeros((head.classes, head.classes), int)
    np.add.at(matrix, (labels["test"], answers), 1)
    metrics = {
        "test_accuracy": float(np.mean(answers == labels["test"])),
        "validation_accuracy": accuracy(state, "validation"),
        "train_accuracy": accuracy(state, "train"),
        "best_epoch": best // per_epoch,
        "steps_per_epoch": per_epoch,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "train_latents": len(inputs["train"]),
        "validation_images": len(inputs["validation"]),
        "test_images": len(inputs["test"]),
        "dataset": of_functaset["metrics"]["dataset"],
        "latent_shape": of_functaset["metrics"]["latent_shape"],
        "reconstruction_psnr": of_functaset["metrics"]["test_psnr"],
        "confusion": matrix.tolist(),
        **times,
    }
    return _content(config, metrics, run.directory)


def _check(config: Config, per_epoch: int) -> None:
    if per_epoch < 1:
        raise ValueError(f"batch_size={config.batch_size} is more than there are train images")
    if config.curve_every is not None and config.curve_every % config.evaluate_every:
        raise ValueError(
            f"curve_every={config.curve_every} is not a multiple of evaluate_every={config.evaluate_every} epochs"
        )
    if config.curve_every is not None and config.table_b is not None:
        epochs = [row[0] for row in table("B", config.table_b).rows]
        if lacking := [e for e in range(config.curve_every, config.epochs + 1, config.curve_every) if e not in epochs]:
            raise ValueError(
                f"curve_every={config.curve_every} and epochs={config.epochs} measure at epochs {lacking}, which table "
                f"{config.table_b} of report B does not have; it has {epochs}"
            )


def _latents(
    config: Config, directory: Path, of_functaset: dict[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Normalised latents and labels by split; those of "train" include the augmented copies."""
    there = len(list(directory.glob("train-*.npz")))
    copies = there if config.copies is None else config.copies
    if not 0 <= copies <= there:
        raise ValueError(f"copies={copies}, but {directory} has {there} augmented copies of the train split")
    names = {
        "train": [part_name("train", i) for i in range(copies + 1)],
        "validation": ["validation"],
        "test": ["test"],
    }
    inputs, labels = {}, {}
    for split, files in names.items():
        parts = [functaset.load(directory / f"{name}.npz", model=of_functaset["model"]) for name in files]
        inputs[split] = np.concatenate([part.normalised for part in parts])
        labels[split] = np.concatenate([part.labels for part in parts])
    return inputs, labels


def _head(config: Config, classes: int) -> fj.MLPHead | fj.ConvHead | fj.ResidualHead:
    if config.head == "mlp":
        activation = {"silu": nn.silu, "relu": nn.relu}[config.activation]
        return fj.MLPHead(classes, config.widths, activation, config.dropout)
    if config.head == "conv":
        return fj.ConvHead(classes, config.widths)
    return fj.ResidualHead(classes, config.widths, dropout=config.dropout, cell_dropout=config.cell_dropout)


def _optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    rate: optax.ScalarOrSchedule = config.learning_rate
    if config.schedule == "cosine":
        rate = optax.cosine_decay_schedule(config.learning_rate, steps)
    if config.optimizer == "adamw":
        return optax.adamw(rate, weight_decay=config.weight_decay)
    return optax.chain(optax.add_decayed_weights(config.weight_decay), optax.adam(rate))


def _as_it_is(latents: Array) -> Array:
    """Latents are normalised when they are loaded."""
    return latents


def _noise(deviation: float) -> Callable[[Array, Array], Array]:
    def add(key: Array, latents: Array) -> Array:
        return latents + deviation * jax.random.normal(key, latents.shape, latents.dtype)

    return add


def _content(config: Config, metrics: dict[str, Any], directory: Path) -> dict[str, Any]:
    size = " x ".join(map(str, metrics["latent_shape"]))
    rows = [
        ["test accuracy, %", round(100 * metrics["test_accuracy"], 2)],
        ["validation accuracy, %", round(100 * metrics["validation_accuracy"], 2)],
        ["train accuracy, %", round(100 * metrics["train_accuracy"], 2)],
        ["best epoch on validation", metrics["best_epoch"]],
        ["test images", metrics["test_images"]],
        ["latents trained on", metrics["train_latents"]],
        ["PSNR of the latents' test images, dB", metrics["reconstruction_psnr"]],
        ["parameters", metrics["parameters"]],
        ["training time, s", round(metrics["train_seconds"], 1)],
    ]
    title = f"{metrics['dataset']} from latents of {size} values, {config.head} head, test split"
    return {
        "metrics": metrics,
        "table": {"title": title, "columns": ["quantity", "value"], "rows": rows},
        "comparisons": [*_beside_a(config, metrics), *_beside_b(config, metrics, directory)],
        "figures": ["accuracy.png", "confusion.png"],
    }


def _beside_a(config: Config, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    grid = len(metrics["latent_shape"]) > 1
    row = {("mnist", False): (1, "MNIST"), ("cifar10", False): (1, "CIFAR10"), ("cifar10", True): (3, "CIFAR10")}.get(
        (metrics["dataset"], grid)
    )
    if row is None or config.table_b is not None:
        return []
    return [
        {
            "quantity": "accuracy on test images, %",
            "setting": f"{row[1]}, latent {'x'.join(map(str, metrics['latent_shape']))}, {config.head} head",
            "ours": 100 * metrics["test_accuracy"],
            "report": "A",
            "table": 3,
            "published": published("A", 3, row=row, column="accuracy, %"),
            "published_setting": f"configuration {row[0]}",
            "higher_is_better": True,
            "note": f"Our latents render the test images with {metrics['reconstruction_psnr']:.2f} dB. "
            "The epoch was chosen on the validation split.",
        }
    ]


def _beside_b(config: Config, metrics: dict[str, Any], directory: Path) -> list[dict[str, Any]]:
    if config.table_b is None:
        return []
    records = logs.read_lines(directory / "metrics.jsonl")
    per_epoch = metrics["steps_per_epoch"]
    found = []
    for kind in ("test", "train"):
        for step, ours in zip(*logs.curve(records, f"curve_{kind}_accuracy"), strict=True):
            epoch = step // per_epoch
            found.append(
                {
                    "quantity": f"{kind} accuracy after {epoch} epochs",
                    "setting": f"CIFAR10, latent {'x'.join(map(str, metrics['latent_shape']))}, widths {config.widths}",
                    "ours": ours,
                    "report": "B",
                    "table": config.table_b,
                    "published": published("B", config.table_b, row=epoch, column=f"{kind} accuracy"),
                    "published_setting": "latent 512",
                    "higher_is_better": True,
                    "note": "Measured at the epochs of the table, which were not chosen by it.",
                }
            )
    return found


def draw(directory: Path, result: dict[str, Any]) -> None:
    """Draws the figures of a finished run from its logs and result."""
    records = logs.read_lines(directory / "metrics.jsonl")
    metrics, config = result["metrics"], result["config"]

    def percent(name: str) -> tuple[list[float], list[float]]:
        steps, values = logs.curve(records, name)
        return [step / metrics["steps_per_epoch"] for step in steps], [100 * value for value in values]

    series = {"training, as it goes": percent("accuracy"), "validation": percent("validation_accuracy")}
    if config["curve_every"]:
        series["test"] = percent("curve_test_accuracy")
    levels = {}
    if config["table_b"] is None:
        levels = {f"report {c['report']}, table {c['table']}": c["published"] for c in result["comparisons"]}
    size = " x ".join(map(str, metrics["latent_shape"]))
    plots.curves(
        series,
        directory / "accuracy.png",
        title=f"{metrics['dataset']} from latents of {size} values; {100 * metrics['test_accuracy']:.2f} % on test",
        x_label="epochs",
        y_label="accuracy, %",
        levels=levels,
    )
    names = [data.class_name(metrics["dataset"], label) for label in range(len(metrics["confusion"]))]
    plots.confusion(
        np.array(metrics["confusion"]),
        names,
        directory / "confusion.png",
        title=f"{metrics['dataset']}: {metrics['test_images']} test images by their latents, in %",
    )
