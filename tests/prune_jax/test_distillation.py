"""The distillation loss against numpy and its known gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prune_jax import distillation_loss

STUDENT, TEACHER = (jnp.asarray(np.random.default_rng(i).normal(size=(5, 7)) * 3, jnp.float32) for i in range(2))


def softmax(x):
    x = np.exp(np.asarray(x, np.float64) - np.max(x, -1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_value_and_gradient(temperature):
    p, q = softmax(TEACHER / temperature), softmax(STUDENT / temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(distillation_loss(STUDENT, TEACHER, temperature), expected, rtol=1e-4)

    def total(student, teacher):
        return distillation_loss(student, teacher, temperature).sum()

    student, teacher = jax.jit(jax.grad(total, argnums=(0, 1)))(STUDENT, TEACHER)
    np.testing.assert_allclose(student, temperature * (q - p), atol=1e-5)
    assert not teacher.any()


def test_certain_teachers_stay_finite():
    sure = jnp.array([[1e4, 0.0]])
    assert np.isfinite(distillation_loss(-sure, sure)).all()
    assert distillation_loss(sure, sure) == 0


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        distillation_loss(STUDENT, TEACHER, 0)
    with pytest.raises(ValueError, match=r"one shape, got \(5, 7\) and \(4, 7\)"):
        distillation_loss(STUDENT, TEACHER[:4])
