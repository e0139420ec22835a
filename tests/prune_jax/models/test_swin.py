"""Swin: windows against a loop over tokens, any image size, free widths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prune_jax.models import Swin, swin
from prune_jax.models.swin import WindowBlock

KEY = jax.random.key(0)
MODEL = Swin(num_classes=3, patch=2, window=4, width=6, depths=(2, 1), heads=(1, 2))


def start(model, x):
    """Random variables, made without compiling anything."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, KEY, x)
    return jax.tree.map(lambda x: 0.4 * rng.standard_normal(x.shape).astype(np.float32), shapes)


def normal(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def attend_in_loops(x, params, window, shift):
    """One head, one image (H, W, D): each token over the tokens of its window that the image keeps together."""
    side = [min(window, n) for n in x.shape[:2]]
    shift = [shift if n > window else 0 for n in x.shape[:2]]
    padded = np.zeros([-(-n // s) * s for n, s in zip(x.shape[:2], side, strict=True)] + [x.shape[2]])
    padded[: x.shape[0], : x.shape[1]] = x
    qkv = padded @ np.asarray(params["attention"]["qkv"]["kernel"]) + np.asarray(params["attention"]["qkv"]["bias"])
    q, k, v = np.split(qkv, 3, -1)
    table = np.asarray(params["relative_position_bias"]).reshape(2 * window - 1, 2 * window - 1)
    lines = [(0, 1)[s > 0] for s in shift]

    def place(position):  # the window along each axis, in an image cut before its first full, shifted window
        return tuple((p - s) // w if on else p // w for p, s, w, on in zip(position, shift, side, lines, strict=True))

    out = np.zeros_like(padded)
    tokens = list(np.ndindex(*padded.shape[:2]))
    for i in tokens:
        near = [j for j in tokens if place(i) == place(j)]
        logits = [
            q[i] @ k[j] / np.sqrt(x.shape[2]) + table[i[0] - j[0] + window - 1, i[1] - j[1] + window - 1] for j in near
        ]
        p = np.exp(logits) / np.exp(logits).sum()
        out[i] = p @ np.stack([v[j] for j in near])
    proj = params["attention"]["proj"]
    return (out @ np.asarray(proj["kernel"]) + np.asarray(proj["bias"]))[: x.shape[0], : x.shape[1]]


@pytest.mark.parametrize("size", [(8, 8), (6, 9), (3, 7), (4, 4), (2, 3)])
@pytest.mark.parametrize("shifted", [False, True])
def test_windows_are_those_of_a_loop(size, shifted):
    block = WindowBlock(4, 1, 4, 4, 5, window=4, shifted=shifted, scale=0.5)
    x = normal(2, *size, 4)
    variables = start(block, x)
    y = jax.jit(lambda v, x: block.apply(v, x, method="windows"))(variables, x)
    for image, expected in zip(x, y, strict=True):
        np.testing.assert_allclose(
            attend_in_loops(image, variables["params"], 4, 2 if shifted else 0), expected, atol=1e-5
        )


@pytest.mark.parametrize("size", [(16, 16), (14, 20), (15, 9)])
def test_any_image_size(size):
    images = normal(2, *size, 3)
    variables = start(MODEL, normal(1, 16, 16, 3))
    assert jnp.isfinite(jax.jit(MODEL.apply)(variables, images)).all()


def test_every_width_is_free():
    model = MODEL.clone(width=(5, 8), heads=((1, 2), 2), qk_dim=((3, 2), 4), v_dim=2, mlp_hidden=(7, (9,)), scale=0.5)
    params = jax.eval_shape(model.init, KEY, jnp.zeros((1, 16, 16, 3)))["params"]
    assert params["blocks_0_1"]["attention"]["qkv"]["kernel"].shape == (5, 2 * (2 + 2 + 2))
    assert params["blocks_1_0"]["mlp"]["fc1"]["kernel"].shape == (8, 9)
    assert params["merging_0"]["reduction"]["kernel"].shape == (20, 8)
    assert swin("T", num_classes=2).block_widths[2][5] == {
        "width": 384, "heads": 12, "qk_dim": 32, "v_dim": 32, "mlp_hidden": 1536, "scale": 32**-0.5,
    }  # fmt: skip


def test_published_sizes():
    for size, parameters in (("T", 28_288_354), ("B", 87_768_224)):  # the original code's counts
        shapes = jax.eval_shape(swin(size, num_classes=1000).init, KEY, jnp.zeros((1, 28, 28, 3)))
        assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters


def test_randomness_only_in_training():
    model = MODEL.clone(depths=(1,), heads=(1,), dropout=0.2)
    images = normal(2, 8, 8, 3)
    variables = start(model, images)
    run = jax.jit(lambda key: model.apply(variables, images, train=True, rngs={"dropout": key}))
    assert not np.allclose(run(KEY), run(jax.random.key(1)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": (1, 2, 3)}, "heads must be one value or a sequence of 2"),
        ({"mlp_hidden": (4, (3, 3))}, r"mlp_hidden\[1\] must be one value or a sequence of 1"),
        ({"heads": (4, 2)}, "heads must divide"),
        ({"gelu": "fast"}, "gelu must be"),
        ({"dropout": 1.1}, "dropout must be from 0 to 1, got 1.1"),
        ({"drop_path": "0.1"}, "drop_path must be from 0 to 1, got '0.1'"),
        ({"patch": 0}, "patch must be a whole number of at least 1"),
    ],
)
def test_what_does_not_go_is_said(settings, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(MODEL.clone(**settings).init, KEY, jnp.zeros((1, 16, 16, 3)))
    with pytest.raises(ValueError, match="size must be one of T, S, B"):
        swin("L", num_classes=2)
