"""Functa: meta-learn a network whose latent, fitted in three gradient steps, is the image.

Reference: Dupont et al. 2022, arXiv:2201.12204; Bauer et al. 2023, arXiv:2302.03130 (grids of latents); report A,
section 1.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import functa_jax as fj
from experiments import data, folder, image_plots, logs, plots, runs, training
from experiments.models.functa import Functa, to_unit
from experiments.published import published
from experiments.runs import Run
from experiments.studies.functa_presets import PRESETS as PRESETS
from experiments.studies.functa_presets import Config as Config

SUMMARY = "Meta-learn a Functa: a modulated SIREN that fits any image of a set in three gradient steps"


def run(config: Config, run: Run) -> dict[str, Any]:
    """Trains, then fits every test image and measures it.

    Returns:
      metrics, table, comparisons and figures for `result.json`.
    """
    mesh = training.data_mesh()
    splits = _images(config, run)
    train = splits["train"][: config.train_images]
    held_out = splits["validation"][: config.validation_images]
    functa = build(config, train.shape[1:], mesh)

    def loss(params: fj.MetaParams, points: Array, targets: Array) -> Array:
        rates = params.rates if config.meta_sgd else jax.lax.stop_gradient(params.rates)
        return functa.loss(
            params._replace(rates=rates),
            points,
            targets,
            second_order=config.second_order,
            inner_loss_weight=config.inner_loss_weight,
        )

    limit = jnp.inf if config.rate_limit is None else config.rate_limit

    def rate_limit(variables: Any, points: Array) -> Array:
        key = jax.random.key(config.seed)  # where the power iteration starts does not matter, as long as it is fixed
        # Enough to see a curvature that runs away, at little cost; a grid needs some in each of its cells.
        enough = 64 if isinstance(config.latent, int) else 4 * config.latent[0] * config.latent[1]
        some = points[:: max(1, len(points) // enough)]
        return limit / fj.curvature(functa.model.apply, variables, some, functa.latent_init, key, iterations=3)

    outer_step = fj.meta_step(
        loss,
        _optimizer(config),
        rate_bounds=(0.0, jnp.inf) if config.meta_sgd else None,
        rate_limit=rate_limit if config.meta_sgd and config.rate_limit is not None else None,
        microbatch=_microbatch(config),
    )

    def step(state: fj.MetaState, batch: training.Batch, key: Array) -> tuple[fj.MetaState, dict[str, Array]]:
        points, targets = functa.coords, to_unit(batch["image"]).reshape(config.batch_size, -1, train.shape[-1])
        if config.points is not None:
            points, targets = fj.subsample(key, points, targets, config.points)
        return outer_step(state, points, targets)

    def evaluate(state: fj.MetaState, step: int, log: logs.Log) -> dict[str, float]:
        latents, errors = functa.fit(state.params, held_out)
        log.images(step, "reconstructions", functa.render(state.params, latents[:8]))
        return {f"validation_{name}": value for name, value in _psnr(errors).items()}

    plan = training.Plan(
        steps=config.steps,
        batch_size=config.batch_size,
        steps_per_call=config.steps_per_call,
        evaluate_every=config.evaluate_every,
        checkpoint_every=config.checkpoint_every,
        host_data=config.host_data,
        evaluate_early=True,
    )
    state, times = training.fit(
        run,
        step,
        initial_state(config, functa),
        {"image": train},
        plan,
        seed=config.seed,
        mesh=mesh,
        evaluate=evaluate,
        best_metric="validation_psnr",
    )
    return _measure(config, run, functa, state.params, held_out, splits["test"], times)


def _images(config: Config, run: Run) -> dict[str, np.ndarray]:
    """The images of each split; those of a folder are of the size asked for, and the same as when the run began."""
    if config.dataset != "folder":
        names = ("train", "validation", "test")
        return {name: data.load(config.dataset, name, data_dir=run.options.data_dir).images for name in names}
    found = folder.load(run.options.data_dir, size=config.image_size, fit=config.fit)
    counts = {name: len(images) for name, images in found.splits.items()}
    say = partial(run.console.print, markup=False, highlight=False, soft_wrap=True)
    say("pictures: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    if found.unreadable:
        say(f"skipped {len(found.unreadable)} that cannot be read:", style="yellow")
        for name, reason in found.unreadable.items():
            say(f"  {name}: {reason}", style="yellow")
    runs.check_unchanged(
        run.directory / "pictures.json", {**counts, "digest": found.digest}, other="other pictures in its folder"
    )
    return found.splits


def _measure(
    config: Config,
    run: Run,
    functa: Functa,
    params: fj.MetaParams,
    held_out: np.ndarray,
    test: np.ndarray,
    times: dict[str, float],
) -> dict[str, Any]:
    """The final numbers, on the test split."""
    latents, errors = functa.fit(params, test)
    log = logs.Log(run.directory, config.steps, enabled=run.first_process)
    log.images(config.steps, "held_out_originals", held_out[:8])
    log.images(config.steps, "test_originals", test[:8])
    log.images(config.steps, "test_reconstructions", functa.render(params, latents[:8]))
    log.images(config.steps, "test_4x", functa.render(params, latents[:8], scale=4))
    log.close()
    metrics = {
        **{f"test_{name}": value for name, value in _psnr(errors).items()},
        "test_images": len(test),
        "latent_size": int(np.prod(functa.latent_shape)),
        "values_per_image": int(np.prod(functa.image_shape)),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params.model)),
        **times,
    }
    rows = [
        ["PSNR, mean of per-image, dB", metrics["test_psnr"]],
        ["PSNR of the mean squared error, dB", metrics["test_psnr_of_mean_mse"]],
        ["test images", metrics["test_images"]],
        ["latent", _latent_name(config.latent)],
        ["values per image", metrics["values_per_image"]],
        ["parameters of the shared network", metrics["parameters"]],
        ["training time, s", round(times["train_seconds"], 1)],
    ]
    return {
        "metrics": metrics,
        "table": {"title": f"{config.dataset}, test split", "columns": ["quantity", "value"], "rows": rows},
        "comparisons": _comparisons(config, metrics["test_psnr"]),
        "figures": ["reconstructions.png", "psnr.png", "phases.png"],
    }


def draw(directory: Path, result: dict[str, Any]) -> None:
    """Draws the figures of a finished run from its logs and result."""
    images = directory / "images.jsonl"
    step = result["config"]["steps"]
    metrics = result["metrics"]
    rows = {
        "original": logs.read_images(images, "test_originals")[step],
        "reconstruction": logs.read_images(images, "test_reconstructions")[step],
        "same latent, 4x": logs.read_images(images, "test_4x")[step],
    }
    title = (
        f"{result['config']['dataset']}: {metrics['values_per_image']} values as a latent of "
        f"{_latent_name(result['config']['latent'])}, "
        f"fitted in {result['config']['inner_steps']} steps; test images, mean {metrics['test_psnr']:.2f} dB"
    )
    image_plots.image_rows(rows, directory / "reconstructions.png", title=title)
    records = logs.read_lines(directory / "metrics.jsonl")
    plots.curves(
        {"PSNR": logs.curve(records, "validation_psnr")},
        directory / "psnr.png",
        title=f"{result['study']} {result['preset']}: held-out images of the train split",
        x_label="outer steps",
        y_label="PSNR, mean of per-image, dB",
        levels={f"report {c['report']}, table {c['table']}": c["published"] for c in result["comparisons"]},
    )
    snapshots = logs.read_images(images, "reconstructions")
    steps = sorted(snapshots)
    evenly = np.geomspace(steps[0], steps[-1], num=6)
    chosen = sorted({min(steps, key=lambda s: abs(np.log(s / at))) for at in evenly})
    originals = {"original": logs.read_images(images, "held_out_originals")[step]}
    image_plots.image_rows(
        {f"step {s}": snapshots[s] for s in chosen} | originals,
        directory / "phases.png",
        title=f"{result['study']} {result['preset']}: the same held-out images during training",
    )


def build(config: Config, image_shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> Functa:
    """The network of a config, with what fitting needs to know."""
    height, width, channels = image_shape
    network: dict[str, Any] = {
        "width": config.width,
        "depth": config.depth,
        "out_features": channels,
        "w0": config.w0,
        "modulate": config.modulate,
        "hidden": config.hidden,
        "modulation_scale": config.modulation_scale,
        "compute_dtype": jnp.bfloat16 if config.matmul == "bfloat16" else None,
    }
    model: fj.ModulatedSiren | fj.SpatialModulatedSiren
    if isinstance(config.latent, int):
        model = fj.ModulatedSiren(**network)
    else:
        model = fj.SpatialModulatedSiren(
            **network,
            interpolation=config.interpolation,
            kernel_size=config.kernel_size,
            coordinates=config.coordinates,
        )
    latent_shape = (config.latent,) if isinstance(config.latent, int) else config.latent
    return Functa(model, (height, width, channels), latent_shape, config.inner_steps, config.rates_per_step, mesh)


def initial_state(config: Config, functa: Functa) -> fj.MetaState:
    """Network, inner rates and optimizer state before the first step."""
    initialise = partial(functa.initialise, rate=config.inner_rate, rate_scale=config.inner_rate_scale)
    variables, rates = jax.jit(initialise)(jax.random.key(config.seed))
    return fj.init_meta(variables, rates, _optimizer(config))


def _microbatch(config: Config) -> int | None:
    if jax.default_backend() != "cpu":
        return None
    return min(config.batch_size, config.microbatch * jax.device_count())


def _psnr(errors: np.ndarray) -> dict[str, float]:
    return {
        "psnr": float(np.mean(fj.psnr_from_mse(errors))),
        "psnr_of_mean_mse": float(fj.psnr_from_mse(np.mean(errors, dtype=np.float64))),
    }


def _latent_name(latent: int | Sequence[int]) -> str:
    return str(latent) if isinstance(latent, int) else "x".join(map(str, latent))


def _comparisons(config: Config, ours: float) -> list[dict[str, Any]]:
    grid = not isinstance(config.latent, int)
    configuration2 = (config.width, config.depth) == (512, 16)
    row = {
        ("mnist", False): (2 if configuration2 else 1, "MNIST"),
        ("cifar10", False): (1, "CIFAR10"),
        ("cifar10", True): (3, "CIFAR10"),
    }.get((config.dataset, grid))
    if row is None:
        return []
    return [
        {
            "quantity": "PSNR on test images, dB",
            "setting": f"{row[1]}, latent {_latent_name(config.latent)}",
            "ours": ours,
            "report": "A",
            "table": 2,
            "published": published("A", 2, row=row, column="PSNR, dB"),
            "published_setting": f"configuration {row[0]}",
            "higher_is_better": True,
            "note": "Ours is the mean of per-image PSNR on [0, 1]; the report does not say which mean it gives.",
        }
    ]


def _optimizer(config: Config) -> optax.GradientTransformation:
    rate: optax.ScalarOrSchedule = config.learning_rate
    if config.schedule == "linear":
        warmup = max(1, config.steps // 20)
        rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
        fall = optax.linear_schedule(config.learning_rate, 0.0, max(1, config.steps - warmup))
        rate = optax.join_schedules([rise, fall], [warmup])
    return optax.adam(rate) if config.updates == "adam" else fj.relative_adam(rate)
