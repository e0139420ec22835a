"""Reads the images and labels of a TFDS directory without TensorFlow, every file of it checked.

Reading goes shard by shard, so that a damaged one can be named. The decoded arrays are kept in the user's cache
directory, because decoding 60,000 images takes seconds and a study is started many times.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from experiments.files import cache_folder

Arrays = tuple[np.ndarray, np.ndarray]
_ARRAYS = ("images.npy", "labels.npy")
_READ_AHEAD = 1024  # records fetched at once


class DamagedDataError(OSError):
    """A file of a data set is corrupt, truncated or missing; the message names it."""


def read_split(directory: Path, name: str, split: str) -> Arrays:
    """Reads an official split of a TFDS image classification set in the array_record format.

    Args:
      directory: `data_dir/name/version`, with dataset_info.json.
      name: of the data set.
      split: "train" or "test".

    Returns:
      Images, uint8 (N, H, W, C), and labels, int32 (N,), in the order of the shards.

    Raises:
      DamagedDataError: a file is corrupt, truncated or missing.
    """
    entry = cache_folder("decoded") / f"{name}-{directory.name}-{split}-{_fingerprint(directory, name, split)[:16]}"
    arrays = _read_cache(entry)
    if arrays is None:
        arrays = _decode(directory, name, split)
        _write_cache(entry, arrays)
    return arrays


def _fingerprint(directory: Path, name: str, split: str) -> str:
    """Returns SHA-256 of all that the decoded split depends on: a shard damaged after it was cached is noticed too."""
    digest = hashlib.sha256()
    for path in sorted({*directory.glob("*.json"), *directory.glob(f"{name}-{split}.*")}):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _decode(directory: Path, name: str, split: str) -> Arrays:
    """Decodes a split of a TFDS directory; a shard that fails any check is named."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(directory)
        instructions = builder.info.splits[split].file_instructions
        shape, classes = builder.info.features["image"].shape, builder.info.features["label"].num_classes
    except Exception as error:  # whatever TFDS raises on JSON that it did not write
        raise DamagedDataError(f"dataset_info.json or features.json in {directory} cannot be used: {error}") from error
    if (file_format := builder.info.file_format.file_suffix) != "array_record":
        raise DamagedDataError(
            f"{directory} holds {name!r} as {file_format}, which only TensorFlow reads; prepare it as array_record in "
            f"another directory: TFDS_DATA_DIR=DIR python -m experiments data prepare {name}"
        )
    count = sum(shard.examples_in_shard for shard in instructions)
    images, labels = np.empty((count, *shape), np.uint8), np.empty(count, np.int32)
    start = 0
    for index, shard in enumerate(instructions):
        try:
            for example in _read_shard(builder, f"{split}[{index}shard]", shard):
                images[start], labels[start] = _decode_example(example, shape, classes)
                start += 1
        except Exception as error:  # the readers have no common exception, and each means that the file is damaged
            raise DamagedDataError(
                f"{shard.filename} is damaged: {error}\n"
                f"Delete {directory} and prepare it again: python -m experiments data prepare {name}"
            ) from error
    return images, labels


def _read_shard(builder: Any, split: str, shard: Any) -> Iterator[dict[str, Any]]:
    """Yields the examples of one shard with the image still encoded; array_record checks a hash of every chunk."""
    import tensorflow_datasets as tfds

    reader = ArrayRecordReader(str(shard.filename))
    found = reader.num_records()
    reader.close()
    if found != shard.examples_in_shard:
        raise ValueError(f"{found} records, where dataset_info.json says {shard.examples_in_shard}")
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    for start in range(0, found, _READ_AHEAD):
        yield from source.__getitems__(list(range(start, min(start + _READ_AHEAD, found))))


def _decode_example(example: dict[str, Any], shape: tuple[int, ...], classes: int) -> tuple[np.ndarray, int]:
    # Pillow is exact and twice as fast here as TFDS's own decoding, which also asks for OpenCV in a log line.
    image = np.asarray(Image.open(io.BytesIO(example["image"])))
    if image.shape != (shape[:2] if shape[2] == 1 else shape) or image.dtype != np.uint8:
        raise ValueError(f"an image of shape {image.shape} and type {image.dtype}, where {shape} uint8 was expected")
    if not 0 <= example["label"] < classes:
        raise ValueError(f"label {example['label']} is not in 0..{classes - 1}")
    return image.reshape(shape), example["label"]


def _read_cache(entry: Path) -> Arrays | None:
    """Returns the cached arrays, or None where they are absent or damaged."""
    try:
        checksums = json.loads((entry / "checksums.json").read_text())
        content = {name: (entry / name).read_bytes() for name in _ARRAYS}
        if any(zlib.crc32(content[name]) != checksums[name] for name in content):
            return None
        images, labels = (np.load(io.BytesIO(content[name])) for name in _ARRAYS)
        return images, labels
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_cache(entry: Path, arrays: Arrays) -> None:
    """Writes the cache entry at once, or not at all: without a cache a study starts more slowly, but right."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=entry.parent, prefix=f"{entry.name}.tmp-") as temporary:
            part = Path(temporary) / "part"
            part.mkdir()
            for name, array in zip(_ARRAYS, arrays, strict=True):
                np.save(part / name, array)
            checksums = {name: zlib.crc32((part / name).read_bytes()) for name in _ARRAYS}
            (part / "checksums.json").write_text(json.dumps(checksums))
            shutil.rmtree(entry, ignore_errors=True)  # only a damaged one can be there
            part.replace(entry)
    except OSError as error:
        warnings.warn(f"decoded images cannot be cached in {entry.parent}: {error}", stacklevel=2)
