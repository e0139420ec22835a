"""Pictures brought to the form that a study asks for: size, colours, range."""

import numpy as np
from PIL import Image

from experiments import data

_TILES_HIGH = 4  # tiles per height of a photograph


def to_bytes(images: np.ndarray) -> np.ndarray:
    """Images on [0, 1] as uint8, clipped."""
    return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)


def resize(images: np.ndarray, height: int, width: int | None = None) -> np.ndarray:
    """uint8 images (N, H, W, C) at another size, bicubic; no width keeps the ratio of the sides."""
    if width is None:
        width = max(1, round(images.shape[2] * height / images.shape[1]))
    if images.shape[1:3] == (height, width):
        return images
    resized = [_pillow(image).resize((width, height), Image.Resampling.BICUBIC) for image in images]
    return np.stack([np.atleast_3d(np.asarray(image)) for image in resized])


def adapt(images: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 images (N, H, W, C) as images of another set's shape: grey (by luminance) or colour, and resized."""
    height, width, channels = shape
    if images.shape[-1] != channels:
        mode = "L" if channels == 1 else "RGB"
        images = np.stack([np.atleast_3d(np.asarray(_pillow(image).convert(mode))) for image in images])
    return resize(images, height, width)


def photograph_tiles(shape: tuple[int, int, int]) -> np.ndarray:
    """Tiles of the photographs in scikit-image, each shrunk to four tiles high: uint8 (N, *shape), in a fixed order."""
    height, width, _ = shape
    tiles = []
    for photograph in data.photographs().values():
        high = _TILES_HIGH * height
        wide = max(width, photograph.shape[1] * high // photograph.shape[0])
        small = adapt(photograph[None], (high, wide, shape[2]))[0]
        tiles += [
            small[top : top + height, left : left + width]
            for top in range(0, high - height + 1, height)
            for left in range(0, wide - width + 1, width)
        ]
    return np.stack(tiles)[np.random.default_rng(0).permutation(len(tiles))]


def _pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
