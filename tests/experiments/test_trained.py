"""A trained Functa comes back from its run as that run measured it, or not at all."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from study_runs import run_preset

import functa_jax as fj
from experiments import config, data, trained
from experiments.checkpoints import CheckpointError
from experiments.runs import RunError
from experiments.training import data_mesh

# Orbax abandons a task of its own when a damaged file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    return run_preset(tmp_path_factory.mktemp("runs"), "functa", steps=25)


def test_the_functa_comes_back_as_measured(run: tuple[Path, dict]) -> None:
    directory, result = run
    functa, params, asked = trained.load_trained(directory, data_mesh())
    assert asked == dataclasses.replace(config.preset("functa", "tiny").config, steps=25)
    latents, errors = functa.fit(params, data.load("digits", "test").images)
    assert latents.shape[1:] == functa.latent_init.shape
    np.testing.assert_allclose(np.mean(fj.psnr_from_mse(errors)), result["metrics"]["test_psnr"], rtol=1e-5)


def test_the_checksum_is_of_weights_and_rates(run: tuple[Path, dict]) -> None:
    _, params, _ = trained.load_trained(run[0], data_mesh())
    checksum = trained.model_checksum(params)
    assert checksum == trained.model_checksum(jax.tree.map(lambda x: x + 0, params))
    assert checksum != trained.model_checksum(params._replace(rates=params.rates * 1.001))
    assert checksum != trained.model_checksum(params._replace(model=jax.tree.map(lambda x: x + 1e-6, params.model)))


def test_a_damaged_missing_or_foreign_one_is_refused(run: tuple[Path, dict], tmp_path: Path) -> None:
    directory = shutil.copytree(run[0], tmp_path / "run")
    last = directory / "checkpoints" / "25"
    largest = max(last.glob("state/**/d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 16
    largest.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint 25 in .* is damaged"):
        trained.load_trained(directory, data_mesh())
    shutil.rmtree(last)
    with pytest.raises(CheckpointError, match=r"no checkpoint 25 in .*, only \[10, 20\]"):
        trained.load_trained(directory, data_mesh())
    result = json.loads((directory / "result.json").read_text())
    (directory / "result.json").write_text(json.dumps(result | {"config": result["config"] | {"knots": 3}}))
    with pytest.raises(RunError, match="another version of this program: unknown knots"):
        trained.load_trained(directory, data_mesh())
    (directory / "result.json").unlink()
    with pytest.raises(RunError, match="holds no finished run"):
        trained.load_trained(directory, data_mesh())
