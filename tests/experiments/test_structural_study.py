"""The study of structural pruning: its records are of the plans it keeps, its parts are kept, CNNs are cut as well."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from study_runs import check_figures_come_from_the_logs, run_preset

from experiments import config, structural, trained, training
from experiments.config import Options
from experiments.models.vgg import VGG
from experiments.runs import RunError
from experiments.studies import structural_pruning, vit
from prune_jax import flops
from prune_jax.graph import apply_plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished base, and its pruning in two of the arms."""
    folder = tmp_path_factory.mktemp("runs")
    run_preset(folder, "vit", depth=1, epochs=12)
    run_preset(folder, "structural-pruning", arms=("global", "regularised"), ways=("recovered", "distilled"))
    return folder


@pytest.mark.parametrize("name", structural_pruning.PRESETS)
def test_presets_have_their_base(name) -> None:
    preset = structural_pruning.PRESETS[name].config
    structural_pruning.check(preset)
    if preset.network == "trained":
        assert preset.base.rpartition("-")[0] in vit.PRESETS
    else:
        assert preset.network in structural.CNNS


@pytest.mark.slow
def test_records_are_of_the_plans_that_are_kept(folder) -> None:
    directory = folder / "structural-pruning" / "tiny-0"
    result = json.loads((directory / "result.json").read_text())
    base = trained.load_base(Options(runs_dir=folder), "tiny-0", training.data_mesh())
    dense, parts = result["metrics"]["dense"], result["metrics"]["parts"]
    assert [(p["arm"], p["ratio"], list(p["after"])) for p in parts] == [
        ("global", 0.5, ["recovered", "distilled"]),
        ("regularised", 0.5, ["recovered"]),
    ]
    assert dense["accuracy"] == pytest.approx(100 * base.result["metrics"]["test_accuracy"])
    plan = json.loads((directory / "global-0.5" / "plan.json").read_text())
    variables = apply_plan(plan, base.variables)
    found = base.measure_variables(variables, base.test, model=structural.cut_model(base, plan))
    assert parts[0]["cut"]["accuracy"] == pytest.approx(100 * found["accuracy"])
    assert parts[0]["parameters"] == sum(x.size for x in jax.tree.leaves(variables)) < dense["parameters"]
    assert parts[0]["flops"] < dense["flops"]
    widths = parts[0]["widths"]
    assert widths["class_head"] == 1
    kernel = variables["params"]["blocks_0"]["mlp"]["fc1"]["kernel"]
    assert widths["blocks_0/mlp/fc1"] == kernel.shape[1] / base.params["blocks_0"]["mlp"]["fc1"]["kernel"].shape[1]
    assert all(min(p["latency"].values()) > 0 for p in parts)
    assert len(result["table"]["rows"]) == 1 + 3
    assert result["comparisons"] == []  # report A has no digits


@pytest.mark.slow
def test_figures_and_finished_parts_are_kept(folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "runs")
    directory = tmp_path / "runs" / "structural-pruning" / "tiny-0"
    before = json.loads((directory / "result.json").read_text())
    check_figures_come_from_the_logs(structural_pruning.draw, directory, before)
    (directory / "result.json").unlink()
    kept = directory / "global-0.5" / "record.json"
    record = json.loads(kept.read_text())
    kept.write_text(json.dumps({**record, "parameters": 7}))
    again = run_preset(
        tmp_path / "runs", "structural-pruning", arms=("global", "regularised"), ways=("recovered", "distilled")
    )[1]
    first, second = before["metrics"]["parts"]
    assert again["metrics"]["parts"] == [first | {"parameters": 7}, second]  # and its latency, a part of its own


def test_the_published_tables_stand_beside_ours() -> None:
    asked = config.preset("structural-pruning", "cpu").config
    base = trained.Base(None, None, None, None, None, None, vit.PRESETS["cpu"].config, {}, None)  # type: ignore[arg-type]
    after = {"accuracy": 69.0, "top5_accuracy": 97.0}
    parts = [
        {"arm": "global", "ratio": 0.5, "parameters": 40, "after": {"recovered": after}},
        {"arm": "local", "ratio": 0.4, "parameters": 30, "after": {}},
        {"arm": "magnitude", "ratio": 0.5, "parameters": 40, "after": {"recovered": after}},
    ]
    (found,) = structural_pruning._comparisons(
        asked, base, {"dense": {"accuracy": 70.0, "parameters": 80}, "parts": parts}
    )
    assert (found["ours"], found["table"], found["setting"][:13]) == (1.0, 6, "cpu-0, global")
    assert found["published"] == pytest.approx(98.52 - 91.04)
    assert "ours 50%, the report's 35%" in found["note"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": (1.0,)}, r"ratios are fractions removed, in \[0, 1\), got \[1.0\]"),
        ({"finetuned": (0.2,)}, r"finetuned=\[0.2\] are not among ratios=\(0.5,\)"),
        ({"arms": ()}, "arms must name at least one of"),
        ({"sparse_strength": -1.0}, "sparse_strength must be at least 0"),
        ({"ridge": 0.0}, "ridge must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        run_preset(tmp_path, "structural-pruning", **changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": 10_000}, "calibration must be from 1 to the 128 train images"),
        ({"epochs": 0.0}, "epochs must be above 0"),
    ],
)
def test_what_does_not_fit_the_base_is_refused(folder, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        run_preset(folder, "structural-pruning", seed=1, **changes)


def test_it_needs_its_base(tmp_path) -> None:
    with pytest.raises(RunError, match="python -m experiments run vit tiny"):
        run_preset(tmp_path, "structural-pruning")


@pytest.mark.slow
def test_a_cnn_is_trained_then_cut(tmp_path) -> None:
    directory, result = run_preset(tmp_path, "structural-pruning", "tiny-cnn")
    (part,) = result["metrics"]["parts"]
    assert part["parameters"] < result["metrics"]["dense"]["parameters"]
    assert (directory / "base" / "metrics.jsonl").exists()
    assert list(part["after"]) == ["recovered"]


def test_flops_of_a_cnn_are_those_of_its_layers_not_of_how_a_cpu_computes_them() -> None:
    model = structural.computed(VGG(((8,), (16,)), classes=3, hidden=()), "xla")
    x = jnp.zeros((1, 8, 8, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    expected = 2 * (8 * 8 * 9 * 3 * 8 + 4 * 4 * 9 * 8 * 16 + 2 * 2 * 16 * 3)  # as if padding were computed
    assert flops(structural.evaluated(model), variables, x) == expected


def test_scores_of_a_cnn_leave_out_its_statistics() -> None:
    model = VGG(((4,),), classes=3, hidden=())
    x = jax.random.normal(jax.random.key(0), (4, 4, 4, 2))
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(1), x)
    base = trained.Base(
        model,
        variables["params"],
        None,
        None,
        None,
        None,
        None,
        {},
        None,
        variables["batch_stats"],  # type: ignore[arg-type]
    )
    labels = jnp.array([0, 1, 2, 0])
    scores = structural.taylor_scores(base, [(x, labels), (x, labels)])
    assert jax.tree.leaves(scores["batch_stats"]) == []
    assert jax.tree.map(jnp.shape, scores["params"]) == jax.tree.map(jnp.shape, variables["params"])
    one = structural.taylor_scores(base, [(x, labels)])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 2 * b, rtol=1e-5), scores["params"], one["params"])
