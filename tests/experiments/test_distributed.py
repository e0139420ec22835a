"""Two real processes, joined by jax.distributed over localhost, train, save and stop as one process does."""

import json
import signal
import socket

import numpy as np
import pytest
from processes import HERE, Command
from test_interruptions import LINEAR, arrays_of, lines_in, wait_until

from experiments.logs import read_lines
from experiments.runs import claimed

pytestmark = pytest.mark.slow


@pytest.fixture
def start_two(start):
    """start_two(...) starts the command as two processes of one job, process 0 first."""

    def begin(*arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job = ("--coordinator-address", f"127.0.0.1:{port}", "--num-processes", "2")
        return [start(*arguments, *job, "--process-id", str(index)) for index in range(2)]

    return begin


def weights_of(directory):
    return json.loads((directory / "result.json").read_text())["metrics"]["weights"]


def history_of(directory):
    """Checksum of the order in which the examples were seen, at the newest checkpoint."""
    arrays = arrays_of(directory)
    return arrays[max(arrays)]["['history']"]


@pytest.fixture(scope="module", params=["device", "host"])
def one(request, environment, tmp_path_factory):
    """The options of a run, and the folder of it made by one process."""
    options = (*LINEAR, "--host-data") if request.param == "host" else LINEAR
    runs_dir = tmp_path_factory.mktemp("one")
    code, said = Command([HERE / "linear_study.py", *options, "--runs-dir", runs_dir], environment).finish()
    assert code == 0, said
    return options, runs_dir / "linear" / "tiny-0"


def assert_trained_alike(directory, other):
    assert history_of(directory) == history_of(other)
    np.testing.assert_allclose(weights_of(directory), weights_of(other), rtol=1e-5)
    lines = [read_lines(folder / "metrics.jsonl") for folder in (directory, other)]
    assert [line.keys() for line in lines[0]] == [line.keys() for line in lines[1]]
    for ours, theirs in zip(*lines, strict=True):
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-4)


def test_two_processes_train_as_one(one, start_two, tmp_path):
    options, directory = one
    both = [process.finish() for process in start_two(*options, "--runs-dir", tmp_path)]
    assert [code for code, _ in both] == [0, 0], both
    assert_trained_alike(tmp_path / "linear" / "tiny-0", directory)
    result = json.loads((tmp_path / "linear" / "tiny-0" / "result.json").read_text())
    assert "2 processes" in result["provenance"]["device"]
    assert "coordinator" not in result["command"]
    assert "result:" in both[0][1]
    assert "result:" not in both[1][1]


@pytest.mark.parametrize("first_by", [1, 2])
def test_a_checkpoint_of_one_or_two_processes_goes_on_in_two_or_one(one, start, start_two, tmp_path, first_by):
    options, directory = one
    if options != LINEAR:
        pytest.skip("once is enough")
    asked, stopped = (*options, "--runs-dir", tmp_path), tmp_path / "linear" / "tiny-0"
    processes = [start(*asked)] if first_by == 1 else start_two(*asked)
    assert wait_until(lambda: (stopped / "checkpoints" / "10").exists(), processes[0])
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.finish()
    saved = arrays_of(stopped)
    assert 10 <= max(saved) <= 40
    processes = start_two(*asked) if first_by == 1 else [start(*asked)]
    both = [process.finish() for process in processes]
    assert {code for code, _ in both} == {0}, both
    assert "resuming at step" in both[0][1]
    assert_trained_alike(stopped, directory)


@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_to_one_of_two_stops_both_with_their_state_saved(start_two, tmp_path, told):
    asked = (*LINEAR, "--runs-dir", tmp_path, "--steps", "20000")
    directory = tmp_path / "linear" / "tiny-0"
    processes = start_two(*asked)
    assert wait_until(lambda: lines_in(directory) >= 3, processes[0])
    processes[told].send_signal(signal.SIGTERM)
    both = [process.finish() for process in processes]
    assert [code for code, _ in both] == [143, 143], both
    assert "all saved. To go on:" in both[0][1]
    (stopped,) = [int(word) for word in both[0][1].split("stopped at step ")[1].split()[:1]]
    assert max(arrays_of(directory)) == stopped


def test_a_refusal_ends_both(start_two, tmp_path):
    with claimed(tmp_path / "linear" / "tiny-0"):  # which the first process alone asks for
        both = [process.finish() for process in start_two(*LINEAR, "--runs-dir", tmp_path)]
    assert [code for code, _ in both] == [1, 1], both
    assert "is in use by another process" in both[0][1]
    assert "the first process was refused" in both[1][1]


def test_half_of_the_options_for_joining_is_refused(start, tmp_path):
    code, said = start(*LINEAR, "--runs-dir", tmp_path, "--num-processes", "2").finish()
    assert code == 1
    assert "--coordinator-address, --num-processes and --process-id go together" in said
    assert "Traceback" not in said
