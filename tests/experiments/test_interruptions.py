"""Whatever ends a run, the same command goes on, and what it ends with is what a run never interrupted ends with."""

import json
import random
import shutil
import signal
import subprocess
import time

import pytest
from processes import HERE, Command

LINEAR = ("run", "linear", "tiny")


def wait_until(condition, command, timeout=240):
    """Waits for a condition of the running command; False if the command ended before."""
    end = time.monotonic() + timeout
    while command.poll() is None:
        if condition():
            return True
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)
    return False


def lines_in(directory):
    path = directory / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def logged_anew(directory, lines):
    """A condition: the log has so many lines, and is one that was opened after now."""
    path = directory / "metrics.jsonl"
    before = path.stat().st_ino if path.exists() else None
    return lambda: path.exists() and path.stat().st_ino != before and lines_in(directory) >= lines


def arrays_of(directory):
    """step -> path -> checksum of the array, of all checkpoints on disk."""
    found = {}
    for path in (directory / "checkpoints").glob("[0-9]*/_CHECKPOINT_METADATA"):
        if path.parent.name.isdigit():  # else it is being written, or was
            found[int(path.parent.name)] = json.loads(path.read_text())["custom_metadata"]["arrays"]
    return found


def assert_same_run(directory, other):
    """Bit-identical arrays in all checkpoints that are kept, the same logs, the same numbers."""
    arrays = arrays_of(directory)
    assert len(arrays) >= 3
    assert arrays == arrays_of(other)
    for name in ("metrics.jsonl", "images.jsonl"):
        assert (directory / name).read_bytes() == (other / name).read_bytes(), name
    results = [json.loads((folder / "result.json").read_text()) for folder in (directory, other)]
    for result in results:
        del result["metrics"]["train_seconds"], result["metrics"]["compile_seconds"]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["config"] == results[1]["config"]


@pytest.fixture(scope="module")
def whole(environment, tmp_path_factory):
    """Folder of runs never interrupted: linear/tiny-0."""
    runs_dir = tmp_path_factory.mktemp("whole")
    code, said = Command([HERE / "linear_study.py", *LINEAR, "--runs-dir", runs_dir], environment).finish()
    assert code == 0, said
    return runs_dir


@pytest.mark.slow
def test_functa_killed_at_random_points_ends_bit_identical(start, tmp_path):
    """kill -9 at seeded random steps, and in the middle of writing a checkpoint."""
    asked = ("run", "functa", "tiny", "--checkpoint-every", "5", "--evaluate-every", "30")
    code, said = start(*asked, "--runs-dir", tmp_path / "whole").finish()
    assert code == 0, said
    command, directory = (*asked, "--runs-dir", tmp_path / "killed"), tmp_path / "killed" / "functa" / "tiny-0"
    whole = tmp_path / "whole" / "functa" / "tiny-0"
    rng = random.Random(0)
    killed = []
    for lines in sorted(rng.sample(range(1, lines_in(whole) - 1), 2)):
        reached = logged_anew(directory, lines)
        running = start(*command)
        if wait_until(reached, running):
            time.sleep(rng.uniform(0, 0.02))
            running.send_signal(signal.SIGKILL)
        killed.append(running.finish()[0])
    saved = {path.name for path in (directory / "checkpoints").glob("[0-9]*")}
    running = start(*command)
    if wait_until(lambda: any(p.name not in saved for p in (directory / "checkpoints").glob("*tmp*")), running):
        running.send_signal(signal.SIGKILL)
    killed.append(running.finish()[0])
    assert killed.count(-signal.SIGKILL) >= 2, killed
    code, said = start(*command).finish()
    assert code == 0, said
    assert "resuming at step" in said
    assert not list((directory / "checkpoints").glob("*tmp*"))
    assert_same_run(directory, whole)


