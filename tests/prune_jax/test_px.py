"""PX against brute force: every path listed, and path sums in plain loops; and the properties that it must have."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prune_jax import apply_masks, exponential, iterative_masks, layer_statistics, scores, sparsity
from prune_jax.scores.path_flow import active_flow, weight_flow

px = jax.jit(scores.px, static_argnums=0, static_argnames="balance")

RELUS = {
    "relu": jax.nn.relu,
    "maximum": lambda x: jnp.maximum(x, 0.0),
    "maximum_flipped": lambda x: jnp.maximum(0.0, x),
    "minimum": lambda x: -jnp.minimum(-x, 0.0),
    "where": lambda x: jnp.where(x > 0, x, 0.0),
    "product": lambda x: x * (x > 0),
    "clip": lambda x: jnp.clip(x, 0.0, 1e6),
    "jit": jax.jit(jax.nn.relu),
    "remat": jax.checkpoint(jax.nn.relu),
}


def mlp_params(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"kernel": rng.normal(size=(a, b)).astype(np.float32), "bias": rng.normal(size=b).astype(np.float32)}
        for a, b in itertools.pairwise(sizes)
    ]


def mlp(params, x, relu=jax.nn.relu):
    for layer in params[:-1]:
        x = relu(x @ layer["kernel"] + layer["bias"][None])
    return x @ params[-1]["kernel"] + params[-1]["bias"][None]


def pruned(params, seed=1):
    """With zeros. In a dense net every output has the same active paths, so that gates cancel in the scores."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: p * (rng.random(p.shape) < 0.7) if p.ndim > 1 else p, params)


def list_paths(params, x):
    """Scores, z1 and z2 from every path of the MLP, one by one, in float64."""
    kernels = [np.asarray(layer["kernel"], np.float64) for layer in params]
    biases = [np.asarray(layer["bias"], np.float64) for layer in params]
    gates, hidden = [], np.asarray(x, np.float64)
    for kernel, bias in zip(kernels[:-1], biases[:-1], strict=True):
        hidden = hidden @ kernel + bias
        gates.append(hidden > 0)
        hidden = np.maximum(hidden, 0)
    outputs = kernels[-1].shape[1]
    z1, z2 = np.zeros(outputs), np.zeros(outputs)
    through = [np.zeros((*kernel.shape, outputs)) for kernel in kernels]  # sum of v_p^2 over paths through a weight
    sizes = [kernels[0].shape[0], *(kernel.shape[1] for kernel in kernels)]
    for path in itertools.product(*map(range, sizes)):
        steps = list(itertools.pairwise(path))
        value = np.prod([kernel[step] for kernel, step in zip(kernels, steps, strict=True)])
        for n in range(len(x)):
            active = value != 0 and all(gate[n, unit] for gate, unit in zip(gates, path[1:-1], strict=True))
            z1[path[-1]] += active * float(x[n, path[0]]) ** 2
        z2[path[-1]] += value**2
        for layer, step in enumerate(steps):
            through[layer][(*step, path[-1])] += value**2
    return [total @ z1 / (z1 @ z2) for total in through], z1, z2


@pytest.mark.parametrize("relu", RELUS)
def test_equals_listing_all_paths(relu):
    params = pruned(mlp_params((3, 5, 4, 2)))
    x = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)

    def net(params, x):
        return mlp(params, x, RELUS[relu])

    expected, z1, z2 = list_paths(params, x)
    for layer, shares in zip(px(net, params, jnp.asarray(x)), expected, strict=True):
        assert layer["bias"] is None
        np.testing.assert_allclose(layer["kernel"], shares, rtol=2e-5, atol=1e-8)
    assert abs(z1[0] - z1[1]) > 0.1 * z1.max()  # else z1 would cancel, and nothing above would depend on gates
    flow, exponent = jax.jit(active_flow, static_argnums=0)(net, params, jnp.asarray(x))
    np.testing.assert_allclose(flow.sum(0) * 2.0**exponent, z1, rtol=1e-5)
    flow, exponent = jax.jit(weight_flow, static_argnums=0)(net, params, jnp.asarray(x[:1]))
    np.testing.assert_allclose(flow[0] * 2.0**exponent, z2, rtol=1e-5)


