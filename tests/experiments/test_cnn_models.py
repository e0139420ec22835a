"""CNNs: convolutions against XLA's and Flax's, parameter counts against the published ones."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models.conv import Conv, convolve, max_pool
from experiments.models.lenet import LeNet
from experiments.models.resnet import ResNet, resnet20, resnet50, resnet56
from experiments.models.vgg import vgg19, vgg_a

SHAPES = [
    # image, kernel, strides, padding
    ((5, 6, 1), (5, 5, 1, 3), (1, 1), "SAME"),
    ((28, 28, 1), (5, 5, 1, 6), (1, 1), "SAME"),
    ((14, 14, 6), (5, 5, 6, 4), (1, 1), "VALID"),
    ((5, 5, 16), (5, 5, 16, 7), (1, 1), "VALID"),
    ((9, 8, 3), (3, 3, 3, 4), (2, 2), "SAME"),
    ((8, 9, 3), (3, 2, 3, 4), (1, 2), "VALID"),
    ((8, 7, 20), (3, 3, 20, 4), (1, 1), "SAME"),
    ((8, 7, 20), (3, 3, 20, 4), (2, 2), "SAME"),
    ((9, 9, 20), (1, 1, 20, 4), (2, 2), "SAME"),
    ((4, 4, 20), (1, 1, 20, 4), (1, 1), "SAME"),
    ((1, 1, 20), (3, 3, 20, 4), (1, 1), "SAME"),
    ((2, 2, 3), (5, 5, 3, 4), (1, 1), "SAME"),
]


@pytest.mark.parametrize(("image", "kernel", "strides", "padding"), SHAPES)
def test_all_methods_are_the_convolution_and_so_are_their_gradients(image, kernel, strides, padding) -> None:
    x_key, k_key = jax.random.split(jax.random.key(0))
    x, k = jax.random.normal(x_key, (2, *image)), jax.random.normal(k_key, kernel)

    @partial(jax.jit, static_argnames="method")
    def both(method):
        y, pullback = jax.vjp(lambda x, k: convolve(x, k, strides, padding, method=method), x, k)
        return y, *pullback(jnp.sin(y))

    theirs = both("xla")
    for method in ("im2col", "auto", "no-loop"):
        for ours, expected in zip(both(method), theirs, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_conv_is_a_drop_in_for_flax() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 9, 8, 3))
    ours = Conv(5, (3, 3), (2, 2), method="im2col")
    theirs = nn.Conv(5, (3, 3), (2, 2))
    variables = theirs.init(jax.random.key(1), x)
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(1), x)) == jax.tree.map(jnp.shape, variables)
    np.testing.assert_allclose(ours.apply(variables, x), theirs.apply(variables, x), rtol=1e-4, atol=1e-5)


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="method must be one of auto, no-loop, im2col, xla, got 'fft'"):
        convolve(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)), (1, 1), "SAME", method="fft")


def test_max_pool_is_that_of_flax() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 3))
    theirs, back = jax.vjp(lambda x: nn.max_pool(x, (2, 2), (2, 2)), x)
    ours, our_back = jax.vjp(max_pool, x)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(our_back(jnp.sin(theirs))[0], back(jnp.sin(theirs))[0])


def test_max_pool_passes_nan_on_and_divides_by_nothing() -> None:
    x = jnp.zeros((4, 2, 2, 1)).at[jnp.arange(4), [0, 0, 1, 1], [0, 1, 0, 1]].set(jnp.nan)
    assert np.isnan(max_pool(x)).all()
    assert "div" not in str(jax.make_jaxpr(jax.grad(lambda x: max_pool(x).sum()))(x))


@pytest.mark.parametrize(
    ("model", "image", "count"),
    [
        (LeNet(), (28, 28, 1), 61_706),  # LeNet-5 with full connections
        (vgg_a(classes=1000, hidden=(4096, 4096), norm=False), (224, 224, 3), 132_863_336),  # torchvision's vgg11
        (vgg_a(classes=1000, hidden=(4096, 4096)), (224, 224, 3), 132_868_840),  # vgg11_bn
        (vgg19(classes=1000, hidden=(4096, 4096), norm=False), (224, 224, 3), 143_667_240),  # vgg19
        (vgg19(classes=1000, hidden=(4096, 4096)), (224, 224, 3), 143_678_248),  # vgg19_bn
        (vgg_a(norm=False), (32, 32, 3), 9_750_922),
        (resnet20(), (32, 32, 3), 269_722),  # 0.27 M in the paper's Table 6
        (resnet56(), (32, 32, 3), 853_018),  # 0.85 M there
        (resnet50(), (32, 32, 3), 23_520_842),  # torchvision's 25,557,032 with a 3x3 stem and 10 classes
    ],
    ids=lambda value: value.__class__.__name__ if isinstance(value, nn.Module) else str(value),
)
def test_parameter_counts_are_the_published_ones(model, image, count) -> None:
    shapes = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, *image))), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count


def test_layer_names_are_those_of_the_reports() -> None:
    shapes = jax.eval_shape(lambda key: LeNet().init(key, jnp.zeros((1, 28, 28, 1))), jax.random.key(0))
    assert list(shapes["params"]) == ["conv1", "conv2", "conv3", "fc1", "fc2"]
    assert shapes["params"]["conv3"]["kernel"].shape == (5, 5, 16, 120)


@pytest.mark.parametrize("model", [vgg_a(dropout=0.5), resnet20()], ids=["vgg", "resnet"])
def test_normalised_models_train_and_measure(model) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))

    def shapes(key):
        variables = model.init(key, x)
        logits, updated = model.apply(variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
        return logits, updated["batch_stats"], variables["batch_stats"], model.apply(variables, x)

    logits, updated, before, measured = jax.eval_shape(shapes, jax.random.key(0))
    assert logits.shape == measured.shape == (2, 10)
    assert updated == before


@pytest.mark.parametrize("model", [ResNet((1, 1), 4), ResNet((1, 1), 4, projection=True, last_scale=0.0)])
def test_every_channel_of_a_resnet_learns(model) -> None:
    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
    variables = model.init(jax.random.key(1), x)

    @jax.jit
    def gradient(params):
        def loss(params):
            logits, _ = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            return -jax.nn.log_softmax(logits)[:, 0].mean()

        return jax.grad(loss)(params)

    params = variables["params"]
    for _ in range(2):  # behind scales that start at zero the second step is the first to learn
        gradients = gradient(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
    for path, leaf in jax.tree.leaves_with_path(gradients):
        channels = np.abs(np.asarray(leaf)).reshape(-1, leaf.shape[-1]).max(0)
        assert (channels > 0).all(), jax.tree_util.keystr(path)


def test_scales_from_zero_need_a_projection() -> None:
    with pytest.raises(ValueError, match="last_scale=0 needs projection=True"):
        ResNet((1, 1), 4, last_scale=0.0).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
