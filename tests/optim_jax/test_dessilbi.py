"""DessiLBI against a float64 NumPy replay written from its equations, loop by loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim_jax import (
    NEVER,
    GroupLasso,
    PenaltyRule,
    SparseGroup,
    activation_order,
    dessilbi,
    prune_by_path,
    sparse_params,
)

STEPS = 80
RATE, KAPPA, MU = 0.1, 1.3, 0.5


def problem():
    """Quadratic losses with minima that change sign on the way: groups come alive, die and come alive again."""
    rng = np.random.default_rng(0)
    shapes = {"bias": (4,), "conv": (2, 2, 3, 4), "dense": (5, 4)}
    weights = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    minima = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    curvatures = {name: rng.uniform(0.5, 1.5, shape) for name, shape in shapes.items()}
    return weights, lambda name, w, step: curvatures[name] * (w - minima[name] * np.cos(2 * np.pi * step / 50))


def gamma_by_hand(name, z, kappa):
    """Filter by filter, and element by element."""
    gamma = np.zeros_like(z)
    if name == "conv":
        for f in range(z.shape[-1]):
            norm = np.sqrt(sum(value**2 for value in z[..., f].ravel()))
            if norm > 1:
                gamma[..., f] = kappa * z[..., f] * (1 - 1 / norm)
    else:
        for index, value in np.ndenumerate(z):
            gamma[index] = kappa * max(0.0, abs(value) - 1) * (1 if value > 0 else -1)
    return gamma


class Direction:
    """The bases' directions d, from their textbook equations."""

    def __init__(self, kind):
        self.kind, self.t, self.m, self.v = kind, 0, 0.0, 0.0

    def __call__(self, g, w):
        self.t += 1
        if self.kind == "sgd":
            return g
        if self.kind in ("momentum", "nesterov"):
            self.m = 0.9 * self.m + g
            return self.m if self.kind == "momentum" else g + 0.9 * self.m
        if self.kind == "muon" and w.ndim == 2:  # with fewer outputs than inputs its factor for the shape is 1
            self.m = 0.95 * self.m + 0.05 * g
            return newton_schulz(self.m / (1 - 0.95**self.t))
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g**2
        adam = self.m / (1 - 0.9**self.t) / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)
        return adam + 0.01 * w if self.kind == "adamw" else adam


def newton_schulz(x):
    """Muon's quintic iteration, on the singular values themselves: it leaves the singular vectors as they are."""
    u, values, v = np.linalg.svd(x, full_matrices=False)
    values = values / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return u * values @ v


def replay(kind, coupling, rate=lambda k: RATE, kappa=lambda k: KAPPA, mu=lambda k: MU):
    weights, gradient = problem()
    directions = {name: Direction(kind) for name in weights}
    zs = {name: np.zeros_like(w) for name, w in weights.items() if name != "bias"}
    gammas = {name: np.zeros_like(z) for name, z in zs.items()}
    history = [(weights, gammas)]
    for k in range(STEPS):
        a, kap, nu = rate(k), kappa(k), mu(k)
        new = {}
        for name, w in weights.items():
            g = gradient(name, w, k)
            if name == "bias":
                new[name] = w - a * kap * directions[name](g, w)
                continue
            gap = w - gammas[name]
            if coupling == "inside":
                new[name] = w - a * kap * directions[name](g + gap / nu, w)
            else:
                new[name] = w - a * kap * directions[name](g, w) - (a * kap / nu) * gap
            zs[name] = zs[name] + (a / nu) * gap
        gammas = {name: gamma_by_hand(name, z, kap) for name, z in zs.items()}
        weights = new
        history.append((weights, gammas))
    return history


def train(optimizer):
    weights, gradient = problem()
    params = jax.tree.map(jnp.asarray, weights)
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)
    for k in range(STEPS):
        gradients = {name: jnp.asarray(gradient(name, np.asarray(w), k), w.dtype) for name, w in params.items()}
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        yield params, state


BASES = {
    "sgd": (optax.sgd(1.0), optax.identity()),
    "momentum": (optax.sgd(1.0, momentum=0.9), optax.trace(0.9)),
    "nesterov": (optax.sgd(1.0, momentum=0.9, nesterov=True), optax.trace(0.9, nesterov=True)),
    "adam": (optax.adam(1.0), optax.scale_by_adam()),
    "adamw": (optax.adamw(1.0, weight_decay=0.01), optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.01))),
    "muon": (optax.contrib.muon(1.0, nesterov=False),),
}


