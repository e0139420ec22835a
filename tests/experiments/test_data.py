"""Loading: right pixels, fixed splits, and every kind of damage found and named."""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import data, files, shards

CLASSES = 10


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "png")
    return buffer.getvalue()


def write_set(root, name, arrays, *, encode=png, shape=None, shards_per_split=1, version="3.0.1"):
    """Writes {split: (images, labels)} as a TFDS directory in their own order, through a builder of the test's own."""
    import tensorflow_datasets as tfds

    class SmallSet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=shape or next(iter(arrays.values()))[0].shape[1:]),
                "label": tfds.features.ClassLabel(num_classes=CLASSES),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {split: self._generate_examples(*content) for split, content in arrays.items()}

        def _generate_examples(self, images, labels):
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield index, {"image": encode(image), "label": int(label)}

    SmallSet.name = name
    tfds.disable_progress_bar()
    builder = SmallSet(data_dir=root)
    config = tfds.download.DownloadConfig(num_shards=shards_per_split)
    builder.download_and_prepare(file_format="array_record", download_config=config)
    return Path(builder.data_dir)


def random_split(count, shape, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, *shape), np.uint8)
    images[:, 0, 0, 0] = np.arange(count)  # tells which image it is, whatever the order
    return images, rng.integers(0, CLASSES, count).astype(np.int32)


def in_order(split):
    order = np.argsort(split.images[:, 0, 0, 0])
    return split.images[order], split.labels[order]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    arrays = {"train": random_split(50, (28, 28, 1), 0), "test": random_split(7, (28, 28, 1), 1)}
    write_set(root, "mnist", arrays, shards_per_split=2)
    return root, arrays


