"""Making TFDS sets without TensorFlow: the standard directory, from checked originals, or nothing at all."""

import fcntl
import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest

from experiments import data, prepare
from experiments.downloads import DownloadError, Original, download
from experiments.shards import DamagedDataError

VERSIONS = {"mnist": "3.0.1", "fashion_mnist": "3.0.1", "cifar10": "3.0.2", "cifar100": "3.0.2"}
COUNTS = {"train": 15, "test": 6}


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPACT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("no_proxy", "*")


# --- Small originals in the published formats ----------------------------------------------------------------------


def contents(name):
    """Random images and labels: {split: (images, labels, coarse labels)}."""
    rng = np.random.default_rng(len(name))
    shape = (28, 28, 1) if "mnist" in name else (32, 32, 3)
    classes = 100 if name == "cifar100" else 10
    return {
        split: (
            rng.integers(0, 256, (count, *shape), np.uint8),
            rng.integers(0, classes, count),
            rng.integers(0, 20, count),
        )
        for split, count in COUNTS.items()
    }


def gzipped(content):
    return gzip.compress(content, mtime=0)


def tarred(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def cifar_records(images, *labels):
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([np.stack(labels, axis=1).astype(np.uint8), planes], axis=1).tobytes()


def originals(name):
    """The archives of a small set, {file name: bytes}."""
    made = contents(name)
    if "mnist" in name:
        files = {}
        for split, prefix in (("train", "train"), ("test", "t10k")):
            images, labels, _ = made[split]
            header = struct.pack(">iiii", 2051, len(images), 28, 28)
            files[f"{prefix}-images-idx3-ubyte.gz"] = gzipped(header + images.tobytes())
            header = struct.pack(">ii", 2049, len(labels))
            files[f"{prefix}-labels-idx1-ubyte.gz"] = gzipped(header + labels.astype(np.uint8).tobytes())
        return files
    if name == "cifar10":
        (images, labels, _), test = made["train"], made["test"]
        members = {
            f"data_batch_{batch + 1}.bin": cifar_records(images[3 * batch :][:3], labels[3 * batch :][:3])
            for batch in range(5)
        }
        members |= {"test_batch.bin": cifar_records(test[0], test[1])}
        members |= {"batches.meta.txt": "\n".join(f"class {i}" for i in range(10)).encode() + b"\n\n"}
        return {"cifar-10-binary.tar.gz": tarred({f"cifar-10-batches-bin/{k}": v for k, v in members.items()})}
    members = {f"{split}.bin": cifar_records(made[split][0], made[split][2], made[split][1]) for split in COUNTS}
    members["fine_label_names.txt"] = "\n".join(f"fine {i}" for i in range(100)).encode()
    members["coarse_label_names.txt"] = "\n".join(f"coarse {i}" for i in range(20)).encode()
    return {"cifar-100-binary.tar.gz": tarred({f"cifar-100-binary/{k}": v for k, v in members.items()})}


def register(monkeypatch, files, address="http://127.0.0.1:9"):
    """Makes the small originals the registered ones."""
    registered = [
        Original(f"{address}/{name}", len(content), hashlib.sha256(content).hexdigest(), f"tfds_{name}")
        for name, content in files.items()
    ]
    monkeypatch.setattr(prepare, "_registered", lambda name: registered)
    return registered


def write(directory, files, rename="{}"):
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / rename.format(name)).write_bytes(content)
    return directory


