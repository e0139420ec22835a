"""The functaset study: the same latents after a kill, with damage and on any devices; figures from the logs alone."""

import dataclasses
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import config, data, runs, trained
from experiments.config import Options
from experiments.studies import functaset
from functa_jax import functaset as files

STEPS = ("--steps", "25")
TINY = ("run", "functaset", "tiny", "--chunk", "60")


@pytest.fixture(scope="module")
def whole(environment, tmp_path_factory):
    """A folder of runs: functa/tiny-0 and, never interrupted, functaset/tiny-0."""
    from processes import HERE, Command

    folder = tmp_path_factory.mktemp("runs")
    for asked in (("run", "functa", "tiny", *STEPS), TINY):
        code, said = Command([HERE / "linear_study.py", *asked, "--runs-dir", folder], environment).finish()
        assert code == 0, said
    return folder


def sets(folder):
    return {path.stem: files.load(path) for path in (folder / "functaset" / "tiny-0").glob("*.npz")}


@pytest.mark.parametrize("name", functaset.PRESETS)
def test_presets_are_consistent(name):
    preset = functaset.PRESETS[name].config
    functaset._check(preset)
    assert preset.functa.rpartition("-")[0]


@pytest.mark.slow
def test_the_latents_are_those_of_the_functa(whole):
    found = sets(whole)
    assert set(found) == {"train", "validation", "test", "train-1"}
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    functa, params, _ = trained.load_trained(whole / "functa" / "tiny-0", mesh)
    images = data.load("digits", "test")
    latents, _ = functa.fit(params, images.images)  # on four devices, where the run had one
    np.testing.assert_allclose(found["test"].latents, latents, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(found["test"].labels, images.labels)
    for part in found.values():
        assert part.model == trained.model_checksum(params)
        np.testing.assert_array_equal(part.mean, found["train"].mean)
    result = runs.read_result(whole / "functaset" / "tiny-0")
    of_functa = runs.read_result(whole / "functa" / "tiny-0")
    np.testing.assert_allclose(result["metrics"]["test_psnr"], of_functa["metrics"]["test_psnr"], rtol=1e-4)
    copy = found["train-1"]
    assert (copy.latents != found["train"].latents).any(axis=1).mean() > 0.5
    np.testing.assert_array_equal(copy.labels, found["train"].labels)


@pytest.mark.slow
def test_killed_it_goes_on_from_its_chunks(whole, start, tmp_path):
    """kill -9, twice; a chunk that was kept is used, a damaged one is said and made again."""
    shutil.copytree(whole / "functa", tmp_path / "functa")
    directory = tmp_path / "functaset" / "tiny-0"
    for wanted in (3, 9):
        running = start(*TINY, "--runs-dir", tmp_path)
        end = time.monotonic() + 120
        while len(list(directory.glob("train.chunks/*.npz"))) < wanted and running.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.001)
        running.send_signal(signal.SIGKILL)
        assert running.finish()[0] == -signal.SIGKILL
    kept = files.load(directory / "train.chunks" / "00000060.npz")
    files.save(dataclasses.replace(kept, latents=kept.latents + 1), directory / "train.chunks" / "00000060.npz")
    damaged = directory / "train.chunks" / "00000120.npz"
    damaged.write_bytes(damaged.read_bytes()[:200])
    code, said = start(*TINY, "--runs-dir", tmp_path).finish()
    assert code == 0, said
    assert "00000120.npz is damaged" in said
    assert not list(directory.glob("*.chunks"))
    expected = {name: part.latents for name, part in sets(whole).items()}
    expected["train"][60:120] += 1
    for name, part in sets(tmp_path).items():
        np.testing.assert_array_equal(part.latents, expected[name])


@pytest.mark.slow
def test_done_parts_are_kept_and_those_of_another_recipe_or_model_made_again(whole, execute, tmp_path):
    shutil.copytree(whole, tmp_path / "runs")
    directory = tmp_path / "runs" / "functaset" / "tiny-0"
    (directory / "result.json").unlink()
    test, validation = directory / "test.npz", directory / "validation.npz"
    files.save(dataclasses.replace(files.load(validation), model="another"), validation)
    before = {path.name: path.stat().st_mtime_ns for path in directory.glob("*.npz")}
    changed = (*TINY, "--shift", "2", "--runs-dir", tmp_path / "runs")  # what train-1 depends on, and no other part
    code, said = execute(*changed)
    assert code == 0, said
    after = {path.name: path.stat().st_mtime_ns for path in directory.glob("*.npz")}
    assert {name for name in before if before[name] != after[name]} == {"train-1.npz", "validation.npz"}
    assert files.load(test).model == files.load(validation).model


def test_figures_are_drawn_from_the_logs_alone(whole, tmp_path):
    directory = tmp_path / "tiny-0"
    directory.mkdir()
    original = whole / "functaset" / "tiny-0"
    for path in (*original.glob("*.jsonl"), original / "result.json"):
        shutil.copy(path, directory)
    result = runs.read_result(directory)
    functaset.draw(directory, result)
    for name in result["figures"]:
        assert (directory / name).read_bytes() == (original / name).read_bytes()
        with Image.open(directory / name) as image:
            assert min(image.size) > 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": ("test",)}, "must have 'train' among them"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"shift": 0}, "copies would be equal: set flip or shift"),
        ({"functa": "digits-7"}, r"First run: python -m experiments run functa digits --seed 7"),
    ],
)
def test_bad_requests_are_refused_before_any_work(changes, message, tmp_path):
    asked = dataclasses.replace(config.preset("functaset", "tiny").config, **changes)
    run = runs.Run("functaset", "tiny", tmp_path, Options(runs_dir=tmp_path), None, ())
    with pytest.raises((ValueError, runs.RunError), match=message):
        functaset.run(asked, run)
