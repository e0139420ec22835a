"""The classify study: learns from latents, chooses on validation, stands beside the right published cells."""

import shutil

import numpy as np
import pytest
from study_runs import run_preset

from experiments import logs, runs
from experiments.published import table
from experiments.runs import RunError
from experiments.studies import classify
from functa_jax import functaset as files


def make_functaset(folder, name, shape, dataset):
    """A finished functaset whose latents are a little class and much noise."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(10, *shape))
    sets = {}
    for part, count in {"train": 300, "validation": 80, "test": 90, "train-1": 300}.items():
        labels = np.arange(count) % 10
        latents = 5 + centres[labels] + 0.4 * rng.normal(size=(count, *shape))
        sets[part] = files.make_functaset(latents, labels=labels, psnr=np.full(count, 20.0), model="m")
    directory = folder / "functaset" / name
    for part, made in sets.items():
        files.save(made.with_statistics_of(sets["train"]), directory / f"{part}.npz")
    result = {
        "metrics": {
            "model": "m",
            "dataset": dataset,
            "latent_shape": list(shape),
            "train_images": 300,
            "test_psnr": 20.0,
        },
        "config": {"splits": ["train", "validation", "test"]},
    }
    return directory, result


@pytest.fixture
def functasets(tmp_path, monkeypatch):
    """Small functasets in place of those that the presets name."""
    found = {}

    def finished_run(options, study, name):
        assert study == "functaset"
        if name not in found:
            dataset = name.partition("-")[0]
            shape = (2, 2, 3) if "spatial" in name else (12,)
            found[name] = make_functaset(tmp_path, name, shape, "digits" if dataset == "tiny" else dataset)
        return found[name]

    monkeypatch.setattr(classify.runs, "finished_run", finished_run)
    return found


def classified(tmp_path, name, **changes):
    return run_preset(tmp_path, "classify", name, **changes)[1]


def test_it_learns_chooses_on_validation_and_draws(functasets, tmp_path):
    result = classified(tmp_path, "tiny", epochs=15, curve_every=5, learning_rate=0.02)
    metrics = result["metrics"]
    assert metrics["test_accuracy"] > 0.9
    assert metrics["train_latents"] == 600
    matrix = np.array(metrics["confusion"])
    assert matrix.sum() == 90
    np.testing.assert_allclose(np.trace(matrix) / 90, metrics["test_accuracy"])
    np.testing.assert_array_equal(matrix.sum(axis=1), 9)
    directory = tmp_path / "classify" / "tiny-0"
    steps, accuracies = logs.curve(logs.read_lines(directory / "metrics.jsonl"), "validation_accuracy")
    assert metrics["validation_accuracy"] == pytest.approx(max(accuracies))
    chosen = steps.index(metrics["best_epoch"] * metrics["steps_per_epoch"])
    assert accuracies[chosen] == max(accuracies)
    assert all((directory / name).exists() for name in result["figures"])


@pytest.mark.parametrize("head", ["conv", "residual"])
@pytest.mark.slow
def test_heads_for_grids_learn(functasets, tmp_path, head):
    changes = {"widths": (8, 8), "batch_size": 48, "epochs": 6, "evaluate_every": 2, "cell_dropout": 0.0}
    result = classified(tmp_path, "cifar10-spatial", head=head, learning_rate=0.01, **changes)
    assert result["metrics"]["test_accuracy"] > 0.5
    (comparison,) = result["comparisons"]
    assert (comparison["report"], comparison["table"], comparison["published"]) == ("A", 3, 56.24)


def test_curves_of_report_b_stand_beside_its_rows(functasets, tmp_path):
    """At 100 epochs and so on; here the epochs are short ones."""
    result = classified(tmp_path, "cifar10-b-mlp1", epochs=200, batch_size=300, evaluate_every=50, widths=(8,))
    found = {(c["quantity"], c["published"]) for c in result["comparisons"]}
    assert found == {
        ("test accuracy after 100 epochs", 0.4109),
        ("train accuracy after 100 epochs", 0.4870),
        ("test accuracy after 200 epochs", 0.4230),
        ("train accuracy after 200 epochs", 0.5730),
    }
    assert {c["table"] for c in result["comparisons"]} == {3}


@pytest.mark.parametrize("name", classify.PRESETS)
def test_presets_fit_together(name):
    preset = classify.PRESETS[name].config
    classify._check(preset, per_epoch=5)
    assert (preset.head == "mlp") == ("spatial" not in preset.functaset)
    if preset.table_b:
        epochs = set(table("B", preset.table_b).column("epoch"))
        assert set(range(preset.curve_every, preset.epochs + 1, preset.curve_every)) <= epochs


def test_published_settings_are_those_of_the_reports():
    a = classify.PRESETS["mnist"].config
    assert (a.widths, a.dropout, a.activation) == ((1024,), 0.2, "silu")
    assert (a.optimizer, a.learning_rate, a.weight_decay, a.label_smoothing) == ("adamw", 1e-3, 0.1, 0.1)
    assert (a.batch_size, a.epochs) == (256, 100)
    for name, widths, decay in (("mlp1", (256, 128), 0), ("mlp2", (256, 128, 64), 0), ("mlp1-decay", (256, 128), 1e-4)):
        b = classify.PRESETS[f"cifar10-b-{name}"].config
        assert (b.widths, b.activation, b.dropout, b.label_smoothing) == (widths, "relu", 0, 0)
        assert (b.optimizer, b.learning_rate, b.batch_size, b.weight_decay) == ("adam", 1e-3, 128, decay)


def test_bad_requests_are_refused_before_training(functasets, tmp_path):
    with pytest.raises(ValueError, match=r"copies=3, but .* has 1 augmented copies"):
        classified(tmp_path, "tiny", copies=3)
    with pytest.raises(ValueError, match="batch_size=301 is more than there are train images"):
        classified(tmp_path, "tiny", batch_size=301)
    with pytest.raises(ValueError, match="curve_every=7 is not a multiple of evaluate_every=5"):
        classified(tmp_path, "tiny", curve_every=7)
    directory, result = functasets["tiny-0"]
    result["metrics"]["model"] = "other"
    with pytest.raises(files.FunctasetError, match=r"train.npz was made by the model m, not by other"):
        classified(tmp_path, "tiny")
    result["config"]["splits"] = ["train", "test"]
    with pytest.raises(ValueError, match="'tiny-0' has no validation split"):
        classified(tmp_path, "tiny")
    shutil.rmtree(directory)


def test_a_missing_functaset_comes_with_its_command(tmp_path):
    with pytest.raises(RunError, match=r"First run: python -m experiments run functaset mnist --runs-dir"):
        classified(tmp_path, "mnist")
    assert runs.read_result(tmp_path / "classify" / "mnist-0") is None