@pytest.fixture
def root(pristine, tmp_path):
    """A copy of the small set that the test may damage."""
    return Path(shutil.copytree(pristine[0], tmp_path / "tfds"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("COMPACT_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "decoded"


def shard(root, split="train", index=0):
    return sorted((root / "mnist" / "3.0.1").glob(f"mnist-{split}.array_record-*"))[index]


# --- What is loaded ------------------------------------------------------------------------------------------------


def test_pixels_and_labels_are_those_written(pristine):
    root, arrays = pristine
    for split, official in (("train+validation", "train"), ("test", "test")):
        loaded = data.load("mnist", split, data_dir=root)
        assert (loaded.images.dtype, loaded.labels.dtype) == (np.uint8, np.int32)
        for found, written in zip(in_order(loaded), arrays[official], strict=True):
            np.testing.assert_array_equal(found, written)
    assert "tensorflow" not in sys.modules


def test_order_is_that_of_tfds(pristine):
    import tensorflow_datasets as tfds

    source = tfds.data_source("mnist", split="train", data_dir=pristine[0], download=False)
    loaded = data.load("mnist", "train+validation", data_dir=pristine[0])
    np.testing.assert_array_equal(loaded.images, np.stack([example["image"] for example in source]))
    np.testing.assert_array_equal(loaded.labels, [example["label"] for example in source])


def test_colour_images(tmp_path):
    images, labels = random_split(12, (32, 32, 3), 2)
    write_set(tmp_path, "cifar10", {"train": (images, labels), "test": (images, labels)}, version="3.0.2")
    found = in_order(data.load("cifar10", "test", data_dir=tmp_path))
    np.testing.assert_array_equal(found[0], images)
    np.testing.assert_array_equal(found[1], labels)


def test_validation_is_a_fixed_tenth_of_train(pristine):
    whole, train, validation = (
        data.load("mnist", split, data_dir=pristine[0]) for split in ("train+validation", "train", "validation")
    )
    ids = [set(split.images[:, 0, 0, 0].tolist()) for split in (whole, train, validation)]
    assert len(ids[2]) == len(validation.labels) == 5
    assert ids[1] | ids[2] == ids[0]
    assert not ids[1] & ids[2]
    again = data.load("mnist", "validation", data_dir=pristine[0])
    np.testing.assert_array_equal(again.images, validation.images)


def test_digits_are_the_real_ones_and_the_splits_never_change():
    from sklearn.datasets import load_digits

    splits = {split: data.load("digits", split) for split in ("train", "validation", "test")}
    assert [len(split.labels) for split in splits.values()] == [1294, 143, 360]
    assert np.bincount(splits["test"].labels).tolist() == [36] * 10
    raw = load_digits()
    real = sorted((image.astype(int).tobytes(), label) for image, label in zip(raw.images, raw.target, strict=True))
    found = sorted(
        (np.rint(image[..., 0] * (16 / 255)).astype(int).tobytes(), label)
        for split in splits.values()
        for image, label in zip(split.images, split.labels, strict=True)
    )
    assert found == real
    assert max(split.images.max() for split in splits.values()) == 255
    # Which images are held out must not change with the version of NumPy: published numbers hang on it.
    held_out = {split: zlib.crc32(splits[split].labels.astype("<i4").tobytes()) for split in ("validation", "test")}
    assert held_out == {"validation": 1841130700, "test": 2856413791}


def test_photographs_ship_with_scikit_image(monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    photographs = data.photographs()
    assert set(photographs) == set(data.PHOTOGRAPHS) >= {"rocket", "astronaut", "coffee", "cat"}
    for image in photographs.values():
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] in (1, 3)
        assert image.std() > 10  # is no blank
    assert photographs["rocket"].shape == (427, 640, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.load("cfar10"), r"unknown data set 'cfar10'; did you mean 'cifar10'\?"),
        (lambda: data.load("digits", "valid"), r"unknown split 'valid'; did you mean 'validation'\?"),
        (lambda: data.photograph("rockets"), r"unknown photograph 'rockets'; did you mean 'rocket'\?"),
        (lambda: data.load("zzz"), r"unknown data set 'zzz' \(one of: mnist, fashion_mnist, "),
    ],
)
def test_unknown_names_tell_the_nearest_right_one(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- Where it is found ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_unprepared_set_is_an_error_without_a_download_with_both_ways_to_get_it(name, tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    with pytest.raises(data.DataNotPreparedError) as caught:
        data.load(name, data_dir=tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert f"python -m experiments data prepare {name}\n" in message
    assert f"python -m experiments data prepare {name} --from-archives DIR" in message
    assert "TFDS_DATA_DIR" in message
    assert all(archive in message for archive in data.SOURCES[name].archives)


def test_unprepared_set_is_found_without_tfds(tmp_path):
    script = """if True:
        import sys
        from experiments import data
        try:
            data.load("cifar100")
        except data.DataNotPreparedError:
            print("tensorflow_datasets" in sys.modules, "tensorflow" in sys.modules)
        """
    environment = {**os.environ, "TFDS_DATA_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "False False\n"


def test_data_dir_comes_before_environment_and_newest_version_wins(pristine, tmp_path, monkeypatch):
    root, _ = pristine
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    assert len(data.load("mnist", "test").labels) == 7
    with pytest.raises(data.DataNotPreparedError):
        data.load("mnist", "test", data_dir=tmp_path / "elsewhere")
    monkeypatch.setenv("TFDS_DATA_DIR", "")
    assert data.resolve_data_dir() == Path.home() / "tensorflow_datasets"

    newer = tmp_path / "versions"
    for version in ("3.0.9", "3.0.10", "incomplete.XY_4.0.0"):
        (newer / "mnist" / version).mkdir(parents=True)
        (newer / "mnist" / version / "dataset_info.json").touch()
    (newer / "mnist" / "5.0.0").mkdir()  # without dataset_info.json it is no prepared version
    assert data.prepared_directory("mnist", newer) == newer / "mnist" / "3.0.10"


# --- Damage --------------------------------------------------------------------------------------------------------


def test_bit_flips_never_change_a_pixel_silently(root, pristine):
    path = shard(root)
    original = path.read_bytes()
    intact = shards._decode(path.parent, "mnist", "train")
    rng = np.random.default_rng(3)
    end_of_records = int(np.flatnonzero(np.frombuffer(original[:-65536], np.uint8))[-1])
    tail = len(original) - 65536  # the index of the records
    positions = [64, 80, 104, tail, tail + 30, tail + 70, *rng.integers(64, end_of_records, 30).tolist()]
    found = 0
    for position in positions:
        flipped = bytearray(original)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            decoded = shards._decode(path.parent, "mnist", "train")
        except data.DamagedDataError as error:
            found += str(path) in str(error)
        else:
            np.testing.assert_array_equal(decoded[0], intact[0])
            np.testing.assert_array_equal(decoded[1], intact[1])
    assert found >= 30  # the others hit bytes that nothing reads


@pytest.mark.parametrize("kept", [0, 1, 65535, 65536, 70000, -1])
def test_truncated_shard_is_named(root, kept):
    path = shard(root, index=1)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(data.DamagedDataError, match=re.escape(str(path))):
        data.load("mnist", data_dir=root)


def test_missing_and_misplaced_shards_are_named(root):
    path = shard(root, index=1)
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(data.DamagedDataError, match=re.escape(str(path))):
        data.load("mnist", data_dir=root)
    path.write_bytes(shard(root, "test").read_bytes())  # whole in itself, but with other records
    with pytest.raises(data.DamagedDataError, match=r"\d+ records, where dataset_info.json says 25"):
        data.load("mnist", data_dir=root)
    path.write_bytes(content)
    assert len(data.load("mnist", "train+validation", data_dir=root).labels) == 50


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (lambda image: png(image)[:-30], "truncated|broken|not enough|Truncated"),
        (lambda image: b"no image at all", "cannot identify image"),
        (lambda image: png(image[:20]), r"shape \(20, 28\).*where \(28, 28, 1\) uint8"),
        (lambda image: png(np.repeat(image, 3, axis=2)), r"shape \(28, 28, 3\)"),
    ],
)
def test_wrong_images_are_found(tmp_path, encode, message):
    images, labels = random_split(4, (28, 28, 1), 4)
    good = png(images[0])
    calls = iter(range(8))

    def third_is_bad(image):
        return encode(image) if next(calls) == 2 else good

    write_set(tmp_path, "mnist", {"train": (images, labels), "test": (images, labels)}, encode=third_is_bad)
    with pytest.raises(data.DamagedDataError, match=f"(?s)mnist-train.*({message})"):
        data.load("mnist", data_dir=tmp_path)


def test_labels_out_of_range_are_found(root):
    features = root / "mnist" / "3.0.1" / "features.json"
    features.write_text(features.read_text().replace('"numClasses": "10"', '"numClasses": "2"'))
    with pytest.raises(data.DamagedDataError, match=r"mnist-train.*label \d is not in 0\.\.1"):
        data.load("mnist", data_dir=root)


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_damaged_metadata_is_named(root, file):
    path = root / "mnist" / "3.0.1" / file
    path.write_text(path.read_text()[:100])
    with pytest.raises(data.DamagedDataError, match=f"{file}.*{re.escape(str(path.parent))}"):
        data.load("mnist", data_dir=root)


def test_set_in_the_format_of_tensorflow_is_an_error(root):
    path = root / "mnist" / "3.0.1" / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(data.DamagedDataError, match=r"holds 'mnist' as tfrecord.*data prepare mnist"):
        data.load("mnist", data_dir=root)


# --- The cache of decoded arrays -----------------------------------------------------------------------------------


def test_second_load_reads_the_cache(root, cache, monkeypatch):
    first = data.load("mnist", data_dir=root)
    monkeypatch.setattr(shards, "_decode", None)
    second = data.load("mnist", data_dir=root)
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.labels, second.labels)
    assert len(list(cache.iterdir())) == 1  # and nothing temporary is left
    second.images[:] = 0  # the caller's own copy
    np.testing.assert_array_equal(data.load("mnist", data_dir=root).images, first.images)


@pytest.mark.parametrize("file", ["images.npy", "labels.npy", "checksums.json"])
@pytest.mark.parametrize("damage", ["flip", "header", "truncate", "empty", "delete"])
def test_damaged_cache_is_made_again(root, cache, file, damage):
    first = data.load("mnist", data_dir=root)
    path = next(cache.iterdir()) / file
    content = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        content[len(content) // 2] ^= 4
        header = bytearray(path.read_bytes())
        header[min(70, len(header) - 1)] ^= 1  # in an .npy file: inside the description of the array
        path.write_bytes({"flip": content, "header": header, "truncate": content[:-1], "empty": b""}[damage])
    second = data.load("mnist", data_dir=root)
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.labels, second.labels)
    assert shards._read_cache(next(cache.iterdir())) is not None
    assert len(list(cache.iterdir())) == 1


def test_shard_damaged_after_it_was_cached_is_noticed(root):
    data.load("mnist", data_dir=root)
    path = shard(root)
    content, times = bytearray(path.read_bytes()), path.stat()
    content[300] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(data.DamagedDataError, match=re.escape(str(path))):
        data.load("mnist", data_dir=root)


def test_cache_that_cannot_be_written_is_only_a_warning(root, cache):
    cache.parent.mkdir()
    cache.write_text("a file where the directory should be")
    with pytest.warns(UserWarning, match="cannot be cached"):
        assert len(data.load("mnist", "test", data_dir=root).labels) == 7


def test_default_cache_is_in_the_users_cache_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("COMPACT_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_folder("decoded") == tmp_path / "compact-jax" / "decoded"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_folder("decoded") == Path.home() / ".cache" / "compact-jax" / "decoded"


# --- The real sets, where they are at hand -------------------------------------------------------------------------

REAL = Path(os.environ.get("TFDS_DATA_DIR") or Path(__file__).parents[3] / "shared" / "tfds")


def real(name, split):
    if data.prepared_directory(name, REAL) is None:
        pytest.skip(f"{name} is not prepared in {REAL}")
    return data.load(name, split, data_dir=REAL)


def test_real_mnist():
    test = real("mnist", "test")
    assert test.images.shape == (10000, 28, 28, 1)
    assert np.bincount(test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert abs(test.images.mean() / 255 - 0.1325) < 1e-3  # the published mean of the test images


def test_real_cifar10():
    test = real("cifar10", "test")
    assert test.images.shape == (10000, 32, 32, 3)
    assert np.bincount(test.labels).tolist() == [1000] * 10
    # The usual normalisation constants of CIFAR-10 are those of the train images: 0.4914, 0.4822, 0.4465.
    np.testing.assert_allclose(test.images.mean((0, 1, 2)) / 255, [0.4914, 0.4822, 0.4465], atol=0.01)
