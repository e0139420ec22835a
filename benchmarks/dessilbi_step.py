"""What DessiLBI costs over its base optimizer, side by side in one process: the optimizer alone and the training step.

    python -m benchmarks.dessilbi_step [--out FILE.json]

All competitors stay compiled and take turns, and each turn's time is divided by the plain base's in the same round, so
that a drifting machine cancels out. Times are CPU time of this process, so that other processes count less: pin it to
one core, or the threads' times add up. "Alone" applies a given gradient in a jitted `lax.scan` of many steps;
"training" is a whole step of a network with these parameters, gradient included, in a jitted call of its own. State is
donated in both.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.provenance import provenance
from experiments.models.conv import convolve, max_pool
from optim_jax import dessilbi

Layers = tuple[tuple[int, ...], ...]  # kernel shapes, HWIO and (in, out); a 0 stands for a 2x2 max-pooling

LENET: Layers = ((5, 5, 1, 6), (0,), (5, 5, 6, 16), (0,), (5, 5, 16, 120), (120, 84), (84, 10))
VGG_A: Layers = (
    *((3, 3, 3, 64), (0,), (3, 3, 64, 128), (0,), (3, 3, 128, 256), (3, 3, 256, 256), (0,)),
    *((3, 3, 256, 512), (3, 3, 512, 512), (0,), (3, 3, 512, 512), (3, 3, 512, 512), (0,)),
    *((512, 512), (512, 512), (512, 10)),
)

BASES: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "momentum": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "adam": optax.adam,
}


def init(layers: Layers) -> list[dict[str, jax.Array]]:
    """He-normal kernels; a convolution also has the scale and bias of its BatchNorm, a dense layer its bias."""
    params = []
    for i, shape in enumerate(layers):
        if shape != (0,):
            kernel = jax.nn.initializers.he_normal()(jax.random.key(i), shape)
            norm = {"scale": jnp.ones(shape[-1])} if len(shape) == 4 else {}
            params.append({"kernel": kernel, "bias": jnp.zeros(shape[-1]), **norm})
    return params


def loss(params: list[dict[str, jax.Array]], batch: tuple[jax.Array, jax.Array], layers: Layers) -> jax.Array:
    """Cross-entropy of the network that `layers` draws, with BatchNorm on the batch's statistics."""
    x, labels = batch
    remaining = iter(params)
    for shape in layers:
        if shape == (0,):
            x = max_pool(x)
            continue
        layer = next(remaining)
        if len(shape) == 4:
            x = convolve(x, layer["kernel"], (1, 1), "SAME")
            x = jax.nn.standardize(x, axis=(0, 1, 2)) * layer["scale"].reshape(1, 1, 1, -1)
            x = jax.nn.relu(x + layer["bias"].reshape(1, 1, 1, -1))
        else:
            x = x.mean((1, 2)) if x.ndim == 4 else jax.nn.relu(x)
            x = x @ layer["kernel"] + layer["bias"].reshape(1, -1)
    return optax.softmax_cross_entropy_with_integer_labels(x, labels).mean()


class Competitor:
    """An optimizer that advances its own copy of the parameters; alone if there is no batch to train on."""

    def __init__(self, optimizer: optax.GradientTransformation, layers: Layers, batch: Any, steps: int) -> None:
        params = init(layers)
        given = jax.tree.map(lambda leaf: 1e-3 * leaf, params)
        self.in_a_call = steps if batch is None else 1
        self.calls = steps // self.in_a_call
        self.carry = params, optimizer.init(params)
        self.bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.carry[1]))

        def step(carry: Any, gradient: Any) -> Any:
            params, state = carry
            gradient = gradient if batch is None else jax.grad(loss)(params, batch, layers)
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        @functools.partial(jax.jit, donate_argnums=0)
        def advance(carry: Any, gradient: Any) -> Any:
            if self.in_a_call == 1:
                return step(carry, gradient)
            return jax.lax.scan(lambda carry, _: (step(carry, gradient), None), carry, length=self.in_a_call)[0]

        self.advance = functools.partial(advance, gradient=given)

    def turn(self) -> float:
        """Return the CPU seconds of one step."""
        start = time.process_time()
        for _ in range(self.calls):
            self.carry = self.advance(self.carry)
        jax.block_until_ready(self.carry)
        return (time.process_time() - start) / (self.calls * self.in_a_call)


def compare(name: str, base_name: str, layers: Layers, batch: Any, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Print and return one row a competitor: milliseconds (median and least), ratio to the base, state a parameter."""
    base = BASES[base_name]
    optimizers = {
        base_name: base(0.01),
        "dessilbi": dessilbi(base(1.0), 0.01),
        "dessilbi, no record": dessilbi(base(1.0), 0.01, record=False),
        "dessilbi, inside": dessilbi(base(1.0), 0.01, coupling="inside"),
    }
    arms = {key: Competitor(optimizer, layers, batch, steps) for key, optimizer in optimizers.items()}
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
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    record, rows = provenance(), []
    print(f"{'':28} {'base':9} {'optimizer':20} {'ms a step (least)':>22} {'ratio':>8} bytes a parameter")
    for network, layers, image, alone, training in (
        ("LeNet", LENET, (28, 28, 1), 500, 5),
        ("VGG-A-BN", VGG_A, (32, 32, 3), 10, 1),
    ):
        images = jax.random.normal(jax.random.key(0), (arguments.batch, *image))
        batch = images, jnp.arange(arguments.batch) % 10
        for base_name in BASES:
            rows += compare(f"{network}, optimizer alone", base_name, layers, None, alone, arguments.rounds)
            label = f"{network}, training, batch {arguments.batch}"
            rows += compare(label, base_name, layers, batch, training, arguments.rounds)
    if arguments.out:
        arguments.out.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
