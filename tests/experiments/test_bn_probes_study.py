"""The bn-probes study: presets that fit together, the probe by hand, arms that resume, figures from the logs."""

import dataclasses
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console
from study_runs import check_figures_come_from_the_logs, run_preset

from experiments import data, logs
from experiments.classification import standardise
from experiments.config import Options
from experiments.runs import Run
from experiments.studies import bn_probes
from experiments.training import Plan


@pytest.mark.parametrize("name", bn_probes.PRESETS)
def test_preset_fits_together(name: str) -> None:
    preset = bn_probes.PRESETS[name].config
    Plan(preset.steps, preset.batch_size, preset.steps_per_call, preset.probe_every, preset.probe_every).check(1294, 1)
    assert preset.steps >= 2 * preset.probe_every  # a band needs two points


def test_rates_are_those_of_both_reports() -> None:
    assert set(bn_probes.PRESETS["vgg-a"].config.learning_rates) == {1e-3, 5e-4, 3e-4} | {1e-3, 2e-3, 1e-4, 5e-4}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    return run_preset(tmp_path_factory.mktemp("runs"), "bn-probes")


@pytest.mark.slow
def test_every_arm_is_trained_and_probed(tiny: tuple[Path, dict]) -> None:
    directory, result = tiny
    for net in bn_probes.NETS:
        for rate in result["config"]["learning_rates"]:
            records = logs.read_lines(directory / bn_probes.arm(net, rate) / "metrics.jsonl")
            assert logs.curve(records, "loss")[0] == [1, 2, 3, 4, 5, 6]
            assert logs.curve(records, "beta_high")[0] == [2, 4, 6]
            for record in (record for record in records if "beta_low" in record):
                assert 0 <= record["beta_low"] <= record["beta_high"]
                assert record["loss_low"] <= record["loss_high"]
            for name in ("gradient_change", "path_beta"):
                first, *later = logs.curve(records, name)[1]
                assert first == 0
                assert min(later) > 0


@pytest.mark.slow
def test_table_holds_medians_of_the_logs(tiny: tuple[Path, dict]) -> None:
    directory, result = tiny
    highs, widths = [], []
    for rate in result["config"]["learning_rates"]:
        records = logs.read_lines(directory / bn_probes.arm("bn", rate) / "metrics.jsonl")
        highs += [record["beta_high"] for record in records if "beta_high" in record]
        widths += [record["loss_high"] - record["loss_low"] for record in records if "loss_high" in record]
    rows = {row[0]: row for row in result["table"]["rows"]}
    assert rows["effective beta"][2] == result["metrics"]["effective_beta_bn"] == pytest.approx(np.median(highs))
    assert rows["width of the loss's range"][2] == pytest.approx(np.median(widths))
    assert result["metrics"]["train_seconds"] > 0


@pytest.mark.slow
def test_a_finished_arm_is_not_trained_again_and_gives_the_same_numbers(tiny: tuple[Path, dict]) -> None:
    directory, result = tiny
    console = rich.console.Console(file=io.StringIO())
    run = Run("bn-probes", "tiny", directory, Options(), console, ())
    before = {path: path.read_bytes() for path in directory.glob("*/metrics.jsonl")}
    again = bn_probes.run(bn_probes.PRESETS["tiny"].config, run)
    assert "resuming at step 6 of 6" in console.file.getvalue()  # type: ignore[attr-defined]
    assert again["table"] == result["table"]
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_figures_are_drawn_from_the_logs_alone(tiny: tuple[Path, dict]) -> None:
    directory, result = tiny
    assert result["figures"] == ["landscape.png", "predictiveness.png", "beta.png", "envelope.png"]
    check_figures_come_from_the_logs(bn_probes.draw, directory, result)


def test_the_envelope_spans_the_runs_at_each_step() -> None:
    losses = [(9.0, 3.0, 1.0), (9.0, 2.0, 4.0)]
    runs = [[{"step": step, "loss": loss} for step, loss in enumerate(run, 1)] for run in losses]
    runs[0].insert(1, {"step": 2, "beta_low": 0.0})  # a probe's record, without the metric
    assert bn_probes.envelope(runs, "loss") == ([2, 3], [2.0, 1.0], [3.0, 4.0])


def test_path_change_compares_successive_gradients_and_weights() -> None:
    watch = bn_probes.path_change("fc3")
    kernels, gradients = np.random.default_rng(0).normal(size=(2, 4, 2, 2)).astype(np.float32)
    kernels[3] = kernels[2]  # the weights stood still
    state = watch.init({"fc3": {"kernel": kernels[0]}, "conv1": {"kernel": jnp.zeros(3)}})
    for step in range(4):
        updates = {"fc3": {"kernel": gradients[step]}, "conv1": {"kernel": jnp.ones(3)}}
        passed, state = watch.update(
            updates, state, {"fc3": {"kernel": kernels[step]}, "conv1": {"kernel": jnp.ones(3)}}
        )
        assert passed is updates
        change = np.linalg.norm(gradients[step] - gradients[step - 1]) if step else 0
        beta = change / np.linalg.norm(kernels[step] - kernels[step - 1]) if step in (1, 2) else 0
        assert float(state.gradient_change) == pytest.approx(change, rel=1e-6)
        assert float(state.path_beta) == pytest.approx(beta, rel=1e-6)


def test_path_beta_on_a_quadratic_is_its_curvature() -> None:
    watch = bn_probes.path_change("fc3")
    params = {"fc3": {"kernel": jnp.array([[1.0, -2.0]])}}
    tx = optax.chain(watch, optax.sgd(0.1))
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(jax.tree.map(lambda w: 3 * w, params), state, params)
        params = optax.apply_updates(params, updates)
    assert float(state[0].path_beta) == pytest.approx(3, rel=1e-5)


@pytest.mark.slow
def test_the_probe_is_of_the_training_loss_and_leaves_the_state_alone() -> None:
    preset = dataclasses.replace(bn_probes.PRESETS["tiny"].config, step_sizes=(1e-3,))
    images = data.load("digits", "train")
    prepare = standardise(images.images)
    batch = {"image": images.images[:16], "label": images.labels[:16]}
    model = bn_probes.network(preset, norm=True, classes=10)
    state = bn_probes.initialise(model, optax.sgd(0.1), prepare(jnp.asarray(batch["image"])), jax.random.key(0))
    before = jax.device_get(state)
    found = bn_probes.prober(model, prepare, batch, preset)(state, 0, None)  # type: ignore[arg-type]
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))
    _, metrics = bn_probes.train_step(model, optax.sgd(0.0), prepare)(state, batch, jax.random.key(1))
    assert found["probe_loss"] == pytest.approx(float(metrics["loss"]), rel=1e-5)
    # One step along the gradient lowers the loss by about eta * ||g||^2.
    assert found["probe_loss"] - found["loss_low"] == pytest.approx(1e-3 * found["gradient_norm"] ** 2, rel=0.2)
