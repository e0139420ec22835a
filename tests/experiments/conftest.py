"""Running the command line as other people do: in processes of its own."""

import os

import pytest
from processes import HERE, ROOT, Command


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Of the processes: this source tree, one CPU device, warnings are errors, one cache of compiled programs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "TFDS_"))}
    cache = tmp_path_factory.mktemp("cache")
    path = os.pathsep.join([str(ROOT), str(HERE)])
    return {
        **kept,
        "PYTHONPATH": path,
        "COMPACT_JAX_CACHE": str(cache),
        "JAX_PLATFORMS": "cpu",
        "COLUMNS": "200",
        "PYTHONUNBUFFERED": "1",
    }


@pytest.fixture
def start(environment):
    """start("run", ...) is `python -m experiments run ...` in the background, with the study "linear" besides."""
    started = []

    def begin(*arguments, **env):
        command = Command([HERE / "linear_study.py", *arguments], {**environment, **env})
        started.append(command)
        return command

    yield begin
    for command in started:
        if command.poll() is None:
            command.send_signal(9)
            command.finish()


@pytest.fixture
def execute(start):
    """As `start`, waiting for exit code and output."""
    return lambda *arguments, **env: start(*arguments, **env).finish()
