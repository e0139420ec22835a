"""Each criterion against finite differences, closed forms or a plain NumPy version, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prune_jax import apply_masks, exponential, iterative_masks, layer_statistics, make_masks, scores

RNG = np.random.default_rng(0)
X = RNG.normal(size=(7, 3))
LABELS = RNG.integers(0, 2, 7)
PARAMS = {
    "hidden": {"kernel": RNG.normal(size=(3, 4)), "bias": RNG.normal(size=4)},
    "out": {"kernel": RNG.normal(size=(4, 2)), "bias": RNG.normal(size=2)},
}
PLACES = [(layer, index) for layer in PARAMS for index in np.ndindex(PARAMS[layer]["kernel"].shape)]


@pytest.fixture
def rng():
    """Of each test its own: what a test draws does not depend on the tests before it."""
    return np.random.default_rng(1)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def mlp(params, x):
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"][None]


def numpy_loss(params, temperature=1.0):
    hidden = np.tanh(X @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    logits = (hidden @ params["out"]["kernel"] + params["out"]["bias"]) / temperature
    logits = logits - logits.max(-1, keepdims=True)
    return np.mean(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(X)), LABELS])


def numpy_gradient(params, temperature=1.0):
    """Backpropagation by hand: gradients of the two kernels."""
    hidden = np.tanh(X @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    logits = (hidden @ params["out"]["kernel"] + params["out"]["bias"]) / temperature
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    p[np.arange(len(X)), LABELS] -= 1
    p /= len(X) * temperature
    return {"hidden": X.T @ ((p @ params["out"]["kernel"].T) * (1 - hidden**2)), "out": hidden.T @ p}


def scaled(layer, index, factor):
    """PARAMS with one kernel entry multiplied by a factor, as a mask does."""
    changed = {name: dict(leaves) for name, leaves in PARAMS.items()}
    changed[layer]["kernel"] = PARAMS[layer]["kernel"].copy()
    changed[layer]["kernel"][index] *= factor
    return changed


def mask_derivative(function, layer, index, step=1e-5):
    return (function(scaled(layer, index, 1 + step)) - function(scaled(layer, index, 1 - step))) / (2 * step)


def test_magnitude():
    result = scores.magnitude(PARAMS)
    np.testing.assert_array_equal(result["out"]["kernel"], np.abs(PARAMS["out"]["kernel"]).astype(np.float32))
    assert result["out"]["bias"] is None


def test_prunable_chooses_the_leaves():
    result = scores.magnitude(
        {"a": jnp.ones(3), "b": jnp.ones((2, 2)), "step": jnp.ones((2, 2), int)},
        prunable=lambda path, leaf: path != "b",
    )
    assert result["b"] is None
    assert result["step"] is None  # never scored: not floating point
    assert result["a"].shape == (3,)


def test_snip_is_the_derivative_by_a_mask(x64):
    result = jax.device_get(jax.jit(scores.snip, static_argnums=0)(mlp, PARAMS, X, LABELS))
    assert result["hidden"]["bias"] is None
    for layer, index in PLACES:
        expected = abs(mask_derivative(numpy_loss, layer, index))
        assert result[layer]["kernel"][index] == pytest.approx(expected, rel=1e-6, abs=1e-11)


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_grasp_is_the_mask_derivative_of_the_gradient_norm(x64, temperature):
    def half_squared_norm(params):
        return 0.5 * sum((g**2).sum() for g in numpy_gradient(params, temperature).values())

    result = jax.device_get(jax.jit(lambda: scores.grasp(mlp, PARAMS, X, LABELS, temperature=temperature))())
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(result))
    for layer, index in PLACES:
        expected = mask_derivative(half_squared_norm, layer, index)
        assert result[layer]["kernel"][index] == pytest.approx(expected, rel=1e-5, abs=1e-7 * scale)


def test_taylor_first_order_is_the_squared_derivative(x64):
    result = jax.device_get(jax.jit(scores.taylor, static_argnums=0)(mlp, PARAMS, X, LABELS))
    for layer, index in PLACES:
        expected = mask_derivative(numpy_loss, layer, index) ** 2
        assert result[layer]["kernel"][index] == pytest.approx(expected, rel=1e-6, abs=1e-15)


def test_taylor_second_order_is_exact_on_a_separable_quadratic(x64, rng):
    curvature = jnp.asarray(rng.uniform(0.5, 2, (3, 4)))
    centre = jnp.asarray(rng.normal(size=(3, 4)))
    weights = jnp.asarray(rng.normal(size=(3, 4)))

    def element_loss(w):
        return 0.5 * curvature * (w - centre) ** 2

    result = scores.taylor(
        lambda p, x: element_loss(p["w"]), {"w": weights}, None, None, order=2, loss_fn=lambda out, _: out.sum()
    )
    removal = element_loss(weights) - element_loss(jnp.zeros((3, 4)))
    np.testing.assert_allclose(result["w"], removal**2, rtol=1e-10)


def test_taylor_and_grasp_refuse_bad_arguments():
    with pytest.raises(ValueError, match="order must be 1 or 2, got 3"):
        scores.taylor(mlp, PARAMS, X, LABELS, order=3)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        scores.grasp(mlp, PARAMS, X, LABELS, temperature=0)


def relu_net(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


def test_synflow_is_the_closed_form_of_a_two_layer_net(x64, rng):
    a, b = rng.normal(size=(3, 4)), rng.normal(size=(4, 2))
    result = scores.synflow(relu_net, {"a": a, "b": b}, (1, 3))
    np.testing.assert_allclose(result["a"], np.abs(a) * np.abs(b).sum(1)[None, :], rtol=1e-12)
    np.testing.assert_allclose(result["b"], np.abs(b) * np.abs(a).sum(0)[:, None], rtol=1e-12)
    assert float(result["a"].sum()) == pytest.approx(float(result["b"].sum()))  # conservation


def test_synflow_100_rounds_survives_where_one_shot_magnitude_collapses(rng):
    sizes = [(16, 64), (64, 64), (64, 4)]
    # The middle layer is far smaller in scale: global magnitude cuts all of it.
    params = {str(i): jnp.asarray(rng.normal(size=shape), jnp.float32) for i, shape in enumerate(sizes)}
    params["1"] *= 0.01

    def net(p, x):
        return jax.nn.relu(jax.nn.relu(x @ p["0"]) @ p["1"]) @ p["2"]

    collapsed = layer_statistics(make_masks(scores.magnitude(params), 0.99))
    assert collapsed["1"].kept == 0
    masks = iterative_masks(lambda p: scores.synflow(net, p, (1, 16)), params, exponential(0.99))
    assert all(layer.kept > 0 for layer in layer_statistics(masks).values())
    assert float(net(jax.tree.map(jnp.abs, apply_masks(params, masks)), jnp.ones((1, 16))).sum()) > 0


def test_synflow_out_of_range_is_refused():
    params = {name: jnp.full((4, 4), size, jnp.float32) for name, size in {"a": 1e20, "b": 1e20, "c": 1e5}.items()}
    found = scores.synflow(lambda p, x: x @ p["a"] @ p["b"] @ p["c"], params, (1, 4))
    with pytest.raises(ValueError, match="NaN"):
        make_masks(found, 0.5)


def test_movement_is_the_running_sum(x64, rng):
    weights, gradients = rng.normal(size=(5, 2, 3)), rng.normal(size=(5, 2, 3))
    total = None
    for w, g in zip(weights, gradients, strict=True):
        total = scores.movement({"k": w, "b": w[0]}, {"k": g, "b": g[0]}, total)
    np.testing.assert_allclose(total["k"], -(weights * gradients).sum(0), rtol=1e-12)
    assert total["b"] is None


def test_movement_is_positive_where_descent_moves_away_from_zero(rng):
    w, g = jnp.asarray(rng.normal(size=(8, 8))), jnp.asarray(rng.normal(size=(8, 8)))
    away = jnp.abs(w - 1e-3 * g) > jnp.abs(w)
    np.testing.assert_array_equal(scores.movement({"k": w}, {"k": g})["k"] > 0, away)


def test_movement_sums_in_float32_at_least():
    total = None
    for _ in range(300):
        total = scores.movement({"k": jnp.ones((1, 1), jnp.bfloat16)}, {"k": -jnp.ones((1, 1), jnp.bfloat16)}, total)
    assert float(total["k"][0, 0]) == 300  # bfloat16 would stop at 256


def numpy_lamp(w):
    squares = np.asarray(w, np.float64) ** 2
    return squares / np.where(squares[..., None, None] <= squares, squares, 0).sum((-2, -1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dimap_and_lamp_equal_the_formula(dtype, rng):
    w = jnp.asarray(rng.normal(size=(13, 7)), dtype)
    w = w.at[3].set(w[4]).at[0, 0].set(0).at[5, 5].set(-w[6, 6]).at[2, 2].set(5)  # ties and a zero
    for criterion in (scores.dimap, scores.lamp):
        result = jax.jit(criterion)({"w": w})["w"]
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, numpy_lamp(w.astype(jnp.float32)), rtol=1e-5, atol=0)
        assert result.max() == result[2, 2] == 1


def test_dimap_ranks_a_large_layer_as_magnitude_does(rng):
    w = jnp.asarray(rng.normal(size=(400, 500)), jnp.float32)
    result = np.asarray(jax.jit(scores.dimap)({"w": w})["w"]).ravel()
    order = np.argsort(np.abs(np.asarray(w)).ravel())
    assert (np.diff(result[order]) >= 0).all()
    assert result[order[-1]] == 1


def test_dimap_does_not_depend_on_scale_and_survives_tiny_and_empty_layers(rng):
    w = jnp.asarray(rng.normal(size=(6, 6)), jnp.float32)
    result = jax.jit(scores.dimap)(
        {"w": w, "tiny": w * 2.0**-100, "zeros": jnp.zeros((2, 2)), "empty": jnp.zeros((0, 2))}
    )
    np.testing.assert_allclose(result["tiny"], result["w"], rtol=1e-6)
    assert not result["zeros"].any()
    assert result["empty"].shape == (0, 2)


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("layers_0/blocks_1/attn/qkv/kernel", "qkv"),
        ("layers_0/blocks_1/attn/proj/kernel", "prj"),
        ("layers_0/blocks_1/mlp/fc2/kernel", "mlp"),
        ("Transformer/encoderblock_3/MultiHeadDotProductAttention_1/query/kernel", "qkv"),
        ("Transformer/encoderblock_3/MultiHeadDotProductAttention_1/out/kernel", "prj"),
        ("Transformer/encoderblock_3/MlpBlock_3/Dense_0/kernel", "mlp"),
        ("layers_0/downsample/reduction/kernel", None),
        ("layers_0/blocks_0/attn/relative_position_bias_table", None),
        ("patch_embed/proj/kernel", None),
        ("encoder_norm/scale", None),
        ("head/kernel", None),
    ],
)
def test_dimap_modules(path, module):
    assert scores.dimap_modules(path) == module


def test_dimap_ranks_each_module_by_itself(rng):
    def draw(scale):
        return {"kernel": jnp.asarray(scale * rng.normal(size=(8, 24)), jnp.float32)}

    # Were all ranked together, the number kept in each module would differ from half.
    params = {f"block_{i}": {"attn": {"qkv": draw(1.0)}, "mlp": {"fc1": draw(9.0)}} for i in range(2)}
    masks = make_masks(jax.jit(scores.dimap)(params), 0.5, scope=scores.dimap_modules)
    for attribute, layer in (("attn", "qkv"), ("mlp", "fc1")):
        assert sum(int(masks[block][attribute][layer]["kernel"].sum()) for block in params) == 192


def test_random_is_uniform_reproducible_and_different_by_leaf():
    params = {"a": jnp.zeros((100, 100)), "b": jnp.zeros((100, 100)), "bias": jnp.zeros(3)}
    first, again = (scores.random(jax.random.key(3), params) for _ in range(2))
    np.testing.assert_array_equal(first["a"], again["a"])
    assert abs(np.corrcoef(first["a"].ravel(), first["b"].ravel())[0, 1]) < 0.05
    np.testing.assert_allclose(np.quantile(first["a"], [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.02)
    assert first["bias"] is None


@pytest.mark.parametrize(
    "criterion",
    [
        lambda p: scores.magnitude(p),
        lambda p: scores.dimap(p),
        lambda p: scores.random(jax.random.key(0), p),
        lambda p: scores.movement(p, p),
        lambda p: scores.snip(relu_net, p, jnp.ones((2, 3)), jnp.zeros(2, int)),
        lambda p: scores.grasp(relu_net, p, jnp.ones((2, 3)), jnp.zeros(2, int)),
        lambda p: scores.taylor(relu_net, p, jnp.ones((2, 3)), jnp.zeros(2, int), order=2),
        lambda p: scores.synflow(relu_net, p, (1, 3)),
        lambda p: scores.px(relu_net, p, jnp.ones((2, 3))),
    ],
)
def test_every_criterion_jits_and_keeps_the_tree(criterion, rng):
    params = {"a": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), "b": jnp.ones((4, 2)), "unused": jnp.ones(5)}
    result = jax.jit(criterion)(params)
    assert result["unused"] is None
    for key in ("a", "b"):
        assert result[key].shape == params[key].shape
        assert jnp.isfinite(result[key]).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_scored_in_float32(dtype):
    rng = np.random.default_rng(0)
    half = {
        name: jnp.asarray(1e-2 * rng.normal(size=shape), dtype) for name, shape in (("a", (32, 32)), ("b", (32, 10)))
    }
    batch, labels = jnp.asarray(rng.normal(size=(8, 32)), dtype), jnp.arange(8)

    def net(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    wide, wide_batch = jax.tree.map(lambda x: x.astype(jnp.float32), (half, batch))
    for score in (scores.snip, scores.grasp, scores.taylor, functools.partial(scores.taylor, order=2)):
        found, expected = score(net, half, batch, labels), score(net, wide, wide_batch, labels)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    found, expected = scores.synflow(net, half, (1, 32)), scores.synflow(net, wide, (1, 32))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