def test_outputs_that_share_no_path_are_paired_separately():
    # Two separate columns: R = sum_k z1_k z2_k, not (sum z1)(sum z2).
    params = {"w": jnp.array([[2.0, 0.0], [0.0, 3.0]])}
    x = jnp.array([[1.0, 4.0]])
    result = px(lambda p, x: x @ p["w"], params, x)["w"]
    total = 1 * 4 + 16 * 9
    np.testing.assert_allclose(result, [[4 / total, 0], [0, 144 / total]], rtol=1e-6)


@pytest.mark.parametrize("dead", [False, True], ids=["all outputs alive", "one output dead"])
def test_balanced_shares_are_the_mean_over_outputs(dead):
    params = pruned(mlp_params((3, 5, 4, 3)))
    if dead:
        params[-1]["kernel"] = params[-1]["kernel"] * np.array([1, 0, 1], np.float32)
    x = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
    _, z1, z2 = list_paths(params, x)
    alive = z1 * z2 > 0
    assert alive.sum() == (2 if dead else 3)
    kernels = [np.asarray(layer["kernel"], np.float64) ** 2 for layer in params]
    result = px(mlp, params, jnp.asarray(x), balance=True)
    for layer, share in enumerate(result):
        # The outputs' path sums in which every path must pass the layer's weight, one weight at a time.
        expected = np.zeros(kernels[layer].shape)
        for index in np.ndindex(expected.shape):
            only = np.zeros_like(kernels[layer])
            only[index] = kernels[layer][index]
            through = np.ones(3) @ np.linalg.multi_dot([*kernels[:layer], only, *kernels[layer + 1 :]])
            expected[index] = np.mean(through[alive] / z2[alive])
        np.testing.assert_allclose(share["kernel"], expected, rtol=2e-5, atol=1e-8)
        np.testing.assert_allclose(share["kernel"].sum(), 1, rtol=1e-5)


def test_balanced_rounds_leave_every_output_a_path():
    # The first output's weights are so small that the others take all that is left, unless every output counts alike.
    params = mlp_params((8, 16, 16, 4))
    params[-1]["kernel"] = params[-1]["kernel"] * np.array([1e-3, 1, 1, 1], np.float32)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32))

    def alive(balance):
        masks = iterative_masks(lambda p: scores.px(mlp, p, x, balance=balance), params, exponential(0.95, 50))
        return np.asarray(masks[-1]["kernel"]).any(0)

    assert not alive(False)[0]
    assert alive(True).all()


# -- a small convolutional network with BatchNorm, max-pool, a skip connection and an average pool, in plain loops -----


