"""What batch normalisation does to the loss around the weights: VGG-A with and without it, probed while it trains.

Reference: Santurkar et al. 2018, arXiv:1805.11604, section 3.2; report A, sections 3.1-3.2; report B, sections 3.1-3.2.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments import data, logs, plots, training
from experiments.classification import Prepare, State, initialise, standardise, train_step
from experiments.config import Preset
from experiments.models.vgg import VGG, vgg_a
from experiments.runs import Run
from optim_jax import probe_gradients
from optim_jax.penalties import leaf_name

SUMMARY = "VGG-A with and without batch normalisation: loss landscape, gradient predictiveness and effective beta"

NETS = {"plain": "without BN", "bn": "with BN"}
# Of the last layer, as the reports have it; `path_change` says what they are.
ENVELOPES = {
    "loss": "training loss",
    "gradient_change": "last layer: change of the gradient",
    "path_beta": "the same per change of the weights",
}


@dataclass(frozen=True)
class Config:
    """A study's settings.

    Attributes:
      dataset: images to classify.
      width: factor on the channels of VGG-A and on the units of its dense layers.
      blocks: convolution blocks of VGG-A, each ending in a pooling; 5 for images of 32x32.
      learning_rates: one run of each network for each rate, by Adam; the reports name the rates and no optimizer.
      batch_size: images a step, and in the probe.
      steps: training steps of each run.
      steps_per_call: steps in one compiled call; the loss is logged as the mean over them.
      probe_every: steps between two probes.
      step_sizes: step sizes eta of the probe, along the gradient: w - eta * gradient. The same for all networks and
        rates, so that the curves compare.
      seed: of the parameters and of the order of the images.
    """

    dataset: str = "cifar10"
    width: float = 1.0
    blocks: int = 5
    learning_rates: tuple[float, ...] = (2e-3, 1e-3, 5e-4, 3e-4, 1e-4)
    batch_size: int = 128
    steps: int = 7000
    steps_per_call: int = 50
    probe_every: int = 50
    step_sizes: tuple[float, ...] = (0.0125, 0.025, 0.05, 0.1)
    seed: int = 0


PRESETS = {
    "vgg-a": Preset(
        Config(),
        "VGG-A on CIFAR-10 for 20 epochs, at the learning rates of both reports",
        "for an accelerator, where it was not measured; about two days on two CPU cores",
        "bands of the network with BN narrower than those of the one without",
    ),
    "vgg-a-cpu": Preset(
        Config(width=0.5, batch_size=64, steps=150, steps_per_call=5, probe_every=10),
        "VGG-A of half the width, the first 150 steps at the learning rates of both reports",
        "20 min on one CPU core",
        "bands of the network with BN narrower than those of the one without",
    ),
    "tiny": Preset(
        Config(
            dataset="digits",
            width=1 / 16,
            blocks=3,
            learning_rates=(2e-3, 5e-4),
            batch_size=32,
            steps=6,
            steps_per_call=1,
            probe_every=2,
        ),
        "to try the machinery: all it does, too short to be of use",
        "1 min on two CPU cores, most of it compilation",
        "nothing worth a look",
    ),
}


def run(config: Config, run: Run) -> dict[str, Any]:
    """Trains and probes both networks at every rate, one run after the other, each in its folder.

    Returns:
      metrics, table, comparisons and figures for `result.json`.
    """
    train = data.load(config.dataset, "train", data_dir=run.options.data_dir)
    prepare = standardise(train.images)
    batch = {"image": train.images[: config.batch_size], "label": train.labels[: config.batch_size]}
    mesh = training.data_mesh()
    seconds = dict.fromkeys(NETS, 0.0)
    for net in NETS:
        model = network(config, norm=net == "bn", classes=int(train.labels.max()) + 1)
        probe = prober(model, prepare, batch, config)
        for rate in config.learning_rates:
            optimizer = optax.chain(path_change("fc3"), optax.inject_hyperparams(optax.adam)(rate))
            _, times = training.fit(
                dataclasses.replace(run, directory=run.directory / arm(net, rate)),
                train_step(model, optimizer, prepare, watch=last_change),
                initialise(model, optimizer, prepare(jnp.asarray(train.images[:1])), jax.random.key(config.seed)),
                {"image": train.images, "label": train.labels},
                training.Plan(
                    steps=config.steps,
                    batch_size=config.batch_size,
                    steps_per_call=config.steps_per_call,
                    evaluate_every=config.probe_every,
                    checkpoint_every=config.probe_every,
                ),
                seed=config.seed,
                mesh=mesh,
                evaluate=probe,
            )
            seconds[net] += times["train_seconds"]
    return summary(config, run.directory, seconds)


def draw(directory: Path, result: dict[str, Any]) -> None:
    """Draws the figures of a finished run from its logs."""
    rates = result["config"]["learning_rates"]
    records = {
        (net, rate): logs.read_lines(directory / arm(net, rate) / "metrics.jsonl") for net in NETS for rate in rates
    }
    sizes = result["config"]["step_sizes"]
    subject = f"VGG-A, {result['config']['dataset']}"
    where = f"on one batch, at {len(sizes)} step sizes {sizes[0]:g} to {sizes[-1]:g} along the gradient"
    for figure, quantity, title, label in (
        ("landscape.png", "loss", "Loss landscape: smallest to largest loss", "loss"),
        ("predictiveness.png", "distance", "Gradient predictiveness: distance to the gradient", "gradient distance"),
        ("beta.png", "beta", "Effective beta-smoothness, the upper edge", "gradient distance / distance moved"),
    ):
        plots.bands(
            {
                f"learning rate {rate:g}": {
                    name: (
                        *logs.curve(records[net, rate], f"{quantity}_low"),
                        _values(records[net, rate], f"{quantity}_high"),
                    )
                    for net, name in NETS.items()
                }
                for rate in rates
            },
            directory / figure,
            title=f"{subject}. {title}, {where}",
            x_label="training steps",
            y_label=label,
            log=True,
        )
    every = result["config"]["steps_per_call"]
    each = "step" if every == 1 else f"{every} steps, in the mean over them,"
    plots.bands(
        {
            panel: {name: envelope([records[net, rate] for rate in rates], metric) for net, name in NETS.items()}
            for metric, panel in ENVELOPES.items()
        },
        directory / "envelope.png",
        title=f"{subject}. Envelope over runs at learning rates {', '.join(f'{rate:g}' for rate in rates)}",
        x_label="training steps",
        y_label="least and greatest over the runs",
        log=True,
        share_y=False,
        caption=f"Every {each} the least and the greatest value over the runs, as the reports draw it: how much the "
        "learning rate matters, not how smooth the loss is at one point. Change and beta are between successive "
        "steps, each on its own batch; the first step, which has none before it, is left out.",
    )


def network(config: Config, *, norm: bool, classes: int) -> VGG:
    """VGG-A, scaled as the config says."""
    whole = vgg_a(config.width, classes=classes, norm=norm)
    return whole.clone(configuration=whole.configuration[: config.blocks])


def arm(net: str, rate: float) -> str:
    """Folder of one network's run at one learning rate."""
    return f"{net}-{rate:g}"


