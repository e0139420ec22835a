"""Makes TFDS data sets without TensorFlow: fetch the original archives, check them, write the standard directory.

TFDS itself needs TensorFlow here only to unpack the archives and to encode images as PNG. Both are done by hand below;
everything else (features, shuffling, shards, metadata) is TFDS's own code, so that the directory is the standard one.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

from experiments.data import SOURCES, check_choice, prepared_directory, resolve_data_dir
from experiments.downloads import Original, collect, download
from experiments.shards import DamagedDataError

_CIFAR_SIDE = 32


@dataclass(frozen=True)
class Status:
    """One line of `data list`: whether a data set is on this machine, and where."""

    name: str
    prepared: bool
    where: str
    examples: int
    description: str
    licence: str


def prepare(name: str, *, data_dir: Path | None = None, from_archives: Path | None = None) -> Path:
    """Makes the TFDS directory of a data set, as array_record, without TensorFlow.

    The originals are downloaded from the addresses that TFDS registers, or taken from a directory; either way their
    SHA-256 must be the registered one. An interrupted run is taken up by the next one. Until the finished directory is
    moved to its place, nothing there looks prepared. A set that is prepared already is left as it is.

    Args:
      name: "mnist", "fashion_mnist", "cifar10" or "cifar100".
      data_dir: TFDS data directory; by default TFDS_DATA_DIR, else ~/tensorflow_datasets.
      from_archives: directory of originals downloaded by hand, under their own names or TFDS's.

    Returns:
      The prepared directory, `data_dir/name/version`.

    Raises:
      ValueError: unknown name, or a set that needs no preparing.
      FileNotFoundError: `from_archives` lacks a file.
      DamagedDataError: an archive is not the registered one, or cannot be unpacked; the message names it.
      DownloadError: a download did not complete.
      RuntimeError: another process is preparing the same set.

    Example:
      >>> prepare("mnist", from_archives=Path("downloads"))  # doctest: +SKIP
      PosixPath('/home/me/tensorflow_datasets/mnist/3.0.1')
    """
    check_choice("data set", name, SOURCES)
    if not SOURCES[name].archives:
        raise ValueError(f"data set {name!r} needs no preparing: {SOURCES[name].description}")
    if existing := prepared_directory(name, data_dir):
        return existing
    root = resolve_data_dir(data_dir)
    target = root / name / _version(name)
    if target.exists():
        raise FileExistsError(f"{target} is no prepared data set (no dataset_info.json): delete it and run again")
    originals = _registered(name)
    if from_archives is not None:
        archives = collect(originals, Path(from_archives))
    work = root / f".prepare-{name}"
    with _only_process(work):
        if prepared_directory(name, data_dir):  # by a process that has just finished
            return target
        if from_archives is None:
            archives = {original.name: download(original, work) for original in originals}
        building = work / "building"
        shutil.rmtree(building, ignore_errors=True)  # left by a killed run
        try:
            finished = _build(name, archives, building)
            target.parent.mkdir(parents=True, exist_ok=True)
            finished.replace(target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(work)
    return target


def status(data_dir: Path | None = None) -> list[Status]:
    """Returns one line for each data set, without asking the network."""
    lines = []
    for name, source in SOURCES.items():
        directory = prepared_directory(name, data_dir)
        if not source.archives:
            lines.append(Status(name, True, "inside scikit-learn", 1797, source.description, source.licence))
        elif directory is None:
            lines.append(Status(name, False, "", 0, source.description, source.licence))
        else:
            try:
                splits = json.loads((directory / "dataset_info.json").read_text())["splits"]
                examples, where = sum(int(n) for split in splits for n in split["shardLengths"]), str(directory)
            except (ValueError, KeyError):
                examples, where = 0, f"{directory} (dataset_info.json is damaged)"
            lines.append(Status(name, examples > 0, where, examples, source.description, source.licence))
    return lines


@contextmanager
def _only_process(work: Path) -> Iterator[None]:
    """Holds the work directory for this process; the lock goes with the process, however that ends."""
    import fcntl

    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another process is preparing this data set in {work}") from None
        yield


def _version(name: str) -> str:
    import tensorflow_datasets as tfds

    return str(tfds.builder_cls(name).VERSION)


def _registered(name: str) -> list[Original]:
    """Returns what TFDS registers for a data set."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.resource import get_dl_fname

    infos = tfds.builder_cls(name).url_infos
    return [
        Original(url, int(info.size), info.checksum, get_dl_fname(url, info.checksum)) for url, info in infos.items()
    ]