def conv_params(seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return {
        "first": draw(3, 3, 2, 3),
        "scale": draw(3),
        "shift": draw(3),
        "second": draw(3, 3, 3, 3),
        "head": draw(3, 4),
    }


MEAN, VAR = np.array([0.1, -0.2, 0.3], np.float32), np.array([0.5, 2.0, 1.5], np.float32)


def conv_net(params, x):
    def conv(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x = conv(x, params["first"])
    factor = params["scale"] / jnp.sqrt(VAR + 1e-5)
    x = jax.nn.relu((x - MEAN[None, None, None]) * factor[None, None, None] + params["shift"][None, None, None])
    x = nn.max_pool(x, (2, 2), (2, 2))
    x = jax.nn.relu(x + conv(x, params["second"]))
    x = nn.avg_pool(x, (2, 2), (2, 2))
    return x.reshape(x.shape[0], -1, 3).mean(1) @ params["head"]


def loop_conv(x, w):
    n, height, width, _ = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.zeros((n, height, width, w.shape[-1]))
    for i, j in itertools.product(range(height), range(width)):
        out[:, i, j] = np.einsum("nabc,abco->no", padded[:, i : i + 3, j : j + 3], w)
    return out


def windows(x):
    n, height, width, channels = x.shape
    return (
        x.reshape(n, height // 2, 2, width // 2, 2, channels)
        .transpose(0, 1, 3, 5, 2, 4)
        .reshape(n, height // 2, width // 2, channels, 4)
    )


def reference_r(params, squares, x):
    """R as a function of the squared weights, with path sums by loops in float64; gates from the forward pass."""
    p = {key: np.asarray(value, np.float64) for key, value in params.items()}
    x = np.asarray(x, np.float64)
    factor = p["scale"] / np.sqrt(VAR.astype(np.float64) + 1e-5)
    a = (loop_conv(x, p["first"]) - MEAN) * factor + p["shift"]
    b = windows(np.maximum(a, 0))
    winner = np.eye(4)[b.argmax(-1)]
    c = b.max(-1)
    d = c + loop_conv(c, p["second"])

    def ones(w):
        return (w != 0).astype(float)

    z = loop_conv(x**2, ones(p["first"])) * (a > 0)
    z = (windows(z) * winner).sum(-1)
    z = (z + loop_conv(z, ones(p["second"]))) * (d > 0)
    z1 = windows(z).sum(-1).reshape(len(x), -1, 3).sum(1) @ ones(p["head"])

    z = loop_conv(np.ones_like(x[:1]), squares["first"]) * factor**2
    z = windows(z).sum(-1)
    z = z + loop_conv(z, squares["second"])
    z2 = windows(z).sum(-1).reshape(1, -1, 3).sum(1) @ squares["head"]
    return float((z1 * z2).sum())


def test_convolutions_pools_skip_and_batchnorm_by_finite_differences():
    params = pruned(conv_params())
    x = np.random.default_rng(2).normal(size=(3, 8, 8, 2)).astype(np.float32)
    kernels = ("first", "second", "head")
    result = px(conv_net, params, jnp.asarray(x))
    assert result["scale"] is None
    squares = {key: np.asarray(params[key], np.float64) ** 2 for key in kernels}
    r = reference_r(params, squares, x)
    for key in kernels:
        for index in list(np.ndindex(squares[key].shape))[:: max(1, squares[key].size // 6)]:
            without = {**squares, key: squares[key].copy()}
            without[key][index] = 0
            # R is linear in each squared weight: what it loses is theta^2 dR/d(theta^2).
            assert result[key][index] == pytest.approx((r - reference_r(params, without, x)) / r, rel=2e-4, abs=1e-7)


def test_equals_the_network_with_batchnorm_folded():
    params = conv_params()
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 8, 8, 2)).astype(np.float32))
    factor = params["scale"] / np.sqrt(VAR + 1e-5)

    def folded_net(folded, x):
        plain = {**folded, "scale": np.sqrt(VAR + 1e-5), "shift": params["shift"] - MEAN * factor + MEAN}
        return conv_net(plain, x)

    folded = {"first": params["first"] * factor, "second": params["second"], "head": params["head"]}
    a, b = px(conv_net, params, x), px(folded_net, folded, x)
    for key in folded:
        np.testing.assert_allclose(a[key], b[key], rtol=1e-4, atol=1e-8)


# -- properties --------------------------------------------------------------------------------------------------------


class Vgg(nn.Module):
    """Every path crosses every layer."""

    widths: tuple = (4, 6)

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(width, (3, 3))(x)))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(5)(x.mean((1, 2)))


def layer_sums(tree):
    return np.array([np.asarray(leaf, np.float64).sum() for leaf in jax.tree.leaves(tree)])


def test_all_layers_score_sums_are_equal():
    x = jax.random.normal(jax.random.key(0), (6, 8, 8, 3))
    variables = jax.jit(Vgg().init)(jax.random.key(1), x)
    result = px(Vgg().apply, variables, x)
    assert jax.tree.structure(result) != jax.tree.structure(variables)  # norms and biases are None
    np.testing.assert_allclose(layer_sums(result), np.ones(3), rtol=1e-4)


def test_flows_outside_float32_neither_overflow_nor_vanish():
    # Squares of 1e30 times 64^6 ones are far outside float32, and six times squared weights of 1e-6 are nothing in it.
    kernels = 1e-4 * jax.random.normal(jax.random.key(0), (6, 64, 64))

    def deep(kernels, x):
        return jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, kernels)[0]

    x = 1e15 * jax.random.normal(jax.random.key(1), (2, 64))
    result = px(deep, kernels, x)
    np.testing.assert_allclose(np.asarray(result, np.float64).sum((1, 2)), np.ones(6), rtol=1e-3)


