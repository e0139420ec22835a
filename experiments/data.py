"""The data sets of the studies: real images as uint8 arrays, and which of them are held out."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from experiments import shards
from experiments.shards import DamagedDataError as DamagedDataError


class DataNotPreparedError(FileNotFoundError):
    """The data set is not on this machine; the message says how to get it."""


@dataclass(frozen=True)
class Split:
    """Images and labels in one order: uint8 (N, H, W, C) and int32 (N,)."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Source:
    """What is known about a data set before it is on the machine."""

    description: str
    licence: str
    archives: tuple[str, ...] = ()  # original files that `data prepare` downloads


_IDX_ARCHIVES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
SOURCES = {
    "mnist": Source("Handwritten digits, 28x28x1, 60,000 + 10,000", "CC BY-SA 3.0", _IDX_ARCHIVES),
    "fashion_mnist": Source("Clothing, 28x28x1, 60,000 + 10,000", "MIT", _IDX_ARCHIVES),
    "cifar10": Source(
        "Photographs of 10 classes, 32x32x3, 50,000 + 10,000",
        "none stated; cite Krizhevsky (2009)",
        ("cifar-10-binary.tar.gz",),
    ),
    "cifar100": Source(
        "Photographs of 100 classes, 32x32x3, 50,000 + 10,000",
        "none stated; cite Krizhevsky (2009)",
        ("cifar-100-binary.tar.gz",),
    ),
    "digits": Source("Handwritten digits, 8x8x1, 1,437 + 360; ships with scikit-learn", "CC BY 4.0"),
}
_CLASS_NAMES = {
    "cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    "fashion_mnist": ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"],
}
SPLITS = ("train", "validation", "test", "train+validation")

# Fixes for good which images are held out: runs with different training seeds share one validation and one test split.
HELD_OUT_SEED = 0
_DIGITS_TEST_PER_CLASS = 36

_PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "hubble_deep_field": "hubble_deep_field.jpg",
    "immunohistochemistry": "ihc.png",
    "moon": "moon.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
}
PHOTOGRAPHS = tuple(_PHOTOGRAPHS)


