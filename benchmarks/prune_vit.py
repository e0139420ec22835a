"""Structural pruning of ViT-B/16 to half width: seconds to trace, to find the groups, and to cut.

    python -m benchmarks.prune_vit [--size B] [--ratio 0.5] [--rounds 3] [--out FILE.json]

Run it on one core (`taskset -c 0`). CPU seconds are given beside wall seconds: on one core without other work they are
alike. Compiling the smaller network is no part of it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.provenance import provenance
from prune_jax.graph import dependency_groups, prune
from prune_jax.models import vit


def timed(call: Callable) -> tuple[Any, float, float]:
    """The result, wall seconds and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(call())
    return result, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="B", choices=["Ti", "S", "B", "L"])
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    flags = parser.parse_args()

    model = vit(flags.size, num_classes=1000)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    params = jax.tree.map(lambda s: jnp.asarray(draw.standard_normal(s.shape, np.float32)), shapes)
    # what the uncut run of a process does once is measured with the first round
    calls = {
        "trace": lambda: jax.make_jaxpr(model.apply)(params, images) and None,
        "trace and groups": lambda: len(dependency_groups(model.apply, params, images)),
        "trace, groups and cut": lambda: prune(model.apply, params, images, ratio=flags.ratio, scope="local").params,
    }
    rows = []
    print(f"{'ViT-' + flags.size + '/16':24}{'wall s':>10}{'CPU s':>10}")
    for turn in range(flags.rounds):
        for name, call in calls.items():
            result, wall, cpu = timed(call)
            rows.append({"turn": turn, "what": name, "wall_seconds": wall, "cpu_seconds": cpu})
            print(f"{name:24}{wall:10.2f}{cpu:10.2f}")
    before, after = (sum(x.size for x in jax.tree.leaves(p)) for p in (params, result))
    print(f"{before:,} parameters, {after:,} after the cut")
    if flags.out:
        record = provenance() | {"size": flags.size, "ratio": flags.ratio, "parameters": [before, after], "rows": rows}
        flags.out.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