def test_scan_equals_the_loop_and_reverse_scan_the_reversed_loop():
    kernels = jax.random.normal(jax.random.key(0), (2, 4, 4))
    x = jax.random.normal(jax.random.key(1), (5, 4))

    def body(x, w):
        x = jax.nn.relu(x @ w)
        return x, x.sum(-1)

    def scanned(kernels, x, reverse):
        last, sums = jax.lax.scan(body, x, kernels, reverse=reverse)
        return last + sums.T @ jnp.ones((2, 4)) * jnp.array([[1.0, 2.0, 3.0, 4.0]])

    def looped(kernels, x, reverse):
        sums = {}
        for i in (1, 0) if reverse else (0, 1):
            x, sums[i] = body(x, kernels[i])
        stacked = jnp.stack([sums[0], sums[1]])
        return x + stacked.T @ jnp.ones((2, 4)) * jnp.array([[1.0, 2.0, 3.0, 4.0]])

    for reverse in (False, True):
        a = px(lambda p, x, r=reverse: scanned(p, x, r), kernels, x)
        b = px(lambda p, x, r=reverse: looped(p, x, r), kernels, x)
        np.testing.assert_allclose(a, b, rtol=1e-5)
        assert a.max() > 0


def test_custom_derivative_rules_are_looked_through():
    @jax.custom_vjp
    def double(x):
        return 2 * x

    double.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))
    params, x = mlp_params((3, 4, 2)), jax.random.normal(jax.random.key(0), (5, 3))
    a = px(lambda p, x: double(mlp(p, x)), params, x)
    b = px(lambda p, x: 2 * mlp(p, x), params, x)
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-6), a, b)


def test_max_over_an_axis_and_of_two_branches_picks_the_winner():
    params = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([[3.0, 1.0]])}
    x = jnp.array([[2.0]])
    for fn in (
        lambda p, x: jnp.maximum(x @ p["a"], x @ p["b"]),
        lambda p, x: jnp.stack([x @ p["a"], x @ p["b"]]).max(0),
        lambda p, x: jnp.where(x @ p["a"] > x @ p["b"], x @ p["a"], x @ p["b"]),
        lambda p, x: nn.max_pool(jnp.stack([x @ p["a"], x @ p["b"]], 1), (2,), (2,))[:, 0],
    ):
        flow = active_flow(fn, params, x)
        np.testing.assert_array_equal(flow.flow * 2.0**flow.exponent, [[4, 4]])  # one active path an output
        flow = weight_flow(fn, params, x)
        np.testing.assert_array_equal(flow.flow * 2.0**flow.exponent, [[1 + 9, 4 + 1]])  # two paths an output


