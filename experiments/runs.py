"""One run: its folder, claimed by one process at a time, and its result with provenance."""

import contextlib
import dataclasses
import difflib
import fcntl
import functools
import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import rich.console
from jax.experimental import multihost_utils

from experiments.config import ConfigT, Options, differences
from experiments.config import study as study_module
from experiments.files import naming, write_atomically
from experiments.tables import SCHEMA, check_result, counted

_FOLDER_NAME = r"[\w+-][\w.+-]*"
_PROGRAM = ("python", "-m", "experiments")
_OF_THIS_MACHINE = ("--runs-dir", "--data-dir", "--coordinator-address", "--num-processes", "--process-id")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class RunError(RuntimeError):
    """The run folder cannot be used as asked; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a study is given to work with.

    Attributes:
      study: name.
      preset: name.
      directory: the run's folder.
      options: where and how to run.
      console: for the person watching; silent on all but the first process.
      arguments: of the command line.
    """

    study: str
    preset: str
    directory: Path
    options: Options
    console: rich.console.Console
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command that resumes the run."""
        return shlex.join([*_PROGRAM, *self.arguments])

    @property
    def first_process(self) -> bool:
        """Whether this process writes the files."""
        return jax.process_index() == 0


def directory_of(study: str, preset: str, seed: int, options: Options) -> Path:
    """Folder of a run: RUNS_DIR/STUDY/PRESET-SEED, or RUNS_DIR/STUDY/RUN_NAME.

    Raises:
      RunError: a run name that is not a plain folder name.
    """
    name = options.run_name or f"{preset}-{seed}"
    if not re.fullmatch(_FOLDER_NAME, name):
        raise RunError(f"run name {name!r} must be a plain folder name: letters, digits, '.', '_', '+', '-'")
    return options.runs_dir / study / name


@contextlib.contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Holds the run folder, the first process of a job for all; the hold ends with the process, however it ends.

    Raises:
      RunError: another process, or job, holds it.
    """
    with contextlib.ExitStack() as stack:
        refusal = ""
        if jax.process_index() == 0:
            try:
                stack.enter_context(_locked(directory))
            except RunError as error:
                refusal = str(error)
        if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.array(bool(refusal))):
            refusal = refusal or f"the first process was refused {directory}"
        if refusal:
            raise RunError(refusal)
        yield


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise RunError(
                f"{directory} is in use by another process ({holder}): wait for it to end, or give this run another "
                "folder with --run-name"
            ) from None
        with naming(directory / "lock"):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
        yield


def check_config(directory: Path, config: Any) -> None:
    """Compares the config with that of the run in the folder, if there is one; else writes it there.

    A run of which nothing is kept, as one whose config was wrong, does not count. A field that was added to the config
    since the run was begun counts as having had its default.

    Raises:
      RunError: the folder belongs to a run with another config; shows the differing fields. Or its file is damaged.
    """
    known = {f.name: f.default for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING}
    plain = as_json(dataclasses.replace(config, **known))
    defaults = {name: plain[name] for name in known}
    check_unchanged(directory / "config.json", as_json(config), other="another config", defaults=defaults)


def begun(directory: Path) -> bool:
    """Whether a run's folder keeps anything of it: a checkpoint, a finished part or the result."""
    saved = any(path.name.isdigit() for path in directory.glob("**/checkpoints/*"))
    return saved or any(any(directory.glob(f"**/{name}.json")) for name in ("record", "row", "result"))


