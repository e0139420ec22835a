"""Proximal maps against their definition as minimisers, in float64 NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optim_jax import L1, GroupLasso, Penalty, SparseGroup, assign_penalties

SHAPE = (3, 2, 4, 5)

# Each penalty beside its value, written out for one array x of shape SHAPE.
PENALTIES = {
    "l1": (L1(0.7), lambda x: 0.7 * np.abs(x).sum()),
    "filters": (GroupLasso(strength=1.5), lambda x: 1.5 * sum(np.linalg.norm(x[..., o]) for o in range(5))),
    "inputs": (GroupLasso(axis=-2), lambda x: sum(np.linalg.norm(x[:, :, i]) for i in range(4))),
    "slices": (
        GroupLasso(axis=(-2, 3)),
        lambda x: sum(np.linalg.norm(x[:, :, i, o]) for i in range(4) for o in range(5)),
    ),
    "scaled": (
        GroupLasso(strength=0.2, scale_by_size=True),
        lambda x: 0.2 * np.sqrt(24) * sum(np.linalg.norm(x[..., o]) for o in range(5)),
    ),
    "sparse-group": (
        SparseGroup(L1(0.3), GroupLasso(axis=-1, strength=0.8)),
        lambda x: 0.3 * np.abs(x).sum() + 0.8 * sum(np.linalg.norm(x[..., o]) for o in range(5)),
    ),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_prox_minimises_its_objective(name):
    """The objective is 1-strongly convex: at a minimiser x, f(y) >= f(x) + ||y - x||^2 / 2 for every y."""
    penalty, value = PENALTIES[name]
    rng = np.random.default_rng(1)
    # Groups of very different norms: some vanish, some stay.
    z = rng.standard_normal(SHAPE) * np.geomspace(0.05, 3, 5) * np.geomspace(0.05, 1, 4)[:, None]

    def objective(x):
        return 0.5 * np.sum((x - z) ** 2) + value(x)

    with jax.enable_x64(True):
        x = np.asarray(penalty.prox(jnp.asarray(z)))
    assert 0 < np.count_nonzero(x) < x.size
    rivals = [np.zeros(SHAPE), z, 0.5 * z]
    rivals += [x + scale * rng.standard_normal(SHAPE) for scale in (1e-4, 1e-2, 1.0) for _ in range(50)]
    rivals += [x * (1 + scale * rng.standard_normal(SHAPE)) for scale in (1e-4, 1e-2, 1.0) for _ in range(50)]
    for y in rivals:
        assert objective(y) >= objective(x) + 0.5 * np.sum((y - x) ** 2) - 1e-12


@pytest.mark.parametrize("name", PENALTIES)
def test_active_tells_the_groups_that_prox_leaves_nonzero(name):
    penalty = PENALTIES[name][0]
    for seed in range(20):
        z = jax.random.normal(jax.random.key(seed), SHAPE) * jnp.geomspace(0.05, 3, 5).reshape(1, 1, 1, 5)
        active, x = penalty.active(z), np.asarray(penalty.prox(z))
        assert active.ndim == z.ndim
        summed = tuple(a for a in range(4) if active.shape[a] == 1)
        np.testing.assert_array_equal(active, np.any(x != 0, axis=summed, keepdims=True) if summed else x != 0)


def test_groups_are_what_their_axis_indexes():
    for axis, shape in ((-1, (1, 1, 1, 5)), (3, (1, 1, 1, 5)), (-2, (1, 1, 4, 1)), ((2, -1), (1, 1, 4, 5))):
        assert GroupLasso(axis).active(jnp.ones(SHAPE)).shape == shape
    assert GroupLasso(-1).active(jnp.ones((4, 5))).shape == (1, 5)  # dense neurons
    assert GroupLasso(-2).active(jnp.ones((4, 5))).shape == (4, 1)  # dense inputs
    with pytest.raises(ValueError, match=r"GroupLasso\(axis=4\).*shape \(3, 2, 4, 5\)"):
        GroupLasso(4).prox(jnp.ones(SHAPE))


@pytest.mark.parametrize("name", PENALTIES)
def test_zero_and_huge_groups_have_finite_maps_and_derivatives(name):
    """In forward and in reverse mode, everywhere: alive, on the threshold, below it, and at zero."""
    penalty = PENALTIES[name][0]
    mixed = jnp.zeros(SHAPE).at[..., 1].set(1e15).at[..., 2].set(0.3).at[0, 0, 0, 3].set(penalty_threshold(penalty))
    for z in (jnp.zeros(SHAPE), mixed, jnp.full(SHAPE, 1e-30)):
        x, derivative = jax.jvp(penalty.prox, (z,), (jnp.ones(SHAPE),))
        gradient = jax.grad(lambda z: penalty.prox(z).sum())(z)
        for values in (x, derivative, gradient):
            assert bool(jnp.all(jnp.isfinite(values)))
        np.testing.assert_array_equal(x[..., 0], 0)
        if not np.any(np.asarray(penalty.active(z))):  # constant at zero, all around
            np.testing.assert_array_equal(derivative, 0)
            np.testing.assert_array_equal(gradient, 0)


def penalty_threshold(penalty):
    return penalty.l1.strength + penalty.group.strength if isinstance(penalty, SparseGroup) else penalty.strength


def test_penalties_are_equal_by_value_and_carry_no_arrays():
    assert L1(0.5) == L1(0.5) != L1(0.6)
    assert jax.tree.leaves([penalty for penalty, _ in PENALTIES.values()]) == []
    assert jax.tree.structure(GroupLasso(-1)) != jax.tree.structure(GroupLasso(-2))


def test_one_penalty_goes_to_kernels_only():
    params = {"conv": jnp.ones((3, 3, 2, 4)), "dense": jnp.ones((4, 5)), "bias": jnp.ones(5), "scale": jnp.ones(())}
    assert assign_penalties(L1(), params) == {"conv": L1(), "dense": L1(), "bias": None, "scale": None}


def test_strength_must_be_positive():
    for make in (L1, lambda strength: GroupLasso(strength=strength)):
        for strength in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match="strength must be > 0"):
                make(strength)


def test_a_users_penalty_needs_two_methods():
    @dataclasses.dataclass(frozen=True)
    class Clip(Penalty):
        def prox(self, z):
            return jnp.where(jnp.abs(z) > 1, z, 0)

        def active(self, z):
            return jnp.abs(z) > 1

    assert assign_penalties(Clip(), {"kernel": jnp.ones((2, 2))}) == {"kernel": Clip()}
