"""The DessiLBI studies: presets that fit together, the reports' settings as published, resumption, figures."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from study_runs import check_figures_come_from_the_logs, run_preset

from experiments import cut, optimizers, path_config, path_records, path_study, path_tables
from experiments.models.resnet import ResNet
from experiments.models.vgg import VGG
from experiments.published import published, table
from experiments.studies import dessilbi_cifar10, dessilbi_mnist
from experiments.training import Plan

EXAMPLES = {"mnist": (54_000, (28, 28, 1)), "cifar10": (45_000, (32, 32, 3)), "digits": (1_294, (8, 8, 1))}
PRESETS = {
    **{f"mnist {name}": preset.config for name, preset in dessilbi_mnist.PRESETS.items()},
    **{f"cifar10 {name}": preset.config for name, preset in dessilbi_cifar10.PRESETS.items()},
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_fits_together(name: str) -> None:
    preset = PRESETS[name]
    examples, image = EXAMPLES[preset.dataset]
    examples = min(examples, preset.images or examples)
    per_call = max(1, examples // preset.batch_size // 8)
    Plan(100, preset.batch_size, per_call, 8 * per_call, 8 * per_call).check(examples, devices=1)
    model = path_config.MODELS[preset.model]()
    shapes = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, *image))), jax.random.key(0))
    path_config.check(preset, shapes["params"])
    layers = set(cut.layers_of(shapes["params"]))
    assert {preset.kernels, *preset.features} <= layers


def test_report_settings_are_as_published() -> None:
    a = dessilbi_mnist.PRESETS["report-a"].config
    row = dict(epochs=a.epochs, **{"batch size": a.batch_size, "kappa": a.kappa, "mu": a.mu})
    assert row == {name: published("A", 9, row=30, column=name) for name in row}
    assert a.momentum == 0  # "vanilla" in the heading, and no momentum named
    for name, rate in (("resnet50", "3E-4 for ResNet50"), ("vgg19", "1E-5 for VGG19")):
        c = dessilbi_cifar10.PRESETS[name].config
        row = dict(epochs=c.epochs, **{"batch size": c.batch_size, "kappa": c.kappa, "mu": c.adam_mu})
        assert row == {name: published("A", 11, row=30, column=name) for name in row}
        assert rate in table("A", 11).note
        assert c.adam_rate == float(rate.split()[0])
        assert c.schedule == "constant"
    for presets in (dessilbi_mnist.PRESETS, dessilbi_cifar10.PRESETS):
        b = presets["report-b"].config
        assert (b.epochs, b.batch_size, b.kappa, b.mu, b.learning_rate) == (20, 128, 1.0, 10.0, 0.01)
        assert (b.momentum, b.adam_rate, b.schedule) == (0, 0.01, "step")


def test_the_rates_of_the_reports_fall_as_published() -> None:
    """Both divide by ten every 20 epochs; A's formula, read literally, starts at 1, and 0.1 is what it means."""
    assert published("A", 9, row=30, column="learning rate") == "0.1**(epoch//20)"
    for name, start in (("report-a", 0.1), ("report-b", 0.01)):
        preset = dessilbi_mnist.PRESETS[name].config
        rate = optimizers.schedule(preset.schedule, preset.learning_rate, steps=300, steps_per_epoch=10)
        for epoch in range(30):
            for step in (10 * epoch, 10 * epoch + 9):
                assert float(rate(step)) == pytest.approx(start * 0.1 ** (epoch // 20))


def test_layers_that_are_not_there_are_refused() -> None:
    preset = dataclasses.replace(dessilbi_mnist.PRESETS["tiny"].config, prune=("conv4",))
    model = path_config.MODELS[preset.model]()
    shapes = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 8, 8, 1))), jax.random.key(0))
    with pytest.raises(ValueError, match="unknown layer of lenet-digits 'conv4'; did you mean 'conv"):
        path_config.check(preset, shapes["params"])
    preset = dataclasses.replace(preset, prune=("conv3",), total=None)
    with pytest.raises(ValueError, match=r"fractions must be in \[0, 1\), got \(1.0,\)"):
        path_config.check(dataclasses.replace(preset, fractions=(1.0,)), shapes["params"])
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        path_config.check(dataclasses.replace(preset, seeds=0), shapes["params"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    return run_preset(tmp_path_factory.mktemp("runs"), "dessilbi-mnist")


@pytest.mark.slow
def test_every_arm_and_seed_has_its_record(tiny: tuple[Path, dict]) -> None:
    directory, result = tiny
    arms = result["metrics"]["arms"]
    assert list(arms) == ["sgd", "dessilbi"]
    for arm, records in arms.items():
        for seed, record in enumerate(records):
            assert json.loads((directory / f"{arm}-{seed}" / "record.json").read_text()) == record
            first = record["cut"]["conv3"][0]
            assert (first["fraction"], first["removed"]) == (0, 0)
            assert first["accuracy"] == record["accuracy"]
            assert record["cut"]["conv3"][1]["removed"] < record["cut"]["conv3+fc1"][1]["removed"] <= 0.5
            assert record["total"]["removed"] >= 0.825
            assert list(record["each_layer"]) == ["conv1", "conv2", "conv3", "fc1", "fc2"]
    assert arms["dessilbi"][0] != arms["dessilbi"][1]


@pytest.mark.slow
def test_finished_parts_are_not_trained_again(tiny: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, result = tiny
    (directory / "result.json").unlink()

    def fit(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(path_study.training, "fit", fit)
    _, again = run_preset(directory.parent.parent, "dessilbi-mnist")
    assert again["metrics"] == result["metrics"]


@pytest.mark.slow
def test_figures_are_drawn_from_the_logs_alone(tiny: tuple[Path, dict]) -> None:
    directory, result = tiny
    check_figures_come_from_the_logs(dessilbi_mnist.draw, directory, result)


def _records(preset: path_config.Config, layers: list[str]) -> dict:
    """Records as a run would leave them, the accuracy after cutting p % being 100 - p."""
    cuts = [{"fraction": f, "removed": f, "accuracy": 100 - 100 * f, "retrained": 99.0} for f in preset.fractions]
    record = {
        "accuracy": 99.0,
        "support_removed": 0.5,
        "support_accuracy": 98.0,
        "cut": dict.fromkeys(preset.prune, cuts),
        "each_layer": {layer: {"accuracy": 90.0, "retrained": 95.0} for layer in layers},
        "total": {"fraction": 0.9, "removed": 0.83, "accuracy": 97.0, "retrained": 98.0},
        "train_seconds": 1.0,
    }
    return {arm: [record] * preset.seeds for arm in preset.arms}


@pytest.mark.parametrize(
    ("study", "name", "tables"),
    [
        (dessilbi_mnist, "lenet", {("B", 8): 3, ("A", 10): 12, ("B", 10): 5, ("B", 11): 5, ("papers", "DessiLBI"): 1}),
        (dessilbi_cifar10, "vgg-a-bn-cpu", {("B", 9): 1, ("B", 12): 5, ("B", 13): 8}),
        (dessilbi_cifar10, "vgg-a-bn-quarter", {("B", 9): 3, ("B", 12): 5, ("B", 13): 8}),
        (dessilbi_cifar10, "resnet50", {}),
    ],
)
def test_comparisons_are_with_the_right_cells(study, name, tables, monkeypatch) -> None:
    preset = study.PRESETS[name].config
    layers = [f"conv{i}" for i in range(1, 9 if study is dessilbi_cifar10 else 4)] + ["fc1", "fc2", "fc3"]
    records = _records(preset, layers if study is dessilbi_cifar10 else layers[:-1])
    monkeypatch.setattr(path_study, "run", lambda config, run: records)
    content = study.run(preset, None)
    cited = [(c["report"], c["table"]) for c in content["comparisons"]]
    assert {one: cited.count(one) for one in cited} == tables
    for c in content["comparisons"]:
        if "percent" in c:
            assert c["ours"] == pytest.approx(100 - c["percent"])
            column = {"conv3": "conv3: accuracy, %", "conv3+fc1": "conv3 + fc1: accuracy, %"}[c["cut"]]
            column = column if c["report"] == "A" else "accuracy, %"
            assert c["published"] == published(c["report"], c["table"], row=round(c["percent"]), column=column)
    assert all(len(row) == len(content["table"]["columns"]) for row in content["table"]["rows"])


def test_notes_say_how_an_arm_was_trained(monkeypatch) -> None:
    preset = dessilbi_mnist.PRESETS["lenet"].config
    records = _records(preset, ["conv1", "conv2", "conv3", "fc1", "fc2"])
    monkeypatch.setattr(path_study, "run", lambda config, run: records)
    content = dessilbi_mnist.run(preset, None)
    notes = {c["setting"]: c["note"] for c in content["comparisons"] if c["table"] == 8}
    assert notes["DessiLBI"].endswith("from 0.05, mu and thresholds (filters; weights) 10; 2.5, 0.2.")
    assert notes["DessiLBI+Adam"].endswith("from 0.002, mu and thresholds (filters; weights) 1.25; 1, 0.1.")
    assert notes["Adam"].endswith("linear schedule from 0.002.")
    assert content["table"]["rows"][1] == [
        "mu; thresholds of filters, of weights", None, None, "10; 2.5, 0.2", None, "1.25; 1, 0.1"
    ]  # fmt: skip


def test_feature_maps_are_what_the_next_layer_sees() -> None:
    # A plain convolution's is rectified, a normalised one's after its normalisation, a block's last with the shortcut.
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))

    def variables(model, key=1):
        drawn = model.init(jax.random.key(key), x)
        noisy = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(jax.random.key(7), w.shape), drawn)
        return {**noisy, "batch_stats": jax.tree.map(jnp.abs, noisy.get("batch_stats", {}))}

    def conv(x, kernel, bias=0.0):
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return np.asarray(y) + np.asarray(bias)

    def norm(x, name, of):
        p, s = (jax.device_get(of[collection][name]) for collection in ("params", "batch_stats"))
        return (x - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]

    def rectified(x):
        return np.maximum(x, 0)

    for normalised in (False, True):
        model = VGG(((4,),), norm=normalised, hidden=())
        v = variables(model)
        y = conv(x, v["params"]["conv1"]["kernel"], v["params"]["conv1"]["bias"])
        expected = rectified(norm(y, "norm1", v) if normalised else y)
        found = path_records.feature_maps(model, v, x, ["conv1"])["conv1"]
        assert found == pytest.approx(expected, abs=1e-5)

    model = ResNet((1,), 4)
    v = variables(model)
    stem = rectified(norm(conv(x, v["params"]["conv1"]["kernel"]), "norm1", v))
    block = {name: v[name]["stage1_block1"] for name in ("params", "batch_stats")}
    inner = rectified(norm(conv(stem, block["params"]["conv1"]["kernel"]), "norm1", block))
    outer = rectified(norm(conv(inner, block["params"]["conv2"]["kernel"]), "norm2", block) + stem)
    found = path_records.feature_maps(model, v, x, ["conv1", "stage1_block1/conv1", "stage1_block1/conv2"])
    for name, expected in zip(found, (stem, inner, outer), strict=True):
        assert found[name] == pytest.approx(expected, abs=1e-5), name


def test_several_seeds_are_mean_and_deviation() -> None:
    records = [{"accuracy": 98.0}, {"accuracy": 99.0}]
    assert path_tables.mean(records, "accuracy") == 98.5
    assert path_tables.value_of({"removed": 0.25}, "removed") == 25
    assert path_tables.value_of({}, "support_accuracy") is None
