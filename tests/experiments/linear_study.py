"""A study that takes no time, a noisy linear regression, for the tests of the machinery; `python linear_study.py` is
the command line with this study in it."""

import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from experiments import config, training
from experiments.config import Preset

SUMMARY = "Fit a line"


@dataclass(frozen=True)
class Config:
    """What decides the result.

    Attributes:
      seed: of everything.
      examples: number of them.
      features: inputs of the line; the state has as many values.
      steps: all of them.
      batch_size: examples a step.
      steps_per_call: in one compiled loop.
      evaluate_every: in steps.
      checkpoint_every: in steps.
      host_data: batches from the host.
      nan_at: step at which the loss is NaN.
    """

    seed: int = 0
    examples: int = 22
    features: int = 5
    steps: int = 40
    batch_size: int = 4
    steps_per_call: int = 5
    evaluate_every: int = 20
    checkpoint_every: int = 10
    host_data: bool = False
    nan_at: int | None = None


PRESETS = {"tiny": Preset(Config(), "no time at all", "no time", "a line")}


def data_of(asked: Config) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(asked.examples, asked.features)).astype(np.float32)
    targets = inputs.sum(axis=1) + rng.normal(size=asked.examples).astype(np.float32)
    return {"inputs": inputs, "targets": targets, "index": np.arange(asked.examples)}


def initial(asked: Config) -> dict[str, np.ndarray]:
    return {
        "weights": np.zeros(asked.features, np.float32),
        "count": np.int32(0),
        "history": np.full((asked.steps, asked.batch_size), -1, np.int32),  # the examples that each step saw
    }


def step_of(asked: Config):
    def step(state, batch, key):
        def loss_fn(weights):
            return jnp.mean((batch["inputs"] @ weights - batch["targets"]) ** 2)

        loss, gradient = jax.value_and_grad(loss_fn)(state["weights"])
        gradient = gradient / max(1, asked.features // 5)  # converges for many features too
        noise = 0.01 * jax.random.normal(key, state["weights"].shape)
        count = state["count"] + 1
        if asked.nan_at is not None:
            loss = jnp.where(count == asked.nan_at, jnp.nan, loss)
        state = {
            "weights": state["weights"] - 0.05 * (gradient + noise),
            "count": count,
            "history": state["history"].at[state["count"]].set(batch["index"].astype(jnp.int32)),
        }
        return state, {"loss": loss, "noise": noise[0]}

    return step


def evaluation_of(asked: Config):
    data = data_of(asked)

    def evaluate(state, step, log):
        weights = np.asarray(state["weights"].addressable_data(0))
        error = float(np.mean((data["inputs"] @ weights - data["targets"]) ** 2))
        log.images(step, "weights", (np.abs(weights[:4]) * 99).astype(np.uint8).reshape(1, 2, 2, 1))
        return {"error": error, "negative_error": -error}

    return evaluate


def plan_of(asked: Config) -> training.Plan:
    return training.Plan(
        steps=asked.steps,
        batch_size=asked.batch_size,
        steps_per_call=asked.steps_per_call,
        evaluate_every=asked.evaluate_every,
        checkpoint_every=asked.checkpoint_every,
        host_data=asked.host_data,
    )


def train(asked: Config, run, mesh=None, **changes):
    arguments = {"evaluate": evaluation_of(asked), "best_metric": "negative_error", **changes}
    return training.fit(
        run,
        arguments.pop("step_fn", None) or step_of(asked),
        initial(asked),
        data_of(asked),
        plan_of(asked),
        seed=asked.seed,
        mesh=mesh or training.data_mesh(),
        **arguments,
    )


def run(asked: Config, run):
    state, times = train(asked, run)
    weights = [float(w) for w in np.asarray(state["weights"].addressable_data(0))[:5]]
    table = {"title": "weights", "columns": ["feature", "weight"], "rows": [[i, w] for i, w in enumerate(weights)]}
    return {"metrics": {"weights": weights, **times}, "table": table, "comparisons": [], "figures": ["line.png"]}


def draw(directory, result):
    (directory / "line.png").write_text(str(result["metrics"]["weights"]))


config.STUDIES["linear"] = "linear_study"

if __name__ == "__main__":
    from experiments.__main__ import main

    sys.exit(main())
