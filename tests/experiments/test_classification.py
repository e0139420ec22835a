"""The classification harness: steps, augmentation, exact accuracy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import classification, data, training


class Net(nn.Module):
    """A small net with all that the harness has to carry: batch statistics, dropout, a key."""

    norm: bool = True

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(nn.Dense(16)(x.reshape(len(x), -1)))
        if self.norm:
            x = nn.BatchNorm(not train, momentum=0.9)(x)
            x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(10)(x)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", "train")


@pytest.mark.parametrize("norm", [True, False])
def test_training_learns(digits, norm) -> None:
    model, optimizer = Net(norm), optax.adam(1e-2)
    prepare = classification.standardise(digits.images)
    start = classification.initialise(model, optimizer, prepare(digits.images[:2]), jax.random.key(0))
    step = classification.train_step(
        model, optimizer, prepare, label_smoothing=0.1, watch=lambda state: {"step": state.step}
    )

    def body(state, now):
        index, key = now
        return step(
            state, {"image": jnp.asarray(digits.images)[index], "label": jnp.asarray(digits.labels)[index]}, key
        )

    index = jax.random.randint(jax.random.key(1), (200, 64), 0, len(digits.labels))
    state, metrics = jax.jit(lambda s: jax.lax.scan(body, s, (index, jax.random.split(jax.random.key(2), 200))))(start)
    assert metrics["loss"][-10:].mean() < 0.6 * metrics["loss"][0]
    np.testing.assert_array_equal(metrics["step"], np.arange(1, 201))
    assert bool(start.batch_stats) == norm
    mesh = training.data_mesh()
    measured = classification.measure(model, state.variables, digits.images, digits.labels, prepare, mesh)
    assert measured["accuracy"] > 0.95
    # Against one plain pass over the whole split; 1,294 images do not fill the blocks.
    logits = model.apply(state.variables, prepare(digits.images), train=False)
    right = np.asarray(logits.argmax(-1)) == digits.labels
    assert measured["accuracy"] == right.mean()
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, digits.labels)
    np.testing.assert_allclose(measured["loss"], losses.mean(), rtol=1e-5)
    some = classification.accuracy(model, state.variables, digits.images[:7], digits.labels[:7], prepare, mesh)
    assert some == right[:7].mean()


def test_the_loss_is_the_smoothed_cross_entropy() -> None:
    model, optimizer = Net(norm=False), optax.sgd(1.0)
    x, y = jax.random.normal(jax.random.key(0), (4, 5)), jnp.array([0, 3, 9, 3])
    state = classification.initialise(model, optimizer, x, jax.random.key(1))
    step = classification.train_step(model, optimizer, lambda x: x, label_smoothing=0.2)
    _, metrics = step(state, {"image": x, "label": y}, jax.random.key(2))
    log_p = jax.nn.log_softmax(model.apply(state.variables, x))
    expected = -(0.8 * log_p[jnp.arange(4), y] + 0.2 * log_p.mean(-1)).mean()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


def test_standardise_images_and_latents(digits) -> None:
    x = classification.standardise(digits.images)(digits.images)
    np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=1e-4)
    latents = np.random.default_rng(0).normal(3.0, [1.0, 5.0, 0.0], (100, 3)).astype(np.float32)
    z = classification.standardise(latents)(latents)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(z.std(0), [1, 1, 0], atol=1e-5)


def test_crop_and_flip_moves_whole_images() -> None:
    """Every result is one of the shifts and mirrored shifts of its image, and all of them occur."""
    image = np.arange(1, 13, dtype=np.uint8).reshape(1, 3, 4, 1)
    padded = np.pad(image[0], ((1, 1), (1, 1), (0, 0)))
    shifts = [padded[i : i + 3, j : j + 4] for i in range(3) for j in range(3)]
    possible = {shift.tobytes() for shift in shifts} | {shift[:, ::-1].tobytes() for shift in shifts}
    out = classification.crop_and_flip(jax.random.key(0), jnp.asarray(np.repeat(image, 600, 0)), pad=1)
    assert out.dtype == jnp.uint8
    assert {np.asarray(one).tobytes() for one in out} == possible


def test_cutmix_gives_the_share_that_is_left() -> None:
    images = jnp.broadcast_to(jnp.arange(6, dtype=jnp.uint8)[:, None, None, None], (6, 9, 7, 3))
    mixed, others, share = jax.jit(classification.cutmix)(jax.random.key(3), images, jnp.arange(6))
    np.testing.assert_array_equal(others, [5, 0, 1, 2, 3, 4])
    assert mixed.dtype == jnp.uint8
    own, put_in = mixed == images, mixed == jnp.roll(images, 1, axis=0)
    assert bool((own | put_in).all())
    np.testing.assert_allclose(share, own.mean((1, 2, 3)), rtol=1e-6)
    assert float(share.min()) > 0
    assert float(share.max()) < 1
    for where in np.asarray(put_in[..., 0]):  # a rectangle
        np.testing.assert_array_equal(where, where.any(1)[:, None] & where.any(0)[None])


def test_mixed_labels_and_a_teacher_enter_the_loss() -> None:
    model, optimizer = Net(norm=False), optax.sgd(1.0)
    x, y = jax.random.normal(jax.random.key(0), (3, 5)), jnp.array([0, 3, 9])
    share = jnp.array([0.2, 0.5, 1.0])
    state = classification.initialise(model, optimizer, x, jax.random.key(1))
    log_p = jax.nn.log_softmax(model.apply(state.variables, x))
    mixing = classification.train_step(model, optimizer, lambda x: x, mix=lambda key, x, y: (x, jnp.roll(y, 1), share))
    of = [log_p[jnp.arange(3), labels] for labels in (y, jnp.roll(y, 1))]
    _, metrics = mixing(state, {"image": x, "label": y}, jax.random.key(2))
    np.testing.assert_allclose(metrics["loss"], -(share * of[0] + (1 - share) * of[1]).mean(), rtol=1e-5)
    teacher = classification.Teacher(lambda inputs: jnp.zeros((3, 10)), 0.25, 1.0)
    taught = classification.train_step(model, optimizer, lambda x: x, teacher=teacher)
    _, metrics = taught(state, {"image": x, "label": y}, jax.random.key(2))
    distance = (jnp.log(0.1) - log_p).mean()  # from the uniform distribution
    np.testing.assert_allclose(metrics["loss"], -0.75 * of[0].mean() + 0.25 * distance, rtol=1e-5)