def test_structural_operations_move_flows_as_they_move_values():
    w = jnp.arange(1.0, 7.0).reshape(2, 3)

    def fn(w, x):
        x = jnp.concatenate([x, x[:, ::-1]], axis=1)[:, 1:5]  # (B, 4) of x1 x2 x2 x1
        x = jnp.pad(x, ((0, 0), (1, 1)))[:, 1:-1].reshape(-1, 2, 2).transpose(0, 2, 1)
        x = jnp.squeeze(jnp.expand_dims(x, 1), 1)[:, :, 0]  # x1, x2
        x = jnp.take(x, jnp.array([1, 0]), axis=1)  # x2, x1
        x = jnp.tile(jax.lax.dynamic_slice(x, (0, 0), x.shape), (1, 2))[:, :2]
        x = jnp.stack([*jnp.unstack(x, axis=1)], axis=1)
        x = jnp.zeros_like(x).at[:, :1].set(x[:, :1]).at[:, 1].add(x[:, 1])
        first, second = jnp.split(jnp.cumsum(x, axis=1), 2, axis=1)  # x2, x2 + x1
        return jnp.concatenate([first, -second], axis=1).astype(jnp.bfloat16).astype(jnp.float32) @ w

    x = jnp.array([[5.0, 2.0, 3.0]])
    active = active_flow(fn, w, x)
    np.testing.assert_allclose(active.flow * 2.0**active.exponent, np.full((1, 3), 9 + 9 + 4))
    weight = weight_flow(fn, w, x)
    np.testing.assert_allclose(weight.flow * 2.0**weight.exponent, (np.array([[1, 2]]) @ np.asarray(w) ** 2))


def test_zero_weights_carry_no_path():
    params, x = pruned(mlp_params((3, 6, 2))), jax.random.normal(jax.random.key(0), (5, 3))
    for layer, score in zip(params, px(mlp, params, x), strict=True):
        assert not np.asarray(score["kernel"])[layer["kernel"] == 0].any()


@pytest.mark.parametrize("layout", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("NHWC", "HWIO", "NCHW")])
def test_convolution_of_every_kind_in_the_dense_form_equals_the_masked_form(layout):
    lhs, rhs = layout[:2]
    x = jnp.transpose(jax.random.uniform(jax.random.key(0), (2, 7, 9, 3)), ["NHWC".index(axis) for axis in lhs])
    w = jnp.transpose(jax.random.uniform(jax.random.key(1), (3, 2, 3, 4)) + 0.1, ["HWIO".index(axis) for axis in rhs])

    def convolve(w, x):
        return jax.lax.conv_general_dilated(
            x, w, (2, 1), [(1, 0), (2, 1)], lhs_dilation=(1, 2), rhs_dilation=(2, 1), dimension_numbers=layout
        )

    dense = active_flow(convolve, w, x)
    expected = convolve(jnp.ones_like(w), x**2)
    np.testing.assert_allclose(dense.flow * 2.0**dense.exponent, expected, rtol=1e-5)
    cut = active_flow(convolve, w.at[0, 0, 0, 0].set(0), x)
    expected = convolve(jnp.ones_like(w).at[0, 0, 0, 0].set(0), x**2)
    np.testing.assert_allclose(cut.flow * 2.0**cut.exponent, expected, rtol=1e-5)


def test_grouped_convolution_equals_separate_convolutions():
    w = jax.random.normal(jax.random.key(0), (3, 3, 2, 6))
    x = jax.random.normal(jax.random.key(1), (2, 5, 5, 4))

    def convolve(x, w, groups):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    grouped = px(lambda w, x: jax.nn.relu(convolve(x, w, 2)), w, x)

    def halves(w, x):
        parts = (convolve(x[..., :2], w[..., :3], 1), convolve(x[..., 2:], w[..., 3:], 1))
        return jax.nn.relu(jnp.concatenate(parts, -1))

    np.testing.assert_allclose(grouped, px(halves, w, x), rtol=1e-5)


def test_bfloat16_networks_are_scored_in_float32():
    x = jax.random.normal(jax.random.key(0), (8, 3))
    params = mlp_params((3, 16, 2))
    half = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), params)
    result = px(mlp, half, x.astype(jnp.bfloat16))
    full = px(mlp, jax.tree.map(lambda p: p.astype(jnp.float32), half), x.astype(jnp.bfloat16).astype(jnp.float32))
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(full), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=0.02)