def prober(
    model: VGG, prepare: Prepare, batch: Mapping[str, np.ndarray], config: Config
) -> Callable[[State, int, logs.Log], dict[str, float]]:
    """What `training.fit` calls now and then: probes the loss at the present weights, always on the same batch."""
    inputs, labels = prepare(jnp.asarray(batch["image"])), jnp.asarray(batch["label"])
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs, train=False))
    # Training mode normalises by the batch and does not read the running statistics: any will do.
    stats = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes.get("batch_stats", {}))

    def loss(params: Any, batch: tuple[Array, Array]) -> Array:
        variables = {"params": params, "batch_stats": stats}
        logits, _ = model.apply(variables, batch[0], train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def probe(state: State, step: int, log: logs.Log) -> dict[str, float]:
        begun = time.monotonic()
        found = jax.device_get(probe_gradients(loss, state.params, (inputs, labels), config.step_sizes))
        ranges = {"loss": found.loss, "distance": found.gradient_distance, "beta": found.beta}
        return {
            "probe_loss": float(found.start_loss),
            "probe_seconds": time.monotonic() - begun,
            "gradient_norm": float(found.gradient_norm),
            **{f"{name}_low": float(values.min()) for name, values in ranges.items()},
            **{f"{name}_high": float(values.max()) for name, values in ranges.items()},
        }

    return probe


class PathChange(NamedTuple):
    """State of `path_change`: steps taken, one layer's gradient and kernel at the last, and what changed since.

    `gradient` and `weights` are trees like the parameters, None at all other leaves, in float32 at least.
    """

    steps: Array
    gradient: Any
    weights: Any
    gradient_change: Array
    path_beta: Array


def path_change(layer: str) -> optax.GradientTransformationExtraArgs:
    """Watches how one layer's gradient changes from step to step, as the reports measure smoothness.

    `gradient_change` is the 2-norm of the change (report B, section 3.1), `path_beta` that over the 2-norm of the
    weights' own change (section 3.2). Both are 0 at the first step, which has none before it, and `path_beta` where
    the weights stood still. Updates pass as they are.

    Raises:
      ValueError: from `init`, if the parameters have no kernel of that layer; from `update` without parameters.
    """

    def watched(tree: Any) -> Any:
        def kernel(path: Any, leaf: Array) -> Array | None:
            chosen = leaf_name(path) == f"{layer}/kernel"
            return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) if chosen else None

        return jax.tree.map_with_path(kernel, tree)

    def init(params: optax.Params) -> PathChange:
        weights = jax.tree.map(jnp.copy, watched(params))  # a copy, lest one buffer be donated twice
        if jax.tree.leaves(params) and not jax.tree.leaves(weights):
            names = [leaf_name(path) for path, _ in jax.tree.leaves_with_path(params)]
            raise ValueError(f"layer {layer!r} has no kernel among the parameters {names}")
        zero = jnp.zeros([], jnp.float32)
        return PathChange(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, weights), weights, zero, zero)

    def update(
        updates: optax.Updates, state: PathChange, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, PathChange]:
        del extra_args
        if params is None:
            raise ValueError("path_change needs the parameters: call update(updates, state, params)")
        gradient, weights = watched(updates), watched(params)
        change, moved = (
            optax.tree.norm(optax.tree.sub(new, old))
            for new, old in ((gradient, state.gradient), (weights, state.weights))
        )
        change = jnp.where(state.steps > 0, change, 0)
        beta = jnp.where(moved == 0, 0, change / jnp.where(moved == 0, 1, moved))
        steps = optax.safe_increment(state.steps)
        return updates, PathChange(steps, gradient, weights, change.astype(jnp.float32), beta.astype(jnp.float32))

    return optax.GradientTransformationExtraArgs(init, update)


