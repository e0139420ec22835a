"""What DessiLBI costs over its base optimizer, side by side in one process: the optimizer alone and the training step.

    python -m benchmarks.dessilbi_step [--out FILE.json]

All competitors stay compiled and take turns, and each turn's time is divided by the plain base's in the same round, so
that a drifting machine cancels out. Times are CPU time of this process, so that other processes count less: pin it to
one core, or the threads' times add up. "Alone" applies a given gradient in a jitted `lax.scan` of many steps;
"training" is a whole step of the studies' LeNet or VGG-A, gradient included, in a jitted call of its own. State is
donated in both. "path" also returns `layer_sparsity` from every step.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks.provenance import provenance
from experiments.models.conv import for_steps
from experiments.models.lenet import LeNet
from experiments.models.vgg import vgg_a
from optim_jax import dessilbi, layer_sparsity


class Setting(NamedTuple):
    """A network, the shape of its images, and steps of a turn: of the optimizer alone, and of training."""

    model: nn.Module
    image: tuple[int, int, int]
    alone: int
    training: int


NETWORKS = {"LeNet": Setting(LeNet(), (28, 28, 1), 500, 5), "VGG-A-BN": Setting(vgg_a(), (32, 32, 3), 10, 1)}

BASES: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "momentum": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "adam": optax.adam,
}


class Competitor:
    """An optimizer that advances its own copy of the parameters: alone, or training on the batch.

    Args:
      optimizer: any.
      setting: the network, and how many steps a turn has.
      batch: images and labels.
      train: whether the gradient is the loss's, computed in each step, or given.
      watch: whether each step also returns the path, `layer_sparsity`.
    """

    def __init__(
        self, optimizer: optax.GradientTransformation, setting: Setting, batch: Any, *, train: bool, watch: bool
    ) -> None:
        model = for_steps(setting.model, 1)
        images, labels = batch
        variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), images)
        params, stats = variables["params"], variables.get("batch_stats", {})
        given = jax.tree.map(lambda leaf: 1e-3 * leaf, params)
        self.in_a_call, self.calls = (1, setting.training) if train else (setting.alone, 1)
        self.carry = params, optimizer.init(params)
        self.bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.carry[1]))

        def loss(params: Any) -> jax.Array:
            # Normalised by the batch, as in training; new running statistics are not kept.
            logits, _ = model.apply(
                {"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        def step(carry: Any, gradient: Any) -> Any:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params) if train else gradient, state, params)
            return (optax.apply_updates(params, updates), state), layer_sparsity(state) if watch else None

        @functools.partial(jax.jit, donate_argnums=0)
        def advance(carry: Any, gradient: Any) -> Any:
            if self.in_a_call == 1:
                return step(carry, gradient)
            return jax.lax.scan(lambda carry, _: step(carry, gradient), carry, length=self.in_a_call)

        self.advance = functools.partial(advance, gradient=given)

    def turn(self) -> float:
        """Return the CPU seconds of one step."""
        start = time.process_time()
        for _ in range(self.calls):
            self.carry, path = self.advance(self.carry)
        jax.block_until_ready((self.carry, path))
        return (time.process_time() - start) / (self.calls * self.in_a_call)


def compare(
    name: str, base_name: str, setting: Setting, batch: Any, *, train: bool, rounds: int
) -> list[dict[str, Any]]:
    """Print and return one row a competitor: milliseconds (median and least), ratio to the base, state a parameter."""
    base = BASES[base_name]
    optimizers = {
        base_name: base(0.01),
        "dessilbi": dessilbi(base(1.0), 0.01),
        "dessilbi, path": dessilbi(base(1.0), 0.01),
        "dessilbi, no record": dessilbi(base(1.0), 0.01, record=False),
        "dessilbi, inside": dessilbi(base(1.0), 0.01, coupling="inside"),
    }
    arms = {
        key: Competitor(optimizer, setting, batch, train=train, watch=key.endswith("path"))
        for key, optimizer in optimizers.items()
    }
    for arm in arms.values():
        arm.turn()
    times: dict[str, list[float]] = {key: [] for key in arms}
    for _ in range(rounds):
        for key, arm in arms.items():
            times[key].append(arm.turn())
    size = sum(leaf.size for leaf in jax.tree.leaves(arms[base_name].carry[0]))
    rows = []
    for key, arm in arms.items():
        row = {
            "setting": name,
            "base": base_name,
            "optimizer": key,
            "milliseconds": 1e3 * statistics.median(times[key]),
            "least_milliseconds": 1e3 * min(times[key]),
            "ratio": statistics.median(mine / plain for mine, plain in zip(times[key], times[base_name], strict=True)),
            "state_bytes_per_parameter": arm.bytes / size,
            "seconds_by_round": times[key],
        }
        rows.append(row)
        milliseconds = f"{row['milliseconds']:10.3f} ({row['least_milliseconds']:.3f})"
        print(
            f"{name:28} {base_name:9} {key:20} {milliseconds:>22} {row['ratio']:7.2f}x"
            f" {row['state_bytes_per_parameter']:6.2f}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=32, help="images in a training step")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    record, rows = provenance(), []
    print(f"{'':28} {'base':9} {'optimizer':20} {'ms a step (least)':>22} {'ratio':>8} bytes a parameter")
    for network in arguments.networks:
        setting = NETWORKS[network]
        images = jax.random.normal(jax.random.key(0), (arguments.batch, *setting.image))
        batch = images, jnp.arange(arguments.batch) % 10
        for base_name in BASES:
            for train, label in ((False, "optimizer alone"), (True, f"training, batch {arguments.batch}")):
                rows += compare(f"{network}, {label}", base_name, setting, batch, train=train, rounds=arguments.rounds)
    if arguments.out:
        arguments.out.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
