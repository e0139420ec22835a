"""The sine against float64 and exact references, and the SIREN network against numpy."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functa_reference import random_params, siren
from hypothesis import given, settings
from hypothesis import strategies as st

from functa_jax import Siren, sine

# --- the sine ---------------------------------------------------------------------------------------------------------


@cache
def derivative(order):
    """The derivative of that order of `sine`, at every element of a vector."""
    f = sine
    for _ in range(order):
        f = jax.grad(f)
    return jax.jit(jax.vmap(f))


REFERENCES = (np.sin, np.cos, lambda x: -np.sin(x), lambda x: -np.cos(x))


def near_multiples_of_half_pi():
    """For every multiple of pi/2 up to 1000: the nearest floats, one by one, then points ever farther away."""
    multiples = (np.arange(-636, 637) * (np.pi / 2)).astype(np.float32)
    neighbours = np.spacing(np.abs(multiples))[:, None] * np.arange(-40, 41)
    around = np.geomspace(1e-7, 0.8, 60)
    offsets = np.concatenate([neighbours, np.broadcast_to(np.concatenate([around, -around]), (1273, 120))], axis=1)
    return (multiples[:, None] + offsets).astype(np.float32).ravel()


@cache
def arguments_up_to_1000():
    rng = np.random.default_rng(0)
    pieces = [
        rng.uniform(-1000, 1000, 200_000),
        rng.uniform(-4, 4, 100_000),
        rng.choice([-1, 1], 20_000) * np.geomspace(1e-37, 1e3, 20_000),
        near_multiples_of_half_pi(),
        [0.0, -0.0, 1000.0, -1000.0],
    ]
    return np.concatenate(pieces).clip(-1000, 1000).astype(np.float32)


@pytest.mark.parametrize("order", range(4))
def test_sine_and_derivatives_up_to_1000(order):
    x = arguments_up_to_1000()
    f = derivative(order)
    error = np.abs(np.asarray(f(x), np.float64) - REFERENCES[order](x.astype(np.float64)))
    assert error.max() < 3e-7  # what the docstring says


@cache
def inverse_of_two_pi(bits):
    """2**bits / (2 pi), rounded down, by Machin's formula in integers."""

    def arctan_of_inverse(n, one):
        term, total, k, sign = one // n, 0, 1, 1
        while term:
            total += sign * (term // k)
            term, k, sign = term // n**2, k + 2, -sign
        return total

    one = 1 << (bits + 64)
    pi = 4 * (4 * arctan_of_inverse(5, one) - arctan_of_inverse(239, one))
    return (one * one // (2 * pi)) >> 64


def exact_angle(x):
    """x modulo 2 pi in [-pi, pi], to float64 precision for every float32, with integers of 300 bits."""
    significand, exponent = math.frexp(float(x))
    product = int(significand * 2**24) * inverse_of_two_pi(300)
    product = product << exponent - 24 if exponent >= 24 else product >> 24 - exponent
    turn = ((product & (1 << 300) - 1) >> 200) / 2**100
    return 2 * math.pi * (turn - round(turn))


def test_the_exact_reference_itself():
    x = np.random.default_rng(0).uniform(-1e6, 1e6, 100).astype(np.float32)
    np.testing.assert_allclose([math.sin(exact_angle(v)) for v in x], np.sin(x.astype(np.float64)), rtol=0, atol=1e-14)


@cache
def arguments_of_every_exponent():
    """From 512 up to the largest float32, with the float32 that lies nearest to a multiple of pi/2."""
    rng = np.random.default_rng(1)
    significands = np.concatenate([rng.integers(0, 2**23, (119, 60)), np.tile([0, 1, 2**23 - 1], (119, 1))], axis=1)
    bits = (np.arange(9, 128)[:, None] + 127 << 23) | significands | (rng.integers(0, 2, (119, 63)) << 31)
    worst = np.float32(16367173 * 2.0**72)
    x = np.append(bits.astype(np.uint32).view(np.float32).ravel(), [worst, -worst, np.finfo(np.float32).max])
    return x.astype(np.float32), np.array([exact_angle(v) for v in x])


@pytest.mark.parametrize("order", range(4))
def test_sine_and_derivatives_up_to_the_largest_float(order):
    x, angle = arguments_of_every_exponent()
    assert np.abs(x).max() == np.finfo(np.float32).max
    f = derivative(order)
    assert np.abs(np.asarray(f(x), np.float64) - REFERENCES[order](angle)).max() < 1e-6


SINE_AND_SLOPE = jax.jit(lambda x: jax.jvp(sine, (x,), (jnp.float32(1),)))


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_sine_of_any_float(x):
    value, slope = SINE_AND_SLOPE(jnp.float32(x))
    assert abs(float(value) - math.sin(exact_angle(x))) < 1e-6
    assert abs(float(slope) - math.cos(exact_angle(x))) < 1e-6
    assert float(SINE_AND_SLOPE(jnp.float32(-x))[0]) == -float(value)


def test_infinities_and_nan_stay_their_own():
    x = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 1.0])
    for order in range(4):
        f = derivative(order)
        np.testing.assert_array_equal(np.isnan(f(x)), [True, True, True, False])


