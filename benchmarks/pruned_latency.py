"""A ViT-S/16 and its half: seconds of a batch through the dense network and the pruned one, which take turns.

    python -m benchmarks.pruned_latency [--size S] [--ratio 0.5] [--batch 8] [--calls 20] [--out FILE.json]

Weights are random: neither the cut (the same fraction of every layer) nor the time depends on what they are. The pruned
network runs twice: as the smaller function, and as the ordinary module. In a third one whole heads are cut in place of
a fraction of every head's dims. CPU seconds, of all threads together, stand beside wall seconds: on a busy machine they
say more. A ratio is taken within each turn, then its median over the turns.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.provenance import provenance
from prune_jax import count_parameters, flops
from prune_jax.graph import dependency_groups, prune
from prune_jax.models import narrow, vit


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S", choices=["Ti", "S", "B", "L"])
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    flags = parser.parse_args()

    model = vit(flags.size, num_classes=1000)
    draw = np.random.default_rng(0)
    images = jnp.asarray(draw.standard_normal((flags.batch, 224, 224, 3), np.float32))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images[:1])
    dense = jax.tree.map(lambda s: jnp.asarray(0.02 * draw.standard_normal(s.shape, np.float32)), shapes)
    pruned = prune(model.apply, dense, images[:1], ratio=flags.ratio, scope="local")
    ties = dependency_groups(model.apply, dense, images[:1]).ties
    apart = {tie: flags.ratio for tie, groups in ties.items() if len(groups) == 1}  # dims are a group in each head
    of_heads = prune(model.apply, dense, images[:1], ratio=apart, kinds=("width", "block"))
    networks = {
        "dense": (model.apply, dense),
        "pruned function": (pruned.fn, pruned.params),
        "pruned module": (narrow(model, pruned.plan).apply, pruned.params),
        "fewer heads": (narrow(model, of_heads.plan).apply, of_heads.params),
    }
    compiled = {name: jax.jit(fn).lower(params, images).compile() for name, (fn, params) in networks.items()}
    wall: dict[str, list[float]] = {name: [] for name in networks}
    cpu: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(2 + flags.calls):  # the first two are not measured
        for name, (_, params) in networks.items():
            began = time.perf_counter(), time.process_time()
            jax.block_until_ready(compiled[name](params, images))
            if turn >= 2:
                wall[name].append(time.perf_counter() - began[0])
                cpu[name].append(time.process_time() - began[1])
    record = provenance() | {"size": flags.size, "ratio": flags.ratio, "batch": flags.batch, "networks": {}}
    heads = ("parameters", "GFLOP", "FLOP ratio", "wall s", "faster", "CPU s", "less CPU")
    print(f"{'ViT-' + flags.size + '/16':18}" + "".join(f"{head:>12}" for head in heads))
    work = {name: flops(fn, params, images) for name, (fn, params) in networks.items()}
    for name, (_, params) in networks.items():
        row = {
            "parameters": count_parameters(params),
            "flops": work[name],
            "flop_ratio": work["dense"] / work[name],
            "wall_seconds": wall[name],
            "speed_up": float(np.median(np.divide(wall["dense"], wall[name]))),
            "cpu_seconds": cpu[name],
            "cpu_ratio": float(np.median(np.divide(cpu["dense"], cpu[name]))),
        }
        record["networks"][name] = row
        print(
            f"{name:18}{row['parameters']:12,}{work[name] / 1e9:12.2f}{row['flop_ratio']:12.2f}"
            f"{np.median(wall[name]):12.4f}{row['speed_up']:12.2f}{np.median(cpu[name]):12.4f}{row['cpu_ratio']:12.2f}"
        )
    if flags.out:
        flags.out.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