def load(name: str, split: str = "train", *, data_dir: Path | None = None) -> Split:
    """Loads one split of a data set, every image and label of it checked.

    The validation split is a tenth of the official train split, N // 10 images held out by a fixed seed: those with
    the smallest of N raw 64-bit draws of PCG64(0), a stream that does not change between NumPy versions. "test" is the
    official test split, meant for the final number only. "digits" has no official one: 36 of each class are held out
    in the same way, and the grey values 0..16 of its 8x8 images are scaled to 0..255.

    Args:
      name: "mnist", "fashion_mnist", "cifar10", "cifar100" (TFDS directories) or "digits" (ships with scikit-learn).
      split: "train", "validation", "test" or "train+validation" (the official train split, in its own order).
      data_dir: TFDS data directory; by default TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Returns:
      Images, uint8 (N, H, W, C) in 0..255, and labels, int32 (N,).

    Raises:
      ValueError: unknown name or split.
      DataNotPreparedError: the set is not in the data directory.
      DamagedDataError: a shard is corrupt, truncated or missing.

    Example:
      >>> from experiments import data
      >>> train = data.load("digits", "train")
      >>> train.images.shape, train.images.dtype, train.labels.shape
      ((1294, 8, 8, 1), dtype('uint8'), (1294,))
    """
    check_choice("data set", name, SOURCES)
    check_choice("split", split, SPLITS)
    official = "test" if split == "test" else "train"
    whole = _digits(official) if name == "digits" else _tfds(name, official, data_dir)
    if split in ("test", "train+validation"):
        return whole
    held_out = hold_out(len(whole.labels), len(whole.labels) // 10)
    chosen = held_out if split == "validation" else ~held_out
    return Split(whole.images[chosen], whole.labels[chosen])


def load_splits(name: str, *, images: int | None = None, data_dir: Path | None = None) -> tuple[Split, Split, Split]:
    """Loads the train, validation and test split, as `load` does, or the first `images` of each."""
    found = [load(name, split, data_dir=data_dir) for split in ("train", "validation", "test")]
    train, validation, test = (Split(split.images[:images], split.labels[:images]) for split in found)
    return train, validation, test


def photograph(name: str) -> np.ndarray:
    """Loads a photograph that ships inside scikit-image, without any download.

    Args:
      name: one of `PHOTOGRAPHS`, such as "rocket", "astronaut", "cat".

    Returns:
      uint8 (H, W, C) in 0..255, with C = 3 for colour and 1 for grey.

    Raises:
      ValueError: unknown name.
      FileNotFoundError: the installed scikit-image does not ship the file.

    Example:
      >>> from experiments import data
      >>> data.photograph("rocket").shape
      (427, 640, 3)
    """
    import skimage

    check_choice("photograph", name, _PHOTOGRAPHS)
    path = Path(skimage.__file__).parent / "data" / _PHOTOGRAPHS[name]
    if not path.is_file():
        raise FileNotFoundError(f"photograph {name!r}: the installed scikit-image does not ship {path}")
    with Image.open(path) as image:
        return np.atleast_3d(np.asarray(image))


def photographs() -> dict[str, np.ndarray]:
    """Loads all photographs of `PHOTOGRAPHS`, by name."""
    return {name: photograph(name) for name in PHOTOGRAPHS}


def class_name(name: str, label: int) -> str:
    """What a label of a data set means: a word where the classes have names that fit, else the number."""
    return _CLASS_NAMES[name][label] if name in _CLASS_NAMES else str(label)


def resolve_data_dir(data_dir: Path | None = None) -> Path:
    """Returns the TFDS data directory: the argument, else TFDS_DATA_DIR, else TFDS's default in the home directory."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def prepared_directory(name: str, data_dir: Path | None = None) -> Path | None:
    """Returns the newest prepared version of a TFDS set, `data_dir/name/version`, or None; never asks the network."""
    versions = []
    for info in (resolve_data_dir(data_dir) / name).glob("*/dataset_info.json"):
        if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name):
            versions.append((tuple(map(int, info.parent.name.split("."))), info.parent))
    return max(versions)[1] if versions else None


def check_choice(what: str, value: str, choices: Iterable[str]) -> None:
    """Raises ValueError, naming the nearest right choice, unless the value is among the choices."""
    choices = list(choices)
    if value not in choices:
        nearest = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown {what} {value!r}{hint} (one of: {', '.join(choices)})")


def hold_out(count: int, size: int) -> np.ndarray:
    """Returns a mask of `count` with `size` of them True, the same ones for ever."""
    keys = np.random.PCG64(HELD_OUT_SEED).random_raw(count)
    mask = np.zeros(count, bool)
    mask[np.argsort(keys, kind="stable")[:size]] = True
    return mask


def _digits(official: str) -> Split:
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = np.rint(raw.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = raw.target.astype(np.int32)
    test = np.zeros(len(labels), bool)
    for label in range(10):
        members = np.flatnonzero(labels == label)
        test[members] = hold_out(len(members), _DIGITS_TEST_PER_CLASS)
    chosen = test if official == "test" else ~test
    return Split(images[chosen], labels[chosen])


def _tfds(name: str, official: str, data_dir: Path | None) -> Split:
    directory = prepared_directory(name, data_dir)
    if directory is None:
        files = "\n".join(f"       {file}" for file in SOURCES[name].archives)
        raise DataNotPreparedError(
            f"data set {name!r} is not prepared in {resolve_data_dir(data_dir)}. Either\n"
            f"  1. with network:    python -m experiments data prepare {name}\n"
            f"  2. without network: python -m experiments data prepare {name} --from-archives DIR\n"
            f"     where DIR holds these files, downloaded by hand:\n{files}\n"
            "or set TFDS_DATA_DIR to a directory in which TensorFlow Datasets has prepared it (as array_record)."
        )
    return Split(*shards.read_split(directory, name, official))