# --- From archives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(VERSIONS))
def test_result_is_the_standard_directory_and_reads_back_through_plain_tfds(name, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    files = originals(name)
    register(monkeypatch, files)
    root = tmp_path / "tfds"
    directory = prepare.prepare(name, data_dir=root, from_archives=write(tmp_path / "originals", files))
    assert directory == root / name / VERSIONS[name]
    names = {"dataset_info.json", "features.json"}
    names |= {f"{name}-{split}.array_record-00000-of-00001" for split in COUNTS}
    assert names <= {path.name for path in directory.iterdir()}
    assert {path.name for path in directory.iterdir()} - names <= {"label.labels.txt", "coarse_label.labels.txt"}
    assert [path.name for path in root.iterdir()] == [name]  # nothing temporary is left

    for split, (images, labels, coarse) in contents(name).items():
        source = tfds.data_source(name, split=split, data_dir=root, download=False)
        loaded = data.load(name, {"train": "train+validation", "test": "test"}[split], data_dir=root)
        where = {image.tobytes(): index for index, image in enumerate(images)}
        found = [where[example["image"].tobytes()] for example in source]
        assert sorted(found) == list(range(len(images)))
        assert [example["label"] for example in source] == labels[found].tolist()
        np.testing.assert_array_equal(loaded.images, images[found])
        np.testing.assert_array_equal(loaded.labels, labels[found])
        if "cifar" in name:
            ids = [bytes(example["id"]).decode() for example in source]
            assert ids == [f"{split}_{index:05d}" for index in found]
        if name == "cifar100":
            assert [example["coarse_label"] for example in source] == coarse[found].tolist()
            assert source.dataset_info.features["coarse_label"].int2str(3) == "coarse 3"
    if name == "cifar10":
        assert source.dataset_info.features["label"].int2str(3) == "class 3"
    assert json.loads((directory / "dataset_info.json").read_text())["moduleName"].startswith("tensorflow_datasets.")
    assert source.dataset_info.download_size == sum(map(len, files.values()))
    assert "tensorflow" not in sys.modules


def test_order_is_that_of_tfds_shuffling(tmp_path, monkeypatch):
    """The i-th example is the same as in a set that TFDS writes itself: it shuffles by a hash of the index."""
    from tensorflow_datasets.core.hashing import Hasher

    files = originals("cifar10")
    register(monkeypatch, files)
    prepare.prepare("cifar10", from_archives=write(tmp_path / "originals", files))
    hasher = Hasher("train")
    order = sorted(range(COUNTS["train"]), key=hasher.hash_key)
    loaded = data.load("cifar10", "train+validation")
    np.testing.assert_array_equal(loaded.images, contents("cifar10")["train"][0][order])


def test_registered_files_are_those_named_in_the_error_of_an_unprepared_set():
    for name in VERSIONS:
        registered = prepare._registered(name)
        assert {original.name for original in registered} == set(data.SOURCES[name].archives)
        assert all(len(original.sha256) == 64 and original.size > 4000 for original in registered)
        assert prepare._version(name) == VERSIONS[name]


def test_prepared_set_is_left_alone(tmp_path, monkeypatch):
    files = originals("mnist")
    register(monkeypatch, files)
    directory = prepare.prepare("mnist", from_archives=write(tmp_path / "originals", files, rename="tfds_{}"))
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    monkeypatch.setattr(prepare, "_registered", None)
    assert prepare.prepare("mnist") == directory
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def test_missing_and_wrong_archives_are_named(tmp_path, monkeypatch):
    files = originals("mnist")
    registered = register(monkeypatch, files)
    directory = write(tmp_path / "originals", files)
    (directory / registered[1].name).unlink()
    (directory / registered[2].name).unlink()
    with pytest.raises(FileNotFoundError) as missing:
        prepare.prepare("mnist", from_archives=directory)
    assert [original.url in str(missing.value) for original in registered] == [False, True, True, False]

    write(directory, files)
    path = directory / registered[0].name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedDataError) as wrong:
        prepare.prepare("mnist", from_archives=directory)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    assert all(part in str(wrong.value) for part in (str(path), registered[0].sha256, found))
    assert not (tmp_path / "tfds").exists()


def idx(*header, size=0):
    return gzipped(struct.pack(f">{len(header)}i", *header) + bytes(size))


