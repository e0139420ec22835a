"""What a run says: lines that survive crashes and full disks, event files, progress without a terminal."""

import errno
import io
import json
import os
import struct

import numpy as np
import pytest
import rich.console

from experiments import logs
from experiments.files import write_atomically
from experiments.logs import Log, Progress, curve, read_images, read_lines


def test_lines_and_images_come_back(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3)).astype(np.uint8)
    log = Log(tmp_path, 0)
    log.scalars(5, {"loss": 1 / 3, "psnr": np.float32(0.1)})
    log.scalars(10, {"loss": 0.25})
    log.images(10, "colour", images)
    log.images(10, "grey", images[..., :1])
    log.images(20, "colour", images[::-1])
    log.close()
    records = read_lines(tmp_path / "metrics.jsonl")
    assert records == [{"step": 5, "loss": 1 / 3, "psnr": float(np.float32(0.1))}, {"step": 10, "loss": 0.25}]
    assert curve(records, "loss") == ([5, 10], [1 / 3, 0.25])
    assert curve(records, "psnr")[0] == [5]
    found = read_images(tmp_path / "images.jsonl", "colour")
    assert sorted(found) == [10, 20]
    np.testing.assert_array_equal(found[10], images)
    np.testing.assert_array_equal(found[20], images[::-1])
    np.testing.assert_array_equal(read_images(tmp_path / "images.jsonl", "grey")[10], images[..., :1])


def test_resuming_drops_later_lines_and_the_torn_one_and_keeps_the_rest_byte_for_byte(tmp_path):
    log = Log(tmp_path, 0)
    for step in (5, 10, 15):
        log.scalars(step, {"loss": step / 7, "rate": 1e-30, "large": 12345678901234567.0})
        log.images(step, "x", np.zeros((1, 2, 2, 1), np.uint8))
    log.close()
    paths = [tmp_path / "metrics.jsonl", tmp_path / "images.jsonl"]
    kept = ["".join(path.read_text().splitlines(keepends=True)[:2]) for path in paths]
    for path in paths:
        path.write_text(path.read_text()[:-7])  # a kill tore the last line
    Log(tmp_path, 10).close()
    assert [path.read_text() for path in paths] == kept
    Log(tmp_path, 0).close()
    assert [path.read_text() for path in paths] == ["", ""]


def test_damage_before_the_end_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not JSON"):
        read_lines(path)


def test_a_process_that_is_not_the_first_writes_nothing(tmp_path):
    log = Log(tmp_path, 0, tensorboard=True, enabled=False)
    log.scalars(1, {"loss": 1.0})
    log.images(1, "x", np.zeros((1, 2, 2, 1), np.uint8))
    log.close()
    assert list(tmp_path.iterdir()) == []


def records_of(path):
    """The payloads of a TFRecord file: length, its checksum, payload, its checksum."""
    content, at = path.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield content[at + 12 : at + 12 + length]
        at += 16 + length


def test_tensorboard_files_hold_scalars_and_images(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    log = Log(tmp_path, 20, tensorboard=True)
    log.scalars(25, {"loss": 0.5})
    log.images(25, "weights", np.zeros((1, 2, 2, 1), np.uint8))
    log.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    events = [Event.FromString(record) for record in records_of(path)]
    values = {value.tag: (event.step, value) for event in events for value in event.summary.value}
    assert values["loss"][0] == 25
    assert values["loss"][1].simple_value == 0.5
    (image,) = (value.image for tag, (_, value) in values.items() if tag.startswith("weights"))
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert [event.step for event in events if event.HasField("session_log")] == [
        21
    ]  # TensorBoard drops these and later


def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_atomically(path, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*result.json'"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")  # noqa: PTH110
def test_a_full_disk_under_a_log_line_is_named(tmp_path):
    log = Log(tmp_path, 0)
    log._files["metrics"].close()
    log._files["metrics"] = open("/dev/full", "w")  # noqa: PTH123, SIM115
    for action in (lambda: log.scalars(1, {"loss": 1.0}), log.close):
        with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'"):
            action()
    log._files["images"].close()


def test_atomic_writing_keeps_text_and_bytes(tmp_path):
    write_atomically(tmp_path / "new" / "a", "x é\n")
    write_atomically(tmp_path / "new" / "b", b"\x00\xff")
    assert (tmp_path / "new" / "a").read_bytes() == "x é\n".encode()
    assert (tmp_path / "new" / "b").read_bytes() == b"\x00\xff"


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves: `clock[0] += seconds`."""
    now = [1000.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    return now


def test_progress_without_a_terminal_is_a_line_now_and_then(clock):
    console = rich.console.Console(file=io.StringIO(), width=40)
    with Progress(console, 1000, 100, "functa tiny") as progress:
        clock[0] += 50  # compiling
        progress.start_clock(100)
        for step in range(110, 210, 10):
            clock[0] += 5
            progress.update(step, {"loss": 0.12345678, "psnr[x]": 20.0})
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "functa tiny 110/1000  2 steps/s  7:25 left  loss 0.1235 psnr[x] 20"
    assert [line.split()[2] for line in lines] == ["110/1000", "160/1000"]  # more than 20 s apart
    assert lines[1].startswith("functa tiny 160/1000  2 steps/s  7:00 left")


def test_progress_on_a_terminal_shows_speed_time_left_and_metrics(clock):
    console = rich.console.Console(file=io.StringIO(), width=120, force_terminal=True)
    with Progress(console, 20000, 0, "functa tiny") as progress:
        progress.start_clock(0)
        clock[0] += 10
        progress.update(10, {"psnr": 23.1})
    text = console.file.getvalue()
    for part in ("compiling", "10/20000", "1 steps/s", "5:33:10 left", "psnr 23.1"):
        assert part in text


def test_lines_are_json_also_for_readers_in_other_languages(tmp_path):
    log = Log(tmp_path, 0)
    log.scalars(np.int64(3), {"accuracy": np.float64(0.5)})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 3, "accuracy": 0.5}
