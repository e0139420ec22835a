"""The latent-tasks study: problems and their classical answers, choices on validation images, resuming, figures."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from study_runs import check_figures_come_from_the_logs, run_preset

from experiments import classical, data, logs, runs
from experiments.config import Options
from experiments.models.restorer import Effort, Restorer
from experiments.pictures import photograph_tiles
from experiments.published import published
from experiments.studies import functa as functa_study
from experiments.studies import latent_problems, latent_tasks
from experiments.trained import load_trained
from experiments.training import data_mesh


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs: a tiny functa that was trained on some of the images, and the latent tasks on it."""
    folder = tmp_path_factory.mktemp("runs")
    run_preset(folder, "functa", train_images=1_000)
    run_preset(folder, "latent-tasks")
    return folder


@pytest.mark.parametrize("name", latent_tasks.PRESETS)
def test_preset_fits_together(name: str) -> None:
    preset = latent_tasks.PRESETS[name].config
    shapes = {"mnist": (28, 28, 1), "cifar10": (32, 32, 3), "digits": (8, 8, 1)}
    trained = functa_study.PRESETS[preset.functa.rpartition("-")[0]].config
    other = functa_study.PRESETS[(preset.stranger or preset.functa).rpartition("-")[0]].config
    assert other.dataset == trained.dataset
    height, width, _ = shapes[trained.dataset]
    assert all(height % factor == 0 and width % factor == 0 for factor in preset.factors)
    assert trained.inner_steps in preset.steps or name == "tiny"


@pytest.mark.slow
def test_every_problem_has_its_row(folder: Path) -> None:
    result = run_preset(folder, "latent-tasks")[1]
    rows = {(row[0], row[1]): row for row in result["table"]["rows"]}
    assert list(rows) == [
        ("super-resolution", "2x"),
        ("denoising", "sigma 0.2"),
        ("inpainting", "50% known"),
        ("fitting", "test images"),
        ("fitting", "unused training images"),
        ("fitting", "photographs"),
    ]
    assert rows["denoising", "sigma 0.2"][2] == pytest.approx(-20 * np.log10(0.2), abs=3)  # clipping removes some noise
    for row in rows.values():
        assert row[-3] in (2, 3, 4)
        assert 5 < row[5] < 40  # dB
        assert -1 <= row[7] <= 1
    # Fitting at the steps of training is what the run itself measured, on the first test images.
    directory, _ = runs.finished_run(Options(runs_dir=folder), "functa", "tiny-0")
    functa, params, _ = load_trained(directory, data_mesh())
    _, errors = functa.fit(params, data.load("digits", "test").images[:8])
    assert rows["fitting", "test images"][5] == pytest.approx(np.mean(-10 * np.log10(errors)), abs=1e-4)


@pytest.mark.slow
def test_finished_parts_are_kept_and_others_done_again(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "runs")
    directory = tmp_path / "runs" / "latent-tasks" / "tiny-0"
    before = json.loads((directory / "result.json").read_text())
    (directory / "result.json").unlink()
    shutil.rmtree(directory / "parts" / "denoising")
    kept = directory / "parts" / "inpainting" / "50-known" / "row.json"
    row = json.loads(kept.read_text())
    kept.write_text(json.dumps([*row[:5], row[5] + 1, *row[6:]]))
    after = run_preset(tmp_path / "runs", "latent-tasks")[1]
    assert after["metrics"]["functa_psnr_inpainting_50% known"] == row[5] + 1
    assert after["table"]["rows"][:2] == before["table"]["rows"][:2]


@pytest.mark.slow
def test_figures_are_drawn_from_the_logs_alone(folder: Path) -> None:
    directory = folder / "latent-tasks" / "tiny-0"
    result = json.loads((directory / "result.json").read_text())
    assert len(result["figures"]) == len(set(result["figures"])) == 5
    check_figures_come_from_the_logs(latent_tasks.draw, directory, result)


@pytest.mark.slow
def test_an_interpolation_starts_and_ends_at_its_images(folder: Path) -> None:
    log = folder / "latent-tasks" / "tiny-0" / "images.jsonl"
    test = data.load("digits", "test")
    strip = logs.read_images(log, "2 to 3, pixels")[0]
    for end, label in ((0, 2), (-1, 3)):
        np.testing.assert_array_equal(strip[end], test.images[test.labels == label][0])
    np.testing.assert_allclose(strip[4], (1.0 * strip[0] + strip[-1]) / 2, atol=1)


