"""ViT and Swin on CIFAR: trained from scratch, or fine-tuned from a published checkpoint; what pruning starts from.

References: Dosovitskiy et al. 2021, arXiv:2010.11929; Liu et al. 2021, arXiv:2103.14030; report A, section 2.6.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import classification, data, logs, optimizers, plots, training
from experiments.classification import State
from experiments.published import published
from experiments.runs import Run
from experiments.studies.vit_presets import PRESETS as PRESETS
from experiments.studies.vit_presets import Config
from experiments.training import PyTree
from prune_jax import count_parameters, flops
from prune_jax.models import Swin, ViT, load_weights
from prune_jax.models import swin as published_swin
from prune_jax.models import vit as published_vit

SUMMARY = "Train a ViT or a Swin, or fine-tune a published one: the base that the pruning studies start from"
SPLITS = ("train", "validation", "test")


def run(config: Config, run: Run) -> dict[str, Any]:
    """Trains and tests; returns metrics, table, comparisons and figures for `result.json`."""
    train, validation, test = data.load_splits(config.dataset, images=config.images, data_dir=run.options.data_dir)
    model = build(config, train)
    check(config, len(train.labels))
    optimizer, mesh = make_optimizer(config, len(train.labels)), training.data_mesh()
    prepare = make_prepare(config, train)

    def measure(state: State, split: data.Split) -> dict[str, float]:
        images, labels = split.images, split.labels
        return classification.measure(model, {"params": final_params(config, state)}, images, labels, prepare, mesh)

    def evaluate(state: State, step: int, log: logs.Log) -> dict[str, float]:
        del step, log
        return {f"validation_{name}": value for name, value in measure(state, validation).items()}

    per_epoch = len(train.labels) // config.batch_size
    per_call = max(1, per_epoch // 4)
    plan = training.Plan(
        steps=config.epochs * per_epoch,
        batch_size=config.batch_size,
        steps_per_call=per_call,
        evaluate_every=4 * per_call,
        checkpoint_every=4 * per_call,
    )
    step = classification.train_step(
        model,
        optimizer,
        prepare,
        label_smoothing=config.label_smoothing,
        augment=classification.crop_and_flip if config.augment else None,
        mix=partial(classification.cutmix, alpha=config.cutmix) if config.cutmix else None,
    )
    state, times = training.fit(
        run,
        step,
        initial_state(config, model, optimizer, train),
        {"image": train.images, "label": train.labels},
        plan,
        seed=config.seed,
        mesh=mesh,
        evaluate=evaluate,
    )
    found = {name: measure(state, split) for name, split in zip(SPLITS, (train, validation, test), strict=True)}
    params = final_params(config, state)
    metrics: dict[str, Any] = {
        **{f"{split}_{name}": value for split, values in found.items() for name, value in values.items()},
        "parameters": count_parameters(params),
        "flops": flops(model.apply, {"params": params}, prepare(jnp.asarray(train.images[:1]))),
        "test_images": len(test.labels),
        "steps_per_epoch": per_epoch,
        **times,
    }
    return _content(config, metrics)


def build(config: Config, train: data.Split) -> ViT | Swin:
    """The module of a config, for the classes of a train split."""
    classes = int(train.labels.max()) + 1
    dtype = None if config.compute_dtype == "float32" else config.compute_dtype
    common: dict[str, Any] = {"num_classes": classes, "drop_path": config.drop_path, "compute_dtype": dtype}
    size = config.image_size or train.images.shape[1]
    if config.size is not None and config.model == "swin":
        return published_swin(config.size, **common)
    if config.size is not None:
        # the published base checkpoints of ViT come from Google, whose GELU is the tanh form
        gelu = "tanh" if config.weights.endswith(".npz") else "exact"
        return published_vit(config.size, image_size=size, patch=config.patch, gelu=gelu, **common)
    if config.model == "swin":
        return Swin(
            **common,
            patch=config.patch,
            window=config.window,
            width=config.width,
            depths=config.depths,
            heads=config.swin_heads,
        )
    return ViT(
        **common, image_size=size, patch=config.patch, width=config.width, depth=config.depth, heads=config.heads
    )


def check(config: Config, examples: int) -> None:
    """Refuses, before any training, numbers that make no sense.

    Raises:
      ValueError: names the field, its value and what would be right.
      FileNotFoundError: there is no file of weights.
    """
    if config.epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {config.epochs}")
    if not 1 <= config.batch_size <= examples:
        raise ValueError(f"batch_size must be from 1 to the {examples} train images, got {config.batch_size}")
    if not 0 <= config.average < 1:
        raise ValueError(f"average must be in [0, 1), got {config.average}")
    if config.weights and not Path(config.weights).is_file():
        raise FileNotFoundError(f"weights={config.weights!r} is no file; give the path of a published checkpoint")
    if config.weights and config.size is None:
        raise ValueError(f"weights={config.weights!r} needs size, the published size of that model")


def make_prepare(config: Config, train: data.Split) -> classification.Prepare:
    """Brings uint8 images to what the model takes: standardised, and of the size asked for."""
    standardise = classification.standardise(train.images)
    size = config.image_size
    if size is None or size == train.images.shape[1]:
        return standardise

    def resized(images: jax.Array) -> jax.Array:
        shape = (images.shape[0], size, size, images.shape[3])
        return jax.image.resize(standardise(images), shape, "bicubic")

    return resized


def make_optimizer(config: Config, examples: int) -> optax.GradientTransformation:
    """AdamW; the rate rises over the warm-up and falls to zero by a cosine. Biases and norms are not decayed."""
    steps = config.epochs * (examples // config.batch_size)
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, max(1, round(config.warmup * steps)), steps)
    adamw = optimizers.adamw(rate, config.weight_decay)
    return optimizers.averaging(adamw, config.average) if config.average else adamw


def initial_state(
    config: Config, model: ViT | Swin, optimizer: optax.GradientTransformation, train: data.Split
) -> State:
    """What training starts from: random parameters, or a published checkpoint with a head of zeros."""
    image = make_prepare(config, train)(jnp.asarray(train.images[:1]))
    state = classification.initialise(model, optimizer, image, jax.random.key(config.seed))
    if not config.weights:
        return state
    params = load_weights(model, config.weights, head="zeros")["params"]
    return state._replace(params=params, opt_state=optimizer.init(params))


def final_params(config: Config, state: State) -> PyTree:
    """The parameters to use: their moving average, where the config keeps one."""
    return optimizers.average_of(state.opt_state) if config.average else state.params


def _content(config: Config, metrics: dict[str, Any]) -> dict[str, Any]:
    percents = [
        (f"{split} {name}, %", f"{split}_{key}")
        for split in ("test", "validation", "train")
        for name, key in (("accuracy", "accuracy"), ("top-5 accuracy", "top5_accuracy"))
    ]
    rows = [[title, round(100 * metrics[key], 2)] for title, key in percents]
    rows += [
        ["parameters, M", round(metrics["parameters"] / 1e6, 3)],
        ["GFLOP an image, forward", round(metrics["flops"] / 1e9, 4)],
        ["test images", metrics["test_images"]],
        ["training time, s", round(metrics["train_seconds"], 1)],
    ]
    name = f"{config.model} {config.size}" if config.size else f"small {config.model}"
    return {
        "metrics": metrics,
        "table": {"title": f"{name} on {config.dataset}", "columns": ["quantity", "value"], "rows": rows},
        "comparisons": _comparisons(config, metrics),
        "figures": ["training.png"],
    }


def _comparisons(config: Config, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    if config.dataset != "cifar10" or config.model != "vit":
        return []
    note = "The report fine-tunes ViT-B/16, which has seen ImageNet-21k"
    return [
        {
            "quantity": "accuracy on CIFAR-10's test images, %",
            "setting": "fine-tuned from a published checkpoint" if config.weights else "trained from scratch",
            "ours": 100 * metrics["test_accuracy"],
            "report": "A",
            "table": 5,
            "published": published("A", 5, row="base", column="accuracy, %"),
            "published_setting": "ViT-B/16, 224 px",
            "higher_is_better": True,
            "note": note + ("." if config.weights else "; ours has seen CIFAR-10 alone."),
        }
    ]


def draw(directory: Path, result: dict[str, Any]) -> None:
    """Draws the figure of a finished run from its logs and result."""
    records = logs.read_lines(directory / "metrics.jsonl")
    per_epoch = result["metrics"]["steps_per_epoch"]

    def percent(name: str) -> tuple[list[float], list[float]]:
        steps, values = logs.curve(records, name)
        return [step / per_epoch for step in steps], [100 * value for value in values]

    config, accuracy = result["config"], 100 * result["metrics"]["test_accuracy"]
    plots.curves(
        {
            "training, augmented" if config["augment"] else "training": percent("accuracy"),
            "validation": percent("validation_accuracy"),
        },
        directory / "training.png",
        title=f"{result['table']['title']}: {config['epochs']} epochs; {accuracy:.2f} % on test",
        x_label="epochs",
        y_label="accuracy, %",
    )
