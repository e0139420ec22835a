"""The inner loop and the outer loss against closed forms and an independent derivation in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functa_reference import (
    central_difference,
    complex_step,
    directional,
    fit,
    modulated_siren,
    mse,
    outer,
    random_params,
    tiny_network,
    tiny_problem,
)

from functa_jax import ModulatedSiren, curvature, fit_latents, meta_loss


def tiny(params, coords, latent):
    return tiny_network(params, coords, latent, sin=jnp.sin)


def assert_close(found, expected, tolerance):
    """Leaf by leaf, relative to the largest element."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


# --- the references themselves ----------------------------------------------------------------------------------------


def test_the_two_ways_to_differentiate_agree():
    params, coords, targets, latent = tiny_problem()

    def loss(z):
        return mse(tiny_network, params, coords, targets[0], z)

    assert_close(central_difference(loss, latent), complex_step(loss, latent), 1e-8)


# --- a linear model: closed form --------------------------------------------------------------------------------------


def linear_model(params, coords, latent):
    return params * (coords @ latent)[..., None]


@pytest.mark.parametrize("unroll", [True, False, None])
@pytest.mark.parametrize(("steps", "penalty"), [(0, 0.0), (1, 0.0), (3, 0.2), (7, 0.0)])
def test_gradient_descent_on_a_linear_model(steps, penalty, unroll):
    rng = np.random.default_rng(0)
    scale, rate, start = 1.5, 0.1, np.array([0.3, -0.2, 0.1])
    design, targets = rng.normal(size=(8, 3)), rng.normal(size=(4, 8, 1))
    hessian = 2 * scale**2 * design.T @ design / 8 + 2 * penalty * np.eye(3)
    best = np.linalg.solve(hessian, 2 * scale * design.T @ targets[..., 0].T / 8).T  # (4, 3)
    contraction = np.eye(3) - rate * hessian
    expected = [best + (start - best) @ np.linalg.matrix_power(contraction, k) for k in range(steps + 1)]
    expected_losses = [np.mean((scale * z @ design.T - targets[..., 0]) ** 2, axis=1) for z in expected]

    latents, losses = fit_latents(
        linear_model,
        scale,
        jnp.asarray(design, jnp.float32),
        jnp.asarray(targets, jnp.float32),
        jnp.asarray(start, jnp.float32),
        steps=steps,
        learning_rate=rate,
        latent_penalty=penalty,
        unroll=unroll,
    )
    assert latents.shape == (4, 3)
    assert losses.shape == (4, steps + 1)
    np.testing.assert_allclose(latents, expected[-1], atol=1e-5)
    np.testing.assert_allclose(losses, np.stack(expected_losses, axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unroll", [True, False])
def test_a_latent_may_be_a_plain_number(unroll):
    def line(params, coords, latent):
        return latent * coords

    latents, _ = fit_latents(
        line,
        None,
        jnp.ones((2, 1)),
        jnp.array([[[3.0], [3.0]], [[5.0], [5.0]]]),
        0.0,
        steps=2,
        learning_rate=0.25,
        unroll=unroll,
    )
    np.testing.assert_allclose(latents, [3 * 0.75, 5 * 0.75])  # the distance halves at each step


# --- a sine network: independent float64 derivation -------------------------------------------------------------------

GAIN, SHIFT = np.array([0.3, 0.1, 0.2]), np.array([0.15, 0.25])
STEP_RATES = {"gain": np.outer([1.0, 0.5, 0.8], GAIN), "shift": np.outer([0.6, 1.0, 0.9], SHIFT)}
RATES = {  # name: rates, whether they are per step
    "scalar": (np.array(0.2), False),
    "meta-SGD": ({"gain": GAIN, "shift": SHIFT}, False),
    "one a step": (np.array([0.3, 0.2, 0.1]), True),
    "meta-SGD a step": (STEP_RATES, True),
    "scalar a leaf": ({"gain": np.array(0.3), "shift": np.array(0.1)}, False),
}

CASES = {  # name: (rates, options)
    "second order, meta-SGD": ("meta-SGD", {}),
    "second order, one rate a step": ("one a step", {}),
    "second order, meta-SGD a step, penalty, inner losses": (
        "meta-SGD a step",
        {"latent_penalty": 0.3, "inner_loss_weight": 0.7},
    ),
    "second order, own points, scan, checkpoint": (
        "scalar a leaf",
        {"own_points": True, "unroll": False, "checkpoint": True, "inner_loss_weight": 1.0},
    ),
    "first order": ("scalar", {"second_order": False}),
    "first order, meta-SGD, inner losses (report A)": ("meta-SGD", {"second_order": False, "inner_loss_weight": 1.0}),
    "first order, meta-SGD a step, own points, scan, penalty": (
        "meta-SGD a step",
        {"second_order": False, "own_points": True, "unroll": False, "latent_penalty": 0.3},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_latents_losses_and_outer_gradient_against_numpy(case):
    name, options = CASES[case]
    rates, per_step = RATES[name]
    options = {"second_order": True, "inner_loss_weight": 0.0, "latent_penalty": 0.0} | options
    params, coords, targets, latent = tiny_problem(own_points=options.pop("own_points", False))

    def rate_of_step(rates):
        tree = rates if isinstance(rates, dict) else {"gain": rates, "shift": rates}
        return [jax.tree.map(lambda r, k=k: r[k] if per_step else r, tree) for k in range(3)]

    def points(b):
        return coords[b] if coords.ndim == 3 else coords

    fitted = [
        fit(tiny_network, params, points(b), y, latent, rate_of_step(rates), penalty=options["latent_penalty"])[0]
        for b, y in enumerate(targets)
    ]
    losses = [
        [mse(tiny_network, params, points(b), targets[b], z) for z in latents] for b, latents in enumerate(fitted)
    ]
    loss = outer(
        tiny_network,
        (params, rates, latent),
        coords,
        targets,
        rate_of_step,
        second_order=options["second_order"],
        inner_loss_weight=options["inner_loss_weight"],
        penalty=options["latent_penalty"],
    )
    gradient = central_difference(loss, (params, rates, latent))

    with jax.enable_x64(True):
        options |= {"steps": 3, "rates_per_step": per_step}
        inner_options = {name: value for name, value in options.items() if name != "inner_loss_weight"}

        @jax.jit
        def evaluate(params, rates, latent):
            def outer_loss(p, r, z):
                return meta_loss(tiny, p, coords, targets, z, learning_rate=r, **options)

            fitted = fit_latents(tiny, params, coords, targets, latent, learning_rate=rates, **inner_options)
            return fitted, jax.value_and_grad(outer_loss, argnums=(0, 1, 2))(params, rates, latent)

        (found_latents, found_losses), (found_loss, found_gradient) = evaluate(params, rates, latent)
        expected_latents = jax.tree.map(lambda *z: np.stack(z), *[latents[-1] for latents in fitted])
        assert_close(found_latents, expected_latents, 1e-12)
        np.testing.assert_allclose(found_losses, losses, rtol=1e-12)
        np.testing.assert_allclose(found_loss, loss((params, rates, latent)), rtol=1e-12)
        assert_close(found_gradient, gradient, 1e-6)


def test_report_a_inner_losses_reach_the_rates_only():
    """Its Figure 1: parameters are frozen in the inner loop; the rates are not."""
    params, coords, targets, latent = jax.tree.map(np.float32, tiny_problem())

    def gradient(second_order):
        def inner_losses(p, r):
            options = {"steps": 2, "learning_rate": r, "second_order": second_order}
            return jnp.mean(fit_latents(tiny, p, coords, targets, latent, **options)[1][:, :-1])

        return jax.jit(jax.grad(inner_losses, argnums=(0, 1)))(params, 0.2)

    of_params, of_rate = gradient(second_order=False)
    assert not any(np.any(g) for g in jax.tree.leaves(of_params))
    assert of_rate != 0
    of_params, _ = gradient(second_order=True)
    assert all(np.all(g != 0) for g in jax.tree.leaves(of_params))


@pytest.mark.parametrize("second_order", [True, False])
def test_outer_gradient_through_the_modulated_siren(second_order):
    """The whole of it in float32, with the library's sine: along random directions of all arguments."""
    rng = np.random.default_rng(2)
    w0s = (6.0, 4.0)
    model = ModulatedSiren(width=8, depth=3, out_features=1, w0=w0s, modulate="both")
    coords = rng.uniform(-1, 1, (6, 2)).astype(np.float32)
    targets = rng.uniform(0, 1, (2, 6, 1)).astype(np.float32)
    latent = 0.1 * rng.normal(size=4).astype(np.float32)
    rates = rng.uniform(0.3, 0.6, 4).astype(np.float32)
    params = random_params(model, coords, latent)

    def loss(params, rates, latent):
        return meta_loss(
            lambda p, x, z: model.apply({"params": p}, x, z),
            params,
            coords,
            targets,
            latent,
            steps=2,
            learning_rate=rates,
            second_order=second_order,
            batched=True,
            unroll=False,  # compiles faster
        )

    found = jax.device_get(jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params, rates, latent))

    def network(params, coords, z):
        return modulated_siren(params, coords, z, w0s, 0.5, "both")

    double = jax.tree.map(lambda a: a.astype(np.float64), (params, rates, latent))
    reference = outer(network, double, coords, targets, lambda r: [r] * 2, second_order=second_order)
    for _ in range(4):
        direction = jax.tree.map(lambda a: rng.normal(size=a.shape), double)
        terms = [np.vdot(g, d) for g, d in zip(jax.tree.leaves(found), jax.tree.leaves(direction), strict=True)]
        expected = directional(reference, double, direction)
        assert sum(terms) == pytest.approx(expected, abs=1e-3 * np.linalg.norm(terms))


# --- forms that must not matter ---------------------------------------------------------------------------------------


def test_scan_and_checkpoint_change_nothing():
    params, coords, targets, latent = tiny_problem()
    with jax.enable_x64(True):

        def gradient(unroll, checkpoint):
            def loss(p, r):
                options = {"unroll": unroll, "checkpoint": checkpoint, "steps": 2, "inner_loss_weight": 0.5}
                return meta_loss(tiny, p, coords, targets, latent, learning_rate=r, **options)

            return jax.value_and_grad(loss, argnums=(0, 1))

        forms = [gradient(unroll, checkpoint) for unroll in (True, False) for checkpoint in (False, True)]
        first, *others = jax.jit(lambda p, r: [form(p, r) for form in forms])(params, 0.2)
        for other in others:
            assert_close(other, first, 1e-12)


def test_steps_are_written_out_up_to_four():
    params, coords, targets, latent = jax.tree.map(np.float32, tiny_problem())

    def primitives(steps, **options):
        def loss(p):
            return meta_loss(tiny, p, coords, targets, latent, steps=steps, learning_rate=0.1, **options)

        return [equation.primitive.name for equation in jax.make_jaxpr(loss)(params).eqns]

    assert "scan" not in primitives(3, unroll=True) + primitives(5, unroll=True) + primitives(4)
    assert primitives(3, unroll=False).count("scan") == primitives(5).count("scan") == 1


def test_checkpoint_saves_memory():
    params, coords, targets, latent = jax.tree.map(np.float32, tiny_problem(points=1000))

    def memory(checkpoint):
        def loss(p):
            options = {"steps": 4, "learning_rate": 0.1, "checkpoint": checkpoint}
            return meta_loss(tiny, p, coords, targets, latent, **options)

        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    assert memory(checkpoint=True) < 0.6 * memory(checkpoint=False)


def image_problem(own_points=False, batch=5):
    """`tiny_problem` with 3x4 images, in float32."""
    params, coords, targets, latent = jax.tree.map(np.float32, tiny_problem(batch, 12, own_points))
    coords, targets = coords.reshape(*coords.shape[:-2], 3, 4, 2), targets.reshape(batch, 3, 4, 2)
    return params, coords, targets, latent, {"gain": np.float32(GAIN), "shift": np.float32(SHIFT)}


def tiny_pixels(params, coords, latent):
    """`tiny` for one image, coords (..., 2)."""
    return tiny(params, coords.reshape(-1, 2), latent).reshape(*coords.shape[:-1], 2)


def tiny_batch(params, coords, latent):
    """`tiny` for a batch, coords (N, 2) or (B, N, 2)."""
    assert coords.ndim in (2, 3)
    return tiny(params, coords if coords.ndim == 3 else coords[None], latent)


@pytest.mark.parametrize("own_points", [False, True])
def test_batched_networks_give_what_single_ones_give(own_points):
    params, coords, targets, latent, rates = image_problem(own_points)

    def everything(apply, batched):
        def loss(p, r):
            options = {"steps": 2, "learning_rate": r, "latent_penalty": 1e-3, "batched": batched}
            latents, losses = fit_latents(apply, p, coords, targets, latent, **options)
            return jnp.mean(losses[:, -1]), (latents, losses)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, rates)

    ((_, (latents, losses)), _) = results = everything(tiny_batch, batched=True)
    assert jax.tree.map(jnp.shape, latents) == {"gain": (5, 3), "shift": (5, 2)}
    assert losses.shape == (5, 3)
    assert np.all(losses[:, -1] < 0.97 * losses[:, 0])
    assert_close(results, everything(tiny_pixels, batched=False), 1e-4)


@pytest.mark.parametrize("batched", [False, True])
def test_an_image_does_not_depend_on_the_others(batched):
    params, coords, targets, latent, rates = image_problem()
    apply = tiny_batch if batched else tiny_pixels

    @jax.jit
    def fitted(targets):
        return fit_latents(apply, params, coords, targets, latent, steps=2, learning_rate=rates, batched=batched)

    jacobian = jax.jit(jax.jacrev(lambda y: fitted(y)[0]["gain"]))(targets)  # (B, L, B, 3, 4, 2)
    for image in range(5):
        for other in range(5):
            assert np.any(jacobian[image, :, other]) == (image == other)
    alone, together, many = fitted(targets[3:4]), fitted(targets), fitted(np.tile(targets, (20, 1, 1, 1)))
    for batch, index in ((together, 3), (many, 98)):
        assert_close(jax.tree.map(lambda x, i=index: x[i : i + 1], batch), alone, 1e-4)


def test_no_steps():
    params, coords, targets, latent, rates = image_problem()
    expected = [mse(tiny_network, params, coords.reshape(-1, 2), y.reshape(-1, 2), latent) for y in targets]
    for unroll in (True, False):
        latents, losses = fit_latents(
            tiny_pixels, params, coords, targets, latent, steps=0, learning_rate=rates, unroll=unroll
        )
        np.testing.assert_array_equal(latents["gain"], np.broadcast_to(latent["gain"], (5, 3)))
        np.testing.assert_allclose(losses, np.array(expected)[:, None], rtol=1e-5)
    loss = meta_loss(tiny_pixels, params, coords, targets, latent, steps=0, learning_rate=rates)
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("unroll", [True, False])
@pytest.mark.parametrize("rate", [0.1, np.float32(0.1)], ids=["python", "float32"])
def test_narrow_latents_keep_their_dtype(unroll, rate):
    latents, _ = fit_latents(
        linear_model,
        1.0,
        jnp.eye(2),
        jnp.ones((3, 2, 1)),
        jnp.zeros(2, jnp.bfloat16),
        steps=2,
        learning_rate=rate,
        unroll=unroll,
    )
    assert latents.dtype == jnp.bfloat16


# --- errors -----------------------------------------------------------------------------------------------------------

GRID, IMAGES, LATENT = (4, 4, 2), (3, 4, 4, 1), {"a": (2,), "b": ()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "steps must be 0 or more, got -1"),
        ({"coords": (4, 5, 2)}, r"targets \(3, 4, 4, 1\) do not go with coords \(4, 5, 2\): .* \(4, 4, 2\) would do"),
        ({"coords": (2, 4, 4, 2)}, r"targets \(3, 4, 4, 1\) do not go with coords \(2, 4, 4, 2\)"),
        ({"targets": (4, 1)}, r"targets \(4, 1\) do not go with coords \(4, 4, 2\)"),
        ({"learning_rate": {"a": 0.1, "c": 0.1}}, r"learning_rate must be a scalar or a pytree like one latent .*'c'"),
        ({"learning_rate": np.ones(2)}, r"learning_rate has shape \(2,\); a latent of shape \(\) needs \(\) or \(\)"),
        (
            {"learning_rate": {"a": np.ones(3), "b": 1.0}},
            r"shape \(3,\); a latent of shape \(2,\) needs \(\) or \(2,\)",
        ),
        (
            {"learning_rate": np.ones(2), "rates_per_step": True},
            r"shape \(2,\); a latent of shape \(2,\) needs \(3,\) or \(3, 2\) \(rates_per_step, 3 steps\)",
        ),
        ({"learning_rate": 0.1, "rates_per_step": True}, r"shape \(\); .* \(3,\) or \(3, 2\)"),
    ],
)
def test_errors_name_argument_value_and_remedy(arguments, message):
    arguments = {"coords": GRID, "targets": IMAGES, "steps": 3, "learning_rate": 0.1} | arguments
    coords, targets = jnp.zeros(arguments.pop("coords")), jnp.zeros(arguments.pop("targets"))
    latent = {name: jnp.zeros(shape) for name, shape in LATENT.items()}
    for function in (fit_latents, meta_loss):
        with pytest.raises(ValueError, match=message):
            function(lambda p, x, z: x[..., :1] * z["b"], None, coords, targets, latent, **arguments)


