"""The study of token methods: all of them on a tiny ViT, taken up again where it stopped, its figures and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from study_runs import check_figures_come_from_the_logs, run_preset

from experiments import token_skipping, token_training, training
from experiments.config import Options
from experiments.parts import part
from experiments.runs import Run
from experiments.studies import token_pruning
from experiments.studies.token_presets import PRESETS
from experiments.token_figures import decided, names
from experiments.token_methods import TITLES, reaches, stages
from experiments.token_training import classifier
from experiments.trained import Base
from prune_jax.models import ViT
from prune_jax.tokens import PatchSkip, Skipping


@pytest.mark.slow
def test_all_methods_on_a_tiny_vit(tmp_path) -> None:
    run_preset(tmp_path, "vit")
    directory, result = run_preset(tmp_path, "token-pruning")
    check_figures_come_from_the_logs(token_pruning.draw, directory, result)
    metrics = result["metrics"]
    found = {(row["series"], row["trained"]) for row in metrics["rows"]}
    assert {series for series, _ in found} == set(TITLES)
    assert {"none", "classifier", "joint", "ViT"} == {trained for _, trained in found}
    assert {series for series, trained in found if trained == "ViT"} == set(TITLES) - {"dynamic"}
    assert [row["keep"] for row in metrics["rows"] if row["trained"] == "joint"] == [0.75, 0.5]
    for row in metrics["rows"]:
        assert row["flops"] < metrics["dense"]["flops"]
        assert 0 <= row["accuracy"] <= row["top5_accuracy"] <= 100
        assert ("latency" in row) == (row["trained"] == "none")
    check_thresholds(metrics)
    # what is recorded is not made again
    (directory / "result.json").unlink()
    again = run_preset(tmp_path, "token-pruning")[1]
    assert again["metrics"] == metrics


def test_joint_training_goes_on_from_the_next_larger_keep_rate(tmp_path, monkeypatch) -> None:
    study = object.__new__(token_pruning._Study)
    study.config = dataclasses.replace(PRESETS["tiny"].config, joint=(0.2, 0.8, 0.5))
    study.run = Run("token-pruning", "tiny", tmp_path, Options(), rich.console.Console(quiet=True), ())
    study.model, study.base, study.predictors = ViT(num_classes=3, image_size=8, patch=2, depth=4), None, ["predictors"]
    monkeypatch.setattr(
        token_training, "train", lambda own, base, start, *_, seed: [*start, (own.directory.name, seed)]
    )
    learned = study._joint(0.2, part(study.run, "joint-0.2"))
    assert learned == ["predictors", ("joint-0.8", 0), ("joint-0.5", 0), ("joint-0.2", 0)]


@pytest.mark.parametrize(("depth", "blocks"), [(12, (3, 6, 9)), (6, (2, 3, 5)), (4, (1, 2, 3)), (2, (1,)), (1, (0,))])
def test_dynamic_vit_decides_once_each_quarter_has_run(depth, blocks) -> None:
    assert stages(ViT(num_classes=3, image_size=8, patch=2, depth=depth)) == blocks


def check_thresholds(metrics: dict) -> None:
    """Each threshold stands for itself, and beside it the form that computes less, with numbers of its own."""
    forms = [(row["attend"], row["form"]) for row in metrics["thresholds"]]
    assert forms == [(attend, form) for attend in ("kept", "all") for form in ("threshold", "capacity")]
    for row in metrics["thresholds"]:
        assert 0 <= row["patches_skipped"] <= 16
        assert ("latency" in row) == (row["form"] == "capacity")
        assert (row["flops"] >= metrics["dense"]["flops"]) == (
            row["form"] == "threshold" or row["patches_skipped"] == 0
        )
    for scorer in metrics["similarity"]["scorers"].values():
        for share, commoner in zip(scorer["keep_share"], scorer["commoner"], strict=True):
            assert commoner == max(share, 1 - share)
        assert all(0 <= x <= 1 for x in (*scorer["accuracy"], *scorer["balanced_accuracy"]))


def test_scorers_learn_what_the_commoner_answer_cannot_say(tmp_path) -> None:
    """On a dense run of made-up tokens, whose first channel says what a block does to a patch."""
    model = ViT(num_classes=3, image_size=8, patch=2, width=24, depth=2, heads=2)
    method = PatchSkip(model, hidden=16)
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((128, 2, 8, 24)).astype(np.float32)
    similarity = np.where(tokens[..., 0] > 0.5, 0.9, 0.99).astype(np.float32)
    seen = {"tokens": tokens, "means": tokens.mean(axis=2), "similarity": similarity}
    params = jax.jit(method.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    run = Run("token-pruning", "tiny", tmp_path, Options(), rich.console.Console(quiet=True), ())
    base = Base(model, params["model"], None, None, None, None, None, {}, training.data_mesh())
    plan = token_skipping.Plan(steps=160, batch_size=32, learning_rate=3e-2)
    learned = token_skipping.learn(run, base, method, params, seen, 0.95, plan, seed=0)
    scores = method.apply({"params": learned}, tokens, seen["means"], method="score")
    found = token_skipping.quality(Skipping(scores, similarity), 0.95)
    assert learned["model"] is params["model"]
    assert min(found["accuracy"]) > max(found["commoner"]) + 0.05
    assert min(found["balanced_accuracy"]) > 0.8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_rates": (0.5, 0.0)}, r"keep_rates must be above 0 and at most 1, got \[0.0\]"),
        ({"joint": (1.5,)}, "joint must be above 0 and at most 1"),
        ({"cosine_thresholds": (1.0,)}, "cosine_thresholds must be between 0 and 1"),
        ({"series": ()}, "need at least one entry"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"scorer_steps": 0}, "scorer_steps must be at least 1, got 0"),
        ({"series": ("tome", "top")}, r"series must be among tome, .*, got \['top'\]"),
        ({"timed": (0.5, 0.55)}, r"timed must be among the keep_rates \(0.5,\), got \[0.55\]"),
        ({"predictor_keep": 0.0}, "predictor_keep must be above 0 and at most 1, got 0.0"),
        ({"own_learning_rate": -1.0}, "own_learning_rate must be above 0 and finite, got -1.0"),
        ({"joint_epochs": 0.0}, "joint_epochs must be above 0 and finite, got 0.0"),
        ({"batches": (1, 0)}, r"batches must be at least 1, got \[0\]"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"test_images": 0}, "test_images must be at least 1, or None for all, got 0"),
    ],
)
def test_wrong_numbers_are_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        token_pruning.check(dataclasses.replace(PRESETS["tiny"].config, **changes))


def test_presets_are_not_refused() -> None:
    for preset in PRESETS.values():
        token_pruning.check(preset.config)


def test_keep_rates_that_no_method_reaches_are_refused() -> None:
    """Two blocks that merge leave at least 8 + 4 of 16 patches twice."""
    model = ViT(num_classes=3, image_size=8, patch=2, width=8, depth=2, heads=2)
    low = dataclasses.replace(PRESETS["tiny"].config, series=("tome",), keep_rates=(0.1,), timed=(0.1,))
    with pytest.raises(ValueError, match=r"keep_rates must have one .* at least 0.375 of the patches, got \(0.1,\)"):
        token_pruning.check_reach(low, model)
    with pytest.raises(ValueError, match=r"timed must be reached by a method: .*, got \[0.1\]"):
        token_pruning.check_reach(dataclasses.replace(low, keep_rates=(0.5, 0.1)), model)
    token_pruning.check_reach(dataclasses.replace(low, keep_rates=(0.5, 0.1), timed=(0.5,)), model)
    token_pruning.check_reach(dataclasses.replace(low, series=("tome", "cp")), model)


def test_only_figures_with_something_to_show_are_named() -> None:
    config = dataclasses.replace(PRESETS["tiny"].config, series=("tome", "cp"))
    found = names(config, [{"latency": {}}, {}], ["cp-0.5"])
    assert found == ["flops.png", "tokens.png", "cascade.png", "attention.png", "informativeness.png"]
    assert {"latency.png", "merged.png"} < set(names(config, [{"latency": {"1": {}}}], ["tome-0.5"]))


def test_a_distilled_vit_has_two_classifiers() -> None:
    paths = ("class_head/kernel", "distillation_head/bias", "blocks_0/norm1/scale", "class_token")
    assert [classifier(f"model/{path}") for path in paths] == [True, True, False, False]
    assert not classifier("predictors_0/out/kernel")


def test_pictures_show_who_carries_a_patch() -> None:
    image = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1)
    owner = np.array([[0, 0, -1, 3]])
    drawn = decided(image, owner, (2, 2))[0, ..., 0]
    np.testing.assert_array_equal(drawn[:2, :2], drawn[:2, 2:])
    np.testing.assert_array_equal(drawn[:2, :2], [[1, 2], [5, 6]])
    assert (drawn[2:, :2] == 221).all()
    np.testing.assert_array_equal(drawn[2:, 2:], image[0, 2:, 2:, 0])
    assert decided(np.zeros((1, 5, 5, 3), np.uint8), np.zeros((1, 4), int), (2, 2)).shape == (1, 16, 16, 3)


def test_merging_reaches_what_halving_leaves() -> None:
    model = ViT(num_classes=3, image_size=8, patch=2, width=8, depth=2, heads=2)
    assert reaches("tome", 0.375, model)  # (8 + 4) / 32
    assert not reaches("tome", 0.3, model)
    assert reaches("cp", 0.3, model)
