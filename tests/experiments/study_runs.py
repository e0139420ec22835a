"""What the tests of all studies do: run a preset in this process, and draw its figures again."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from experiments import config, execute
from experiments.config import Options


def run_preset(folder: Path, study: str, preset: str = "tiny", **changes: Any) -> tuple[Path, dict]:
    """Runs a preset, some of its fields changed, with runs and caches in `folder`: the run's folder and its result."""
    asked = dataclasses.replace(config.preset(study, preset).config, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPACT_JAX_CACHE", str(folder / "cache"))
        result = execute.execute(study, preset, asked, Options(runs_dir=folder), ["run", study, preset])
    return folder / study / f"{preset}-{asked.seed}", result


def check_figures_come_from_the_logs(draw: Callable[[Path, dict], None], directory: Path, result: dict) -> None:
    """Asserts that figures, once gone, are drawn again to the same bytes, and are pictures."""
    before = {name: (directory / name).read_bytes() for name in result["figures"]}
    for name in before:
        (directory / name).unlink()
    draw(directory, result)
    for name, content in before.items():
        with Image.open(directory / name) as image:
            assert min(image.size) > 100
        assert (directory / name).read_bytes() == content