NAMES_ONLY = {"cifar-10-batches-bin/batches.meta.txt": b"\n".join(b"abcdefghij"[i : i + 1] for i in range(10))}
BATCHES = {f"cifar-10-batches-bin/{name}.bin": bytes(3000) for name in ("data_batch_1", "test_batch")}
MNIST, CIFAR = "train-images-idx3-ubyte.gz", "cifar-10-binary.tar.gz"


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("mnist", MNIST, originals("mnist")[MNIST][:-20], f"{MNIST} cannot be unpacked"),
        ("mnist", MNIST, originals("mnist")[MNIST][:40] + b"?" * 60, f"{MNIST} cannot be unpacked"),
        ("mnist", MNIST, b"no gzip", f"{MNIST} cannot be unpacked"),
        ("mnist", MNIST, idx(2049, 15, 28, 28, size=15 * 784), "is not an IDX file of 3 dimensions"),
        ("mnist", MNIST, idx(2051, 15, 28, 28, size=15 * 784 - 1), "is not an IDX file of 3 dimensions"),
        ("mnist", MNIST, gzipped(b"\0\0\x08"), "is not an IDX file of 3 dimensions"),
        ("mnist", MNIST, idx(2051, 14, 28, 28, size=14 * 784), "has 14 images, but .* has 15 labels"),
        ("cifar10", CIFAR, originals("cifar10")[CIFAR][:-50], f"{CIFAR} cannot be unpacked"),
        ("cifar10", CIFAR, b"no archive", f"{CIFAR} cannot be unpacked"),
        ("cifar10", CIFAR, tarred({"../evil": b"x"}), r"unsafe member: '\.\./evil'"),
        ("cifar10", CIFAR, tarred({"/evil": b"x"}), "unsafe member: '/evil'"),
        ("cifar10", CIFAR, tarred(NAMES_ONLY), "data_batch_1.bin"),
        (
            "cifar10",
            CIFAR,
            tarred(NAMES_ONLY | BATCHES),
            r"data_batch_1.bin has 3000 bytes, which is no multiple of 3073",
        ),
        ("cifar10", CIFAR, gzipped(gzip.decompress(originals("cifar10")[CIFAR])[:2000]), f"{CIFAR} cannot be unpacked"),
    ],
    ids=lambda value: "content" if isinstance(value, bytes) else value,  # archives hold the time they were made at
)
def test_archive_that_cannot_be_used_is_named_and_leaves_nothing(name, file, content, message, tmp_path, monkeypatch):
    files = originals(name) | {file: content}
    register(monkeypatch, files)
    with pytest.raises(OSError, match=message):
        prepare.prepare(name, from_archives=write(tmp_path / "originals", files))
    assert data.prepared_directory(name) is None
    assert not list((tmp_path / "tfds").glob("**/*array_record*"))
    assert not list(tmp_path.glob("**/evil"))


def test_links_in_an_archive_are_refused(tmp_path):
    archive = tmp_path / "links.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(link)
    with pytest.raises(DamagedDataError, match="unsafe member: 'link'"):
        prepare._unpack(archive, tmp_path / "out.tar.gz")


def test_names_and_directories_that_cannot_be_prepared(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'mnist'"):
        prepare.prepare("mnits")
    with pytest.raises(ValueError, match=r"'digits' needs no preparing: .*ships with scikit-learn"):
        prepare.prepare("digits")
    (tmp_path / "tfds" / "mnist" / "3.0.1").mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"3\.0\.1 is no prepared data set .*: delete it"):
        prepare.prepare("mnist")


def test_second_process_is_refused(tmp_path, monkeypatch):
    files = originals("mnist")
    register(monkeypatch, files)
    work = tmp_path / "tfds" / ".prepare-mnist"
    work.mkdir(parents=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # only an exclusive lock is refused beside it
        with pytest.raises(RuntimeError, match="another process is preparing"):
            prepare.prepare("mnist", from_archives=write(tmp_path / "originals", files))
    prepare.prepare("mnist", from_archives=tmp_path / "originals")


@pytest.mark.parametrize("images", [0, COUNTS["train"] + 2, COUNTS["train"] + COUNTS["test"]])
def test_killed_prepare_leaves_nothing_that_looks_prepared(images, tmp_path, monkeypatch):
    """SIGKILL after so many images: before the first, in the second split, and just before the last rename."""
    files = originals("mnist")
    directory = write(tmp_path / "originals", files)
    registered = register(monkeypatch, files)
    script = f"""if True:
        import itertools, os, signal
        from pathlib import Path
        from experiments import prepare
        from experiments.downloads import Original
        prepare._registered = lambda name: {registered!r}
        png, left = prepare._png, itertools.count({images}, -1)
        def kill():
            os.kill(os.getpid(), signal.SIGKILL)
        prepare._png = lambda image: png(image) if next(left) else kill()
        Path.replace = lambda self, target: kill()
        prepare.prepare("mnist", from_archives=Path({str(directory)!r}))
        """
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, env=os.environ, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert data.prepared_directory("mnist") is None
    building = tmp_path / "tfds" / ".prepare-mnist" / "building"
    assert building.is_dir()  # it was in the middle of it
    (building / "mnist" / "3.0.1").mkdir(parents=True, exist_ok=True)
    (building / "mnist" / "3.0.1" / "left over").touch()
    with pytest.raises(data.DataNotPreparedError):
        data.load("mnist")
    prepared = prepare.prepare("mnist", from_archives=directory)
    assert not (prepared / "left over").exists()
    assert len(data.load("mnist", "train+validation").labels) == COUNTS["train"]
    assert [path.name for path in (tmp_path / "tfds").iterdir()] == ["mnist"]


def test_status(tmp_path, monkeypatch):
    files = originals("mnist")
    register(monkeypatch, files)
    directory = prepare.prepare("mnist", from_archives=write(tmp_path / "originals", files))
    lines = {line.name: line for line in prepare.status()}
    assert list(lines) == list(data.SOURCES)
    assert (lines["mnist"].prepared, lines["mnist"].where, lines["mnist"].examples) == (True, str(directory), 21)
    assert (lines["cifar10"].prepared, lines["cifar10"].where, lines["cifar10"].examples) == (False, "", 0)
    assert lines["digits"].prepared
    (directory / "dataset_info.json").write_text("{")
    damaged = prepare.status()[0]
    assert not damaged.prepared
    assert "dataset_info.json is damaged" in damaged.where


# --- Downloads -----------------------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves files from memory, as the class attributes of a test's own subclass say."""

    files: dict
    ranges = True
    break_after = None  # bytes
    requests: list

    def do_GET(self):
        content = self.files[self.path[1:]]
        asked = self.headers.get("Range")
        self.requests.append((self.path[1:], asked))
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: self.break_after])

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(files, **attributes):
        handler = type("TestHandler", (Handler,), {"files": files, "requests": [], **attributes})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}", handler

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


