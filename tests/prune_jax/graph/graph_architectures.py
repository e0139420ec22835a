"""Small networks of many kinds, each as (function, parameters, arguments)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

ARCHITECTURES = {}


def architecture(build):
    ARCHITECTURES[build.__name__] = build
    return build


def data(*shape, seed=9):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def weights(**shapes):
    return {name: 0.5 * data(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def randomised(variables):
    """Flax variables without the zeros and ones of a fresh initialisation, which would hide mistakes."""
    leaves, tree = jax.tree.flatten(variables)
    new = [0.5 * data(*x.shape, seed=i) + 0.3 * (x.ndim == 1) for i, x in enumerate(leaves)]
    variables = jax.tree.unflatten(tree, new)
    if "batch_stats" in variables:
        variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])
    return variables


def linen(module, *args):
    return module.apply, randomised(jax.eval_shape(module.init, jax.random.key(0), *args)), args


@architecture
def mlp():
    def net(p, x):
        x = jax.nn.relu(x @ p["w0"] + p["b0"][None])
        return jax.nn.relu(x @ p["w1"] + p["b1"][None]) @ p["w2"]

    return net, weights(w0=(3, 8), b0=(8,), w1=(8, 6), b1=(6,), w2=(6, 2)), (data(4, 3),)


@architecture
def lenet():
    class LeNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.avg_pool(jnp.tanh(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
            x = nn.avg_pool(jnp.tanh(nn.Conv(6, (3, 3))(x)), (2, 2), (2, 2))
            return nn.Dense(3)(jnp.tanh(nn.Dense(8)(x.reshape(x.shape[0], -1))))

    return linen(LeNet(), data(2, 8, 8, 1))


@architecture
def vgg():
    class VGG(nn.Module):
        @nn.compact
        def __call__(self, x):
            for width in (6, 8):
                x = nn.Conv(width, (3, 3), use_bias=False)(x)
                x = nn.max_pool(nn.relu(nn.BatchNorm(use_running_average=True)(x)), (2, 2), (2, 2))
            return nn.Dense(3)(nn.relu(nn.Dense(10)(x.reshape(x.shape[0], -1))))

    return linen(VGG(), data(2, 8, 8, 3))


@architecture
def convolution_as_a_product():
    def net(p, x):
        b = x.shape[0]
        # each row of six inputs makes two pixels of six channels, then both of a tile become one
        banded = jnp.stack([jnp.pad(p["a"], ((0, 3), (0, 0))), jnp.pad(p["a"], ((3, 0), (0, 0)))], axis=1)
        h = (x @ banded.reshape(6, -1)).reshape(b, 3, 8, 6)
        h = jax.nn.relu(h + p["bias"][None, None, None]).reshape(b, 3, 4, 2, 6).max(3)
        return h.reshape(b, -1) @ p["b"].reshape(-1, 5) @ p["c"]

    return net, weights(a=(3, 6), bias=(6,), b=(3, 4, 6, 5), c=(5, 2)), (data(2, 3, 4, 6),)


@architecture
def resnet():
    class ResNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            def norm(x):
                return nn.BatchNorm(use_running_average=True)(x)

            x = nn.relu(norm(nn.Conv(8, (3, 3))(x)))
            h = nn.relu(norm(nn.Conv(6, (3, 3))(x)))
            x = nn.relu(x + norm(nn.Conv(8, (3, 3))(h)))
            x = nn.max_pool(x, (2, 2), (2, 2))
            x = nn.Conv(12, (3, 3), strides=2)(x) + nn.Conv(12, (1, 1), strides=2)(x)
            return nn.Dense(3)(x.mean((1, 2)))

    return linen(ResNet(), data(2, 8, 8, 3))


@architecture
def densenet():
    class DenseNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(6, (3, 3))(x)
            for _ in range(2):
                x = jnp.concatenate([x, nn.relu(nn.Conv(4, (3, 3))(x))], -1)
            return nn.Dense(3)(x.reshape(x.shape[0], -1))

    return linen(DenseNet(), data(2, 4, 4, 3))


@architecture
def uneven_chunk():
    def net(p, x):
        u, v, w = jnp.split(jnp.tanh(x @ p["a"]), [4, 7], -1)
        return u @ p["b"] @ p["c"] + jnp.concatenate([v, w], -1) @ p["d"]

    return net, weights(a=(3, 12), b=(4, 5), c=(5, 2), d=(8, 2)), (data(4, 3),)


@architecture
def gated_unit():
    def net(p, x):
        u, v = jnp.split(x @ p["a"], 2, -1)
        return (u * jax.nn.sigmoid(v)) @ p["b"]

    return net, weights(a=(3, 12), b=(6, 2)), (data(4, 3),)


@architecture
def grouped_convolutions():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (1, 1))(x))
            x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8)(x))
            x = nn.relu(nn.Conv(12, (3, 3), feature_group_count=4)(x))
            x = nn.relu(nn.Conv(24, (3, 3), feature_group_count=12)(x))
            return nn.Dense(3)(x.mean((1, 2)))

    return linen(Net(), data(2, 4, 4, 3))


def attention(q, k, v):
    a = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) * 0.3, -1)
    return jnp.einsum("bhts,bshd->bthd", a, v)


@architecture
def vit_fused():
    def net(p, x):
        x = x @ p["embed"] + p["pos"][None]
        b, t, _ = x.shape
        qkv = (x @ p["qkv"]).reshape(b, t, 3, 2, 4)
        x = x + attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]).reshape(b, t, 8) @ p["proj"]
        return (x + jax.nn.gelu(x @ p["fc1"]) @ p["fc2"])[:, 0] @ p["head"]

    shapes = {
        "embed": (3, 6),
        "pos": (5, 6),
        "qkv": (6, 24),
        "proj": (8, 6),
        "fc1": (6, 9),
        "fc2": (9, 6),
        "head": (6, 2),
    }
    return net, weights(**shapes), (data(2, 5, 3),)


@architecture
def vit_split():
    def net(p, x):
        x = x @ p["embed"]
        b, t, _ = x.shape
        q, k, v = (y.reshape(b, t, 2, 4).transpose(0, 2, 1, 3) for y in jnp.split(x @ p["qkv"], 3, -1))
        a = jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2), -1) @ v
        return (x + a.transpose(0, 2, 1, 3).reshape(b, t, 8) @ p["proj"]).mean(1) @ p["head"]

    return net, weights(embed=(3, 6), qkv=(6, 24), proj=(8, 6), head=(6, 2)), (data(2, 5, 3),)


@architecture
def vit_linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(6, (2, 2), (2, 2))(x)
            x = x.reshape(x.shape[0], -1, 6)
            token = self.param("cls", nn.initializers.normal(), (1, 1, 6))
            x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], 1)
            x = x + nn.MultiHeadDotProductAttention(2, qkv_features=8)(x, x)
            x = x + nn.Dense(6)(nn.gelu(nn.Dense(9)(x)))
            return nn.Dense(3)(x[:, 0])

    return linen(Net(), data(2, 4, 4, 3))


@architecture
def gqa():
    def net(p, x):
        x = x @ p["embed"]
        b, t, _ = x.shape
        q = (x @ p["q"]).reshape(b, t, 4, 4)
        k, v = (jnp.repeat((x @ p[n]).reshape(b, t, 2, 4), 2, axis=2) for n in "kv")
        return (x + attention(q, k, v).reshape(b, t, 16) @ p["proj"]).mean(1) @ p["head"]

    return net, weights(embed=(3, 6), q=(6, 16), k=(6, 8), v=(6, 8), proj=(16, 6), head=(6, 2)), (data(2, 5, 3),)


@architecture
def gqa_rope_causal():
    def rope(x):
        t, d = x.shape[1], x.shape[3]
        angle = jnp.arange(t)[:, None] * (0.1 ** (jnp.arange(d // 2) / 2))[None]
        cos, sin = (jnp.concatenate([f(angle)] * 2, -1)[None, :, None] for f in (jnp.cos, jnp.sin))
        a, b = jnp.split(x, 2, -1)
        return x * cos + jnp.concatenate([-b, a], -1) * sin

    def net(p, x):
        x = x @ p["embed"]
        b, t, _ = x.shape
        q = rope((x @ p["q"]).reshape(b, t, 4, 4)).reshape(b, t, 2, 2, 4)
        k, v = rope((x @ p["k"]).reshape(b, t, 2, 4)), (x @ p["v"]).reshape(b, t, 2, 4)
        s = jnp.einsum("btkgd,bskd->bkgts", q, k)
        s = jnp.where(jnp.tril(jnp.ones((t, t), bool))[None, None, None], s, -1e9)
        o = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(s, -1), v)
        return (x + o.reshape(b, t, 16) @ p["proj"]).mean(1) @ p["head"]

    return net, weights(embed=(3, 6), q=(6, 16), k=(6, 8), v=(6, 8), proj=(16, 6), head=(6, 2)), (data(2, 5, 3),)


@architecture
def swin():
    index = np.array([[0, 1, 2, 3], [4, 5, 6, 7], [8, 0, 1, 2], [3, 4, 5, 6]])

    def net(p, x):
        x = x @ p["embed"]
        b, h, w, c = x.shape
        y = jnp.roll(x, (-1, -1), (1, 2)).reshape(b, h // 2, 2, w // 2, 2, c)
        y = y.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = (y @ p["qkv"]).reshape(-1, 4, 3, 2, 4).transpose(2, 0, 3, 1, 4)
        bias = p["bias"][index.reshape(-1)].reshape(4, 4, 2).transpose(2, 0, 1)
        y = jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2) + bias[None], -1) @ v
        y = y.transpose(0, 2, 1, 3).reshape(-1, 4, 8) @ p["proj"]
        y = y.reshape(b, h // 2, w // 2, 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        x = x + jnp.roll(y, (1, 1), (1, 2))
        x = jnp.concatenate([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return (x @ p["merge"]).mean((1, 2)) @ p["head"]

    shapes = {"embed": (3, 6), "qkv": (6, 24), "proj": (8, 6), "bias": (9, 2), "merge": (24, 10), "head": (10, 2)}
    return net, weights(**shapes), (data(2, 4, 4, 3),)


@architecture
def mixer():
    def net(p, x):
        x = x @ p["embed"]
        x = x + jnp.swapaxes(jax.nn.gelu(jnp.swapaxes(x, 1, 2) @ p["t1"]) @ p["t2"], 1, 2)
        return (x + jax.nn.gelu(x @ p["c1"]) @ p["c2"]).mean(1) @ p["head"]

    return net, weights(embed=(3, 6), t1=(5, 7), t2=(7, 5), c1=(6, 9), c2=(9, 6), head=(6, 2)), (data(2, 5, 3),)


@architecture
def unet():
    class UNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            a = nn.relu(nn.Conv(6, (3, 3))(x))
            b = nn.relu(nn.Conv(8, (3, 3), strides=2)(a))
            c = nn.relu(nn.Conv(10, (3, 3), strides=2)(b))
            u = nn.relu(nn.ConvTranspose(8, (2, 2), (2, 2))(c))
            u = nn.relu(nn.Conv(8, (3, 3))(jnp.concatenate([u, b], -1)))
            u = jax.image.resize(u, (u.shape[0], 8, 8, u.shape[3]), "nearest")
            return nn.Conv(2, (1, 1))(jnp.concatenate([u, a], -1))

    return linen(UNet(), data(2, 8, 8, 3))


@architecture
def decoder():
    def net(p, x):
        h = jax.nn.relu((x @ p["a"]).reshape(-1, 2, 2, 5) * p["scale"][None, None, None])
        h = lax.conv_general_dilated(h, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.tanh(h) @ p["head"]

    return net, weights(a=(3, 20), scale=(5,), k=(3, 3, 5, 4), head=(4, 2)), (data(2, 3),)


@architecture
def scan_over_layers():
    def net(p, x):
        def layer(x, w):
            return x + jnp.tanh(x @ w[0]) @ w[1], None

        return lax.scan(layer, x @ p["embed"], (p["w1"], p["w2"]))[0] @ p["head"]

    return net, weights(embed=(3, 6), w1=(4, 6, 8), w2=(4, 8, 6), head=(6, 2)), (data(4, 3),)


@architecture
def recurrent():
    def net(p, x):
        def step(h, x):
            h = jnp.tanh(x @ p["wx"] + h @ p["wh"])
            return h, h

        last, states = lax.scan(step, jnp.zeros((x.shape[0], 8)), jnp.swapaxes(x, 0, 1))
        return last @ p["head"] + states.mean(0) @ p["head"]

    return net, weights(wx=(3, 8), wh=(8, 8), head=(8, 2)), (data(2, 5, 3),)


@architecture
def lstm():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.RNN(nn.LSTMCell(8))(x)[:, -1])

    return linen(Net(), data(2, 5, 3))


@architecture
def branches_and_loops():
    def net(p, x):
        h = jnp.tanh(x @ p["a"])
        h = lax.cond(x.sum() > 0, lambda h: h @ p["b"], lambda h: jnp.sin(h) @ p["c"], h)
        h = lax.fori_loop(0, x.shape[0], lambda i, h: jnp.tanh(h @ p["b"]), h)
        h, _ = lax.while_loop(lambda s: s[1] < 3, lambda s: (jnp.tanh(s[0] @ p["c"]), s[1] + 1), (h, 0))
        return h @ p["head"]

    return net, weights(a=(3, 8), b=(8, 8), c=(8, 8), head=(8, 2)), (data(2, 3),)


@architecture
def embedding():
    def net(p, tokens):
        return jnp.tanh(p["table"][tokens] @ p["a"]) @ p["b"] @ p["table"].T

    return net, weights(table=(11, 6), a=(6, 8), b=(8, 6)), (jnp.array([[1, 2, 3], [4, 5, 6]]),)


@architecture
def padded_shortcut():
    def net(p, x):
        h = jnp.tanh(x @ p["a"])
        return (jnp.pad(h, ((0, 0), (2, 2))) + h @ p["b"]) @ p["c"]

    return net, weights(a=(3, 4), b=(4, 8), c=(8, 2)), (data(2, 3),)


@architecture
def shuffled():
    def net(p, x):
        h = jnp.tanh(x @ p["a"])[:, jnp.array([3, 1, 0, 2, 7, 6, 5, 4])]
        h = jnp.roll(h[:, ::-1], 3, 1)
        return jnp.concatenate([h[:, ::2], h[:, 1::2]], 1) @ p["b"]

    return net, weights(a=(3, 8), b=(8, 2)), (data(2, 3),)


@architecture
def channel_shuffle():
    def net(p, x):
        h = jnp.tanh(x @ p["a"]).reshape(-1, 2, 4)
        h = h.transpose(0, 2, 1).reshape(-1, 8)  # the groups of ShuffleNet come to lie between each other
        return h @ p["b"] + jnp.tile(h @ p["c"], (1, 3)) @ p["d"]

    return net, weights(a=(3, 8), b=(8, 2), c=(8, 5), d=(15, 2)), (data(2, 3),)


@architecture
def token_indexing():
    def net(p, x, i):
        h = jnp.tanh(x @ p["a"])  # (batch, tokens, width)
        h = h + jnp.cumsum(h, 1) + jnp.cumsum(h, 1, dtype=jnp.float32)[:, ::-1] + jnp.sort(h, 1)
        h = h.at[:, 0].add(h[:, 1]).at[:, 2].set(0.5 * h[:, 3]).at[:, i].mul(2.0)
        h = lax.dynamic_update_slice_in_dim(h, 2 * lax.dynamic_slice_in_dim(h, i, 2, axis=1), i, axis=1)
        scores = h @ p["score"]  # (batch, tokens)
        best = lax.top_k(scores, 2)[1]
        h = h + jnp.take_along_axis(h, best[:, :1, None], axis=1) + h[:, jnp.argmax(scores[0])][:, None]
        h = h + jax.vmap(lambda row, k: row[k])(h, best).sum(1, keepdims=True)
        h = nn.max_pool(h, (2,), (1,), "SAME") + lax.cummax(h, axis=1) + lax.rev(h, (1,))
        return jnp.where(scores[:, :, None] > 0, h, -h).max(1) @ p["b"]

    return net, weights(a=(3, 8), score=(8,), b=(8, 2)), (data(2, 5, 3), jnp.asarray(1))


@architecture
def width_cumulative():
    def net(p, x):
        h = jnp.cumsum(x @ p["a"], 1)
        return jnp.tril(jnp.ones((8, 8)))[3][None] * h @ p["b"] + jax.nn.one_hot(jnp.array([1, 5]), 8) @ p["b"]

    return net, weights(a=(3, 8), b=(8, 2)), (data(2, 3),)


@architecture
def fourier_mixing():
    def net(p, x):
        h = jnp.tanh(x @ p["a"])  # (batch, tokens, width)
        h = h + jnp.fft.irfft(jnp.fft.rfft(h, axis=1) * p["filter"][None], n=5, axis=1)  # GFNet's global filter
        u = jnp.tanh(h @ p["b"])
        u = u + jnp.fft.fft2(u).real  # FNet's mixing, of tokens and width: the width must not change
        return (jax.nn.relu(u @ p["c"]) @ p["d"]).sum(1)

    shapes = {"a": (3, 8), "filter": (3, 8), "b": (8, 4), "c": (4, 8), "d": (8, 2)}
    return net, weights(**shapes), (data(2, 5, 3),)


@architecture
def stacked():
    def net(p, x):
        both = jnp.stack([x @ p["a"], x @ p["b"]], 1)  # (batch, 2, width)
        u, v = jnp.unstack(jnp.tanh(both), axis=1)
        return u @ p["c"] + v @ p["d"]

    return net, weights(a=(3, 8), b=(3, 8), c=(8, 2), d=(8, 2)), (data(2, 3),)


@architecture
def rematerialised():
    def net(p, x):
        return jax.checkpoint(lambda x: jnp.tanh(jax.nn.relu(x @ p["a"]) @ p["b"]))(x) @ p["c"]

    return net, weights(a=(3, 8), b=(8, 8), c=(8, 2)), (data(2, 3),)


@architecture
def nnx_mlp():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
            self.second = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.norm(self.first(x))))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    return (lambda state, x: nnx.merge(graph, state)(x)), state, (data(4, 3),)