def last_change(state: State) -> dict[str, Array]:
    """What `path_change` saw in the last step."""
    return {name: optax.tree.get(state.opt_state, name) for name in ("gradient_change", "path_beta")}


def envelope(runs: list[list[dict[str, Any]]], metric: str) -> tuple[list[int], list[float], list[float]]:
    """Steps, and the least and greatest value of a metric over the runs at each of them, from the second record on.

    The first is left out because it holds the first step, which has no gradient before it.
    """
    steps = logs.curve(runs[0], metric)[0]
    values = np.array([_values(records, metric) for records in runs])
    return steps[1:], values.min(0)[1:].tolist(), values.max(0)[1:].tolist()


def summary(config: Config, directory: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """The result: what the bands' widths and heights are, without BN and with it."""
    records = {
        net: [logs.read_lines(directory / arm(net, rate) / "metrics.jsonl") for rate in config.learning_rates]
        for net in NETS
    }

    def probed(net: str, name: str) -> np.ndarray:
        return np.concatenate([_values(run, name) for run in records[net]])

    def width(net: str, name: str) -> np.ndarray:
        return probed(net, f"{name}_high") - probed(net, f"{name}_low")

    def spread(net: str, metric: str) -> np.ndarray:
        _, low, high = envelope(records[net], metric)
        return np.subtract(high, low)

    measured = {
        "loss_range": ("width of the loss's range", lambda net: width(net, "loss")),
        "distance_range": ("width of the gradient distance's range", lambda net: width(net, "distance")),
        "distance": ("largest gradient distance", lambda net: probed(net, "distance_high")),
        "beta_range": ("width of beta's range", lambda net: width(net, "beta")),
        "effective_beta": ("effective beta", lambda net: probed(net, "beta_high")),
        "envelope_loss": ("envelope over rates: width, training loss", lambda net: spread(net, "loss")),
        "envelope_change": ("envelope over rates: width, gradient change", lambda net: spread(net, "gradient_change")),
        "envelope_beta": ("envelope over rates: width, beta along the path", lambda net: spread(net, "path_beta")),
    }
    metrics: dict[str, Any] = {"train_seconds": sum(seconds.values())}
    rows: list[list[Any]] = []
    for name, (title, of) in measured.items():
        plain, bn = of("plain"), of("bn")
        medians = {net: float(np.median(values)) for net, values in (("plain", plain), ("bn", bn))}
        metrics |= {f"{name}_{net}": median for net, median in medians.items()}
        metrics[f"{name}_smaller_with_bn"] = smaller = float(np.mean(bn < plain))
        rows.append([title, *medians.values(), medians["plain"] / medians["bn"], f"{smaller:.0%} of {len(bn)}"])
    for index, rate in enumerate(config.learning_rates):
        last = {net: _values(records[net][index], "loss")[-1] for net in NETS}
        metrics |= {f"final_loss_{arm(net, rate)}": value for net, value in last.items()}
        rows.append([f"training loss at the end, rate {rate:g}", *last.values(), last["plain"] / last["bn"], None])
    steps = len(config.learning_rates) * config.steps
    cost = {net: float(np.median(probed(net, "probe_seconds"))) / (seconds[net] / steps) for net in NETS}
    metrics |= {f"steps_per_probe_{net}": value for net, value in cost.items()}
    rows.append(["time of a probe, in training steps", *cost.values(), None, None])
    return {
        "metrics": metrics,
        "table": {
            "title": f"{config.dataset}: medians over probes, all rates together",
            "columns": ["quantity", *NETS.values(), "ratio", "smaller with BN at"],
            "rows": rows,
        },
        "comparisons": [],  # the reports give figures only
        "figures": ["landscape.png", "predictiveness.png", "beta.png", "envelope.png"],
    }


def _values(records: list[dict[str, Any]], metric: str) -> list[float]:
    return logs.curve(records, metric)[1]