def _build(name: str, archives: dict[str, Path], building: Path) -> Path:
    """Writes the TFDS directory below `building` and returns it."""
    import tensorflow_datasets as tfds

    files = _UnpackedFiles(archives, building / "unpacked")
    base: Any = tfds.builder_cls(name)

    reader: Any = _CifarReader if hasattr(base, "_cifar_info") else _IdxReader

    class Builder(reader, base, skip_registration=True):  # type: ignore[call-arg]
        name = base.name

        def _make_download_manager(self, **_: Any) -> _UnpackedFiles:
            return files

        def _log_download_bytes(self) -> None:  # would print a download that does not happen
            pass

        def _log_download_done(self) -> None:  # would print a directory that is about to move
            pass

    Builder.__module__ = base.__module__  # dataset_info.json tells it
    tfds.disable_progress_bar()
    builder = Builder(data_dir=building)
    builder.download_and_prepare(file_format="array_record")
    return Path(builder.data_dir)


class _UnpackedFiles:
    """Stands in for TFDS's download manager: the originals are here already, by file name, and are unpacked here."""

    def __init__(self, archives: dict[str, Path], directory: Path):
        self.downloaded_size = sum(path.stat().st_size for path in archives.values())
        self._unpacked = {name: _unpack(path, directory / name) for name, path in archives.items()}

    def download_and_extract(self, urls: str | dict[str, str]) -> Any:
        if isinstance(urls, str):
            return str(self._unpacked[urls.rsplit("/", 1)[-1]])
        return {key: self.download_and_extract(url) for key, url in urls.items()}


def _unpack(archive: Path, target: Path) -> Path:
    """Unpacks a .gz into the file `target`, or a .tar.gz into the directory, and nothing outside of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unzipped = target.with_name(f"{target.name}.unzipped")
    try:
        with gzip.open(archive) as content, unzipped.open("wb") as file:
            shutil.copyfileobj(content, file)  # to the end, where gzip checks its CRC
        if not target.name.endswith(".tar.gz"):
            return unzipped.rename(target)
        with tarfile.open(unzipped) as tar:
            for member in tar:
                path = (target / member.name).resolve()
                if not path.is_relative_to(target.resolve()) or not (member.isfile() or member.isdir()):
                    raise DamagedDataError(f"{archive} has an unsafe member: {member.name!r}")
                if (inside := tar.extractfile(member)) is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with path.open("wb") as file:
                        shutil.copyfileobj(inside, file)
    except (EOFError, gzip.BadGzipFile, tarfile.TarError, zlib.error) as error:
        raise DamagedDataError(f"{archive} cannot be unpacked: {error}") from error
    unzipped.unlink()
    return target


class _IdxReader:
    """Reads the IDX files of the MNIST family."""

    def _generate_examples(
        self, num_examples: int, data_path: str, label_path: str
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        del num_examples  # the files say it themselves
        images, labels = _read_idx(Path(data_path), dimensions=3), _read_idx(Path(label_path), dimensions=1)
        if len(images) != len(labels):
            raise DamagedDataError(f"{data_path} has {len(images)} images, but {label_path} has {len(labels)} labels")
        for index in track(range(len(images)), description="Writing"):
            yield index, {"image": _png(images[index]), "label": int(labels[index])}


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Reads an IDX file of bytes: 0, 0, 8 (unsigned byte), number of dimensions, each as a big-endian int32, data."""
    content = path.read_bytes()
    header = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(content[4:header], ">i4").tolist())
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) != header + np.prod(shape):
        raise DamagedDataError(f"{path.name} is not an IDX file of {dimensions} dimensions and {len(content)} bytes")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


class _CifarReader:
    """Reads the binary files of CIFAR: records of one byte for each label, then red, green and blue planes."""

    _cifar_info: Any  # TFDS's own: which labels the set has

    def _generate_examples(self, split_prefix: str, filepaths: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        keys = self._cifar_info.label_keys
        size = len(keys) + 3 * _CIFAR_SIDE**2
        index = 0
        for path in map(Path, filepaths):
            content = np.fromfile(path, np.uint8)
            if not len(content) or len(content) % size:
                raise DamagedDataError(f"{path.name} has {len(content)} bytes, which is no multiple of {size}")
            for record in track(content.reshape(-1, size), description=f"Writing {path.name}"):
                image = record[len(keys) :].reshape(3, _CIFAR_SIDE, _CIFAR_SIDE).transpose(1, 2, 0)
                labels = dict(zip(keys, record[: len(keys)].tolist(), strict=True))
                yield index, {"id": f"{split_prefix}{index:05d}", "image": _png(image), **labels}
                index += 1


def _png(image: np.ndarray) -> bytes:
    """Encodes uint8 (H, W) or (H, W, 3) without loss."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    return buffer.getvalue()
