"""The README's examples run, and what it names exists."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments import config, execute
from experiments.config import Options

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda code: code.split("import ", 2)[-1].split(",")[0][:20])
def test_example_runs(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "holiday.jpg" in example:
        own_pictures(monkeypatch)
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    if "dessilbi(" in example:
        path_means_something(names)
    if "probe_gradients(" in example:
        smallest, largest = names["probe"].loss_range
        assert 0 < smallest < names["probe"].start_loss
        assert smallest < largest
        assert 0 < names["probe"].effective_beta < np.inf


def path_means_something(names: dict[str, Any]) -> None:
    """Some weights came alive and not all; those of the inputs that matter; and they are enough."""
    alive = np.asarray(names["alive"])
    assert 0 < alive.mean() < 0.3
    assert alive[:2].sum() > 0.5 * alive.sum()
    for layer in ("hidden", "out"):
        sparsity = np.asarray(names["path"][layer])
        assert sparsity[0] == 1
        assert 0 < sparsity[-1] < 1
    before, after, cut = (float(names["loss"](names[of], names["batch"])) for of in ("start", "params", "small"))
    assert after < 1e-3 * before
    assert cut < 0.01 * before


def own_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture, and a finished run on a folder of such, in the current directory."""
    monkeypatch.setenv("COMPACT_JAX_CACHE", "cache")
    Path("pictures").mkdir()
    for i in range(6):
        Image.new("RGB", (20, 16), (40 * i, 100, 200)).save(f"pictures/{i}.png")
    Image.new("RGB", (30, 20), "orange").save("holiday.jpg")
    tiny = config.preset("functa", "tiny-grid").config
    asked = dataclasses.replace(tiny, dataset="folder", image_size=8, batch_size=4, steps=5)
    execute.execute("functa", "folder", asked, Options(data_dir=Path("pictures")), ["run", "functa", "folder"])


def test_examples_were_found() -> None:
    assert len(EXAMPLES) >= 2


def test_every_preset_named_exists() -> None:
    named = re.findall(r"(?:experiments run|slurm\.sbatch|tpu_vm\.sh run) ([a-z-]+) ([a-z0-9-]+)", README)
    assert named
    for study, preset in named:
        config.preset(study, preset)


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_map_names_every_module() -> None:
    """Top-level folders, and each module of `experiments`, stand in the map of the house."""
    for module in (ROOT / "experiments").glob("*.py"):
        if module.name not in ("__init__.py", "files.py"):
            assert f"`{module.name}`" in README, module.name
    for folder in ("functa_jax", "prune_jax", "optim_jax", "experiments", "benchmarks", "results", "tests"):
        assert f"`{folder}/`" in README