def test_a_run_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(runs.RunError, match=r"needs the run functa/tiny-0, .* First run: .*run functa tiny"):
        run_preset(tmp_path, "latent-tasks")


def test_comparisons_are_with_images_the_network_was_not_made_for() -> None:
    rows = [["fitting", kind, None, None, None, 20.0, None, 0.5, 3, 1.0, 0.0] for kind in ("test images", "digits")]
    (found,) = latent_tasks._comparisons(functa_study.PRESETS["mnist-half"].config, rows)
    assert (found["ours"], found["published"]) == (20.0, 18.97)
    assert "digits" in found["setting"]
    assert published("A", "text", row=found_row(), column="value") == found["published"]
    assert latent_tasks._comparisons(functa_study.PRESETS["digits"].config, rows) == []


def found_row() -> str:
    return "PSNR on images of another data set, MNIST configuration 1, dB"


IMAGES = np.random.default_rng(0).random((3, 8, 8, 1)).astype(np.float32)


def test_each_problem_shows_what_it_leaves() -> None:
    generator = np.random.default_rng(1)
    means = latent_problems.super_resolution(2, (8, 8)).observe(IMAGES, generator)
    np.testing.assert_allclose(means[1, 2, 3, 0], IMAGES[1, 4:6, 6:8].mean(), rtol=1e-6)
    noise = latent_problems.denoising(0.3).observe(IMAGES, generator) - IMAGES
    assert 0.25 < noise.std() < 0.35
    observed = latent_problems.inpainting(0.25).observe(IMAGES, generator)
    assert observed.known.shape == (3, 16)
    assert all(len(set(known)) == 16 for known in observed.known.tolist())
    shown = latent_problems.inpainting(0.25).show(observed)
    np.testing.assert_array_equal(shown[observed.mask], np.rint(IMAGES[observed.mask] * 255))
    assert (shown[~observed.mask] == 128).all()


def test_classical_methods_do_their_work() -> None:
    smooth = photograph_tiles((16, 16, 3))[:4].astype(np.float32) / 255
    noisy = smooth + np.random.default_rng(0).normal(0, 0.1, smooth.shape).astype(np.float32)
    for method, strengths in classical.DENOISERS.items():
        assert min(np.mean((classical.denoise(noisy, method, s, 0.1) - smooth) ** 2) for s in strengths) < 0.008
        assert classical.denoise(noisy[..., :1], method, strengths[0], 0.1).shape == (4, 16, 16, 1)
    ramp = np.broadcast_to(np.linspace(0, 1, 8, dtype=np.float32)[None, :, None, None], (1, 8, 8, 1))
    known = np.random.default_rng(0).random((1, 8, 8)) < 0.7
    filled = classical.inpaint(ramp, known)
    np.testing.assert_array_equal(filled[known], ramp[known])
    np.testing.assert_allclose(filled[0, 2:-2, 2:-2], ramp[0, 2:-2, 2:-2], atol=0.05)
    np.testing.assert_allclose(
        classical.bicubic(classical.block_means(ramp, 2), (8, 8))[0, 2:-2], ramp[0, 2:-2], atol=0.02
    )
    np.testing.assert_allclose(classical.ssim(smooth, smooth), 1.0)
    with pytest.raises(ValueError, match="factor=3 does not divide the sides of images of 8x8"):
        classical.block_means(ramp, 3)


@pytest.mark.slow
def test_restoring_does_not_depend_on_the_block() -> None:
    functa = functa_study.build(functa_study.PRESETS["tiny"].config, (8, 8, 1), data_mesh())
    variables, rates = functa.initialise(jax.random.key(0), rate=None, rate_scale=1.0)
    params = jax.device_get(functa_study.fj.MetaParams(variables, rates))
    restorer = Restorer(functa, params, 1e-3)
    many = np.concatenate([IMAGES] * 12)[:33]
    effort = Effort(5, 0.5, 0.1)
    np.testing.assert_allclose(restorer.denoise(many, effort)[32], restorer.denoise(many[32:], effort)[0], atol=1e-5)
    small = classical.block_means(many, 2)
    assert restorer.super_resolve(small, 2, effort).shape == many.shape
    known = np.tile(np.arange(40, dtype=np.int32), (33, 1))
    filled = restorer.inpaint(many, known, effort)
    np.testing.assert_array_equal(filled.reshape(33, 64)[:, :40], many.reshape(33, 64)[:, :40])
