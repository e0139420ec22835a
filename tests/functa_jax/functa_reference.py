"""The networks, the inner loop and the outer loss in float64 numpy, written from their equations, for these tests.

Gradients of the inner loop are taken by complex steps (exact to rounding, as every function here is analytic), those of
the outer loss by central differences of everything.
"""

import jax
import jax.numpy as jnp
import numpy as np

# --- networks ---------------------------------------------------------------------------------------------------------


def random_params(model, *inputs, seed=0):
    """Parameters of the model's shapes, at about the scale of its initialisation (but quicker, and no bias zero)."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]

    def draw(path, leaf):
        assert leaf.dtype == np.float32
        scale = 0.5 if {"layer_0", "latent_to_modulation"} & {key.key for key in path} else 0.1
        return rng.uniform(-scale, scale, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def check_batch_gradients(model, params, coords, latents):
    """Asserts that gradients through a batch, of parameters and latents, are those of its images taken singly."""

    def batch(params, latents):
        return jnp.sum(jnp.square(model.apply({"params": params}, coords, latents)))

    def singles(params, latents):
        one = jax.vmap(lambda x, z: model.apply({"params": params}, x, z), in_axes=(0 if coords.ndim == 3 else None, 0))
        return jnp.sum(jnp.square(one(coords, latents)))

    found = jax.jit(jax.grad(batch, argnums=(0, 1)))(params, latents)
    expected = jax.jit(jax.grad(singles, argnums=(0, 1)))(params, latents)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max()), found, expected)


def linear(params, x):
    return x @ np.asarray(params["kernel"], np.float64) + np.asarray(params["bias"], np.float64)


def siren(params, coords, w0s, offset, scale=None, shift=None):
    """Coords (..., d), one frequency a sine layer, scale and shift (layers, width)."""
    h = np.asarray(coords, np.float64)
    for layer, w0 in enumerate(w0s):
        a = linear(params[f"layer_{layer}"], h)
        if scale is not None:
            a = scale[layer] * a
        if shift is not None:
            a = a + shift[layer]
        h = np.sin(w0 * a)
    return linear(params["output"], h) + offset


def modulated_siren(params, coords, latent, w0s, offset, modulate):
    """One image: coords (..., d), latent (L,). Modulations are ordered kind (scale, shift), layer, unit."""
    to_modulation = params["latent_to_modulation"]
    z = np.asarray(latent)
    for i in range(len(to_modulation) - 1):
        z = linear(to_modulation[f"hidden_{i}"], z)
        z = z / (1 + np.exp(-z))  # SiLU
    kinds = linear(to_modulation["modulations"], z).reshape(2 if modulate == "both" else 1, len(w0s), -1)
    scale = None if modulate == "shift" else 1 + kinds[0]
    shift = None if modulate == "scale" else kinds[-1]
    return siren(params, coords, w0s, offset, scale, shift)


def tiny_network(params, coords, latent, sin=np.sin):
    """One hidden layer of sines, shifted by latent["shift"] and scaled by latent["gain"]; runs in numpy and in jax.

    For one image, coords (N, 2), or a batch, leaves of the latent (B, ...), coords (1, N, 2) or (B, N, 2).
    """
    shift = (latent["shift"] @ params["m"])[..., None, :]
    bias = params["b"].reshape((1,) * (shift.ndim - 1) + (-1,))
    hidden = sin(3.0 * (coords @ params["w"] + bias + shift)) * (1.0 + latent["gain"])[..., None, :]
    output = hidden @ params["v"]
    return output + params["c"].reshape((1,) * (output.ndim - 1) + (-1,))


def tiny_problem(batch=2, points=5, own_points=False, seed=0):
    """Parameters, coordinates, targets and initial latent for `tiny_network`."""
    rng = np.random.default_rng(seed)
    params = {
        "w": 0.4 * rng.normal(size=(2, 3)),
        "b": rng.normal(size=(3,)),
        "m": 0.4 * rng.normal(size=(2, 3)),
        "v": 0.6 * rng.normal(size=(3, 2)),
        "c": rng.normal(size=(2,)),
    }
    coords = rng.uniform(-1, 1, size=(batch, points, 2) if own_points else (points, 2))
    targets = rng.normal(size=(batch, points, 2))
    latent = {"gain": 0.1 * rng.normal(size=(3,)), "shift": 0.1 * rng.normal(size=(2,))}
    return params, coords, targets, latent


# --- differentiation --------------------------------------------------------------------------------------------------


def _moved(leaves, i, index, step):
    moved = np.array(leaves[i], np.result_type(step, np.float64))
    moved[index] += step
    return [*leaves[:i], moved, *leaves[i + 1 :]]


def _by_element(derivative, tree):
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, tree))
    gradients = [np.zeros(leaf.shape) for leaf in leaves]
    for i, gradient in enumerate(gradients):
        for index in np.ndindex(gradient.shape):
            gradient[index] = derivative(
                lambda step, i=i, index=index: structure.unflatten(_moved(leaves, i, index, step))
            )
    return structure.unflatten(gradients)


def complex_step(f, tree):
    """Gradient of an analytic scalar function in a pytree of real arrays."""
    return _by_element(lambda move: f(move(np.complex128(1e-40j))).imag / 1e-40, tree)


def central_difference(f, tree):
    """Gradient of a scalar function in a pytree of real arrays."""
    return _by_element(lambda move: _slope(lambda t: f(move(t))), tree)


def directional(f, tree, direction):
    """Derivative of a scalar function of a pytree along a direction."""
    return _slope(lambda t: f(jax.tree.map(lambda a, d: a + t * d, tree, direction)))


def _slope(f, step=1e-4):
    return (8 * (f(step) - f(-step)) - (f(2 * step) - f(-2 * step))) / (12 * step)


# --- inner and outer loop ---------------------------------------------------------------------------------------------


def mse(f, params, coords, target, latent):
    return np.mean(np.square(f(params, coords, latent) - target))


def fit(f, params, coords, target, latent, rate_of_step, *, penalty=0.0, constants=None):
    """One image: the latent before each step and at the end, and the gradients used; `constants` replace those."""

    def objective(z):
        return mse(f, params, coords, target, z) + penalty * sum(np.sum(np.square(a)) for a in jax.tree.leaves(z))

    latents, gradients = [latent], []
    for k, rate in enumerate(rate_of_step):
        gradients.append(complex_step(objective, latent) if constants is None else constants[k])
        latent = jax.tree.map(lambda z, r, g: z - r * g, latent, rate, gradients[-1])
        latents.append(latent)
    return latents, gradients


def outer(f, arguments, coords, targets, rate_of_step, *, second_order, inner_loss_weight=0.0, penalty=0.0):
    """The outer loss as a function of (params, rates, latent), to be differentiated at `arguments`.

    First order: inner gradients are constants, and the losses before each step see the parameters as constants.
    """
    params, rates, latent = arguments
    own_points = coords.ndim == targets.ndim
    images = [(coords[b] if own_points else coords, target) for b, target in enumerate(targets)]
    recorded = [fit(f, params, x, y, latent, rate_of_step(rates), penalty=penalty)[1] for x, y in images]

    def loss(arguments):
        p, r, z = arguments
        total = 0.0
        for (x, y), constants in zip(images, recorded, strict=True):
            fixed = None if second_order else constants
            *before, last = fit(f, p, x, y, z, rate_of_step(r), penalty=penalty, constants=fixed)[0]
            inner = [mse(f, p if second_order else params, x, y, latent) for latent in before]
            total += mse(f, p, x, y, last) + inner_loss_weight * np.mean(inner)
        return total / len(images)

    return loss