@pytest.mark.parametrize("coupling", ["outside", "inside"])
@pytest.mark.parametrize("kind", BASES)
def test_every_step_equals_the_float64_replay(kind, coupling):
    expected = replay(kind, coupling)
    filters = np.array([[np.any(gammas["conv"][..., f]) for f in range(4)] for _, gammas in expected])
    elements = np.array([gammas["dense"] != 0 for _, gammas in expected])
    for alive in (filters, elements):  # the replay has steps in which groups activate, and others in which they die
        assert np.any(alive[1:] & ~alive[:-1])
        assert np.any(~alive[1:] & alive[:-1])
    for base in BASES[kind]:
        with jax.enable_x64(True):
            optimizer = dessilbi(base, RATE, KAPPA, MU, coupling=coupling)
            for (params, state), (weights, gammas) in zip(train(optimizer), expected[1:], strict=True):
                for name, w in weights.items():
                    np.testing.assert_allclose(params[name], w, rtol=1e-9, atol=1e-9)
                for name, gamma in gammas.items():
                    np.testing.assert_allclose(sparse_params(state)[name], gamma, rtol=1e-9, atol=1e-9)
                assert sparse_params(state)["bias"] is None


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
def test_float32_follows_the_replay(kind):
    (*_, (params, state)) = train(dessilbi(BASES[kind][0], RATE, KAPPA, MU))
    weights, gammas = replay(kind, "outside")[-1]
    for name, w in weights.items():
        assert params[name].dtype == jnp.float32
        np.testing.assert_allclose(params[name], w, rtol=1e-3, atol=1e-3)
    for name, gamma in gammas.items():
        np.testing.assert_allclose(sparse_params(state)[name], gamma, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("coupling", ["outside", "inside"])
@pytest.mark.parametrize("injected", [False, True])
def test_schedules_follow_the_replay(injected, coupling):
    schedules = {
        "learning_rate": lambda k: 0.1 / (1 + 0.02 * k),
        "kappa": lambda k: 1.0 + 0.005 * k,
        "mu": lambda k: 0.5 + 0.01 * k,
    }
    expected = replay("momentum", coupling, *schedules.values())
    make = functools.partial(dessilbi, optax.sgd(1.0, momentum=0.9), coupling=coupling)
    with jax.enable_x64(True):
        optimizer = optax.inject_hyperparams(make)(**schedules) if injected else make(**schedules)
        for (params, state), (weights, gammas) in zip(train(optimizer), expected[1:], strict=True):
            for name, w in weights.items():
                np.testing.assert_allclose(params[name], w, rtol=1e-9, atol=1e-9)
            for name, gamma in gammas.items():
                np.testing.assert_allclose(sparse_params(state)[name], gamma, rtol=1e-9, atol=1e-9)


def test_activation_is_recorded_at_the_first_step_of_each_group():
    history = replay("sgd", "outside")
    with jax.enable_x64(True):
        steps = list(train(dessilbi(optax.sgd(1.0), RATE, KAPPA, MU)))
        for done in (1, 10, 25, STEPS):
            order = activation_order(steps[done - 1][1])
            conv = [
                min((k for k in range(done + 1) if np.any(history[k][1]["conv"][..., f])), default=NEVER)
                for f in range(4)
            ]
            assert order["conv"].shape == (1, 1, 1, 4)
            assert order["conv"].ravel().tolist() == conv
            for index in np.ndindex(5, 4):
                alive = (k for k in range(done + 1) if history[k][1]["dense"][index])
                assert order["dense"][index] == min(alive, default=NEVER)
            assert order["bias"] is None
            assert order["conv"].dtype == order["dense"].dtype == jnp.int32


def test_z_tends_to_its_fixed_points():
    """Weights that are held: Gamma = kappa * prox(Z) = W. Weights that nothing holds: W -> 0 and Z -> W0 / kappa."""
    start = {"kernel": jnp.array([[0.5, -2.0]])}
    optimizer = dessilbi(optax.set_to_zero(), 0.05, kappa=4.0, mu=0.25, base_is_direction=False)
    for held, gamma, z in ((True, [[0.5, -2.0]], [[1.125, -1.5]]), (False, [[0.0, 0.0]], [[0.125, -0.5]])):
        params, state = start, optimizer.init(start)
        for _ in range(100):
            updates, state = optimizer.update({"kernel": jnp.zeros((1, 2))}, state, params)
            params = params if held else optax.apply_updates(params, updates)
        np.testing.assert_allclose(sparse_params(state)["kernel"], gamma, rtol=1e-3)
        np.testing.assert_allclose(state.z["kernel"], z, rtol=1e-3)
        np.testing.assert_allclose(params["kernel"], start["kernel"] if held else [[0.0, 0.0]], atol=1e-3)


def test_half_precision_keeps_z_in_float32():
    """Steps of Z far below bfloat16's resolution still add up."""
    params = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
    optimizer = dessilbi(optax.set_to_zero(), 1e-3, mu=20.0, base_is_direction=False)
    step = jax.jit(
        lambda state, _: (optimizer.update({"kernel": jnp.zeros_like(params["kernel"])}, state, params)[1], None)
    )
    state, _ = jax.lax.scan(step, optimizer.init(params), length=10_000)
    np.testing.assert_allclose(state.z["kernel"], 0.5, rtol=1e-3)


def test_state_holds_one_array_like_the_structured_weights_and_one_record_a_group():
    params = {"conv": jnp.zeros((3, 3, 4, 8)), "dense": jnp.zeros((6, 5)), "bias": jnp.zeros(8)}
    state = dessilbi(optax.sgd(1.0), 0.1).init(params)
    assert sorted(leaf.size for leaf in jax.tree.leaves(state)) == sorted([1, 1, 288, 8, 30, 30])


def test_without_a_record_momentum_and_z_take_eight_bytes_a_parameter():
    params = {"conv": jnp.ones((3, 3, 4, 8)), "dense": jnp.ones((6, 5)), "bias": jnp.zeros(8)}
    momentum = optax.sgd(1.0, momentum=0.9)
    without, recording = (dessilbi(momentum, 0.1, mu=0.1, record=record) for record in (False, True))
    state, other = without.init(params), recording.init(params)
    scalars = 8  # bytes: the step and kappa
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) - scalars <= 8 * optax.tree.size(params)
    for _ in range(30):
        updates, state = without.update(params, state, params)
        expected, other = recording.update(params, other, params)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
    jax.tree.map(np.testing.assert_array_equal, sparse_params(state), sparse_params(other))
    with pytest.raises(ValueError, match=r"no record of activations.*record=True"):
        activation_order(state)
    with pytest.raises(ValueError, match=r"no record of activations.*record=True"):
        prune_by_path(params, state, 0.5)


