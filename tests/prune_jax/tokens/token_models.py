"""A small ViT with random weights, far enough from zero that every token matters, for the tests of token methods."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from prune_jax.models import ViT
from prune_jax.tokens import CPViT, DynamicViT, PatchSkip, ToMe

MODEL = ViT(num_classes=3, image_size=16, patch=4, width=12, depth=3, heads=3)
IMAGES = np.random.default_rng(1).standard_normal((2, 16, 16, 3)).astype(np.float32)
DENSE = [
    DynamicViT(MODEL, (1, 2), 1.0),
    DynamicViT(MODEL, (0, 2), (1.0, 1.0), merge=True),
    CPViT(MODEL),
    CPViT(MODEL, merge=True, queries="prefix"),
    PatchSkip(MODEL, 1.0),
    PatchSkip(MODEL, 1.0, attend="kept"),
    ToMe(MODEL, 0),
]
SPARSE = [
    DynamicViT(MODEL, (0, 2), 0.5),
    DynamicViT(MODEL, (1, 2), (0.5, 0.25), merge=True),
    CPViT(MODEL, (0.3, 0.0, 0.4)),
    CPViT(MODEL, (0.3, 0.2, 0.0), merge=True, queries="prefix"),
    PatchSkip(MODEL, (0.5, 0.25, 0.75)),
    PatchSkip(MODEL, 0.5, attend="kept"),
    PatchSkip(MODEL, threshold=0.5),
    ToMe(MODEL, (8, 1, 3)),
]


def name(method):
    return type(method).__name__


@functools.cache
def shapes(model, shape):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))


def start(model, images=IMAGES, seed=0):
    """Random variables, made without compiling anything."""
    rng = np.random.default_rng(seed)
    wanted = shapes(model, images.shape)
    return jax.tree.map(lambda x: 0.4 * rng.standard_normal(x.shape).astype(np.float32), wanted)


@functools.cache
def compiled(module, method):
    return jax.jit(lambda v, *a, **k: module.apply(v, *a, **k, method=method))


def run(module, variables, *args, method="__call__", **arrays):
    """The jitted method of a module; compiled once for all tests."""
    return compiled(module, method)(variables, *args, **arrays)


def counted(module, method):
    """The jitted method as `run` calls it, and a list that gets longer each time it is traced."""
    traced = []

    def call(variables, images):
        traced.append(images.shape)
        return module.apply(variables, images, method=method)

    return jax.jit(call), traced


def shuffle(images, order, patch=4):
    """Images whose patches are in another order."""
    b, h, w, c = images.shape
    patches = images.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(b, -1, patch, patch, c)[:, order]
    patches = patches.reshape(b, h // patch, w // patch, patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(b, h, w, c)


def without_positions(variables):
    """A model for which the order of patches means nothing."""
    params = variables["params"]
    model = {**params["model"], "position_embedding": jnp.zeros_like(params["model"]["position_embedding"])}
    return {"params": {**params, "model": model}}


VARIABLES = start(MODEL)
LOW = MODEL.clone(compute_dtype=jnp.bfloat16)


def wrapped(method):
    """The method's variables around `VARIABLES`, its own parts drawn as large."""
    return {"params": {**start(method, seed=5)["params"], "model": VARIABLES["params"]}}