def test_small_arguments_keep_their_relative_precision():
    x = np.geomspace(1e-37, 1, 10_000).astype(np.float32)
    np.testing.assert_allclose(np.asarray(sine(x), np.float64), np.sin(x.astype(np.float64)), rtol=2.5e-7)


@pytest.mark.parametrize("f", [sine, jax.grad(sine)], ids=["sine", "cosine"])
def test_a_batch_is_just_a_larger_array(f):
    x = jnp.linspace(-2000, 2000, 12).reshape(3, 4)
    each = f if f is sine else jax.vmap(f)
    batched = jax.jit(jax.vmap(each))
    np.testing.assert_array_equal(batched(x), jax.jit(each)(x) if f is sine else jax.jit(jax.vmap(each))(x))
    if jax.default_backend() == "cpu":  # the costly reduction stays in a branch of its own
        assert " conditional(" in batched.lower(x).compile().as_text()


def test_float64_is_the_built_in():
    with jax.enable_x64(True):
        x = jnp.linspace(-2000, 2000, 1001)
        assert sine(x).dtype == jnp.float64
        np.testing.assert_array_equal(sine(x), jnp.sin(x))
        np.testing.assert_array_equal(jax.vmap(jax.grad(sine))(x), jnp.cos(x))
        assert sine(jnp.arange(3)).dtype == jnp.float64


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_go_through_float32(dtype):
    x = jnp.linspace(-60, 60, 1001).astype(dtype)
    exact = np.asarray(x, np.float64)
    half_a_unit = float(jnp.finfo(dtype).eps) / 2
    for f, reference in ((jax.jit(sine), np.sin), (derivative(1), np.cos)):
        assert f(x).dtype == dtype
        assert np.abs(np.asarray(f(x), np.float64) - reference(exact)).max() < half_a_unit


def test_integers_and_booleans_become_floats():
    x = np.arange(-50, 50)
    np.testing.assert_allclose(jax.jit(sine)(x), np.sin(x), atol=3e-7)
    for dtype in (jnp.int32, jnp.uint8, jnp.bool_):
        assert jax.eval_shape(sine, jax.ShapeDtypeStruct((0, 2), dtype)) == jax.ShapeDtypeStruct((0, 2), jnp.float32)
    assert float(sine(3)) == pytest.approx(math.sin(3), abs=3e-7)


def test_sine_under_every_transformation():
    x = jnp.linspace(-30, 30, 24).reshape(4, 6)
    sin, cos = np.sin(np.asarray(x, np.float64)), np.cos(np.asarray(x, np.float64))

    def total(x):
        return jnp.sum(sine(x))

    def through_scan(x):
        return jax.lax.scan(lambda carry, row: (carry + jnp.sum(sine(row)), None), 0.0, x)[0]

    ones = jnp.ones_like(x)
    cases = {  # name: function, expected
        "value": (sine, sin),
        "vmap": (jax.vmap(sine), sin),
        "vmap over another axis": (jax.vmap(jax.vmap(sine), in_axes=1, out_axes=1), sin),
        "fori_loop": (lambda x: jax.lax.fori_loop(0, 2, lambda _, y: sine(y), x), np.sin(sin)),
        "grad": (jax.grad(total), cos),
        "grad of vmap": (jax.grad(lambda x: jnp.sum(jax.vmap(sine)(x))), cos),
        "vmap of grad": (jax.vmap(jax.vmap(jax.grad(sine))), cos),
        "jvp": (lambda x: jax.jvp(sine, (x,), (2 * ones,))[1], 2 * cos),
        "linearize": (lambda x: jax.linearize(sine, x)[1](3 * ones), 3 * cos),
        "vjp": (lambda x: jax.vjp(sine, x)[1](3 * ones)[0], 3 * cos),
        "checkpoint": (jax.grad(jax.checkpoint(total)), cos),
        "scan": (jax.grad(through_scan), cos),
        "checkpointed scan": (jax.grad(jax.checkpoint(through_scan)), cos),
        "forward over reverse": (lambda x: jax.jvp(jax.grad(total), (x,), (ones,))[1], -sin),
        "reverse over reverse": (jax.grad(lambda x: jnp.sum(jax.grad(total)(x))), -sin),
        "reverse over forward": (jax.grad(lambda x: jnp.sum(jax.jvp(sine, (x,), (ones,))[1])), -sin),
        "hessian": (lambda x: jnp.diagonal(jax.hessian(total)(x[0])), -sin[0]),
        "third": (lambda x: jnp.einsum("iiii->i", jax.jacfwd(jax.jacrev(jax.jacfwd(sine)))(x[0])), -cos[0]),
    }
    found = jax.jit(lambda x: {name: f(x) for name, (f, _) in cases.items()})(x)
    for name, (f, expected) in cases.items():
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=2e-6, err_msg=name)
        if name in ("value", "grad"):
            np.testing.assert_allclose(f(x), expected, rtol=0, atol=2e-6, err_msg=f"{name}, not compiled")


