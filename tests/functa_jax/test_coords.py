"""Coordinates of pixels, and random subsets of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from functa_jax import coordinate_grid, subsample


def test_pixel_centres_of_a_small_image():
    expected = [[[-0.5, -2 / 3], [-0.5, 0], [-0.5, 2 / 3]], [[0.5, -2 / 3], [0.5, 0], [0.5, 2 / 3]]]
    grid = coordinate_grid((2, 3))
    assert grid.dtype == jnp.float32
    np.testing.assert_allclose(grid, expected, atol=1e-7)
    np.testing.assert_array_equal(coordinate_grid((1, 1)), np.zeros((1, 1, 2)))


@settings(derandomize=True, deadline=None, max_examples=8)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.sampled_from([0.5, 1.0, 3.0]))
def test_pixels_cover_the_square_evenly(shape, limit):
    grid = np.asarray(coordinate_grid(shape, limit=limit), np.float64)
    assert grid.shape == (*shape, len(shape))
    for index in np.ndindex(*shape):
        edges = [-limit + 2 * limit * i / n for i, n in zip(index, shape, strict=True)]
        centre = [edge + limit / n for edge, n in zip(edges, shape, strict=True)]
        np.testing.assert_allclose(grid[index], centre, atol=1e-6)


def test_doubled_resolution_is_nested():
    coarse, fine = coordinate_grid((3, 5)), coordinate_grid((6, 10))
    np.testing.assert_allclose(fine.reshape(3, 2, 5, 2, 2).mean(axis=(1, 3)), coarse, atol=1e-7)


def test_a_larger_limit_holds_the_image_in_its_middle():
    np.testing.assert_allclose(coordinate_grid((12, 12), limit=3.0)[4:8, 4:8], coordinate_grid((4, 4)), atol=1e-6)


@pytest.mark.parametrize("shape", [(), (0, 4), (4, -1)])
def test_an_empty_grid_is_an_error(shape):
    with pytest.raises(ValueError, match=r"shape must name .* at least one pixel, got \("):
        coordinate_grid(shape)


def numbered_images(batch=3, shape=(4, 5)):
    """Images whose channels are the pixel's number and the image's, and the grid of their pixels' numbers."""
    number = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(*shape, 1)
    images = jnp.stack([jnp.concatenate([number, jnp.full_like(number, b)], axis=-1) for b in range(batch)])
    return jnp.concatenate([number, -number], axis=-1), images


@settings(derandomize=True, deadline=None, max_examples=6)
@given(seed=st.integers(0, 2**31 - 1), count=st.sampled_from([1, 7, 20]))
def test_points_are_distinct_and_stay_with_their_pixels(seed, count):
    numbers, images = numbered_images()
    coords, targets = subsample(jax.random.key(seed), numbers, images, count)
    assert coords.shape == (count, 2)
    assert targets.shape == (3, count, 2)
    assert len(set(np.asarray(coords[:, 0]))) == count
    np.testing.assert_array_equal(coords[:, 1], -coords[:, 0])
    for b in range(3):
        np.testing.assert_array_equal(targets[b, :, 0], coords[:, 0])
        np.testing.assert_array_equal(targets[b, :, 1], np.full(count, b))


def test_every_pixel_is_as_likely_as_any_other_and_keys_matter():
    numbers, images = numbered_images(batch=1)
    keys = jax.random.split(jax.random.key(0), 2000)
    draw = jax.jit(jax.vmap(lambda key: subsample(key, numbers, images, 5)[0][:, 0]))
    counts = np.bincount(np.asarray(draw(keys), int).ravel(), minlength=20)
    assert counts.sum() == 10_000
    expected, deviation = 500, (2000 * 0.25 * 0.75) ** 0.5
    assert np.abs(counts - expected).max() < 4.5 * deviation
    assert 0.5 * deviation < counts.std() < 2 * deviation


def test_the_same_key_gives_the_same_points():
    numbers, images = numbered_images()
    first, again = (subsample(jax.random.key(5), numbers, images, 6) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)


@pytest.mark.parametrize("count", [0, -1, 21])
def test_an_impossible_count_is_an_error(count):
    with pytest.raises(ValueError, match=f"count must be between 1 and the 20 points there are, got {count}"):
        subsample(jax.random.key(0), *numbered_images(), count)


@pytest.mark.parametrize("coords_shape", [(3, 4, 5, 2), (5, 4, 2), (19, 2)])
def test_coordinates_of_other_pixels_are_an_error(coords_shape):
    _, images = numbered_images()
    with pytest.raises(ValueError, match=r"targets \(3, 4, 5, 2\) do not go with coords"):
        subsample(jax.random.key(0), jnp.zeros(coords_shape), images, 4)
