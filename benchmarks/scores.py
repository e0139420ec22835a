"""Criteria for pruning at initialisation beside the published torch code, and masks for 86 million weights.

    python -m benchmarks.scores [--peers-dir FOLDER] [--out FILE.json]

One scoring of ResNet-20 (1x1 convolutions in its shortcuts, as the peer has it) on 128 images of 32x32x3, compiled
before the clock starts; competitors take turns. Then `make_masks` over all kernels of ViT-B/16 together. Times are CPU
time of the process, so that other processes count less: pin it to one core (`taskset -c 0`), or the threads' times add
up; of `make_masks` wall time is given too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.functa_step import Row, measure, start
from benchmarks.provenance import commit, provenance
from benchmarks.turns import Setting, Worker
from prune_jax import make_masks, scores
from prune_jax.models import vit

FOLDER = "px-ntk-pruning"
SETTING = Setting(batch=128, size=32, channels=3)
CRITERIA = {"px": "PX", "snip": "SNIP", "grasp": "GraSP"}


def masks(rounds: int, sparsity: float = 0.9) -> dict:
    """Seconds of `make_masks` on the magnitudes of a random ViT-B/16, compiled before."""
    shapes = jax.eval_shape(vit("B", num_classes=1000).init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(draw.standard_normal(s.shape, np.float32)), shapes)
    score = jax.block_until_ready(scores.magnitude(params))
    weights = sum(leaf.size for leaf in jax.tree.leaves(score))
    found: dict[str, list[float]] = {"cpu_seconds": [], "wall_seconds": []}
    jax.block_until_ready(make_masks(score, sparsity))
    for _ in range(rounds):
        cpu, wall = time.process_time(), time.perf_counter()
        jax.block_until_ready(make_masks(score, sparsity))
        found["cpu_seconds"].append(time.process_time() - cpu)
        found["wall_seconds"].append(time.perf_counter() - wall)
    return {"weights": weights, "sparsity": sparsity, **found}


def main() -> None:
    """Measure, print, and write the JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    environment = os.environ.get
    parser.add_argument("--peers-dir", type=Path, default=environment("COMPACT_JAX_PEERS"), help="COMPACT_JAX_PEERS")
    parser.add_argument(
        "--peers-python",
        default=environment("COMPACT_JAX_PEERS_PYTHON", sys.executable),
        help="interpreter with torch; COMPACT_JAX_PEERS_PYTHON, else this one",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="scorings a competitor does in its turn")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    flags = parser.parse_args()

    record = provenance(flags.peers_python)
    if record["load_at_start"] > 0.5:
        print(f"the machine is busy (load {record['load_at_start']:.1f}): neither times nor ratios will mean much")
    if flags.peers_dir:
        record["peers_commits"] = {FOLDER: commit(flags.peers_dir / FOLDER)}
    rows = []
    for name, title in CRITERIA.items():
        rows += [
            Row(f"{title}, ours", "ours", f"score-{name}", 0),
            Row(f"{title}, published torch code", "peers", f"score-{name}", 0, folder=FOLDER),
        ]
    workers: dict[str, Worker] = {}
    try:
        for row in rows:
            try:
                workers[row.title] = start(row, SETTING, flags.peers_python, flags.peers_dir)
            except (RuntimeError, OSError) as reason:
                print(f"skipped {row.title}: {reason}", flush=True)
        seconds = measure(workers, flags.rounds, flags.steps)
    finally:
        for worker in workers.values():
            worker.close()

    blocks = {title: [statistics.median(block) for block in of] for title, of in seconds.items()}
    table = []
    print(f"\n{'':32}{'CPU s':>9}{'of ours':>9}")
    for title, of in blocks.items():
        ours = blocks[title.split(",")[0] + ", ours"]
        ratio = statistics.median(theirs / mine for theirs, mine in zip(of, ours, strict=True))
        table.append(
            {
                "title": title,
                "cpu_seconds": statistics.median(of),
                "ratio_to_ours": ratio,
                "cpu_seconds_by_round": seconds[title],
            }
        )
        print(f"{title:32}{statistics.median(of):9.3f}{ratio:9.2f}")
    made = masks(flags.rounds)
    cpu, wall = (statistics.median(made[name]) for name in ("cpu_seconds", "wall_seconds"))
    print(f"make_masks, global, {made['weights']:,} weights: {cpu:.2f} s of CPU, {wall:.2f} s wall")
    if flags.out:
        flags.out.write_text(json.dumps(record | {"rows": table, "make_masks": made}, indent=1) + "\n")


if __name__ == "__main__":
    main()