def third_derivative(x):
    return jax.grad(jax.grad(jax.grad(sine)))(x)


@pytest.mark.parametrize("f", [sine, jax.grad(sine), third_derivative], ids=["value", "first", "third"])
def test_cpu_computes_a_polynomial_and_other_platforms_the_built_in(f):
    x = jnp.ones(8)
    traced = jax.jit(jax.vmap(f)).trace(x)
    compiled = traced.lower(lowering_platforms=("cpu",)).compile().as_text()
    for operation in (" sine(", " cosine("):
        assert operation not in compiled
    assert " multiply(" in compiled
    for platform in ("cuda", "tpu"):
        lowered = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.sine" if f is sine else "stablehlo.cosine") in lowered
        assert "stablehlo.round" not in lowered
        assert "stablehlo.bitcast_convert" not in lowered


def test_one_export_serves_several_platforms():
    exported = jax.export.export(jax.jit(sine), platforms=("cpu", "cuda"))(jax.ShapeDtypeStruct((4,), jnp.float32))
    x = np.linspace(-50, 50, 4, dtype=np.float32)
    np.testing.assert_array_equal(exported.call(x), sine(x))


# --- the network ------------------------------------------------------------------------------------------------------


def uniform_coords(count, dimensions=2, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, dimensions)).astype(np.float32)


def post_activations(params, coords, w0s):
    """The output of each sine layer, in float64 numpy."""
    for layer in range(len(w0s)):
        last = {"output": {"kernel": np.eye(params[f"layer_{layer}"]["bias"].size), "bias": 0.0}}
        yield siren({**params, **last}, coords, w0s[: layer + 1], 0.0)


@cache
def initialised():
    w0s, coords = (40.0, 30.0, 20.0, 30.0, 25.0), uniform_coords(300)
    model = Siren(width=512, depth=6, out_features=100, w0=w0s)
    return w0s, coords, jax.device_get(jax.jit(model.init)(jax.random.key(0), coords))["params"]


def test_activations_are_distributed_alike_in_every_layer():
    """Sitzmann 2020, section 3.2: sine arguments of unit variance after the first layer, outputs close to arcsine."""
    w0s, coords, params = initialised()
    inputs, power = None, 0.5
    for layer, h in enumerate(post_activations(params, coords, w0s)):
        assert abs(h.mean()) < 0.1  # of 512 units with random phases
        assert h.std() == pytest.approx(0.5**0.5, rel=0.05)
        if layer:
            arguments = w0s[layer] * (inputs @ params[f"layer_{layer}"]["kernel"])
            assert arguments.std() == pytest.approx(1.0, rel=0.05)
            # E sin^2 of a normal of variance 2 * power (what the kernel's bound gives: w0^2 n (6 / n w0^2) / 3) plus
            # the bias, uniform on +-w0 / sqrt(n): (1 - exp(-2 variance) sin(2 a) / (2 a)) / 2.
            a = w0s[layer] / 512**0.5
            power = (1 - np.exp(-4 * power) * np.sin(2 * a) / (2 * a)) / 2
            assert np.mean(h**2) == pytest.approx(power, rel=0.05)
        inputs = h


