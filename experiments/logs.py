"""What a run says: JSON lines always, TensorBoard event files on request, a progress bar for the person watching."""

import base64
import io
import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.progress
from PIL import Image

from experiments.files import naming, write_atomically


class Log:
    """Append-only record of a run: one JSON object a line in `metrics.jsonl`, image arrays in `images.jsonl`.

    Every line has the step it belongs to. Opening the log at a step drops what an interrupted run wrote beyond it
    (and the torn line of a killed one), so that a resumed run's log reads like that of a run never interrupted.

    Args:
      directory: of the run.
      step: the step training goes on from; lines of later steps are dropped.
      tensorboard: also write event files to `directory/tensorboard`.
      enabled: False on all but the first of several processes: nothing is written.
    """

    def __init__(self, directory: Path, step: int, *, tensorboard: bool = False, enabled: bool = True):
        self._directory = directory
        self._files: dict[str, io.TextIOWrapper] = {}
        self._events: Any = None
        if not enabled:
            return
        for name in ("metrics", "images"):
            path = self._path(name)
            kept = [line for line in read_lines(path) if line["step"] <= step] if path.exists() else []
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
            self._files[name] = path.open("a", encoding="utf-8")
        if tensorboard:
            import tensorboardX

            self._events = tensorboardX.SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers that belong to the state after `step` steps."""
        if "metrics" in self._files:
            self._append("metrics", {"step": int(step), **{name: float(value) for name, value in values.items()}})
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, float(value), step)

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        """Writes images, uint8 (N, H, W, C) with C of 1 or 3, as lossless PNG inside a JSON line."""
        if "images" in self._files:
            self._append("images", {"step": int(step), "name": name, "png": [encode_png(image) for image in images]})
        if self._events is not None:
            self._events.add_images(name, images, step, dataformats="NHWC")

    def close(self) -> None:
        """Closes the files."""
        for name, file in self._files.items():
            with naming(self._path(name)):
                file.close()
        if self._events is not None:
            self._events.close()

    def _append(self, name: str, record: dict[str, Any]) -> None:
        with naming(self._path(name)):
            self._files[name].write(json.dumps(record) + "\n")
            self._files[name].flush()

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.jsonl"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a JSON-lines file; a last line torn by a killed process is left out.

    Raises:
      ValueError: a damaged line that is not the last one; names file and line.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return records


def read_images(path: Path, name: str) -> dict[int, np.ndarray]:
    """Returns the images logged under a name: step -> uint8 (N, H, W, C)."""
    found = [record for record in read_lines(path) if record["name"] == name]
    return {record["step"]: np.stack([decode_png(png) for png in record["png"]]) for record in found}


def encode_png(image: np.ndarray) -> str:
    """Returns a uint8 image (H, W, 1 or 3) as base64 of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def decode_png(text: str) -> np.ndarray:
    """Returns the image (H, W, C), uint8, of `encode_png`."""
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return np.atleast_3d(np.asarray(image))


class Progress:
    """A progress bar with speed, ETA and the current metrics; plain lines now and then where there is no terminal.

    Args:
      console: where to draw.
      total: number of steps of the whole training.
      start: the step it goes on from.
      description: in front of the bar.
      unit: what is counted.
    """

    _SECONDS_BETWEEN_LINES = 20.0

    def __init__(self, console: rich.console.Console, total: int, start: int, description: str, *, unit: str = "steps"):
        self._unit = unit
        self._console, self._total, self._start, self._description = console, total, start, description
        self._begun = self._said = time.monotonic()
        self._first = start  # steps made before the clock was started
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[text]}", markup=False),
            console=console,
            disable=not console.is_terminal,
            transient=False,
        )
        self._task = self._bar.add_task(description, total=total, completed=start, text="compiling")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start_clock(self, step: int) -> None:
        """Begins the measurement of speed, after compilation."""
        self._begun, self._first = time.monotonic(), step

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows that `step` steps are done."""
        now = time.monotonic()
        rate = (step - self._first) / max(now - self._begun, 1e-9)
        left = (self._total - step) / rate if rate > 0 else math.inf
        numbers = " ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        text = f"{rate:.3g} {self._unit}/s  {_duration(left)} left  {numbers}"
        self._bar.update(self._task, completed=step, text=text)
        if not self._console.is_terminal and now - self._said > self._SECONDS_BETWEEN_LINES:
            self._said = now
            line = f"{self._description} {step}/{self._total}  {text}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def curve(records: Iterable[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Returns steps and values of one metric, from the records of `metrics.jsonl`."""
    points = [(record["step"], record[name]) for record in records if name in record]
    return [step for step, _ in points], [value for _, value in points]
