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


def mosaic(tiles: np.ndarray, *, gap: int = 1) -> np.ndarray:
    """Arranges uint8 tiles (N, H, W, C) in a rectangle, about square, on light grey: uint8 (H', W', C)."""
    count, height, width, channels = tiles.shape
    across = max(1, round(np.sqrt(count * (height + gap) / (width + gap))))
    down = -(-count // across)
    sheet = np.full((down * (height + gap) + gap, across * (width + gap) + gap, channels), 221, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = (i // across) * (height + gap) + gap, (i % across) * (width + gap) + gap
        sheet[top : top + height, left : left + width] = tile
    return sheet


def diverging(values: np.ndarray, largest: float) -> np.ndarray:
    """Colours: white at 0, red up to `largest`, blue down to minus that; (...) to uint8 (..., 3)."""
    strength = np.clip(np.abs(values) / max(largest, 1e-30), 0, 1)[..., None]
    ends = np.where(values[..., None] > 0, (178, 24, 43), (33, 102, 172))
    return np.rint(255 + strength * (ends - 255)).astype(np.uint8)