def test_killed_at_any_moment_ends_bit_identical(start, whole, tmp_path):
    """kill -9 after seeded random delays, from before the first step to after the last, until a run gets through."""
    directory = tmp_path / "linear" / "tiny-0"
    rng = random.Random(1)
    codes = []
    while 0 not in codes:
        reached = logged_anew(directory, rng.randrange(9) if len(codes) < 4 else 100)
        running = start(*LINEAR, "--runs-dir", tmp_path)
        if wait_until(reached, running):
            time.sleep(rng.uniform(0, 0.03))
            running.send_signal(signal.SIGKILL)
        code, said = running.finish()
        assert code in (0, -signal.SIGKILL), said
        codes.append(code)
        assert len(codes) < 9
    assert codes.count(-signal.SIGKILL) >= 2, codes
    assert_same_run(directory, whole / "linear" / "tiny-0")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_says_how_to_go_on_and_resumes(start, whole, tmp_path, number, code):
    asked = (*LINEAR, "--runs-dir", str(tmp_path), "--steps", "20000", "--run-name", "stopped")
    directory = tmp_path / "linear" / "stopped"
    running = start(*asked)
    assert wait_until(lambda: lines_in(directory) >= 3, running)
    running.send_signal(number)
    ended, said = running.finish()
    assert ended == code, said
    assert f"all saved. To go on: python -m experiments {' '.join(asked)}" in " ".join(said.split())
    assert "Traceback" not in said
    (stopped,) = [int(word) for word in said.split("stopped at step ")[1].split()[:1]]
    assert max(arrays_of(directory)) == stopped
    reached = logged_anew(directory, stopped // 5 + 1)
    running = start(*asked)
    assert wait_until(reached, running)
    running.send_signal(number)
    ended, said = running.finish()
    assert f"resuming at step {stopped} of 20000" in said


def test_done_is_not_done_again_and_missing_figures_are_drawn(execute, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "runs")
    directory = tmp_path / "runs" / "linear" / "tiny-0"
    (directory / "line.png").unlink()
    shutil.rmtree(directory / "checkpoints")
    result = (directory / "result.json").read_bytes()
    code, said = execute(*LINEAR, "--runs-dir", tmp_path / "runs")
    assert code == 0
    assert "already done on" in said
    assert (directory / "line.png").exists()
    assert (directory / "result.json").read_bytes() == result
    assert not (directory / "checkpoints").exists()


def test_a_damaged_result_is_named_and_costs_no_training(execute, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "runs")
    directory = tmp_path / "runs" / "linear" / "tiny-0"
    text = (directory / "result.json").read_text()
    (directory / "result.json").write_text(text[: len(text) // 2])
    code, said = execute(*LINEAR, "--runs-dir", tmp_path / "runs")
    assert code == 1
    assert "result.json is damaged" in said
    assert "Traceback" not in said
    (directory / "result.json").unlink()
    (directory / "line.png").write_text("of the damaged result")
    logs = (directory / "metrics.jsonl").read_bytes()
    code, said = execute(*LINEAR, "--runs-dir", tmp_path / "runs")
    assert code == 0, said
    assert (directory / "metrics.jsonl").read_bytes() == logs
    assert_same_run(directory, whole / "linear" / "tiny-0")
    assert (directory / "line.png").read_text() == (whole / "linear" / "tiny-0" / "line.png").read_text()


def test_a_second_process_is_refused_and_a_killed_one_holds_nothing(start, execute, tmp_path):
    asked = (*LINEAR, "--runs-dir", tmp_path, "--steps", "20000")
    running = start(*asked)
    assert wait_until(lambda: lines_in(tmp_path / "linear" / "tiny-0") >= 1, running)
    code, said = execute(*asked)
    assert code == 1
    assert "is in use by another process" in said
    assert "Traceback" not in said
    assert running.poll() is None
    running.send_signal(signal.SIGKILL)
    running.finish()
    reached = logged_anew(tmp_path / "linear" / "tiny-0", 1)
    again = start(*asked)
    assert wait_until(reached, again)


def test_another_config_is_refused_with_its_fields(execute, whole):
    code, said = execute(*LINEAR, "--runs-dir", whole, "--batch-size", "8", "--host-data")
    assert code == 1
    assert "batch_size: the run has 4, asked for 8" in said
    assert "host_data: the run has False, asked for True" in said
    assert "Traceback" not in said


def test_nan_stops_with_a_message(execute, tmp_path):
    code, said = execute(*LINEAR, "--runs-dir", tmp_path, "--nan-at", "18")
    assert code == 1
    assert "error: step 18: loss is nan; the last good checkpoint, step 10, is kept" in said
    assert "Traceback" not in said
    assert set(arrays_of(tmp_path / "linear" / "tiny-0")) == {10}
    code, said = execute(*LINEAR, "--runs-dir", tmp_path, "--nan-at", "18", COMPACT_JAX_TRACEBACK="1")
    assert code == 1
    assert "Traceback" in said


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(execute, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "runs")
    directory = tmp_path / "runs" / "linear" / "tiny-0"
    (directory / "result.json").unlink()
    largest = max((directory / "checkpoints" / "40").glob("state/**/d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 16
    largest.write_bytes(content)
    code, said = execute(*LINEAR, "--runs-dir", tmp_path / "runs")
    assert code == 0, said
    assert "checkpoint 40" in said
    assert "is damaged" in said
    assert "resuming at step 30 of 40" in said
    assert_same_run(directory, whole / "linear" / "tiny-0")


def test_full_disk_stops_clearly_and_goes_on_when_there_is_room(execute, tmp_path):
    """A real one, where a small file system can be mounted."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount; test_checkpoints.py has a full disk without it")
    try:
        # 120,000 weights that no compression makes smaller: half a megabyte a checkpoint, and 3 are kept.
        asked = (*LINEAR, "--features", "120000", "--evaluate-every", "10", "--checkpoint-every", "5")
        ballast = small / "ballast"
        ballast.write_bytes(b"x" * 2_700_000)
        code, said = execute(*asked, "--runs-dir", small)
        assert code == 1, said
        assert "Traceback" not in said
        assert "could not write a checkpoint to" in said
        assert "MB free" in said
        directory = small / "linear" / "tiny-0"
        assert arrays_of(directory)
        assert not list(directory.glob(".*partial"))
        ballast.unlink()
        code, said = execute(*asked, "--runs-dir", small)
        assert code == 0, said
        assert "resuming at step" in said
        code, said = execute(*asked, "--runs-dir", tmp_path / "whole")
        assert code == 0, said
        assert_same_run(directory, tmp_path / "whole" / "linear" / "tiny-0")
    finally:
        subprocess.run(["umount", str(small)], check=True)
