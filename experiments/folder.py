"""A folder of a person's own pictures as a data set: of any size and format, all brought to one shape."""

import hashlib
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from experiments.data import hold_out

Fit = Literal["crop", "resize"]

_GREY = ("1", "L", "LA", "I", "I;16", "I;16B")
# What Pillow raises for files that are no image, or a damaged one.
_UNREADABLE = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)


class NoPicturesError(FileNotFoundError):
    """The folder is not there, or has too few pictures to learn from; the message says which."""


@dataclass(frozen=True)
class Pictures:
    """The pictures of a folder, split.

    Attributes:
      splits: "train", "validation" and "test" -> uint8 (N, H, W, C).
      unreadable: files that were skipped, each with the reason.
      digest: of all images in their order: other pictures, names or shapes give another.
    """

    splits: dict[str, np.ndarray]
    unreadable: dict[str, str]
    digest: str


def load(folder: Path | None, *, size: int, fit: Fit) -> Pictures:
    """Reads all pictures in a folder and the folders in it, in the order of their names; hidden files are left out.

    A tenth of them, one at least, is the test split, and another tenth the validation split, chosen by a fixed seed.
    The images have one channel if every picture is grey, else three.

    Args:
      folder: where the pictures are.
      size: side of the square images to make, pixels.
      fit: how a picture becomes a square: "crop" cuts off what is too long, evenly at both ends; "resize" distorts it.

    Raises:
      NoPicturesError: no such folder, or fewer than three pictures in it that can be read.
      ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"image_size must be at least 1, got {size}")
    if folder is None:
        raise NoPicturesError("the data set 'folder' needs --data-dir PATH, the folder of your pictures")
    if not folder.expanduser().is_dir():
        raise NoPicturesError(f"--data-dir {folder} is not a folder")
    root = folder.expanduser()
    files = [
        path
        for path in sorted(root.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(partial(_read_or_reason, size=size, fit=fit), files))
    names = [path.relative_to(root).as_posix() for path in files]
    unreadable = {name: reason for name, reason in zip(names, found, strict=True) if isinstance(reason, str)}
    images = [image for image in found if not isinstance(image, str)]
    if len(images) < 3:
        other = f" and {len(unreadable)} other files ({', '.join([*unreadable][:3])})" if unreadable else ""
        raise NoPicturesError(
            f"{folder} has {len(images)} pictures that can be read{other}; at least 3 are needed: one to train on, one "
            "for validation, one for the test"
        )
    stacked = _one_shape(images)
    count = max(1, len(stacked) // 10)
    held_out = hold_out(len(stacked), 2 * count)
    test = held_out & (np.cumsum(held_out) % 2 == 0)  # every second of those held out
    splits = {"train": stacked[~held_out], "validation": stacked[held_out & ~test], "test": stacked[test]}
    digest = hashlib.blake2b(repr(stacked.shape).encode() + stacked.tobytes(), digest_size=16).hexdigest()
    return Pictures(splits, unreadable, digest)


def read(path: Path, *, size: int, fit: Fit, channels: int | None = None) -> np.ndarray:
    """One picture as a square; transparency becomes white.

    Args:
      path: a file.
      size, fit: as in `load`.
      channels: 1 or 3; None: 1 if it is grey, else 3.

    Returns:
      uint8 (size, size, channels).

    Raises:
      OSError, ValueError, SyntaxError, Image.DecompressionBombError: as Pillow, for what it cannot read.
    """
    with Image.open(path) as opened:
        grey = opened.mode in _GREY if channels is None else channels == 1
        opened.draft("L" if grey else "RGB", (2 * size, 2 * size))  # large JPEGs decode at a fraction of their size
        image: Image.Image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16 bits, which convert() would clip
            image = Image.fromarray((np.asarray(image, np.float32).clip(0, 65535) / 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if grey else "RGB")
    if fit == "crop":
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    else:
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.atleast_3d(np.asarray(image))


def _read_or_reason(path: Path, size: int, fit: Fit) -> np.ndarray | str:
    try:
        return read(path, size=size, fit=fit)
    except _UNREADABLE as error:
        return str(error) or type(error).__name__


def _one_shape(images: Sequence[np.ndarray]) -> np.ndarray:
    channels = max(image.shape[-1] for image in images)
    return np.stack([np.broadcast_to(image, (*image.shape[:2], channels)) for image in images])