def test_dead_network_scores_zero():
    params = {"a": -jnp.ones((2, 3)), "b": jnp.ones((3, 1))}
    result = px(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, jnp.ones((1, 2)))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(result))


def test_iterated_100_rounds_keeps_every_layer_alive_at_99_percent():
    params = [{"kernel": layer["kernel"]} for layer in mlp_params((12, 32, 32, 4))]
    params[1]["kernel"] *= 0.01  # global magnitude would cut this layer first

    def net(params, x):
        return mlp([{**layer, "bias": jnp.zeros(1)} for layer in params], x)

    x = jax.random.normal(jax.random.key(0), (8, 12))
    masks = iterative_masks(lambda p: scores.px(net, p, x), params, exponential(0.99))
    assert sparsity(masks) == pytest.approx(0.99, abs=1e-3)
    assert all(layer.kept > 0 for layer in layer_statistics(masks).values())
    rest = px(net, apply_masks(params, masks), x)
    np.testing.assert_allclose(layer_sums(rest), np.ones(3), rtol=1e-4)  # the rest still carries every path


# -- what is refused ---------------------------------------------------------------------------------------------------


def softmax_net(w, x):
    return jax.nn.softmax(x @ w)


def layer_norm_net(w, x):
    y = x @ w
    return (y - y.mean(-1, keepdims=True)) / jnp.sqrt(jnp.var(y, -1, keepdims=True))


def last_layer(activation):
    return lambda w, x: activation(x @ w)


@pytest.mark.parametrize(
    ("fn", "primitive"),
    [
        (softmax_net, "exp"),
        (layer_norm_net, "square"),
        (last_layer(lambda y: jax.nn.gelu(y, approximate=True)), "integer_pow"),
        (last_layer(lambda y: jax.nn.gelu(y, approximate=False)), "erfc"),
        (last_layer(jnp.tanh), "tanh"),
        (last_layer(lambda y: y @ y.T), "dot_general"),
        (last_layer(lambda y: y * y), "mul"),
        (last_layer(lambda y: 1 / y), "div"),
        (last_layer(jnp.sort), "sort"),
        (last_layer(lambda y: jax.lax.cond(y.sum() > 0, lambda: y, lambda: -y)), "cond"),
        (last_layer(lambda y: jnp.take(y, jnp.argmax(y), axis=1)), "gather"),
        (last_layer(lambda y: jax.lax.clamp(-jnp.ones(y.shape), y, y)), "clamp"),
    ],
)
def test_what_has_no_paths_is_refused_by_name_and_line(fn, primitive):
    with pytest.raises(NotImplementedError, match=rf"px: `{primitive}`.*test_px\.py:\d+"):
        scores.px(fn, jnp.eye(3), jnp.ones((3, 3)))


def test_batch_statistics_are_refused():
    net = nn.BatchNorm(use_running_average=False)
    x = jnp.ones((2, 3))
    variables = jax.jit(net.init)(jax.random.key(0), x)
    with pytest.raises(NotImplementedError, match="running averages"):
        scores.px(lambda v, x: net.apply(v, x, mutable="batch_stats")[0], variables, x)


def test_bad_inputs_and_outputs_are_refused():
    w = jnp.ones((3, 2))
    with pytest.raises(TypeError, match="int32"):
        scores.px(lambda w, x: x @ w, w, jnp.ones((2, 3), jnp.int32))
    with pytest.raises(ValueError, match="batch 2"):
        scores.px(lambda w, x: (x @ w).sum(), w, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="no path"):
        scores.px(lambda w, x: w[:2], w, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="one array"):
        scores.px(lambda w, x: (x @ w, x), w, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="empty"):
        scores.px(lambda w, x: w, w, {})