def test_inner_losses_without_inner_steps_are_an_error():
    with pytest.raises(ValueError, match=r"inner_loss_weight is 0\.5, but with steps=0"):
        meta_loss(
            linear_model,
            1.0,
            jnp.eye(2),
            jnp.ones((1, 2, 1)),
            jnp.zeros(2),
            steps=0,
            learning_rate=0.1,
            inner_loss_weight=0.5,
        )


# --- curvature --------------------------------------------------------------------------------------------------------


def test_curvature_against_the_eigenvalue_of_an_explicit_matrix():
    params, coords, _, latent = tiny_problem(points=9)
    flat = np.concatenate([latent["gain"], latent["shift"]])

    def predict(z):
        return tiny_network(params, coords, {"gain": z[:3], "shift": z[3:]}).ravel()

    jacobian = np.stack([predict(flat + 1e-40j * e).imag / 1e-40 for e in np.eye(5)], axis=1)
    expected = np.linalg.eigvalsh(2 / jacobian.shape[0] * jacobian.T @ jacobian)[-1]
    with jax.enable_x64(True):

        @jax.jit
        @jax.vmap
        def found(key):
            return [curvature(tiny, params, coords, latent, key, iterations=i) for i in (100, 20, 2)]

        many, some, few = found(jax.random.split(jax.random.key(0), 3))
        np.testing.assert_allclose(many, expected, rtol=1e-9)
        assert np.all(few < some)  # from below
        assert np.all(some <= expected * (1 + 1e-12))


def test_gradient_descent_is_stable_up_to_two_over_the_curvature():
    design = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    limit = 2 / float(curvature(linear_model, 1.5, design, jnp.zeros(3), jax.random.key(0), iterations=100))
    targets = linear_model(1.5, design, jnp.ones(3))[None]

    def final_loss(rate):
        return float(
            fit_latents(linear_model, 1.5, design, targets, jnp.zeros(3), steps=300, learning_rate=rate)[1][0, -1]
        )

    assert final_loss(0.97 * limit) < 1e-3
    assert final_loss(1.03 * limit) > 1e3


def test_curvature_of_a_constant_is_zero():
    assert float(curvature(lambda p, x, z: 0 * x * z, None, jnp.ones((4, 1)), 1.0, jax.random.key(0))) == 0
