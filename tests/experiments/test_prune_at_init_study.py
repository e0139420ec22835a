"""The prune-at-init study: presets that fit together, every part with its record, finished parts kept, figures."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from study_runs import check_figures_come_from_the_logs, run_preset

from experiments import foresight, training
from experiments.models.resnet import ResNet
from experiments.studies import prune_at_init as study
from experiments.training import Plan
from prune_jax import layer_statistics, sparsity

EXAMPLES = {"cifar10": (45_000, 32, 3), "digits": (1_294, 8, 1)}


@pytest.mark.parametrize("name", study.PRESETS)
def test_preset_fits_together(name: str) -> None:
    preset = study.PRESETS[name].config
    study.check(preset)
    examples, size, channels = EXAMPLES[preset.dataset]
    examples, size = min(examples, preset.images or examples), preset.image_size or size
    per_call = max(1, examples // preset.batch_size // 4)
    Plan(100, preset.batch_size, per_call, 4 * per_call, 4 * per_call).check(examples, devices=1)
    shape = jnp.zeros((1, size, size, channels))
    variables = jax.eval_shape(study.network(preset, 10).init, jax.random.key(0), shape)
    counts = {"resnet20": 269_722, "vgg19": 20_035_018 + 5_504}  # of the papers, and biases of the convolutions
    if preset.width == 1:
        assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == counts[preset.model]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsities": (1.0,)}, r"sparsities must be some numbers in \(0, 1\), got \(1.0,\)"),
        ({"trained": (0.7,)}, r"trained must be among sparsities=\(0.5, 0.9\), got \(0.7,\)"),
        ({"spectrum": 0.7}, r"spectrum must be among sparsities=\(0.5, 0.9\), got 0.7"),
        ({"methods": ()}, "methods must name at least one criterion"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"ntk_images": 9}, "ntk_images must be from 1 to score_images=8, got 9"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study.check(dataclasses.replace(study.PRESETS["tiny"].config, **changes))


@pytest.fixture(scope="module")
def initial() -> foresight.Initial:
    model = ResNet((1,), 4)
    inputs = jax.random.normal(jax.random.key(1), (6, 8, 8, 3))
    variables = jax.jit(model.init)(jax.random.key(0), inputs)
    labels = jnp.arange(6)
    return foresight.Initial(model, variables["params"], variables["batch_stats"], inputs, labels, jax.random.key(2))


def test_statistics_are_those_of_training(initial: foresight.Initial) -> None:
    @jax.jit
    def both(params):
        fixed = initial.logits(params, initial.inputs, initial.statistics(params))
        return fixed, initial.training_logits(params, initial.inputs)

    np.testing.assert_allclose(*both(initial.params), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", sorted(foresight.TITLES.keys() - {"dense"}))
def test_masks_have_the_sparsity_and_survive_the_file(
    initial: foresight.Initial, method: foresight.Method, tmp_path: Path
) -> None:
    path = tmp_path / "masks.npz"
    made = []

    def make():
        made.append(foresight.keep(initial, method, 0.75, rounds=3))
        return made[0]

    masks = foresight.kept_masks(path, initial.params, make)
    total = sum(layer.total for layer in layer_statistics(masks).values())
    assert sparsity(masks) == int(0.75 * total) / total
    again = foresight.kept_masks(path, initial.params, lambda: pytest.fail("made again"))
    for found in (masks, again):
        assert jax.tree.structure(found) == jax.tree.structure(made[0])
        jax.tree.map(np.testing.assert_array_equal, found, made[0])


@pytest.mark.parametrize("frozen", [False, True])
def test_spectrum_is_that_of_the_masked_kernel(initial: foresight.Initial, frozen: bool) -> None:
    masks = foresight.keep(initial, "magnitude", 0.5, rounds=1)
    found = foresight.spectrum(initial, masks, examples=3, frozen=frozen, chunk=2)
    masked = jax.tree.map(lambda w, m: w if m is None else w * m, initial.params, masks, is_leaf=lambda x: x is None)

    @jax.jit
    def trace(params):
        stats = initial.statistics(initial.params if frozen else masked)
        jacobian = jax.jacrev(lambda p: initial.logits(p, initial.inputs[:3], stats))(params)
        parts = jax.tree.map(
            lambda j, m: jnp.sum(jnp.square(j if m is None else j * m[None, None])),
            jacobian,
            masks,
            is_leaf=lambda x: x is None,
        )
        return sum(jax.tree.leaves(parts))

    # The trace is the sum of squares of the derivatives by all weights that may move.
    np.testing.assert_allclose(found.sum(), trace(masked), rtol=1e-4)
    assert found.shape == (30,)
    assert (np.diff(found) <= 1e-5 * found[0]).all()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    return run_preset(tmp_path_factory.mktemp("runs"), "prune-at-init")


@pytest.mark.slow
def test_every_part_has_its_record(tiny: tuple[Path, dict]) -> None:
    directory, result = tiny
    records = result["metrics"]["records"]
    assert [(r["method"], r["sparsity"]) for r in records] == [
        ("dense", 0.0),
        *((method, s) for s in (0.5, 0.9) for method in ("random", "snip", "px")),
    ]
    for record in records:
        name = f"{record['method']}-{record['sparsity']:g}"
        assert json.loads((directory / name / "record.json").read_text()) == record
        kept, total = (sum(record[key].values()) for key in ("kept", "total"))
        assert total - kept == int(record["sparsity"] * total)
        assert ("test_accuracy" in record) == ("spectrum_own" in record) == (record["sparsity"] != 0.5)
    assert len(records[0]["spectrum_frozen"]) == 30
    rows = result["table"]["rows"]
    assert [row[0] for row in rows] == ["dense", "random", "SNIP", "PX", "random", "SNIP", "PX"]
    assert rows[0][5:7] == [100, 100]


@pytest.mark.slow
def test_finished_parts_are_not_done_again(tiny: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, result = tiny
    (directory / "result.json").unlink()
    (directory / "px-0.5" / "record.json").unlink()
    monkeypatch.setattr(training, "fit", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(foresight, "keep", lambda *_: pytest.fail("pruned again"))
    _, again = run_preset(directory.parent.parent, "prune-at-init")
    found, before = (dict(r["metrics"]["records"][3], pruning_seconds=0) for r in (again, result))
    assert found == before


@pytest.mark.slow
def test_figures_are_drawn_from_the_result_alone(tiny: tuple[Path, dict]) -> None:
    directory, result = tiny
    check_figures_come_from_the_logs(study.draw, directory, result)


def test_layers_are_shown_from_the_input_on() -> None:
    names = ["conv1", "fc", "stage1_block1/conv1", "stage1_block1/conv2", "stage2_block1/conv1", "conv10", "conv2"]
    order = ["conv1", "conv2", "conv10", "stage1_block1/conv1", "stage1_block1/conv2", "stage2_block1/conv1", "fc"]
    assert study._in_order(names) == order
