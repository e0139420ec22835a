"""One meta-learning step of Functa beside the same step of published implementations, taking turns in one run.

    python -m benchmarks.functa_step [--spatial] [--peers-dir FOLDER] [--out FILE.json]

prints for every competitor: seconds a step, the ratio to ours of the same order, matmul work by the cost model, the
rate that makes, and its fraction of the rate that bare float32 matmuls reach in the same run. README.md says where the
peers come from; those that are not there are skipped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.ours import SQUARE
from benchmarks.provenance import commit, provenance
from benchmarks.turns import ROOT, SPATIAL, Setting, Worker


@dataclass(frozen=True)
class Row:
    """A competitor; `flops` are the matmul FLOPs of its step as it is written."""

    title: str
    module: str  # run by benchmarks.MODULE
    name: str
    flops: int
    rival: str = ""  # which of ours its seconds are divided by
    folder: str = ""  # its checkout inside the peers' folder


def steps(s: Setting) -> tuple[Row, ...]:
    """The meta-learning steps of a setting; their work in units of F, the matmul FLOPs of one forward pass."""
    f = s.forward_flops
    ours = (
        Row("ours, second order", "ours", "second-order", 21 * f, "second-order"),
        Row("ours, first order", "ours", "first-order", 9 * f, "first-order"),
        Row("ours, fitting a functaset", "ours", "fit", 7 * f),
    )
    if s.grid:
        return (*ours, Row("spatial_functa", "peers", "spatial-functa", 21 * f, "second-order", "spatial_functa"))
    return (
        *ours,
        Row("DeepMind functa", "peers", "deepmind", 28 * f, "second-order", "functa"),
        Row("DeepMind functa, not logging", "peers", "deepmind-no-log", 21 * f, "second-order", "functa"),
        Row("COIN++", "peers", "coinpp", 21 * f, "second-order", "coinpp"),
        Row("MedFuncta", "peers", "medfuncta", 21 * f, "second-order", "medfuncta"),
        Row("report A, SGD inside", "peers", "report-a", 9 * f, "first-order", "report_a"),
        Row("report A, meta-SGD", "peers", "report-a-meta-sgd", 14 * f, "first-order", "report_a"),
    )


LAYER = ("XLA, layer", "PyTorch, layer")  # the faster of these is the machine's rate


def matmuls(s: Setting) -> tuple[Row, ...]:
    """Bare matmuls at the step's shapes, 20 of one hidden layer, and a large one."""
    product = 2 * s.points * s.width**2
    return (
        Row(LAYER[0], "ours", "matmul", 20 * product),
        Row(LAYER[1], "peers", "matmul", 20 * product),
        Row("XLA, weight gradient", "ours", "matmul-gradient", 20 * product),
        Row(f"XLA, {SQUARE} square", "ours", "matmul-square", 2 * 2 * SQUARE**3),
    )


