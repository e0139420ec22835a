"""Pictures brought to another size, other colours and another range."""

import numpy as np

from experiments import data, pictures


def test_resize_keeps_the_ratio_and_the_colours() -> None:
    image = np.broadcast_to(np.array([10, 100, 250], np.uint8), (1, 30, 40, 3))
    assert pictures.resize(image, 30) is image
    smaller = pictures.resize(image, 15)
    assert smaller.shape == (1, 15, 20, 3)
    np.testing.assert_array_equal(smaller, np.broadcast_to(image[:, :1, :1], smaller.shape))
    assert pictures.resize(image[..., :1], 60).shape == (1, 60, 80, 1)
    assert pictures.resize(image, 10, 10).shape == (1, 10, 10, 3)


def test_adapt_gives_the_shape_asked_for():
    digits = data.load("digits", "test").images[:2]
    colour = pictures.adapt(digits, (28, 20, 3))
    assert colour.shape == (2, 28, 20, 3)
    np.testing.assert_array_equal(colour[..., 0], colour[..., 2])
    np.testing.assert_array_equal(pictures.adapt(pictures.adapt(digits, (8, 8, 3)), (8, 8, 1)), digits)


def test_tiles_are_parts_of_the_photographs():
    grey, colour = (pictures.photograph_tiles((16, 16, channels)) for channels in (1, 3))
    assert grey.shape[1:] == (16, 16, 1)
    assert colour.shape == (len(grey), 16, 16, 3)
    assert len(grey) > 200
    np.testing.assert_array_equal(pictures.photograph_tiles((16, 16, 1)), grey)


def test_bytes_are_clipped_and_rounded():
    np.testing.assert_array_equal(pictures.to_bytes(np.array([-0.5, 0.0, 0.5, 1.0, 2.0])), [0, 0, 128, 255, 255])
