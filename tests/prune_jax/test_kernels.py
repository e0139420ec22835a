"""Which leaves are scored, penalised and pruned where the caller does not say: `prune_jax.is_kernel`."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from prune_jax import scores
from prune_jax.models import Swin, ViT


def kernels_of(params):
    """The paths that a score is of by default."""
    found = jax.tree_util.tree_leaves_with_path(scores.magnitude(params))
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found}


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.LayerNorm()(nn.Dense(4)(x)), None


def test_kernels_are_told_from_biases_with_two_axes():
    x = jnp.ones((1, 3, 4))
    attention = nn.MultiHeadDotProductAttention(2).init(jax.random.key(0), x)
    assert attention["params"]["query"]["bias"].ndim == 2
    assert kernels_of(attention) == {f"params/{name}/kernel" for name in ("query", "key", "value", "out")}
    stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    assert kernels_of(stack.init(jax.random.key(0), x, None)) == {"params/Dense_0/kernel"}
    embed = nn.Embed(5, 4).init(jax.random.key(0), jnp.arange(3))
    assert kernels_of(embed) == set()


def test_kernels_of_vit_and_swin_are_their_layers_alone():
    x = jnp.ones((1, 8, 8, 3))
    vit = ViT(num_classes=3, image_size=8, patch=4, width=8, depth=1, heads=2, registers=2, distilled=True)
    swin = Swin(num_classes=3, patch=2, width=8, depths=(1,), heads=(2,), window=2)
    for model in (vit, swin):
        shapes = jax.eval_shape(model.init, jax.random.key(0), x)
        params = jax.tree.map(lambda s: jnp.ones(s.shape), shapes)
        flat = flax.traverse_util.flatten_dict(params, sep="/")
        assert any(leaf.ndim > 1 for path, leaf in flat.items() if not path.endswith("/kernel"))
        assert kernels_of(params) == {path for path in flat if path.endswith("/kernel")}


def test_kernels_go_by_any_name_of_a_layer():
    w = jnp.ones((2, 3))
    assert kernels_of({"in": w, "b": w, "token_mixing": w, "embedding": {"kernel": w}}) == {
        "in",
        "b",
        "token_mixing",
        "embedding/kernel",
    }
    assert kernels_of({"cls_token": w, "pos_embed": w, "relative_position_bias_table": w, "token": w}) == set()
    _, state = nnx.split(nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0)))
    assert kernels_of(state) == {f"{name}/kernel/value" for name in ("query", "key", "value", "out")}
