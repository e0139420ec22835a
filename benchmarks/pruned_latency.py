"""A ViT-S/16 and its half: seconds of a batch through the dense network and the pruned one, which take turns.

    python -m benchmarks.pruned_latency [--size S] [--ratio 0.5] [--batch 8] [--calls 20] [--out FILE.json]

Weights are random: neither the cut (the same fraction of every layer) nor the time depends on what they are. Give it
two quiet cores (`taskset -c 0,1`). The pruned network runs twice: as the smaller function, and as the ordinary module.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.provenance import provenance
from prune_jax import count_parameters, flops, latencies
from prune_jax.graph import prune
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
    networks = {
        "dense": (model.apply, dense),
        "pruned function": (pruned.fn, pruned.params),
        "pruned module": (narrow(model, pruned.plan).apply, pruned.params),
    }
    found = latencies({name: (fn, (params, images)) for name, (fn, params) in networks.items()}, repeats=flags.calls)
    work = {name: flops(fn, params, images) for name, (fn, params) in networks.items()}
    record = provenance() | {"size": flags.size, "ratio": flags.ratio, "batch": flags.batch, "networks": {}}
    heads = ("parameters", "GFLOP", "median s", "faster", "FLOP ratio")
    print(f"{'ViT-' + flags.size + '/16':18}" + "".join(f"{head:>12}" for head in heads))
    for name, (_, params) in networks.items():
        size, seconds = count_parameters(params), found[name].median
        faster, ratio = found["dense"].median / seconds, work["dense"] / work[name]
        print(f"{name:18}{size:12,}{work[name] / 1e9:12.2f}{seconds:12.4f}{faster:12.2f}{ratio:12.2f}")
        record["networks"][name] = {
            "parameters": size,
            "flops": work[name],
            "seconds": found[name].seconds,
            "median_seconds": seconds,
            "speed_up": faster,
            "flop_ratio": ratio,
        }
    if flags.out:
        flags.out.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
