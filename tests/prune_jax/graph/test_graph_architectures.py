"""On networks of many kinds, cutting is zeroing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_architectures import ARCHITECTURES
from graph_zeroing import check, size

from prune_jax.graph import prune
from prune_jax.scores import px, snip, taylor


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cut_equals_zeroed(name):
    fn, params, args = ARCHITECTURES[name]()
    pruned = check(fn, params, *args, ratio=0.5)
    assert size(pruned.params) < 0.8 * size(params)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.7, 0.9])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cut_equals_zeroed_at_every_ratio(name, ratio):
    fn, params, args = ARCHITECTURES[name]()
    check(fn, params, *args, ratio=ratio, scope="local", kinds=("width", "block"))


CRITERIA = {
    "taylor": taylor,
    "snip": snip,
    "px": lambda fn, params, x, labels: px(fn, params, x),
}


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", ["mlp", pytest.param("vgg", marks=pytest.mark.slow)])
def test_cut_equals_zeroed_by_other_scores(name, criterion):
    fn, params, (x,) = ARCHITECTURES[name]()
    scores = CRITERIA[criterion](fn, params, x, jnp.arange(len(x)) % 2)
    pruned = check(fn, params, x, ratio=0.5, scope="local", importance=scores)
    assert size(pruned.params) < 0.8 * size(params)
    assert pruned.plan != prune(fn, params, x, ratio=0.5, scope="local").plan  # by magnitude other units go


@pytest.mark.parametrize("name", ["grouped_convolutions", "vit_fused", "vit_split", "vit_linen", "gqa", "swin"])
def test_whole_heads_and_channel_groups_cut_equals_zeroed(name):
    fn, params, args = ARCHITECTURES[name]()
    pruned = check(fn, params, *args, ratio=0.5, kinds=("block",), scope="local")
    assert size(pruned.params) < size(params)


@pytest.mark.parametrize("name", ["mlp", "gated_unit", "mixer", "scan_over_layers", "embedding"])
def test_code_without_sizes_runs_on_the_cut_parameters_itself(name):
    # where the Python code holds no sizes, the dense function is its own smaller function
    fn, params, args = ARCHITECTURES[name]()
    pruned = check(fn, params, *args, ratio=0.5)
    np.testing.assert_allclose(fn(pruned.params, *args), pruned.fn(pruned.params, *args), atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "densenet", "vit_fused", "vit_linen", "swin", "recurrent"])
def test_batch_size_is_free(name):
    fn, params, args = ARCHITECTURES[name]()
    pruned = check(fn, params, *args, ratio=0.5)
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), args)
    once = jax.jit(pruned.fn)(pruned.params, *args)
    np.testing.assert_allclose(jax.jit(pruned.fn)(pruned.params, *twice), jnp.concatenate([once, once]), atol=1e-4)
