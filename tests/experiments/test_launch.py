"""The launch templates, run for real against stand-ins for Slurm's and Google's commands."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "experiments" / "launch"

# Writes what it was called with; saves on SIGTERM and ends with 128 + SIGTERM. Gives up after 20 s.
FAKE_PYTHON = """#!/usr/bin/env bash
trap 'echo saved > saved; exit 143' TERM
echo "$@" > called
if [[ $* == *fails* ]]; then exit 3; fi
if [[ $* == *finishes* ]]; then exit 0; fi
for _ in $(seq 1000); do sleep 0.02; done
"""
FAKE_SLURM = {
    "srun": 'echo "$$" > "$HERE/task"; echo "$1" > "$HERE/srun_flags"; shift; exec "$@"\n',
    "scancel": 'echo "$@" > "$HERE/scancel"; kill -TERM "$(cat "$HERE/task")"\n',
    "squeue": 'cat "$HERE/state"\n',
    "scontrol": 'echo "$@" > "$HERE/scontrol"\n',
}
FAKE_GCLOUD = """#!/usr/bin/env bash
echo "$@" >> "$HERE/gcloud"
cd "$HERE/home" || exit 1
for argument in "$@"; do
  if [[ $argument == --command=* ]]; then exec bash -c "${argument#--command=}"; fi
done
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def wait_for(path: Path, text: str = "") -> None:
    """Until the file is there with some content that has `text` in it."""
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text().strip() and text in path.read_text()):
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.01)


@pytest.fixture
def slurm(tmp_path):
    """A repository root with stand-ins for Slurm and Python; gives a function that starts the batch script."""
    executable(tmp_path / ".venv/bin/python", FAKE_PYTHON)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "state").write_text("RUNNING\n")
    for name, text in FAKE_SLURM.items():
        executable(tmp_path / "bin" / name, "#!/usr/bin/env bash\n" + text)

    def start(*arguments: str, **variables: str) -> subprocess.Popen:
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        own = {"HERE": str(tmp_path), "PATH": path, "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "42"}
        command = ["bash", str(LAUNCH / "slurm.sbatch"), *arguments]
        return subprocess.Popen(
            command, env=own | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return start


@pytest.mark.parametrize("name", ["slurm.sbatch", "tpu_vm.sh"])
def test_is_valid_bash(name):
    checked = subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_slurm_asks_for_requeue_and_a_signal_to_the_script():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    assert "#SBATCH --requeue" in lines
    assert any(line.startswith("#SBATCH --signal=B:TERM@") for line in lines)
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])  # Slurm would not read those


@pytest.mark.parametrize(("tasks", "expected"), [("1", ""), ("4", " --distributed auto")])
def test_slurm_runs_the_command(slurm, tmp_path, tasks, expected):
    job = slurm("functa", "finishes", "--seed", "1", SLURM_NTASKS=tasks)
    assert job.wait(10) == 0
    assert (tmp_path / "called").read_text().strip() == "-m experiments run functa finishes --seed 1" + expected
    assert (tmp_path / "srun_flags").read_text().strip() == "--wait=120"
    assert not (tmp_path / "scontrol").exists()
    job.stdout.close()


def test_slurm_time_limit_saves_and_requeues(slurm, tmp_path):
    job = slurm("functa", "mnist-c1")
    wait_for(tmp_path / "called")
    job.send_signal(signal.SIGTERM)  # to the script only, as "B:" does
    output, _ = job.communicate(timeout=10)
    assert job.returncode == 143, output
    assert (tmp_path / "scancel").read_text().split() == ["--signal=TERM", "42"]
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "scontrol").read_text().split() == ["requeue", "42"]


def test_slurm_preemption_that_signals_only_the_task_requeues(slurm, tmp_path):
    job = slurm("functa", "mnist-c1")
    wait_for(tmp_path / "called")
    os.kill(int((tmp_path / "task").read_text()), signal.SIGTERM)
    output, _ = job.communicate(timeout=10)
    assert (tmp_path / "saved").exists(), output
    assert (tmp_path / "scontrol").read_text().split() == ["requeue", "42"]


def test_slurm_cancelled_job_stays_cancelled(slurm, tmp_path):
    job = slurm("functa", "mnist-c1")
    wait_for(tmp_path / "called")
    (tmp_path / "state").write_text("COMPLETING\n")
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=10)
    assert (tmp_path / "saved").exists(), output
    assert not (tmp_path / "scontrol").exists()


def test_slurm_failed_run_is_not_requeued(slurm, tmp_path):
    job = slurm("functa", "fails")
    job.communicate(timeout=10)
    assert job.returncode == 3
    assert not (tmp_path / "scontrol").exists()


def test_slurm_says_how_to_use_it(slurm):
    job = slurm("functa")
    output, _ = job.communicate(timeout=10)
    assert job.returncode == 2
    assert "STUDY PRESET" in output


def test_tpu_runs_detached_on_all_workers_and_stops(tmp_path):
    executable(tmp_path / "bin/gcloud", FAKE_GCLOUD)
    work = tmp_path / "home/compact-jax"
    executable(work / ".venv/bin/python", FAKE_PYTHON)
    env = {"HERE": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TPU_NAME": "mine"}

    def tpu(*arguments: str) -> int:
        command = ["bash", str(LAUNCH / "tpu_vm.sh"), *arguments]
        return subprocess.run(command, env=env, timeout=10, capture_output=True).returncode

    assert tpu("run", "functa", "mnist-c1", "--name", "two words") == 0  # returns while the run goes on
    wait_for(work / "called")
    try:
        called = (work / "called").read_text().strip()
        assert called == "-m experiments run functa mnist-c1 --name two words --distributed auto --runs-dir runs"
        assert tpu("run", "functa", "mnist-c1") == 1  # already running
    finally:
        assert tpu("stop") == 0
    wait_for(work / "saved")
    calls = (tmp_path / "gcloud").read_text()
    assert "compute tpus tpu-vm ssh mine --worker=all" in calls
    assert tpu() == 2
    assert tpu("run", "functa") == 2


def test_tpu_commands_name_the_machine(tmp_path):
    executable(tmp_path / "bin/gcloud", '#!/usr/bin/env bash\necho "$@" >> "$HERE/gcloud"\n')
    env = {"HERE": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TPU_SPOT": "yes"}
    for verb in ("create", "fetch", "delete", "log"):
        subprocess.run(["bash", LAUNCH / "tpu_vm.sh", verb], env=env, timeout=10, check=True)
    create, fetch, delete, log = (tmp_path / "gcloud").read_text().splitlines()
    assert create.startswith("compute tpus tpu-vm create compact-jax --accelerator-type=v5litepod-8 --version=")
    assert "--spot" in create
    assert fetch == "compute tpus tpu-vm scp compact-jax:compact-jax/runs . --worker=0 --recurse --zone=us-west4-a"
    assert delete == "compute tpus tpu-vm delete compact-jax --zone=us-west4-a"
    assert "--worker=0" in log
