"""Run folders: one process at a time, one config each, results with provenance, and the report made of them."""

import dataclasses
import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
import rich.console

from experiments import execute, runs
from experiments.config import Options
from experiments.runs import Run, RunError


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    hidden: tuple[int, ...] = (3, 4)
    folder: Path = Path("a")


TABLE = {"title": "t", "columns": ["quantity", "value"], "rows": [["psnr", 1.5]]}
CONTENT = {"metrics": {"psnr": 1.5}, "table": TABLE, "comparisons": [], "figures": ["a.png"]}


def run_in(directory, *arguments):
    return Run("functa", "tiny", directory, Options(), rich.console.Console(quiet=True), arguments)


def finished(runs_dir, name="tiny-0", started="2026-01-01T00:00:00+00:00", content=CONTENT, seed=0):
    """A folder with a result and its figures."""
    directory = runs_dir / "functa" / name
    started = datetime.fromisoformat(started)
    result = runs.write_result(run_in(directory, "run", "functa", "tiny"), Config(seed), started, content)
    for figure in result["figures"]:
        (directory / figure).write_bytes(f"figure of {directory}".encode())
    return directory


def test_a_folder_is_held_by_one_and_free_afterwards(tmp_path):
    with runs.claimed(tmp_path / "r"):
        with (
            pytest.raises(RunError, match=r"in use by another process \(process \d+ on .*--run-name"),
            runs.claimed(tmp_path / "r"),
        ):
            pass
        with runs.claimed(tmp_path / "other"):
            pass
    with runs.claimed(tmp_path / "r"):
        pass


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "a b", ""])
def test_run_names(tmp_path, name):
    if name:
        with pytest.raises(RunError, match="plain folder name"):
            runs.directory_of("functa", "tiny", 3, Options(runs_dir=tmp_path, run_name=name))
    else:
        assert runs.directory_of("functa", "tiny", 3, Options(runs_dir=tmp_path)) == tmp_path / "functa" / "tiny-3"
    named = Options(runs_dir=tmp_path, run_name="mine-2.0_a")
    assert runs.directory_of("functa", "tiny", 3, named) == tmp_path / "functa" / "mine-2.0_a"


def test_another_config_is_refused_with_the_differing_fields(tmp_path):
    runs.check_config(tmp_path, Config())
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    runs.check_config(tmp_path, Config())
    with pytest.raises(RunError) as refused:
        runs.check_config(tmp_path, Config(seed=1, hidden=()))
    text = str(refused.value)
    assert "seed: the run has 0, asked for 1" in text
    assert "hidden: the run has [3, 4], asked for []" in text
    assert "folder:" not in text.replace("another folder", "")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config.json is damaged"):
        runs.check_config(tmp_path, Config())


def test_a_run_that_got_nowhere_may_be_asked_for_differently(tmp_path):
    runs.check_config(tmp_path, Config(seed=1))
    (tmp_path / "checkpoints").mkdir()
    runs.check_config(tmp_path, Config(seed=2))
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 2


def test_result_has_provenance_and_a_portable_command(tmp_path):
    run = run_in(tmp_path, "run", "functa", "tiny", "--runs-dir", "/somewhere", "--data_dir=/else", "--seed", "0")
    result = runs.write_result(run, Config(), datetime.now(UTC), CONTENT)
    assert runs.read_result(tmp_path) == result
    assert result["command"] == "python -m experiments run functa tiny --seed 0"
    assert run.command == "python -m experiments run functa tiny --runs-dir /somewhere --data_dir=/else --seed 0"
    assert result["config"] == {"seed": 0, "hidden": [3, 4], "folder": "a"}
    origin = result["provenance"]
    assert origin["versions"].keys() >= {"python", "jax", "jaxlib", "numpy"}
    assert 0 <= origin["seconds"] < 100
    assert "x4" in origin["device"]  # the four virtual ones
    assert datetime.fromisoformat(origin["started"]).tzinfo is not None
    assert str(tmp_path) not in (tmp_path / "result.json").read_text()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here")
@pytest.mark.parametrize("kept", ["record", "row"])
def test_a_finished_part_holds_its_run_to_the_config(tmp_path, kept):
    runs.check_config(tmp_path, Config(seed=1))
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / f"{kept}.json").write_text("{}")
    with pytest.raises(RunError, match="seed"):
        runs.check_config(tmp_path, Config(seed=2))


def test_a_field_added_since_counts_as_having_had_its_default(tmp_path):
    runs.check_config(tmp_path, Config())
    (tmp_path / "result.json").write_text("{}")
    path = tmp_path / "config.json"
    old = json.loads(path.read_text())
    del old["hidden"]
    path.write_text(json.dumps(old))
    runs.check_config(tmp_path, Config())
    with pytest.raises(RunError, match="hidden"):
        runs.check_config(tmp_path, Config(hidden=(5,)))


def test_a_result_says_that_earlier_sessions_went_before_it(tmp_path):
    """Of those only that left something behind."""
    moments = [datetime(2026, 1, day, tzinfo=UTC) for day in (1, 2, 3)]
    runs.note_session(tmp_path, moments[0])
    runs.note_session(tmp_path, moments[1])
    run, content = run_in(tmp_path, "run", "functa", "tiny"), {**CONTENT, "figures": []}
    assert "sessions" not in runs.write_result(run, Config(), moments[1], content)["provenance"]
    (tmp_path / "result.json").rename(tmp_path / "record.json")
    runs.note_session(tmp_path, moments[2])
    found = runs.write_result(run, Config(), moments[2], content)["provenance"]
    assert (found["sessions"], found["started"]) == (2, "2026-01-03T00:00:00+00:00")
    assert found["first_session"]["started"] == "2026-01-02T00:00:00+00:00"


