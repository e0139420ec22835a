"""The kernel against explicit Jacobians built by finite differences and by jax.jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prune_jax import apply_masks, ntk, ntk_spectrum, ntk_trace

PARAMS = {
    "a": jax.random.normal(jax.random.key(0), (3, 5)),
    "b": jax.random.normal(jax.random.key(1), (5, 2)),
    "n": jnp.arange(3),
}
X = jax.random.normal(jax.random.key(2), (7, 3))


def net(params, x):
    # Bent at the output too, so that kernel entries (k, l) and (l, k) of two examples differ.
    return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"])


def explicit_kernel(params=PARAMS, x=X, step=1e-6):
    """J row by row from central differences in float64, then J J^T."""
    a, b = (np.asarray(params[key], np.float64) for key in "ab")
    x = np.asarray(x, np.float64)
    flat = np.concatenate([a.ravel(), b.ravel()])

    def outputs(w):
        return np.tanh(np.tanh(x @ w[:15].reshape(3, 5)) @ w[15:].reshape(5, 2)).ravel()

    columns = [(outputs(flat + step * e) - outputs(flat - step * e)) / (2 * step) for e in np.eye(flat.size)]
    jacobian = np.stack(columns, 1)
    return jacobian @ jacobian.T


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_exact_kernel_trace_and_spectrum(chunk):
    expected = explicit_kernel()
    np.testing.assert_allclose(ntk(net, PARAMS, X, chunk=chunk), expected, rtol=1e-4, atol=1e-4)
    assert float(ntk_trace(net, PARAMS, X, chunk=chunk)) == pytest.approx(np.trace(expected), rel=1e-5)
    spectrum = ntk_spectrum(net, PARAMS, X, chunk=chunk)
    np.testing.assert_allclose(spectrum, np.linalg.eigvalsh(expected)[::-1], rtol=1e-3, atol=1e-3)


def test_probes_are_unbiased():
    expected = explicit_kernel()
    kernel = ntk(net, PARAMS, X, probes=4000, chunk=500, key=jax.random.key(0))
    error = 6 * np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / 4000)
    assert (np.abs(kernel - expected) < error).all()
    trace = ntk_trace(net, PARAMS, X, probes=4000, chunk=500, key=jax.random.key(1))
    deviation = np.sqrt(2 * np.trace(expected @ expected) / 4000)
    assert abs(float(trace) - np.trace(expected)) < 5 * deviation


def test_one_probe_of_a_diagonal_kernel_is_exact():
    # Signs make v^T A v = tr A for diagonal A: here J^T J is diagonal.
    x = 2 * jnp.eye(3)
    trace = ntk_trace(lambda p, x: x @ p, jnp.zeros((3, 1)), x, probes=1, key=jax.random.key(0))
    assert float(trace) == pytest.approx(12)


def test_jits_with_masks_and_pytree_inputs():
    masks = {"a": PARAMS["a"] > 0, "b": None, "n": None}

    def masked(p, x):
        return net(apply_masks(p, masks), x["image"])

    trace = jax.jit(lambda p, x: ntk_trace(masked, p, x, chunk=2))(PARAMS, {"image": X})
    jacobian = jax.jacobian(lambda a: net({**PARAMS, "a": jnp.where(masks["a"], a, 0)}, X))(PARAMS["a"])
    rest = jax.jacobian(lambda b: net({**apply_masks(PARAMS, masks), "b": b}, X))(PARAMS["b"])
    assert float(trace) == pytest.approx(float((jacobian**2).sum() + (rest**2).sum()), rel=1e-5)


def test_memory_stays_bounded_by_the_chunk():
    params, x = {"w": jnp.ones((64, 64))}, jnp.ones((64, 64))

    def peak(chunk):
        return (
            jax.jit(lambda p, x: ntk(lambda p, x: jnp.tanh(x @ p["w"]).sum(-1), p, x, chunk=chunk))
            .lower(params, x)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    assert peak(2) < peak(64) / 4


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        ntk(net, PARAMS, X, chunk=0)
    with pytest.raises(ValueError, match="go together"):
        ntk_trace(net, PARAMS, X, probes=3)
    with pytest.raises(ValueError, match="go together"):
        ntk(net, PARAMS, X, key=jax.random.key(0))
    with pytest.raises(ValueError, match="probes must be at least 1"):
        ntk_trace(net, PARAMS, X, probes=0, key=jax.random.key(0))


def test_half_precision_kernels_are_float32():
    params, inputs = jnp.ones((64, 8), jnp.float16), jnp.full((16, 64), 10.0, jnp.float16)

    def net(p, x):
        return x @ p

    assert ntk_trace(net, params, inputs) == 16 * 8 * 64 * 100  # out of float16's range
    assert ntk_spectrum(net, params.astype(jnp.bfloat16), inputs).sum() == pytest.approx(16 * 8 * 64 * 100, rel=1e-5)
    probed = ntk_trace(net, params, inputs, probes=4, key=jax.random.key(0))
    assert probed.dtype == jnp.float32
    assert jnp.isfinite(probed)