def test_penalties_are_chosen_by_path_and_shape():
    params = {"stem": jnp.ones((3, 3, 2, 4)), "block": {"kernel": jnp.ones((3, 3, 4, 6)), "bias": jnp.ones(6)}}
    seen = {}

    def rule(path, shape):
        seen[path] = shape
        return {"stem": SparseGroup(), "block/kernel": GroupLasso(axis=-2)}.get(path)

    for penalty in (PenaltyRule(rule), rule):
        state = dessilbi(optax.sgd(1.0), 0.1, penalty=penalty).init(params)
        assert seen == {"stem": (3, 3, 2, 4), "block/kernel": (3, 3, 4, 6), "block/bias": (6,)}
        assert jax.tree.map(jnp.shape, activation_order(state)) == {
            "stem": (1, 1, 1, 4),
            "block": {"kernel": (1, 1, 4, 1), "bias": None},
        }
        assert state.z["block"]["bias"] is None


@pytest.mark.parametrize(
    "base",
    [
        optax.contrib.muon(1.0),
        optax.lion(1.0),
        optax.rmsprop(1.0),
        optax.adafactor(1.0),
        optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_rms()),
        optax.centralize(),
        optax.masked(optax.sgd(1.0), {"kernel": True, "bias": True}),
        optax.masked(optax.trace(0.9), {"kernel": True, "bias": True}),
        optax.masked(optax.scale_by_adam(), {"kernel": True, "bias": False}),
        optax.partition(
            {"adam": optax.scale_by_adam(), "plain": optax.identity()}, {"kernel": "adam", "bias": "plain"}
        ),
        optax.chain(optax.trace(0.9), optax.scale_by_schedule(lambda step: jnp.minimum(step / 2, 1.0))),
        optax.sgd(lambda step: jnp.minimum(step / 2, 1.0)),
    ],
)
def test_any_base_goes_downhill(base):
    """Optimizers and bare directions, for trees of one structure, and in a warm-up that starts at 0."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (6, 5)), "bias": jnp.ones(5)}
    optimizer = dessilbi(base, 1e-3)

    def loss(p):
        return jnp.sum(jnp.square(p["kernel"])) + jnp.sum(p["bias"])

    state, losses = jax.jit(optimizer.init)(params), [loss(params)]
    update = jax.jit(optimizer.update)
    for _ in range(2):
        updates, state = update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        losses.append(loss(params))
    assert losses[2] < losses[0]


def test_a_base_whose_direction_is_not_found_needs_the_answer():
    params = {"kernel": jnp.ones((6, 5)), "bias": jnp.ones(5)}
    late = optax.scale_by_schedule(lambda step: jnp.where(step < 5, 0.0, 1.0))
    full_size = optax.stateless(
        lambda updates, params: jax.tree.map(lambda g, w: g * jnp.ones((6, 5))[0], updates, params)
    )
    needs_value = optax.scale_by_polyak()
    for base, why in (
        (optax.chain(optax.trace(0.9), late), "moved nothing in two steps"),
        (full_size, "raised TypeError"),
        (needs_value, "raised TypeError"),
        (optax.set_to_zero(), "moved nothing"),
    ):
        with pytest.raises(ValueError, match=f"base_is_direction is needed.*{why}.*base_is_direction=False"):
            dessilbi(base, 0.1).init(params)
        dessilbi(base, 0.1, base_is_direction=True).init(params)
    mixed = optax.partition({"sgd": optax.sgd(1.0), "plain": optax.identity()}, {"kernel": "sgd", "bias": "plain"})
    with pytest.raises(ValueError, match=r"downhill for \['kernel'\] and uphill for \['bias'\]"):
        dessilbi(mixed, 0.1).init(params)
    for given, sign in ((True, -1), (False, 1)):
        optimizer = dessilbi(optax.identity(), 0.1, base_is_direction=given)
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        np.testing.assert_allclose(updates["bias"], sign * 0.1, rtol=1e-6)


def test_extra_arguments_reach_the_base():
    def update(updates, state, params=None, *, factor, **_):
        return jax.tree.map(lambda g: -factor * g, updates), state

    base = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    params = {"bias": jnp.zeros(2), "kernel": jnp.zeros((2, 2))}
    optimizer = dessilbi(base, 0.1, base_is_direction=False)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params, factor=3.0)
    np.testing.assert_allclose(updates["bias"], -0.3, rtol=1e-6)


def test_bad_input_is_named():
    sgd, params = optax.sgd(1.0), {"kernel": jnp.ones((2, 2))}
    for name in ("kappa", "mu"):
        for value in (0.0, -1.0, float("nan"), np.float32(-1), jnp.float32(0)):
            with pytest.raises(ValueError, match=f"{name} must be > 0"):
                dessilbi(sgd, 0.1, **{name: value})
    for name in ("learning_rate", "kappa", "mu"):
        for value in (float("inf"), np.inf, jnp.inf):
            with pytest.raises(ValueError, match=f"{name} must be >=? 0 and finite, got inf"):
                dessilbi(sgd, **{"learning_rate": 0.1, name: value})
        for several in (np.array([1.0, 2.0]), jnp.ones(1)):
            with pytest.raises(ValueError, match=rf"{name} must be a single number, got an array of shape \([12],\)"):
                dessilbi(sgd, **{"learning_rate": 0.1, name: several})
    with pytest.raises(ValueError, match=r"learning_rate must be >= 0 and finite, got -0\.1"):
        dessilbi(sgd, -0.1)
    with pytest.raises(TypeError, match="learning_rate must be a number or a schedule"):
        dessilbi(sgd, None)
    with pytest.raises(TypeError, match="base must be an optax transform"):
        dessilbi(optax.sgd, 0.1)
    with pytest.raises(ValueError, match="coupling must be 'outside' or 'inside', got 'both'"):
        dessilbi(sgd, 0.1, coupling="both")
    with pytest.raises(ValueError, match=r"penalty matches no leaf.*'bias': \(3,\)"):
        dessilbi(sgd, 0.1).init({"bias": jnp.ones(3)})
    with pytest.raises(TypeError, match="penalty must be"):
        dessilbi(sgd, 0.1, penalty="l1").init(params)
    with pytest.raises(TypeError, match=r"under optax\.inject_hyperparams.*wrap the function in PenaltyRule"):
        optax.inject_hyperparams(dessilbi)(sgd, 0.1, penalty=lambda step: 1.0).init(params)
    with pytest.raises(TypeError, match=r"for leaf 'kernel', got 1\.0"):
        dessilbi(sgd, 0.1, penalty=lambda path, shape: 1.0).init(params)
    with pytest.raises(ValueError, match=r"does not fit leaf 'kernel' of shape \(2, 2\)"):
        dessilbi(sgd, 0.1, penalty=GroupLasso(axis=3)).init(params)
    optimizer = dessilbi(sgd, 0.1)
    with pytest.raises(ValueError, match="params must be given"):
        optimizer.update(params, optimizer.init(params))
