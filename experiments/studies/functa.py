"""Functa: meta-learn a network whose latent, fitted in three gradient steps, is the image.

Reference: Dupont et al. 2022, arXiv:2201.12204; report A, section 1 (its configurations 1 and 2).
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import functa_jax as fj
from experiments import data, logs, plots, training
from experiments.config import Preset
from experiments.models.functa import Functa, to_unit
from experiments.published import published
from experiments.runs import Run

SUMMARY = "Meta-learn a Functa: a modulated SIREN that fits any image of a set in three gradient steps"


@dataclass(frozen=True)
class Config:
    """What decides the result of a run.

    Attributes:
      dataset: name of a data set (see `data list`).
      seed: of initialisation, data order and subsampling.
      train_images: how many images of the train split to use; None: all.
      width: units in each hidden layer.
      depth: number of linear layers, the output layer included.
      latent: size of the latent.
      w0: frequency factor of the sines.
      modulate: what the latent does to each layer.
      hidden: hidden widths of the latent-to-modulation MLP; () is a linear map.
      modulation_scale: factor on the initialisation of that map.
      inner_steps: gradient steps to fit a latent.
      inner_rate: rate of the inner steps; None: `inner_rate_scale` / curvature of the inner loss at the start.
      inner_rate_scale: see inner_rate; below 2 the first steps are stable whatever the network's size.
      rate_limit: learned rates are kept below this / curvature of the network as it is; None: no limit.
      meta_sgd: learn a rate for each dimension of the latent.
      rates_per_step: learn them for each inner step.
      second_order: differentiate through the inner gradients.
      inner_loss_weight: weight of report A's extra meta-loss term.
      updates: "relative" scales outer updates to the weights they change (stable at every size); "adam" is plain Adam.
      learning_rate: of the outer loop; a fraction of each weight's size a step for "relative".
      schedule: of the outer learning rate; "linear" warms up over a twentieth of the steps and decays to zero.
      points: random pixels of each image a step; None: all of them.
      batch_size: images a step.
      microbatch: images whose gradient is computed at once on a CPU, for its cache; accelerators take the whole batch.
      matmul: dtype of the big matrix products; sines and parameters stay float32.
      steps: outer steps.
      steps_per_call: steps in one call of the compiled loop.
      evaluate_every: steps between evaluations on held-out images of the train split.
      checkpoint_every: steps between checkpoints.
      validation_images: images of each evaluation.
      host_data: feed batches from the host, for a set that does not fit on the device.
    """

    dataset: str = "mnist"
    seed: int = 0
    train_images: int | None = None
    width: int = 256
    depth: int = 6
    latent: int = 256
    w0: float = 30.0
    modulate: Literal["shift", "scale", "both"] = "shift"
    hidden: tuple[int, ...] = ()
    modulation_scale: float = 1.0
    inner_steps: int = 3
    inner_rate: float | None = None
    inner_rate_scale: float = 1.4
    rate_limit: float | None = 8.0
    meta_sgd: bool = True
    rates_per_step: bool = False
    second_order: bool = True
    inner_loss_weight: float = 0.0
    updates: Literal["relative", "adam"] = "relative"
    learning_rate: float = 0.04
    schedule: Literal["constant", "linear"] = "linear"
    points: int | None = None
    batch_size: int = 16
    microbatch: int = 2
    matmul: Literal["float32", "bfloat16"] = "float32"
    steps: int = 1000
    steps_per_call: int = 20
    evaluate_every: int = 200
    checkpoint_every: int = 200
    validation_images: int = 512
    host_data: bool = False


# Stable on every network size tried; see `functa_jax.relative_adam` and `rate_limit` for why.
_SMALL = Config(
    width=64,
    depth=4,
    latent=256,
    w0=10.0,
    modulate="both",
    modulation_scale=0.4,
    rates_per_step=True,
    points=392,
    batch_size=4,
    microbatch=4,
    steps=3_000,
    steps_per_call=50,
    evaluate_every=200,
    checkpoint_every=200,
    validation_images=256,
)
# Report A's code: first order, with the mean of the inner losses added.
_A1 = Config(
    width=256,
    depth=6,
    latent=256,
    w0=30.0,
    inner_rate=0.01,
    rate_limit=None,
    meta_sgd=False,
    second_order=False,
    inner_loss_weight=1.0,
    updates="adam",
    learning_rate=3e-5,
    schedule="constant",
    batch_size=128,
    steps=200_000,
    steps_per_call=50,
    evaluate_every=5_000,
    checkpoint_every=1_000,
)
_A2 = replace(_A1, width=512, depth=16, latent=512, meta_sgd=True, learning_rate=3e-6, batch_size=32)

PRESETS = {
    "digits": Preset(
        replace(
            _SMALL,
            dataset="digits",
            width=48,
            depth=3,
            latent=16,
            points=None,
            batch_size=16,
            microbatch=16,
            steps=8_000,
        ),
        "scikit-learn's handwritten digits, 8x8; needs no download",
        "1 min on two CPU cores",
        "24 dB with a latent a quarter of the image",
    ),
    "mnist-small": Preset(
        _SMALL,
        "MNIST with a net of width 64",
        "2 min on two CPU cores, one of them training",
        "25.4 dB on the test images (report A: 21.37)",
    ),
    "mnist-medium": Preset(
        replace(_SMALL, width=96, steps=20_000, evaluate_every=1_000, checkpoint_every=500),
        "MNIST with a net of width 96",
        "10 min on two CPU cores",
        "29.6 dB on the test images (report A: 21.37)",
    ),
    "mnist-large": Preset(
        replace(_SMALL, width=96, steps=32_000, evaluate_every=1_000, checkpoint_every=500),
        "MNIST with a net of width 96, trained longer than mnist-medium",
        "20 min on one CPU core",
        "30.5 dB on the test images (report A: 21.37)",
    ),
    "mnist-half": Preset(
        replace(_SMALL, train_images=27_000, steps=5_000, evaluate_every=500, checkpoint_every=500),
        "MNIST, half of the training images: for fitting images of another kind (report A: 18.97 dB)",
        "4 min on one CPU core",
        "26.5 dB on the test images",
    ),
    "mnist-c1": Preset(
        _A1,
        "report A's configuration 1: width 256, depth 6, SGD inside, first order",
        "hours on a GPU, days on two CPU cores (not run here)",
        "report A: 21.37 dB",
    ),
    "mnist-c2": Preset(
        _A2,
        "report A's configuration 2: width 512, depth 16, meta-SGD, first order",
        "about a day on a GPU (not run here)",
        "report A: 19.36 dB",
    ),
    "cifar10-c1": Preset(
        replace(_A1, dataset="cifar10", steps=300_000),
        "report A's configuration 1 on CIFAR-10",
        "hours on a GPU (not run here)",
        "report A: 20.25 dB",
    ),
    "tiny": Preset(
        replace(
            _SMALL,
            dataset="digits",
            width=16,
            depth=3,
            latent=8,
            points=None,
            batch_size=8,
            steps=60,
            steps_per_call=5,
            evaluate_every=20,
            checkpoint_every=10,
            validation_images=16,
        ),
        "to try the machinery: all it does, on a net too small to be of use",
        "20 s on two CPU cores, most of it compilation",
        "nothing worth a look",
    ),
}


def run(config: Config, run: Run) -> dict[str, Any]:
    """Trains, then fits every test image and measures it.

    Returns:
      metrics, table, comparisons and figures for `result.json`.
    """
    mesh = training.data_mesh()
    train = data.load(config.dataset, "train", data_dir=run.options.data_dir).images[: config.train_images]
    held_out = data.load(config.dataset, "validation", data_dir=run.options.data_dir).images[: config.validation_images]
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
        some = points[:: max(1, len(points) // 64)]  # enough to see a curvature that runs away, at little cost
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
    return _measure(config, run, functa, state.params, held_out, times)


def _measure(
    config: Config,
    run: Run,
    functa: Functa,
    params: fj.MetaParams,
    held_out: np.ndarray,
    times: dict[str, float],
) -> dict[str, Any]:
    """The final numbers, on the test split."""
    test = data.load(config.dataset, "test", data_dir=run.options.data_dir).images
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
        "latent_size": config.latent,
        "values_per_image": int(np.prod(functa.image_shape)),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params.model)),
        **times,
    }
    rows = [
        ["PSNR, mean of per-image, dB", metrics["test_psnr"]],
        ["PSNR of the mean squared error, dB", metrics["test_psnr_of_mean_mse"]],
        ["test images", metrics["test_images"]],
        ["latent size", metrics["latent_size"]],
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
        f"{result['config']['dataset']}: {metrics['values_per_image']} values as a latent of {metrics['latent_size']}, "
        f"fitted in {result['config']['inner_steps']} steps; test images, mean {metrics['test_psnr']:.2f} dB"
    )
    plots.image_rows(rows, directory / "reconstructions.png", title=title)
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
    chosen = sorted({steps[round(i)] for i in np.geomspace(1, len(steps), num=min(6, len(steps))) - 1})
    originals = {"original": logs.read_images(images, "held_out_originals")[step]}
    plots.image_rows(
        {f"step {s}": snapshots[s] for s in chosen} | originals,
        directory / "phases.png",
        title=f"{result['study']} {result['preset']}: the same held-out images during training",
    )


def build(config: Config, image_shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> Functa:
    """The network of a config, with what fitting needs to know."""
    height, width, channels = image_shape
    model = fj.ModulatedSiren(
        width=config.width,
        depth=config.depth,
        out_features=channels,
        w0=config.w0,
        modulate=config.modulate,
        hidden=config.hidden,
        modulation_scale=config.modulation_scale,
        compute_dtype=jnp.bfloat16 if config.matmul == "bfloat16" else None,
    )
    return Functa(model, (height, width, channels), config.latent, config.inner_steps, config.rates_per_step, mesh)


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


def _comparisons(config: Config, ours: float) -> list[dict[str, Any]]:
    rows = {"mnist": (1, "MNIST"), "cifar10": (1, "CIFAR10")}
    if config.dataset not in rows:
        return []
    row = rows[config.dataset]
    configuration2 = config.dataset == "mnist" and (config.width, config.depth) == (_A2.width, _A2.depth)
    row = (2, "MNIST") if configuration2 else row
    return [
        {
            "quantity": "PSNR on test images, dB",
            "setting": f"{row[1]}, latent {config.latent}",
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
