"""A structurally pruned CNN is an ordinary module: measured or trained, it gives what the cut program gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models.lenet import LeNet
from experiments.models.resnet import ResNet
from experiments.models.vgg import VGG
from experiments.models.widths import narrow_cnn
from prune_jax.graph import apply_plan, dependency_groups, prune, smaller_function

IMAGES = np.random.default_rng(1).standard_normal((4, 8, 8, 3)).astype(np.float32)
CNNS = {
    "lenet": LeNet(classes=3, features=(4, 6, 8), hidden=5, kernel_size=3, padding="SAME"),
    "vgg": VGG(((4,), (6, 8)), classes=3, hidden=(6, 5)),
    "vgg-plain": VGG(((4,), (6, 8)), classes=3, norm=False, hidden=()),
    "resnet-padded": ResNet((2, 1, 2), 4, classes=3),
    "resnet-projected": ResNet((1, 2), 4, projection=True, classes=3),
    "bottleneck-padded": ResNet((2, 1), 4, bottleneck=True, classes=3),
    "bottleneck-projected": ResNet((1, 2), 4, bottleneck=True, projection=True, classes=3),
}


def start(model):
    """Variables without the zeros and ones of a fresh initialisation, which would hide mistakes."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    return jax.tree.map(lambda x: 0.2 + np.abs(rng.standard_normal(x.shape).astype(np.float32)) * 0.3, shapes) | {
        "params": jax.tree.map(lambda x: 0.5 * rng.standard_normal(x.shape).astype(np.float32), shapes["params"])
    }


def check(model, variables, pruned):
    """Measured and trained, the narrow module is the cut program."""

    def close(ours, theirs):
        scale = max(1.0, float(jnp.abs(theirs).max()))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * scale)

    def train(model):
        return lambda variables, x: model.apply(variables, x, train=True, mutable=["batch_stats"])

    small = narrow_cnn(model, pruned.plan)
    shapes = jax.eval_shape(small.init, jax.random.key(0), IMAGES)
    assert jax.tree.map(np.shape, pruned.params) == jax.tree.map(np.shape, shapes)
    close(jax.jit(small.apply)(pruned.params, IMAGES), jax.jit(pruned.fn)(pruned.params, IMAGES))
    program = smaller_function(train(model), variables, pruned.plan, free_output=lambda path: "batch_stats" in path)
    jax.tree.map(close, jax.jit(train(small))(pruned.params, IMAGES), jax.jit(program)(pruned.params, IMAGES))


@pytest.mark.parametrize("name", CNNS)
def test_a_cut_cnn_is_an_ordinary_cnn(name) -> None:
    model = CNNS[name]
    variables = start(model)
    pruned = prune(model.apply, variables, IMAGES, ratio=0.5)
    assert narrow_cnn(model, pruned.plan) != model
    check(model, variables, pruned)


def test_a_shortcut_stays_projected_where_its_ends_come_to_be_equally_wide() -> None:
    model = CNNS["bottleneck-projected"]
    variables = start(model)
    groups = dependency_groups(model.apply, variables, IMAGES)
    (stage,) = (
        g for g in groups if any(m.path == "params/stage1_block1/conv3/kernel" and m.axis == 3 for m in g.members)
    )
    pruned = prune(model.apply, variables, IMAGES, ratio={stage.tie: 0.75})
    small = narrow_cnn(model, pruned.plan)
    assert small.features == small.block_widths[0][0][-1] == 4
    check(model, variables, pruned)


def test_channels_of_padded_stages_go_together() -> None:
    model = CNNS["resnet-padded"]
    small = narrow_cnn(model, prune(model.apply, start(model), IMAGES, ratio=0.5, scope="local").plan)
    assert small.features == 2
    assert [stage[0][-1] for stage in small.block_widths] == [2, 4, 8]


def test_what_does_not_fit_is_refused() -> None:
    plan = prune(CNNS["lenet"].apply, start(CNNS["lenet"]), IMAGES, ratio=0.5).plan
    with pytest.raises(
        ValueError, match="plan is not one of this model: it lists no leaf 'params/stage1_block1/conv1/"
    ):
        narrow_cnn(CNNS["resnet-padded"], plan)
    model = ResNet((2, 1), 4, widths=(((4, 4),), ((8, 8),)))
    with pytest.raises(ValueError, match=r"widths must name 2 for each of blocks=\(2, 1\), got \(\(\(4, 4\),\), "):
        jax.eval_shape(model.init, jax.random.key(0), IMAGES)


@pytest.mark.slow
def test_a_cut_cnn_trains_as_the_dense_one_with_its_channels_silent() -> None:
    model = VGG(((4, 6),), classes=3, hidden=(5,))
    x = jax.random.normal(jax.random.key(0), (8, 4, 4, 2))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    pruned = prune(model.apply, variables, x, ratio=0.5, scope="local")
    small = narrow_cnn(model, pruned.plan)

    lost = {}
    for group in dependency_groups(model.apply, variables, x):
        for member in group.members:
            entry = next(e for e in pruned.plan["leaves"] if "/".join(e["path"]) == member.path)
            keep = next(k for k in entry["keep"] if k["axis"] == member.axis)["positions"]
            lost[member.path, member.axis] = np.setdiff1d(np.arange(entry["shape"][member.axis]), keep)
    silent = jax.tree.map(np.array, variables)
    for (path, axis), positions in lost.items():
        leaf = silent
        for key in path.split("/"):
            leaf = leaf[key]
        if path.startswith("params"):
            leaf[(slice(None),) * axis + (positions,)] = 0
    wanted, stats = model.apply(silent, x, train=True, mutable=["batch_stats"])
    got, updated = small.apply(pruned.params, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    wanted_stats = apply_plan(pruned.plan, {**variables, **stats})["batch_stats"]
    for ours, theirs in zip(jax.tree.leaves(updated["batch_stats"]), jax.tree.leaves(wanted_stats), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
