"""Token methods on a ViT beside the dense one: seconds a batch, images a second, speed-up.

    python -m benchmarks.tokens [--size S] [--batches 8 1] [--dtype float32] [--rounds 5] [--out FILE.json]

All stay compiled and take turns; a speed-up is taken within each round, then its median over the rounds. With
`--peers-python` an interpreter that has torch also times the same dense ViT there. Weights are random: what a method
keeps does not change how long it takes. On an accelerator: `--size B --batches 256 --dtype bfloat16`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.provenance import provenance
from benchmarks.turns import ROOT, Worker
from prune_jax import flops
from prune_jax.models import vit
from prune_jax.tokens import CPViT, DynamicViT, PatchSkip, ToMe, layer_ratios, wrap

DENSE, TORCH = "dense", "torch, dense"


def competitors(size: str, dtype: str) -> dict[str, tuple[Callable, dict]]:
    """Title -> the function of variables and images, and its variables."""
    model = vit(size, num_classes=1000, compute_dtype=None if dtype == "float32" else dtype)
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    dense = jax.tree.map(lambda s: jnp.asarray(0.02 * draw.standard_normal(s.shape, np.float32)), shapes)
    half = (1.0,) * (model.depth // 4) + (0.5,) * (model.depth - model.depth // 4)
    methods = {
        "DynamicViT, keep 0.7": DynamicViT(model, tuple(model.depth * s // 4 for s in (1, 2, 3)), 0.7),
        "DynamicViT, keep 0.7, merged": DynamicViT(
            model, tuple(model.depth * s // 4 for s in (1, 2, 3)), 0.7, merge=True
        ),
        "ToMe, 156 merged": ToMe(model, 156 // model.depth),  # r = 13 in 12 blocks
        "CP-ViT, 0.3 skipped": CPViT(model, layer_ratios([1.0] * model.depth, 0.3)),
        "patch skip, half, to all": PatchSkip(model, half),
        "patch skip, half, to kept": PatchSkip(model, half, attend="kept"),
    }
    return {
        DENSE: (model.apply, dense),
        **{title: (method.apply, wrap(method, dense, jax.random.key(1))) for title, method in methods.items()},
    }


def measure(calls: dict[str, Callable[[int], list[float]]], rounds: int, steps: int) -> dict[str, list[float]]:
    """Median seconds of each turn, by title; every second round goes backwards."""
    seconds: dict[str, list[float]] = {title: [] for title in calls}
    for number in range(rounds):
        for title in list(calls)[:: -1 if number % 2 else 1]:
            seconds[title].append(statistics.median(calls[title](steps)))
        print(f"round {number + 1} of {rounds}", flush=True)
    return seconds


def timed(apply: Callable, variables: dict, images: jax.Array) -> Callable[[int], list[float]]:
    """A compiled, warm competitor: number of calls -> seconds of each."""
    compiled = jax.jit(apply).lower(variables, images).compile()

    def run(steps: int) -> list[float]:
        seconds = []
        for _ in range(steps):
            begun = time.perf_counter()
            jax.block_until_ready(compiled(variables, images))
            seconds.append(time.perf_counter() - begun)
        return seconds

    run(2)
    return run


def main() -> None:
    """Measure, print, and write the JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S", choices=["Ti", "S", "B", "L"])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="batches a competitor takes in its turn")
    parser.add_argument("--peers-python", default=os.environ.get("COMPACT_JAX_PEERS_PYTHON"), help="one that has torch")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    flags = parser.parse_args()

    record = provenance(flags.peers_python) | {"device": str(jax.devices()[0]), "size": flags.size}
    if record["load_at_start"] > 0.5 and jax.devices()[0].platform == "cpu":
        print(f"the machine is busy (load {record['load_at_start']:.1f}): only speed-ups mean something, and little")
    known = competitors(flags.size, flags.dtype)
    rows = []
    for batch in flags.batches:
        images = jnp.zeros((batch, 224, 224, 3))
        calls = {title: timed(apply, variables, images) for title, (apply, variables) in known.items()}
        peer = None
        if flags.peers_python:
            command = [flags.peers_python, "-m", "benchmarks.torch_vit", flags.size, str(batch)]
            peer = Worker(command, {**os.environ, "PYTHONPATH": str(ROOT)})
            try:
                peer.run(2)
                calls[TORCH] = peer.run
            except RuntimeError as reason:
                print(f"skipped {TORCH}: {reason}", flush=True)
        seconds = measure(calls, flags.rounds, flags.steps)
        if peer:
            peer.close()
        print(f"\nViT-{flags.size}, 224 px, batch {batch}, {flags.dtype}")
        print(f"{'':32}{'seconds':>9}{'images/s':>10}{'speed-up':>10}{'GFLOP/image':>13}")
        for title, of in seconds.items():
            apply, variables = known.get(title, known[DENSE])
            row = {
                "batch": batch,
                "dtype": flags.dtype if title != TORCH else "float32",
                "title": title,
                "seconds": statistics.median(of),
                "speed_up": statistics.median(d / s for d, s in zip(seconds[DENSE], of, strict=True)),
                "gflops_an_image": flops(apply, variables, images[:1]) / 1e9,
                "seconds_by_round": of,
            }
            rows.append(row)
            print(
                f"{title:32}{row['seconds']:9.4f}{batch / row['seconds']:10.1f}{row['speed_up']:10.2f}"
                f"{row['gflops_an_image']:13.2f}"
            )
    if flags.out:
        flags.out.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