def test_the_cores_named_are_those_the_process_may_use():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert "(1 core, " in runs.describe_devices()
    finally:
        os.sched_setaffinity(0, before)


def test_result_refuses_what_the_report_could_not_use(tmp_path):
    with pytest.raises(ValueError, match="relative"):
        runs.write_result(run_in(tmp_path), Config(), datetime.now(UTC), {**CONTENT, "figures": ["/a.png"]})
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "null", '{"schema": 1}', '{"schema": 9}', '{"schema": 1, "comparisons": 3}', "\x00"]
)
def test_a_damaged_result_is_named(tmp_path, content):
    assert runs.read_result(tmp_path) is None
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(RunError, match=r"result.json is damaged .*training is not repeated"):
        runs.read_result(tmp_path)


def test_portable_command_drops_what_belongs_to_the_machine():
    arguments = (
        "run functa tiny --coordinator-address=h:1 --num-processes 2 --process-id 0 --run-name x --runs_dir a --w0 1"
    )
    expected = "python -m experiments run functa tiny --run-name x --w0 1"
    assert runs.portable_command(arguments.split()) == expected


def files_of(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_report_copies_results_and_figures_and_is_the_same_again(tmp_path):
    runs_dir, results_dir = tmp_path / "runs", tmp_path / "results"
    finished(runs_dir)
    finished(runs_dir, "tiny-1", seed=1)
    finished(runs_dir, "narrow", seed=2)  # a --run-name
    (runs_dir / "functa" / "unfinished").mkdir()
    path = execute.report(runs_dir, results_dir)
    assert path == results_dir / "README.md"
    first = files_of(results_dir)
    assert first.keys() == {"README.md"} | {
        f"functa/{run}/{name}" for run in ("tiny-0", "tiny-1", "narrow") for name in ("a.png", "result.json")
    }
    for run in ("tiny-0", "tiny-1", "narrow"):
        assert first[f"functa/{run}/a.png"] == (runs_dir / "functa" / run / "a.png").read_bytes()
        assert f"(functa/{run}/a.png)" in path.read_text()
    execute.report(runs_dir, results_dir)
    assert files_of(results_dir) == first
    execute.report(tmp_path / "nowhere", results_dir)  # without the runs
    assert files_of(results_dir) == first


def test_report_keeps_results_of_other_machines_until_newer_ones_come(tmp_path):
    elsewhere, here, results_dir = tmp_path / "elsewhere", tmp_path / "here", tmp_path / "results"
    finished(elsewhere, started="2026-03-01T00:00:00+00:00")
    finished(elsewhere, "only-there", seed=5)
    execute.report(elsewhere, results_dir)
    before = files_of(results_dir)
    finished(here, started="2026-02-01T00:00:00+00:00")
    execute.report(here, results_dir)
    assert files_of(results_dir) == before
    finished(here, started="2026-04-01T00:00:00+00:00")
    execute.report(here, results_dir)
    after = files_of(results_dir)
    assert {name for name in before if before[name] != after[name]} == {
        "README.md", "functa/tiny-0/a.png", "functa/tiny-0/result.json",
    }  # fmt: skip


def test_report_of_nothing_or_of_damage_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="run a study first"):
        execute.report(tmp_path / "runs", tmp_path / "results")
    directory = finished(tmp_path / "runs")
    (directory / "a.png").unlink()
    with pytest.raises(RunError, match=r"tiny-0 lacks a.png"):
        execute.report(tmp_path / "runs", tmp_path / "results")
    (directory / "result.json").write_text("{")
    with pytest.raises(RunError, match=r"tiny-0/result.json is damaged"):
        execute.report(tmp_path / "runs", tmp_path / "results")
    assert not (tmp_path / "results" / "README.md").exists()


def test_a_finished_run_is_found_and_a_missing_one_comes_with_its_command(tmp_path):
    options = Options(runs_dir=tmp_path)
    directory = finished(tmp_path, "digits-0")
    assert runs.finished_run(options, "functa", "digits-0") == (directory, runs.read_result(directory))
    finished(tmp_path, "mnist-large-0")
    (tmp_path / "functa" / "mnist-small-3").mkdir()  # begun only
    for name, command in {
        "mnist-small-3": "run functa mnist-small --seed 3",
        "digits-1": "run functa digits --seed 1",
        "mine": "run functa PRESET --run-name mine",
        "../functa/digits-0": "run functa PRESET --run-name ../functa/digits-0",
    }.items():
        with pytest.raises(RunError) as refused:
            runs.finished_run(options, "functa", name)
        assert str(refused.value).endswith(f"First run: python -m experiments {command} --runs-dir {tmp_path}")
    with pytest.raises(RunError, match=r"finished there: mnist-large-0\)"):
        runs.finished_run(options, "functa", "mnist-larg-0")
    with pytest.raises(RunError, match=r"no run of functa is finished there\). First run: .*functa digits --runs"):
        runs.finished_run(Options(runs_dir=tmp_path / "empty"), "functa", "digits-0")


def test_a_config_comes_back_from_json(tmp_path):
    config = Config(hidden=(5,), folder="b")
    assert runs.from_json(Config, runs.as_json(config), tmp_path) == config
    assert runs.from_json(Config, {"seed": 2}, tmp_path) == Config(seed=2)
    with pytest.raises(RunError, match="another version of this program: unknown depth"):
        runs.from_json(Config, {"depth": 2}, tmp_path)
