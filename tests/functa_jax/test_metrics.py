"""PSNR against closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from functa_jax import psnr, psnr_from_mse


@pytest.mark.parametrize(("error", "expected"), [(1.0, 0.0), (0.1, 20.0), (0.01, 40.0), (0.5, 20 * np.log10(2))])
def test_a_constant_error(error, expected):
    target = jnp.linspace(0, 1, 2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
    values = psnr(target + error, target)
    assert values.shape == (2,)
    np.testing.assert_allclose(values, expected, atol=1e-3)
    np.testing.assert_allclose(psnr_from_mse(jnp.float32(error**2)), expected, atol=1e-4)


def test_each_image_has_its_own_and_leading_axes_stay():
    target = jnp.zeros((2, 3, 4, 4, 1))
    error = 10.0 ** -jnp.arange(6.0).reshape(2, 3, 1, 1, 1)
    np.testing.assert_allclose(psnr(target + error, target), 20 * np.arange(6.0).reshape(2, 3), atol=1e-4)
    assert psnr(target[0, 0], target[0, 0] + 0.1).shape == ()
    assert psnr(jnp.zeros((9, 2)), jnp.ones((9, 2))).shape == ()


def test_the_range_sets_the_peak():
    target = jnp.zeros((4, 4, 1))
    np.testing.assert_allclose(psnr(target + 25.5, target, data_range=255.0), 20.0, atol=1e-4)
    np.testing.assert_allclose(psnr(target + 0.2, target, data_range=2.0), 20.0, atol=1e-4)
    np.testing.assert_allclose(psnr_from_mse(jnp.float32(0.04), data_range=2.0), 20.0, atol=1e-4)


def test_equal_images_are_infinitely_good():
    assert np.isposinf(psnr(jnp.ones((4, 4, 1)), jnp.ones((4, 4, 1))))


def test_bytes_do_not_wrap_around():
    low, high = jnp.zeros((4, 4, 1), jnp.uint8), jnp.full((4, 4, 1), 255, jnp.uint8)
    np.testing.assert_allclose(psnr(low, high, data_range=255.0), 0.0, atol=1e-4)
    np.testing.assert_allclose(psnr(low, low + 51, data_range=255.0), 20 * np.log10(5), atol=1e-4)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=8))
def test_the_mean_over_images_is_never_below_that_of_the_mean_error(mses):
    values = psnr_from_mse(jnp.array(mses, jnp.float32))
    np.testing.assert_allclose(values, -10 * np.log10(mses), atol=1e-3)
    assert float(jnp.mean(values)) >= float(psnr_from_mse(jnp.mean(jnp.array(mses, jnp.float32)))) - 1e-4


def test_both_ways_for_two_images():
    target = jnp.zeros((2, 4, 4, 1))
    prediction = target.at[0].set(0.1).at[1].set(0.01)
    assert float(jnp.mean(psnr(prediction, target))) == pytest.approx(30.0, abs=1e-3)
    mse = jnp.mean(jnp.square(prediction - target))
    assert float(psnr_from_mse(mse)) == pytest.approx(-10 * np.log10(0.00505), abs=1e-3)


def test_different_shapes_are_an_error():
    with pytest.raises(ValueError, match=r"prediction \(4, 4, 1\) and target \(4, 4, 3\) must have the same shape"):
        psnr(jnp.zeros((4, 4, 1)), jnp.zeros((4, 4, 3)))
