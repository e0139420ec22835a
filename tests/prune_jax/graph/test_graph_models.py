"""The library's ViT and Swin: cutting is zeroing, and the cut network is an ordinary module of smaller widths."""

import jax
import numpy as np
import pytest
from graph_architectures import ARCHITECTURES
from graph_zeroing import check, size

from prune_jax import flops
from prune_jax.graph import dependency_groups, prune
from prune_jax.graph.select import size_of
from prune_jax.models import Swin, ViT, narrow

IMAGES = np.random.default_rng(1).standard_normal((2, 8, 8, 3)).astype(np.float32)
MODELS = {
    "vit": ViT(num_classes=3, image_size=8, patch=4, width=8, depth=2, heads=4, v_dim=6, pre_logits=5, distilled=True),
    "swin": Swin(num_classes=3, patch=2, window=2, width=(8, 12), depths=(2, 1), heads=(2, 4)),
}


def start(model):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("name", MODELS)
def test_cut_equals_zeroed(name):
    # zeroing is cutting only where nothing is normalised over a cut axis, so the residual stream stays whole
    model = MODELS[name]
    params = start(model)
    pruned = check(model.apply, params, IMAGES, ratio=0.5, scope="local", pin=lambda path: "norm" in path)
    assert size(pruned.params) < 0.8 * size(params)


@pytest.mark.parametrize("kinds", [("width",), ("width", "block")])
@pytest.mark.parametrize("name", MODELS)
def test_a_cut_model_is_an_ordinary_model(name, kinds):
    model = MODELS[name]
    params = start(model)
    pruned = prune(model.apply, params, IMAGES, ratio=0.5, scope="local", kinds=kinds)
    small = narrow(model, pruned.plan)
    assert small.block_widths != model.block_widths
    shapes = jax.eval_shape(small.init, jax.random.key(0), IMAGES)
    assert jax.tree.map(np.shape, pruned.params) == jax.tree.map(lambda x: x.shape, shapes)
    np.testing.assert_allclose(
        jax.jit(small.apply)(pruned.params, IMAGES), jax.jit(pruned.fn)(pruned.params, IMAGES), atol=1e-5
    )
    assert flops(small.apply, pruned.params, IMAGES) == flops(pruned.fn, pruned.params, IMAGES)


def test_queries_and_values_of_a_head_are_cut_apart():
    # one row of each head holds its q, k and v dims: rows stay as long as each other whatever each kind loses
    model = MODELS["vit"]
    params = start(model)
    ties = dependency_groups(model.apply, params, IMAGES).ties
    dims = {tie: groups[0].size for tie, groups in ties.items() if len(groups) == model.heads}
    assert sorted(dims.values()) == [2, 2, 6, 6]  # q-k and v, of two blocks
    pruned = check(model.apply, params, IMAGES, ratio={tie: 0.5 for tie, size in dims.items() if size == 6})
    small = narrow(model, pruned.plan)
    assert (small.qk_dim, small.v_dim) == ((2, 2), (3, 3))


def test_a_cut_model_slices_where_it_sliced():
    # a gather in their place would be a copy that nothing fuses with
    model = MODELS["vit"].clone(pre_logits=None, distilled=False, v_dim=None)
    params = start(model)
    pruned = prune(model.apply, params, IMAGES, ratio=0.5, scope="local")
    counts = [
        str(jax.make_jaxpr(fn)(pruned.params, IMAGES)).count("gather[")
        for fn in (pruned.fn, narrow(model, pruned.plan).apply)
    ]
    assert counts == [0, 0]


def test_a_plan_of_another_model():
    fn, params, args = ARCHITECTURES["mlp"]()
    with pytest.raises(ValueError, match="plan is not one of this model"):
        narrow(MODELS["vit"], prune(fn, params, *args, ratio=0.5).plan)


@pytest.mark.parametrize("name", ["mlp", "vit_split", "grouped_convolutions", "scan_over_layers"])
def test_pruning_by_flops_counts_what_costs_counts(name):
    fn, params, args = ARCHITECTURES[name]()
    program = dependency_groups(fn, params, *args).program
    size_left = size_of(program, "flops")
    assert size_left(np.zeros(program.classes.count, bool)) == flops(fn, params, *args)
