"""The smaller function: transformations, derivative rules, and what the numbers in a program mean after the cut."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from graph_architectures import ARCHITECTURES, data, randomised, weights
from graph_zeroing import check, zeroed
from jax import export

from prune_jax.graph import UnknownPrimitiveError, prune


def test_layer_norm_means_over_the_cut_width():
    # the cut network is the same module built narrow
    class Net(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            x = nn.RMSNorm()(nn.LayerNorm()(nn.Dense(self.width)(x)))
            x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-3)
            return nn.Dense(2)(x)

    x = data(4, 3)
    params = randomised(jax.eval_shape(Net(8).init, jax.random.key(0), x))
    pruned = prune(Net(8).apply, params, x, ratio=0.5)
    expected = jax.jit(Net(4).apply)(pruned.params, x)
    np.testing.assert_allclose(jax.jit(pruned.fn)(pruned.params, x), expected, rtol=1e-5, atol=1e-5)


def test_group_norm_means_over_the_cut_width():
    class Net(nn.Module):
        width: int
        groups: int

        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.GroupNorm(self.groups)(nn.Conv(self.width, (1, 1))(x)).mean((1, 2)))

    x = data(2, 4, 4, 3)
    params = randomised(jax.eval_shape(Net(8, 2).init, jax.random.key(0), x))
    narrow = prune(Net(8, 2).apply, params, x, ratio=0.5)
    expected = jax.jit(Net(4, 2).apply)(narrow.params, x)
    np.testing.assert_allclose(jax.jit(narrow.fn)(narrow.params, x), expected, rtol=1e-4, atol=1e-5)
    single = prune(Net(8, 2).apply, params, x, ratio=0.5, kinds=("block",))
    expected = jax.jit(Net(4, 1).apply)(single.params, x)
    np.testing.assert_allclose(jax.jit(single.fn)(single.params, x), expected, rtol=1e-4, atol=1e-5)


def test_a_mean_over_a_free_batch_is_exported():
    params = weights(a=(3, 8), b=(8, 2))

    def net(p, x):
        h = jnp.tanh(x @ p["a"])
        return (h - h.mean(0, keepdims=True)) @ p["b"]

    pruned = check(net, params, data(4, 3), ratio=0.5)
    assert pruned.params["a"].shape == (3, 4)
    shape = export.symbolic_shape("b,3")
    traced = export.export(jax.jit(pruned.fn))(pruned.params, jax.ShapeDtypeStruct(shape, jnp.float32))
    np.testing.assert_allclose(
        traced.call(pruned.params, data(7, 3)), pruned.fn(pruned.params, data(7, 3)), rtol=1e-5, atol=1e-6
    )


def test_attention_scale_stays():
    def attend(scale):
        def net(p, x):
            q, k, v = (jnp.einsum("btc,chd->bthd", x, p[n]) for n in "qkv")
            a = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / scale(q), -1)
            return jnp.einsum("bhts,bshd,hdo->bto", a, v, p["o"])

        return net

    params = weights(q=(3, 2, 8), k=(3, 2, 8), v=(3, 2, 8), o=(2, 8, 3))
    x = data(2, 5, 3)
    pruned = prune(attend(lambda q: q.shape[-1] ** 0.5), params, x, ratio=0.5, scope="local")
    assert pruned.params["q"].shape == (3, 2, 4)
    # the same code runs on the small kernels, but only with the dense network's scale
    expected = attend(lambda q: 8**0.5)(pruned.params, x)
    np.testing.assert_allclose(pruned.fn(pruned.params, x), expected, rtol=1e-5, atol=1e-5)


def test_iota_keeps_its_values():
    def net(p, x):
        h = x @ p["a"]
        return jnp.where(jnp.arange(8)[None] % 3 == 0, h, 0.0) @ p["b"]

    check(net, weights(a=(3, 8), b=(8, 2)), data(4, 3), ratio=0.5)


def straight_through():
    @jax.custom_vjp
    def f(x):
        return jnp.round(x)

    f.defvjp(lambda x: (f(x), None), lambda _, g: (3 * g,))
    return f


def odd_tangent():
    @jax.custom_jvp
    def f(x):
        return jnp.sin(x)

    f.defjvp(lambda x, t: (f(*x), 7 * t[0] * jnp.cos(x[0])))
    return f


def closing_over_arrays(kind):
    scale, turns = jnp.arange(8.0), jnp.arange(8)

    def make():
        f = kind(lambda x: x * (scale * turns)[None])
        if kind is jax.custom_vjp:
            f.defvjp(lambda x: (f(x), None), lambda _, g: (3 * g * scale[None] * turns[None],))
        else:
            f.defjvp(lambda x, t: (f(*x), 3 * t[0] * scale[None] * turns[None]))
        return f

    return make


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(straight_through, id="vjp"),
        pytest.param(odd_tangent, id="jvp"),
        pytest.param(closing_over_arrays(jax.custom_vjp), id="vjp-closing"),
        pytest.param(closing_over_arrays(jax.custom_jvp), id="jvp-closing"),
        pytest.param(lambda: jax.nn.relu, id="relu"),
    ],
)
def test_derivative_rules_survive(make):
    activation = make()

    def net(p, x):
        return activation(x @ p["a"]) @ p["b"]

    params, x = weights(a=(3, 8), b=(8, 2)), 3 * data(4, 3)
    pruned = prune(net, params, x, ratio=0.5)
    dense = zeroed(pruned.plan, params)
    kept = np.asarray(pruned.plan["leaves"][0]["keep"][0]["positions"])

    def loss(fn):
        return lambda p, x: (fn(p, x) ** 3).sum()

    small = jax.jit(jax.grad(loss(pruned.fn)))(pruned.params, x)
    whole = jax.jit(jax.grad(loss(net)))(dense, x)
    np.testing.assert_allclose(small["a"], whole["a"][:, kept], rtol=1e-4, atol=1e-4)

    def second(fn, p):
        inner = jax.grad(loss(fn), argnums=1)
        return jax.jit(jax.grad(lambda x: (inner(p, x) * jnp.arange(3.0)).sum()))(x)

    with jax.numpy_rank_promotion("allow"):
        expected = second(net, dense)
        np.testing.assert_allclose(second(pruned.fn, pruned.params), expected, rtol=1e-3, atol=1e-3)


def test_a_derivative_rule_that_cannot_be_read_is_an_error_only_where_it_is_asked_for():
    @jax.custom_vjp
    def f(x):
        return jnp.sin(x)

    f.defvjp(lambda x: (f(x), x), lambda x, g: (jnp.linalg.inv(x[:8, :8])[:1] * g,))

    def net(p, x):
        return f(x @ p["a"]) @ p["b"]

    pruned = check(net, weights(a=(3, 8), b=(8, 2)), data(8, 3), ratio=0.5)
    assert pruned.params["a"].shape == (3, 4)
    with pytest.raises(UnknownPrimitiveError, match=r"the derivative rule of the function at .* cannot be read"):
        jax.grad(lambda p: pruned.fn(p, data(8, 3)).sum())(pruned.params)


def test_vmap():
    fn, params, (x,) = ARCHITECTURES["vit_fused"]()
    pruned = prune(fn, params, x, ratio=0.5)
    several = jax.jit(jax.vmap(pruned.fn, (None, 0)))(pruned.params, jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(several[1], jax.jit(pruned.fn)(pruned.params, 2 * x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet", "vit_fused", "swin"])
def test_export_for_all_platforms_with_a_symbolic_batch(name):
    fn, params, (x,) = ARCHITECTURES[name]()
    pruned = prune(fn, params, x, ratio=0.5)
    shape = export.symbolic_shape("b," + ",".join(map(str, x.shape[1:])))
    exported = export.export(jax.jit(pruned.fn), platforms=("cpu", "cuda", "tpu"))(
        jax.eval_shape(lambda p: p, pruned.params), jax.ShapeDtypeStruct(shape, x.dtype)
    )
    loaded = export.deserialize(exported.serialize())
    three = jnp.concatenate([x, x])[:3]
    expected = jax.jit(pruned.fn)(pruned.params, three)
    np.testing.assert_allclose(loaded.call(pruned.params, three), expected, rtol=1e-4, atol=1e-4)


def test_trains_with_dropout_and_batch_statistics():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x))
            return nn.Dense(2)(nn.Dropout(0.5, deterministic=False)(nn.relu(x)))

    x, key = data(16, 3), jax.random.key(2)
    variables = Net().init({"params": key, "dropout": key}, x)

    def apply(variables, x, key):
        return Net().apply(variables, x, rngs={"dropout": key}, mutable=["batch_stats"])

    pruned = prune(apply, variables, x, key, ratio=0.5, free_output=lambda path: "batch_stats" in path)
    assert pruned.params["params"]["Dense_0"]["kernel"].shape == (3, 4)
    optimizer = optax.adam(0.05)

    @jax.jit
    def step(variables, state, key):
        def loss(params):
            out, new = pruned.fn({**variables, "params": params}, x, key)
            return ((out - x[:, :2]) ** 2).mean(), new

        (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(gradients, state)
        return {"params": optax.apply_updates(variables["params"], updates), **new}, state, value

    variables, state, losses = pruned.params, optimizer.init(pruned.params["params"]), []
    for i in range(40):
        variables, state, value = step(variables, state, jax.random.fold_in(key, i))
        losses.append(float(value))
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
    assert variables["batch_stats"]["BatchNorm_0"]["mean"].shape == (4,)


def test_wrong_parameters_are_named():
    fn, params, args = ARCHITECTURES["mlp"]()
    pruned = prune(fn, params, *args, ratio=0.5)
    with pytest.raises(ValueError, match=r"parameter 'b0' must have shape .* after this cut, got \(8,\)"):
        pruned.fn(params, *args)