def test_initialisation_bounds_follow_fan_in_and_the_frequency_of_each_layer():
    w0s, _, params = initialised()
    assert set(params) == {"output", *(f"layer_{layer}" for layer in range(5))}
    assert params["output"]["kernel"].shape == (512, 100)
    for name, dense in params.items():
        fan_in = dense["kernel"].shape[0]
        w0 = w0s[-1] if name == "output" else w0s[int(name[-1])]  # the output layer's: that of the layer before
        bound = 1 / 2 if name == "layer_0" else (6 / 512) ** 0.5 / w0
        assert 0.98 * bound < np.abs(dense["kernel"]).max() <= bound * (1 + 1e-6)
        assert dense["kernel"].std() == pytest.approx(bound / 3**0.5, rel=0.05)  # uniform
        assert 0.95 * fan_in**-0.5 < np.abs(dense["bias"]).max() <= fan_in**-0.5 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("w0", "offset", "shape"), [(30.0, 0.0, (7,)), ((20.0, 5.0, 10.0), 0.5, (3, 5)), (8, -1.0, ())]
)
def test_siren_agrees_with_numpy(w0, offset, shape):
    model = Siren(width=24, depth=4, out_features=2, w0=w0, offset=offset)
    coords = uniform_coords(math.prod(shape)).reshape(*shape, 2)
    params = random_params(model, coords)
    w0s = w0 if isinstance(w0, tuple) else (w0,) * 3
    y = jax.jit(model.apply)({"params": params}, coords)
    assert y.shape == (*shape, 2)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, siren(params, coords, w0s, offset), atol=3e-5)


def test_derivatives_in_the_coordinates_agree_with_finite_differences():
    model, w0s, step = Siren(width=24, depth=3, out_features=2, w0=(20.0, 10.0)), (20.0, 10.0), 1e-5
    coords = uniform_coords(20)
    params = random_params(model, coords)

    def reference(moved):
        return siren(params, coords.astype(np.float64) + moved, w0s, 0.0)

    def apply(x):
        return model.apply({"params": params}, x)

    for direction in np.eye(2):
        tangent = jnp.broadcast_to(jnp.asarray(direction, jnp.float32), coords.shape)
        first = (reference(step * direction) - reference(-step * direction)) / (2 * step)
        _, found = jax.jit(lambda x, t: jax.jvp(apply, (x,), (t,)))(coords, tangent)
        np.testing.assert_allclose(found, first, atol=1e-4 * np.abs(first).max())

        second = (reference(1e-4 * direction) - 2 * reference(0) + reference(-1e-4 * direction)) / 1e-8
        _, found = jax.jit(lambda x, t: jax.jvp(lambda x: jax.jvp(apply, (x,), (t,))[1], (x,), (t,)))(coords, tangent)
        np.testing.assert_allclose(found, second, atol=1e-4 * np.abs(second).max())


def test_bfloat16_matmuls_stay_close_with_float32_everywhere_else():
    coords = uniform_coords(200)
    model = Siren(width=64, depth=4, w0=3.0)
    narrow = Siren(width=64, depth=4, w0=3.0, compute_dtype=jnp.bfloat16)
    variables = {"params": random_params(narrow, coords)}  # which asserts that the module's are float32
    y, reference = jax.jit(narrow.apply)(variables, coords), jax.jit(model.apply)(variables, coords)
    assert y.dtype == jnp.float32
    error = np.abs(y - reference).max() / np.std(reference)
    assert 1e-3 < error < 0.2  # used, and harmless

    def dots(model):
        jaxpr = str(jax.make_jaxpr(model.apply)(variables, coords))
        return jaxpr.count("bf16"), jaxpr.count("preferred_element_type=float32")

    assert dots(model) == (0, 4)
    assert dots(narrow)[1] == 4
    assert dots(narrow)[0] > 0
    gradients = jax.eval_shape(jax.grad(lambda v: jnp.mean(narrow.apply(v, coords) ** 2)), variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


def test_float64_parameters_give_float64():
    with jax.enable_x64(True):
        coords = jnp.asarray(uniform_coords(5), jnp.float64)
        model = Siren(width=16, depth=3, w0=20.0)
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), random_params(model, coords))
        y = jax.jit(model.apply)({"params": params}, coords)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, siren(params, coords, (20.0, 20.0), 0.0), rtol=1e-11)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 1}, "depth must be at least 2 .* got 1"),
        ({"w0": (30.0, 30.0)}, r"w0 must be one number or 3 .* got 2: \(30.0, 30.0\)"),
    ],
)
def test_errors_name_argument_value_and_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        Siren(**{"width": 8, "depth": 4} | arguments).init(jax.random.key(0), jnp.zeros((2, 2)))