def start(row: Row, setting: Setting, python: str, peers: Path | None) -> Worker:
    """Start a worker and warm it up; RuntimeError with the reason if it cannot run."""
    if row.folder and not (peers and (peers / row.folder).is_dir()):
        raise RuntimeError(f"no folder {row.folder} in --peers-dir {peers}")
    command = [sys.executable, "-m", "benchmarks.ours", row.name]
    if row.module == "peers":
        command = [python, "-m", "benchmarks.peers", row.name, str(peers)]
    worker = Worker([*command, json.dumps(dataclasses.asdict(setting))], {**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        worker.run(3)  # the first two calls may both compile
    except RuntimeError:
        worker.close()
        raise
    return worker


def measure(workers: dict[str, Worker], rounds: int, steps: int) -> dict[str, list[list[float]]]:
    """Seconds by title: for every round, those of each step in the worker's turn. Every second round goes backwards."""
    seconds: dict[str, list[list[float]]] = {title: [] for title in workers}
    for number in range(rounds):
        for title in list(workers)[:: -1 if number % 2 else 1]:
            seconds[title].append(workers[title].run(steps))
        print(f"round {number + 1} of {rounds}", flush=True)
    return seconds


def summarise(rows: list[Row], seconds: dict[str, list[list[float]]]) -> list[dict]:
    """The table's rows. Ratios are taken within each round, then their median over the rounds."""
    flops = {row.title: row.flops for row in rows}
    titles = {row.name: row.title for row in rows if row.module == "ours"}
    blocks = {title: [statistics.median(block) for block in of] for title, of in seconds.items()}
    rates = {title: [flops[title] / block for block in of] for title, of in blocks.items()}
    layer = max((rates[title] for title in LAYER if title in rates), key=statistics.median, default=None)

    def ratio(above: list[float], below: list[float] | None) -> float | None:
        return None if below is None else statistics.median(a / b for a, b in zip(above, below, strict=True))

    return [
        {
            "title": row.title,
            "seconds": statistics.median(blocks[row.title]),
            "ratio_to_ours": ratio(blocks[row.title], blocks.get(titles.get(row.rival, ""))),
            "gflops": row.flops / 1e9,
            "gflops_per_second": statistics.median(rates[row.title]) / 1e9,
            "fraction_of_layer_matmul": ratio(rates[row.title], layer),
            "seconds_by_round": seconds[row.title],
        }
        for row in rows
        if row.title in blocks
    ]


def show(table: list[dict]) -> None:
    """Print the table."""
    print(f"\n{'':30} {'seconds':>8} {'ratio':>6} {'GFLOP':>7} {'GFLOP/s':>8} {'of matmul':>9}")
    for row in table:
        ratio, fraction = row["ratio_to_ours"], row["fraction_of_layer_matmul"]
        print(
            f"{row['title']:30} {row['seconds']:8.3f} {'' if ratio is None else format(ratio, '.2f'):>6}"
            f" {row['gflops']:7.1f} {row['gflops_per_second']:8.1f}"
            f" {'' if fraction is None else format(fraction, '.0%'):>9}"
        )


def main() -> None:
    """Measure, print, and write the JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    environment = os.environ.get
    parser.add_argument("--spatial", action="store_true", help="a grid of latents, on images of 32x32x3")
    parser.add_argument("--peers-dir", type=Path, default=environment("COMPACT_JAX_PEERS"), help="COMPACT_JAX_PEERS")
    parser.add_argument(
        "--peers-python",
        default=environment("COMPACT_JAX_PEERS_PYTHON", sys.executable),
        help="interpreter with the peers' requirements; COMPACT_JAX_PEERS_PYTHON, else this one",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps a competitor takes in its turn")
    parser.add_argument(
        "--microbatch", type=int, default=Setting.microbatch, help="images our step takes at once; the batch is 16"
    )
    parser.add_argument("--only", nargs="+", metavar="TITLE", help="titles that begin so; matmuls always run")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    flags = parser.parse_args()

    setting = dataclasses.replace(SPATIAL if flags.spatial else Setting(), microbatch=flags.microbatch)
    every = steps(setting)
    chosen = [row for row in every if flags.only is None or row.title.startswith(tuple(flags.only))]
    if not chosen:
        parser.error(f"--only {' '.join(flags.only)} fits none of: {', '.join(row.title for row in every)}")
    rows = [*chosen, *matmuls(setting)]
    record = provenance(flags.peers_python)
    if record["load_at_start"] > 0.5:
        print(f"the machine is busy (load {record['load_at_start']:.1f}): neither times nor ratios will mean much")
    record["setting"] = dataclasses.asdict(setting) | {"forward_gflops": setting.forward_flops / 1e9}
    if flags.peers_dir:
        folders = sorted({row.folder for row in chosen if row.folder})
        record["peers_commits"] = {folder: commit(flags.peers_dir / folder) for folder in folders}
    workers: dict[str, Worker] = {}
    try:
        for row in rows:
            try:
                workers[row.title] = start(row, setting, flags.peers_python, flags.peers_dir)
            except (RuntimeError, OSError) as reason:
                print(f"skipped {row.title}: {reason}", flush=True)
        table = summarise(rows, measure(workers, flags.rounds, flags.steps))
    finally:
        for worker in workers.values():
            worker.close()
    show(table)
    if flags.out:
        flags.out.write_text(json.dumps(record | {"rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
