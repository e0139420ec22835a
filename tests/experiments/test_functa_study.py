"""The functa study: presets that fit together, the reports' settings as published, figures from the logs."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from study_runs import check_figures_come_from_the_logs, run_preset

from experiments import config, data, logs
from experiments.models.functa import Functa
from experiments.published import published
from experiments.studies import functa
from experiments.training import Plan, data_mesh

TRAIN_IMAGES = {
    "mnist": 54_000,
    "fashion_mnist": 54_000,
    "cifar10": 45_000,
    "cifar100": 45_000,
    "digits": 1_294,
    "folder": 1,
}


@pytest.mark.parametrize("name", functa.PRESETS)
def test_preset_fits_together(name: str) -> None:
    preset = functa.PRESETS[name].config
    fields = {field.name for field in dataclasses.fields(Plan)} & vars(preset).keys()
    Plan(**{field: getattr(preset, field) for field in fields}).check(
        preset.train_images or TRAIN_IMAGES[preset.dataset], devices=1
    )
    assert preset.batch_size % min(preset.batch_size, preset.microbatch) == 0


@pytest.mark.parametrize(("name", "row"), [("mnist-c1", 1), ("mnist-c2", 2), ("cifar10-c1", 1), ("cifar10-c3", 3)])
def test_report_a_configurations_are_as_published(name: str, row: int) -> None:
    preset = functa.PRESETS[name].config
    ours = {
        "batch size": preset.batch_size,
        "width": preset.width,
        "depth": preset.depth,
        "latent": str(preset.latent) if isinstance(preset.latent, int) else "x".join(map(str, preset.latent)),
        "outer learning rate": preset.learning_rate,
        "w0": preset.w0,
    }
    for column, value in ours.items():
        expected = published("A", 1, row=row, column=column)
        assert str(expected) == value if isinstance(value, str) else expected == value
    assert preset.meta_sgd == (published("A", 1, row=row, column="inner update") != "SGD 0.01")
    assert (preset.inner_steps, preset.inner_rate, preset.second_order) == (3, 0.01, False)


@pytest.mark.parametrize(
    ("arguments", "latent"), [(["--latent", "128"], 128), (["--latent", "4", "5", "6"], (4, 5, 6))]
)
def test_a_latent_is_a_number_or_a_grid_on_the_command_line(arguments: list[str], latent: object) -> None:
    for preset in ("mnist-small", "cifar10-c3"):
        base = functa.PRESETS[preset].config
        asked, _ = config.parse(base, arguments, prog="test", description="")
        assert asked == dataclasses.replace(base, latent=latent)


@pytest.fixture(scope="module", params=["tiny", pytest.param("tiny-grid", marks=pytest.mark.slow)])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    return run_preset(tmp_path_factory.mktemp("runs"), "functa", request.param)


def test_result_is_written_and_says_where_it_comes_from(tiny: tuple[Path, dict]) -> None:
    directory, result = tiny
    assert json.loads((directory / "result.json").read_text()) == result
    assert result["command"] == f"python -m experiments run functa {result['preset']}"
    assert result["metrics"]["test_images"] == len(data.load("digits", "test").labels)
    # Jensen: the mean of the images' PSNR is the larger one.
    assert result["metrics"]["test_psnr"] > result["metrics"]["test_psnr_of_mean_mse"]


def test_training_lowers_the_loss(tiny: tuple[Path, dict]) -> None:
    _, losses = logs.curve(logs.read_lines(tiny[0] / "metrics.jsonl"), "loss")
    assert losses[-1] < 0.8 * losses[0]


def test_figures_are_drawn_from_the_logs_alone(tiny: tuple[Path, dict]) -> None:
    directory, result = tiny
    check_figures_come_from_the_logs(functa.draw, directory, result)


def test_logged_images_are_those_of_the_test_set(tiny: tuple[Path, dict]) -> None:
    directory, result = tiny
    steps = result["config"]["steps"]
    originals = logs.read_images(directory / "images.jsonl", "test_originals")[steps]
    np.testing.assert_array_equal(originals, data.load("digits", "test").images[:8])
    assert logs.read_images(directory / "images.jsonl", "test_4x")[steps].shape == (8, 32, 32, 1)


@pytest.mark.parametrize("name", ["tiny", pytest.param("tiny-grid", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_fit_does_not_depend_on_the_padding(name: str) -> None:
    """A set that does not fill the last block gives each image the error that it has alone."""
    import jax

    preset = config.preset("functa", name).config
    model = functa.build(preset, (8, 8, 1), data_mesh())
    assert isinstance(model, Functa)
    variables, rates = model.initialise(jax.random.key(0), rate=None, rate_scale=1.0)
    params = functa.fj.MetaParams(variables, rates)
    images = data.load("digits", "test").images[:3]
    latents, errors = model.fit(params, images)
    assert latents.shape == (3, *((preset.latent,) if isinstance(preset.latent, int) else preset.latent))
    for i in range(3):
        alone = model.fit(params, images[i : i + 1])
        np.testing.assert_allclose(alone[0][0], latents[i], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(alone[1][0], errors[i], rtol=1e-4)
