"""Studies of ViTs: the base, its averaged parameters and published weights; L1 penalties and pruning by size."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from study_runs import check_figures_come_from_the_logs, run_preset

from experiments import config, data, optimizers, trained, training
from experiments.config import Options
from experiments.runs import RunError
from experiments.studies import l1_pruning, l1_regularization, vit
from prune_jax.models import ViT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def base(folder):
    """A finished run of the base."""
    return run_preset(folder, "vit", average=0.5)


def test_a_base_is_trained_measured_and_loaded_again(folder, base) -> None:
    directory, result = base
    check_figures_come_from_the_logs(vit.draw, directory, result)
    loaded = trained.load_base(Options(runs_dir=folder), "tiny-0", training.data_mesh())
    assert isinstance(loaded.model, ViT)
    found = loaded.measure(loaded.params, loaded.test)
    assert found == {name: result["metrics"][f"test_{name}"] for name in found}
    # the same by hand
    logits = np.asarray(loaded.logits(loaded.prepare(jnp.asarray(loaded.test.images))))
    order = np.argsort(-logits, axis=1)
    assert found["accuracy"] == np.mean(order[:, 0] == loaded.test.labels)
    assert found["top5_accuracy"] == np.mean((order[:, :5] == loaded.test.labels[:, None]).any(1))


def test_studies_need_their_base(folder) -> None:
    with pytest.raises(RunError, match="python -m experiments run vit cpu"):
        trained.load_base(Options(runs_dir=folder), "cpu-0", training.data_mesh())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 10_000}, "batch_size must be from 1 to the 128 train images"),
        ({"average": 1.0}, r"average must be in \[0, 1\)"),
        ({"weights": "nowhere.npz", "size": "Ti"}, "weights='nowhere.npz' is no file"),
        ({"weights": __file__}, "needs size"),
    ],
)
def test_a_base_that_makes_no_sense(changes, message) -> None:
    asked = dataclasses.replace(config.preset("vit", "tiny").config, **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        vit.check(asked, 128)


def test_the_average_is_that_of_all_parameters() -> None:
    optimizer = optimizers.averaging(optax.sgd(0.5), 0.75)
    params = jnp.array([1.0, -2.0])
    state, seen = optimizer.init(params), [params]
    for gradient in (1.0, 4.0, -2.0):
        updates, state = optimizer.update(jnp.full(2, gradient), state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    shares = [0.75**3, 0.25 * 0.75**2, 0.25 * 0.75, 0.25]
    expected = sum(share * w for share, w in zip(shares, seen, strict=True))
    np.testing.assert_allclose(optimizers.average_of(state), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="params must be given"):
        optimizer.update(params, state)


@pytest.mark.slow
def test_pruning_by_size_keeps_its_masks_through_training(folder, base) -> None:
    del base
    directory, result = run_preset(folder, "l1-pruning")
    check_figures_come_from_the_logs(l1_pruning.draw, directory, result)
    nothing, half, everything = result["metrics"]["parts"]
    assert nothing["before"]["accuracy"] == pytest.approx(result["metrics"]["base"]["accuracy"])
    kernels = nothing["parameters"] - everything["parameters"]
    assert nothing["parameters"] == result["metrics"]["base_parameters"]
    assert half["parameters"] == nothing["parameters"] - kernels // 2
    assert set(everything["layers"].values()) == {1.0}
    # what is recorded is not trained again, and what is not is taken up again
    (directory / "result.json").unlink()
    again = run_preset(folder, "l1-pruning")[1]
    assert again["metrics"] == result["metrics"]


@pytest.mark.slow
def test_the_proximal_penalty_leaves_zeros(folder, base) -> None:
    del base
    directory, result = run_preset(folder, "l1-regularization")
    check_figures_come_from_the_logs(l1_regularization.draw, directory, result)
    without, strong = result["metrics"]["parts"]
    assert without["zero"] == 0 < strong["zero"] <= strong["near_zero"]
    assert strong["l1_norm"] < without["l1_norm"]
    for part in (without, strong):
        np.testing.assert_allclose(sum(part["histogram"]), 1, rtol=1e-6)
    assert json.loads((directory / "strength-0.05" / "record.json").read_text()) == strong


@pytest.mark.parametrize(
    ("study", "changes", "message"),
    [
        (l1_pruning, {"sparsities": (0.5, 1.5)}, "sparsities are fractions removed"),
        (l1_pruning, {"finetuned": (0.3,)}, "are not among sparsities"),
        (l1_regularization, {"strengths": (-1.0,)}, "strengths must be at least 0"),
        (l1_regularization, {"cut": (2.0,)}, "cut holds fractions removed"),
    ],
)
def test_wrong_numbers_are_refused(study, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        study.check(dataclasses.replace(study.PRESETS["tiny"].config, **changes))


def test_a_published_checkpoint_is_the_start(tmp_path) -> None:
    from safetensors.numpy import save_file

    asked = dataclasses.replace(config.preset("vit", "tiny").config, size="Ti", patch=4, image_size=8)
    train = data.load_splits(asked.dataset, images=asked.images)[0]
    model, optimizer = vit.build(asked, train), vit.make_optimizer(asked, len(train.labels))
    shapes = jax.eval_shape(lambda: vit.initial_state(asked, model, optimizer, train)).params
    assert shapes["embedding"]["kernel"].shape == (16, 192)
    save_file({"cls_token": np.zeros((1, 1, 192), np.float32)}, tmp_path / "cut.safetensors")
    broken = dataclasses.replace(asked, weights=str(tmp_path / "cut.safetensors"))
    with pytest.raises(ValueError, match=r"missing 'blocks\.0\.attn\.proj\.bias'"):
        vit.initial_state(broken, vit.build(broken, train), optimizer, train)
