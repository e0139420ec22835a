"""The siren study: presets that fit together, parts that resume, figures from the logs, the reports' settings."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import rich.console
from study_runs import check_figures_come_from_the_logs, run_preset

import functa_jax as fj
from experiments import data, logs
from experiments.config import Options
from experiments.models import siren as models
from experiments.published import published, table
from experiments.runs import Run
from experiments.studies import siren, siren_photograph
from experiments.training import Plan


@pytest.mark.parametrize("name", siren.PRESETS)
def test_preset_fits_together(name: str) -> None:
    preset = siren.PRESETS[name].config
    assert preset.marks[-1] == preset.steps
    assert preset.source in data.PHOTOGRAPHS or preset.source in data.SOURCES
    every = int(np.gcd.reduce(preset.marks))
    plan = Plan(preset.steps, 1, preset.steps_per_call, every, preset.checkpoint_every)
    plan.check(min(preset.sizes) ** 2, devices=1)


def test_presets_follow_the_reports() -> None:
    assert siren.PRESETS["steps"].config.marks == table("B", 1).column("steps")
    assert siren.PRESETS["sizes"].config.sizes == table("B", 2).column("size, pixels")
    for name in ("steps", "sizes"):
        preset = siren.PRESETS[name].config
        assert (preset.nets, preset.learning_rate, preset.schedule) == (((256, 3),), 1e-4, "constant")
    grid = siren.PRESETS["complexity"].config
    assert grid.sizes == (50, 100, 200, 500)
    assert grid.nets == ((20, 2), (50, 2), (100, 2), (100, 3), (200, 3), (200, 4))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    return run_preset(tmp_path_factory.mktemp("runs"), "siren")


@pytest.mark.slow
def test_every_part_is_measured(tiny: tuple[Path, dict]) -> None:
    _, result = tiny
    rows = result["table"]["rows"]
    assert [row[:2] for row in rows] == [[12, "12x1"], [12, "16x2"], [16, "12x1"], [16, "16x2"]]
    assert rows[0][2:4] == [12 * 18, (2 + 1) * 12 + (12 + 1) * 3]
    assert rows[3][3] == (2 + 1) * 16 + (16 + 1) * 16 + (16 + 1) * 3
    for row in rows:
        assert row[5] > row[4] > 10  # dB: more steps fit better
        assert row[6] > 0
    assert {"gradient_correlation", "laplacian_correlation", "siren_enlarged_psnr"} < result["metrics"].keys()


@pytest.mark.slow
def test_figures_are_drawn_from_the_logs_alone(tiny: tuple[Path, dict]) -> None:
    directory, result = tiny
    assert len(result["figures"]) == len(set(result["figures"])) == 5
    check_figures_come_from_the_logs(siren.draw, directory, result)


@pytest.mark.slow
def test_finished_parts_are_kept_and_the_result_is_the_same(tiny: tuple[Path, dict]) -> None:
    directory, result = tiny
    (directory / "result.json").unlink()
    _, again = run_preset(directory.parents[1], "siren")
    assert again["metrics"] == result["metrics"]
    assert again["table"] == result["table"]


@pytest.mark.slow
def test_images_by_steps_beside_report_b(tmp_path: Path) -> None:
    changes = {"source": "digits", "images": 2, "sizes": (8,), "nets": ((16, 2),), "steps": 20, "marks": (10, 20)}
    directory, result = run_preset(tmp_path, "siren", "steps", **changes, steps_per_call=10, checkpoint_every=10)
    originals = logs.read_images(directory / "images.jsonl", "originals")[8]
    np.testing.assert_array_equal(originals, data.load("digits", "test").images[:2])
    assert all((directory / figure).exists() for figure in result["figures"])
    assert result["comparisons"] == []


def test_comparisons_are_of_equal_settings() -> None:
    for name, number in (("steps", 5), ("sizes", 8)):
        preset = siren.PRESETS[name].config
        metrics = {f"psnr_{size}_256x3_{mark}": 1.0 * size + mark for size in preset.sizes for mark in preset.marks}
        found = [c for c in siren._comparisons(preset, metrics) if c["table"] == {"steps": 1, "sizes": 2}[name]]
        assert len(found) == number
        for comparison in found:
            assert comparison["setting"] == comparison["published_setting"]
    assert found[-1]["ours"] == 128 + 2000
    assert found[-1]["published"] == published("B", 2, row=128, column="PSNR after 2000 steps, dB")


def test_a_data_set_cannot_be_analysed_as_a_photograph(tmp_path: Path) -> None:
    asked = dataclasses.replace(siren.PRESETS["tiny"].config, source="digits")
    run = Run("siren", "tiny", tmp_path, Options(), rich.console.Console(quiet=True), ())
    with pytest.raises(ValueError, match=r"analyse needs a photograph as source .*, got 'digits'"):
        siren.run(asked, run)


def test_marks_that_do_not_end_with_the_steps_are_refused(tmp_path: Path) -> None:
    run = Run("siren", "tiny", tmp_path, Options(), rich.console.Console(quiet=True), ())
    recipe = models.Recipe(20, (20, 10), None, 1e-3, "constant", 10, 10)
    with pytest.raises(ValueError, match=r"marks must rise to steps=20, got \(20, 10\)"):
        models.fit(run, recipe, fj.Siren(8, 2, 1), np.zeros((1, 4, 4, 1), np.uint8), seed=0)


def test_rendering_in_chunks_is_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_CHUNK", 7)
    model = fj.Siren(8, 3, 2, w0=5.0)
    coords = fj.coordinate_grid((5, 4), limit=2.0)
    params = jax.vmap(lambda key: model.init(key, coords))(jax.random.split(jax.random.key(0), 3))
    found = models.Fitted(model, params, {}, 1.0).render((5, 4), limit=2.0)
    for i in range(3):
        alone = model.apply(jax.tree.map(lambda x, i=i: x[i], params), coords)
        np.testing.assert_allclose(found[i], alone, atol=1e-6)


def test_differences_of_a_quadratic_are_its_derivatives() -> None:
    grid = np.asarray(fj.coordinate_grid((16, 24)), np.float64)
    y, x = grid[..., 0], grid[..., 1]
    found = siren_photograph._differences(y**2 + 3 * x * y)
    inside = (slice(1, -1), slice(1, -1))
    np.testing.assert_allclose(found["laplacian"][inside], 2.0, rtol=1e-4)
    np.testing.assert_allclose(found["gradient"][inside], np.hypot(2 * y + 3 * x, 3 * y)[inside], rtol=1e-4)
