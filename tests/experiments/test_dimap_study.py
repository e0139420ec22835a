"""The dimap study: rankings by hand, modules that add up, nothing auxiliary cut, figures from the result."""

import dataclasses
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from study_runs import check_figures_come_from_the_logs, run_preset

from experiments import finetuning
from experiments.published import published_number
from experiments.studies import dimap, vit
from experiments.studies.vit_presets import PRESETS as BASES


@pytest.mark.parametrize("name", dimap.PRESETS)
def test_every_preset_has_its_base(name: str) -> None:
    preset = dimap.PRESETS[name].config
    dimap.check(preset)
    assert BASES[preset.base.removesuffix("-0")].config.model == "swin"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ()}, "methods must name at least one of uniform, global, lamp, dimap"),
        ({"sparsities": (0.5, 1.0)}, r"sparsities must be some fractions removed, in \[0, 1\), got \(0.5, 1.0\)"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dimap.check(dataclasses.replace(dimap.PRESETS["tiny"].config, **changes))


@pytest.fixture(scope="module")
def params() -> dict:
    config = BASES["tiny-swin"].config
    model = vit.Swin(3, patch=config.patch, window=2, width=8, depths=(1, 2), heads=(1, 2))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(draw.normal(size=s.shape) * draw.uniform(0.5, 2), jnp.float32), shapes)


@pytest.mark.parametrize("method", dimap.ALL)
def test_rankings_by_hand(params: dict, method: dimap.Method) -> None:
    masks = flax.traverse_util.flatten_dict(dimap.masks_of(method, params, 0.6), sep="/")
    leaves = flax.traverse_util.flatten_dict(params, sep="/")
    pruned = {path: np.asarray(leaves[path], np.float64) for path, mask in masks.items() if mask is not None}
    assert len(pruned) == 3 * 4  # qkv, proj, fc1 and fc2 of three blocks; no norm, embedding, merging, head, bias
    assert all("/kernel" in path and "blocks_" in path for path in pruned)

    def distortion(w: np.ndarray) -> np.ndarray:
        squares = np.sort(w.ravel() ** 2)
        return np.array([x**2 / squares[squares >= x**2].sum() for x in w.ravel()]).reshape(w.shape)

    score = np.abs if method in ("uniform", "global") else distortion
    group = {
        "uniform": lambda path: path,
        "global": lambda path: "",
        "lamp": lambda path: "",
        "dimap": lambda path: path.split("/")[-2].replace("fc1", "mlp").replace("fc2", "mlp"),
    }[method]
    for name in {group(path) for path in pruned}:
        members = [path for path in pruned if group(path) == name]
        values = np.concatenate([score(pruned[path]).ravel() for path in members])
        kept = np.concatenate([np.asarray(masks[path]).ravel() for path in members])
        assert (~kept).sum() == int(0.6 * len(values))
        assert values[~kept].max() <= values[kept].min() * (1 + 1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run_preset(folder, "vit", "tiny-swin")
    return folder


@pytest.mark.slow
def test_modules_add_up_and_training_keeps_the_zeros(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, result = run_preset(folder, "dimap")
    check_figures_come_from_the_logs(dimap.draw, directory, result)
    metrics = result["metrics"]
    assert sum(metrics["modules"].values()) == metrics["base_parameters"]
    for part in metrics["parts"]:
        assert part["modules"]["aux"] == 0
        removed = sum(part["modules"][name] * size for name, size in metrics["modules"].items())
        assert part["parameters"] + round(removed) == metrics["base_parameters"]
        assert part["flops"] < metrics["base_flops"]
    by_dimap = metrics["parts"][1]
    assert [by_dimap["modules"][name] for name in ("qkv", "prj", "mlp")] == pytest.approx([0.5] * 3)
    # What is recorded is not trained again.
    (directory / "result.json").unlink()
    monkeypatch.setattr(finetuning, "finetune", lambda *_, **__: pytest.fail("trained again"))
    assert run_preset(folder, "dimap")[1]["metrics"] == metrics


@pytest.mark.slow
def test_a_base_that_is_no_swin_is_refused(folder: Path) -> None:
    run_preset(folder, "vit", "tiny")
    with pytest.raises(ValueError, match="base must be a Swin, got 'tiny-0', a vit"):
        run_preset(folder, "dimap", base="tiny-0", seed=1)


def test_comparisons_are_with_the_right_cells() -> None:
    part = {"method": "dimap", "sparsity": 0.5, "flops": 50, "after": {"accuracy": 59.0, "top5_accuracy": 95.0}}
    metrics = {"base": {"accuracy": 60.0, "top5_accuracy": 96.5}, "base_flops": 100, "parts": [part]}

    class Base:
        config = BASES["swin-cpu"].config

    found = dimap._comparisons(dimap.Config(), Base(), metrics)  # type: ignore[arg-type]
    assert [(c["table"], c["ours"], round(c["published"], 2)) for c in found] == [
        ("top-1", -1.0, -0.2),
        ("top-1", -1.0, -0.81),
        ("top-5", -1.5, published_number("D", "top-5", row="Swin-B", column="top-5 change, %")),
    ]