def check_unchanged(
    path: Path, asked: dict[str, Any], *, other: str, defaults: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """As `check_config`, for anything else that decides the result.

    Args:
      path: a JSON file in the run's folder, where it is kept.
      asked: what it is now.
      other: how the message names another one.
      defaults: of what the file may lack.

    Raises:
      RunError: the run had another one; shows the differing fields. Or its file is damaged.
    """
    directory = path.parent
    if begun(directory) and path.exists():
        lines = differences(asked, {**defaults, **_read_json(path, hint="delete it to write it anew")})
        if lines:
            raise RunError(
                f"{directory} holds a run with {other}:\n  " + "\n  ".join(lines) + "\n"
                "give this run another folder with --run-name, or delete that one"
            )
    elif jax.process_index() == 0:
        write_atomically(path, json.dumps(asked, indent=2) + "\n")


def as_json(config: Any) -> dict[str, Any]:
    """A config dataclass as what JSON makes of it (tuples become lists, paths text)."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return plain


def from_json(kind: type[ConfigT], plain: dict[str, Any], where: Path) -> ConfigT:
    """A config dataclass from what `as_json` made of it; fields that are missing take their defaults.

    Raises:
      RunError: a field that the dataclass does not have.
    """
    unknown = sorted(plain.keys() - {field.name for field in dataclasses.fields(kind)})  # type: ignore[arg-type]
    if unknown:
        raise RunError(f"{where} was made by another version of this program: unknown {', '.join(unknown)}")

    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    return kind(**{name: frozen(value) for name, value in plain.items()})


def finished_run(options: Options, study: str, name: str) -> tuple[Path, dict[str, Any]]:
    """Folder and result of a run that another run builds on.

    Args:
      options: whose `runs_dir` is searched.
      study: name of the study.
      name: of the run's folder, PRESET-SEED or the one given by --run-name.

    Raises:
      RunError: it is not there or not finished; says the command to run first, and names like it that are there.
    """
    directory = options.runs_dir / study / name
    result = read_result(directory) if re.fullmatch(_FOLDER_NAME, name) else None
    if result is not None:
        return directory, result
    finished = sorted(path.parent.name for path in (options.runs_dir / study).glob("*/result.json"))
    nearest = difflib.get_close_matches(name, finished, n=3, cutoff=0.5) or finished[:3]
    there = f"finished there: {', '.join(nearest)}" if nearest else f"no run of {study} is finished there"
    raise RunError(
        f"this needs the run {study}/{name}, which is not finished in {options.runs_dir} ({there}). "
        f"First run: {_command_of(study, name, options)}"
    )


def _command_of(study: str, name: str, options: Options) -> str:
    """The command that makes a run, as far as its folder's name tells."""
    presets = set(study_module(study).PRESETS)
    preset, _, seed = name.rpartition("-")
    if preset in presets and seed.isdigit():
        arguments = [preset, *(() if seed == "0" else ("--seed", seed))]
    else:
        arguments = ["PRESET", "--run-name", name]
    if options.runs_dir != Options.runs_dir:
        arguments += ["--runs-dir", str(options.runs_dir)]
    return shlex.join([*_PROGRAM, "run", study, *arguments])


def note_session(directory: Path, started: datetime) -> None:
    """Notes that this command begins the run, or goes on with what an earlier one has left in its folder."""
    if jax.process_index() == 0:
        path = directory / "sessions.json"
        earlier = _read_json(path, hint="delete it")["sessions"] if path.exists() and begun(directory) else []
        now = {"started": started.isoformat(timespec="seconds"), "git_commit": git_commit()[0]}
        write_atomically(path, json.dumps({"sessions": [*earlier, now]}, indent=1) + "\n")


def _earlier_sessions(directory: Path) -> dict[str, Any]:
    """For the provenance of a run that was interrupted: how many sessions it took, and when the first began."""
    path = directory / "sessions.json"
    sessions = _read_json(path, hint="delete it")["sessions"] if path.exists() else []
    return {"sessions": len(sessions), "first_session": sessions[0]} if len(sessions) > 1 else {}


def write_result(run: Run, config: Any, started: datetime, content: dict[str, Any]) -> dict[str, Any]:
    """Writes `result.json`: the study's numbers with their provenance.

    Args:
      run: the run.
      config: its config.
      started: when this command was started; the seconds are its own, and it is said if others went before it.
      content: metrics, table, comparisons, figures; `metrics["train_seconds"]`, if there, counts earlier sessions too.

    Returns:
      The whole result, as written.
    """
    seconds = (datetime.now(UTC) - started).total_seconds()
    result = {
        "schema": SCHEMA,
        "study": run.study,
        "preset": run.preset,
        "seed": config.seed,
        "command": portable_command(run.arguments),
        "config": as_json(config),
        **content,
        "provenance": provenance(started, seconds) | _earlier_sessions(run.directory),
    }
    check_result(result, str(run.directory))
    if run.first_process:
        write_atomically(run.directory / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def read_result(directory: Path) -> dict[str, Any] | None:
    """The result of a finished run, or None.

    Raises:
      RunError: the file is damaged.
    """
    path = directory / "result.json"
    if not path.exists():
        return None
    hint = "delete it and run again: training is not repeated"
    result = _read_json(path, hint)
    try:
        check_result(result, str(path))
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # whatever JSON can be
        raise RunError(f"{path} is damaged ({error}); {hint}") from error
    return result


def _read_json(path: Path, hint: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); {hint}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged (not a JSON object); {hint}")
    return content


def provenance(started: datetime, seconds: float) -> dict[str, Any]:
    """Where a number comes from: time, device, versions, commit."""
    commit, dirty = git_commit()
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}}
    return {
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "device": describe_devices(),
        "versions": versions,
        "git_commit": commit,
        "git_dirty": dirty,
    }


def describe_devices() -> str:
    """Kind and number of devices and processes, such as "cpu x1 (2 cores, AMD EPYC)"."""
    devices = jax.devices()
    text = f"{devices[0].device_kind} x{len(devices)}"
    if devices[0].platform == "cpu":
        text += f" ({_cores()}, {_processor()})"
    if jax.process_count() > 1:
        text += f", {jax.process_count()} processes"
    return text


def portable_command(arguments: Sequence[str]) -> str:
    """The command as a person would type it elsewhere: without the paths and addresses of this machine."""
    kept, skip = [], False
    for argument in arguments:
        name = argument.split("=")[0].replace("_", "-")
        if not skip and name not in _OF_THIS_MACHINE:
            kept.append(argument)
        skip = not skip and name in _OF_THIS_MACHINE and "=" not in argument
    return shlex.join([*_PROGRAM, *kept])


def _cores() -> str:
    """Number of cores this process may run on, which a batch system, or taskset, makes fewer than there are."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return counted(count, "core")


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def git_commit() -> tuple[str | None, bool]:
    """Commit of this code, and whether files differ from it, as it was when first asked: the one that is running.

    Ask before a run starts: long ones outlive the commit that is checked out.
    """

    def git(*arguments: str) -> str:
        root = Path(__file__).resolve().parent
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, False
