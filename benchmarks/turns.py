"""Competitors that take turns: one process each, every step timed inside it, a block of steps on command.

A machine drifts (clock rate, neighbours, heat), so that times taken one after the other do not compare. Here all
competitors stay loaded and warm, idle until called, and are called in rounds.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the repository


@dataclass(frozen=True)
class Setting:
    """One shape for all competitors; by default that of configuration 1 of the published MNIST experiments."""

    batch: int = 16
    size: int = 28
    channels: int = 1
    width: int = 256
    depth: int = 6  # linear layers, the output layer included
    latent: int = 256  # of a grid: channels
    grid: int = 0  # cells along each side of a grid of latents; 0: one vector
    inner_steps: int = 3
    w0: float = 30.0
    microbatch: int = 2  # images of the batch whose gradient our step computes at once

    @property
    def points(self) -> int:
        """Coordinates evaluated in one forward pass over the batch."""
        return self.batch * self.size**2

    @property
    def forward_flops(self) -> int:
        """F: matmul FLOPs of one forward pass (the latent-to-modulation map adds under 1 % and is left out)."""
        weights = 2 * self.width + (self.depth - 2) * self.width**2 + self.width * self.channels
        return 2 * self.points * weights


SPATIAL = Setting(size=32, channels=3, latent=16, grid=8, w0=10.0)  # the Spatial Functa paper's network and images


def turns(clock: Callable[[], float] = time.perf_counter) -> Iterator[None]:
    """Worker's side: yield once for every step that stdin asks for and answer each block with its seconds.

    `time.process_time` as the clock gives CPU seconds, of all threads: other processes then count less.

    What the competitor itself prints goes to stderr, since stdout carries the answers.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = clock()
            yield
            seconds.append(clock() - start)
        print(json.dumps(seconds), file=answers, flush=True)


class Worker:
    """A competitor in its own process."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]):
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the process)
        self._process = subprocess.Popen(
            command, env=dict(env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )

    def run(self, steps: int) -> list[float]:
        """Seconds of each of `steps` steps; RuntimeError with the worker's last word if it is gone."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines()
            raise RuntimeError(lines[-1] if lines else f"exit status {self._process.returncode}")
        return json.loads(answer)

    def close(self) -> None:
        """End the process by closing its stdin."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