CONTENT = np.random.default_rng(0).bytes(1_000_000)


def original_at(address, content=CONTENT):
    return Original(f"{address}/file.gz", len(content), hashlib.sha256(content).hexdigest(), "tfds_file.gz")


def test_prepare_from_downloads(serve, tmp_path, monkeypatch):
    files = originals("fashion_mnist")
    address, handler = serve(files)
    register(monkeypatch, files, address)
    prepare.prepare("fashion_mnist")
    assert len(data.load("fashion_mnist", "train+validation").labels) == COUNTS["train"]
    assert sorted(handler.requests) == sorted((name, None) for name in files)
    assert [path.name for path in (tmp_path / "tfds").iterdir()] == ["fashion_mnist"]


def test_broken_download_is_an_error_and_the_next_run_goes_on_from_there(serve, tmp_path):
    address, handler = serve({"file.gz": CONTENT}, break_after=300_000)
    with pytest.raises(DownloadError, match=r"file\.gz stopped: (?s:.)*same command goes on.*--from-archives"):
        download(original_at(address), tmp_path)
    assert (tmp_path / "file.gz.part").read_bytes() == CONTENT[:300_000]
    handler.break_after = None
    assert download(original_at(address), tmp_path).read_bytes() == CONTENT
    assert handler.requests == [("file.gz", None), ("file.gz", "bytes=300000-")]
    download(original_at(address), tmp_path)  # complete: asks the server nothing
    assert len(handler.requests) == 2


@pytest.mark.parametrize("ranges", [True, False])
def test_part_file_is_gone_on_with_or_started_again(serve, tmp_path, ranges):
    address, handler = serve({"file.gz": CONTENT}, ranges=ranges)
    (tmp_path / "file.gz.part").write_bytes(CONTENT[:123_456])
    assert download(original_at(address), tmp_path).read_bytes() == CONTENT
    assert handler.requests == [("file.gz", "bytes=123456-")]


def test_part_file_that_is_too_long_is_started_again(serve, tmp_path):
    address, handler = serve({"file.gz": CONTENT})
    (tmp_path / "file.gz.part").write_bytes(CONTENT + b"more")
    assert download(original_at(address), tmp_path).read_bytes() == CONTENT
    assert handler.requests == [("file.gz", None)]


@pytest.mark.parametrize("served", [CONTENT[:-1] + b"?", CONTENT + b"more"])
def test_wrong_content_is_named_and_thrown_away(serve, tmp_path, served):
    address, _ = serve({"file.gz": served})
    original = original_at(address, CONTENT[:-1] + b"!" if len(served) == len(CONTENT) else CONTENT)
    with pytest.raises(DamagedDataError, match=f"(?s)is not the original from {original.url}.*{original.sha256}"):
        download(original, tmp_path)
    assert not list(tmp_path.iterdir())


def test_server_that_is_down_is_a_download_error(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(DownloadError, match="by hand"):
        download(original_at(address), tmp_path)
