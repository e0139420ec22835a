"""Checkpoints: what is loaded is what was saved, or the damage is found, said and survived."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.checkpoints import CheckpointError, Checkpoints

# Orbax drops coroutines when an array cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def state_of(mesh, step, size=300):
    """A state on all devices; random, so that files hold its bytes and no two steps are alike."""
    rng = np.random.default_rng(step)
    host = {
        "kernel": rng.normal(size=(size, size)).astype(np.float32),
        "nested": [rng.integers(0, 100, 7), np.float32(rng.normal()), np.int32(step)],
    }
    return jax.device_put(host, NamedSharding(mesh, P()))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def open_checkpoints(tmp_path):
    """Opens checkpoints in tmp_path/"c", closing all at the end; `.said` has the warnings."""
    opened = []

    def make(directory=tmp_path / "c", **options):
        said = []
        checkpoints = Checkpoints(directory, warn=said.append, **options)
        checkpoints.said = said
        opened.append(checkpoints)
        return checkpoints

    yield make
    for checkpoints in opened:
        checkpoints.close()


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory, mesh):
    """A directory with good checkpoints 1 and 2, to be copied and damaged."""
    directory = tmp_path_factory.mktemp("saved") / "c"
    checkpoints = Checkpoints(directory, best_metric="psnr")
    for step in (1, 2):
        checkpoints.save(step, state_of(mesh, step), metrics={"psnr": -float(step)}, extra={"train_seconds": step / 3})
    checkpoints.close()
    return directory


def test_round_trip(open_checkpoints, mesh):
    checkpoints = open_checkpoints()
    assert checkpoints.restore(state_of(mesh, 0)) is None
    checkpoints.save(7, state_of(mesh, 7), extra={"train_seconds": 1 / 3})
    checkpoints.wait()
    again = open_checkpoints()
    step, state, extra = again.restore(state_of(mesh, 0))
    assert (step, extra, again.said) == (7, {"train_seconds": 1 / 3}, [])
    assert_same(state, state_of(mesh, 7))
    assert all(leaf.sharding.is_equivalent_to(NamedSharding(mesh, P()), leaf.ndim) for leaf in jax.tree.leaves(state))


def test_newest_three_and_the_best_are_kept(open_checkpoints, mesh):
    checkpoints = open_checkpoints(best_metric="psnr")
    for step, psnr in enumerate([3.0, 9.0, 4.0, 5.0, 6.0, 7.0, 8.0], start=1):
        checkpoints.save(step, state_of(mesh, step, 3), metrics={"psnr": psnr})
    checkpoints.save(8, state_of(mesh, 8, 3))  # between two evaluations
    checkpoints.wait()
    for opened in (checkpoints, open_checkpoints(best_metric="psnr")):
        assert opened.steps() == [2, 6, 7, 8]
        step, state = opened.best(state_of(mesh, 0, 3))
        assert step == 2
        assert_same(state, state_of(mesh, 2, 3))


def test_best_without_any_is_an_error(open_checkpoints, mesh):
    with pytest.raises(CheckpointError, match="psnr"):
        open_checkpoints(best_metric="psnr").best(state_of(mesh, 0))


def test_donated_steps_after_save_do_not_touch_what_is_saved(open_checkpoints, mesh):
    """Saving goes on in the background while the arrays' memory is overwritten by the next steps."""
    checkpoints = open_checkpoints(keep=10)
    state = state_of(mesh, 0, 1000)
    expected = {}

    @jax.jit
    def next_of(x):
        return x * 2 + 1 if jnp.issubdtype(x.dtype, jnp.inexact) else x + 1

    step_fn = jax.jit(lambda state: jax.tree.map(next_of, state), donate_argnums=0)
    for step in range(4):
        expected[step] = jax.tree.map(lambda x: np.array(x, copy=True), state)
        checkpoints.save(step, state)
        for _ in range(10):
            state = step_fn(state)
        jax.block_until_ready(state)
    checkpoints.wait()
    for step in range(4):
        restored, loaded, _ = open_checkpoints(keep=10).restore(state)
        assert restored == 3 - step
        assert_same(loaded, expected[restored])
        shutil.rmtree(checkpoints.directory / str(restored))


def damaged_versions(content: bytes):
    """(what, bytes) for flipped bits at the ends, in the middle and at seeded places, and for truncations."""
    rng = random.Random(len(content))
    places = {0, len(content) // 2, len(content) - 1, *(rng.randrange(len(content)) for _ in range(3))}
    for place in sorted(places):
        bit = rng.randrange(8)
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        yield f"bit {bit} of byte {place}", bytes(flipped)
    yield "empty", b""
    yield "half", content[: len(content) // 2]


def files_of(directory):
    return sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())


@pytest.mark.slow
def test_any_damage_in_any_file_is_harmless_or_found(two_saved, tmp_path, mesh, open_checkpoints):
    like = state_of(mesh, 0)
    files = files_of(two_saved / "2")
    assert len(files) >= 8
    found = set()
    for number, name in enumerate(files):
        content = (two_saved / "2" / name).read_bytes()
        for variant, (what, damaged) in enumerate([*damaged_versions(content), ("missing", None)]):
            directory = tmp_path / f"{number}-{variant}"
            shutil.copytree(two_saved, directory)
            if damaged is None:
                (directory / "2" / name).unlink()
            else:
                (directory / "2" / name).write_bytes(damaged)
            checkpoints = open_checkpoints(directory, best_metric="psnr")
            step, state, extra = checkpoints.restore(like)
            label = f"{name}: {what}"
            assert step in (1, 2), label
            assert_same(state, state_of(mesh, step))
            assert extra == {"train_seconds": step / 3}, label
            if step == 1:
                found.add(str(name))
            shutil.rmtree(directory)
    assert any("/d/" in name for name in found), "no damage of the array data was found"


def test_damaged_is_said_set_aside_and_its_step_can_be_saved_again(two_saved, tmp_path, mesh, open_checkpoints):
    shutil.copytree(two_saved, tmp_path / "c")
    data = max((tmp_path / "c" / "2").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    checkpoints = open_checkpoints()
    assert checkpoints.restore(state_of(mesh, 0))[0] == 1
    (message,) = checkpoints.said
    assert "checkpoint 2" in message
    assert str(tmp_path / "c") in message
    assert (tmp_path / "c" / "damaged" / "2").is_dir()
    assert checkpoints.steps() == [1]
    checkpoints.save(2, state_of(mesh, 2))
    checkpoints.wait()
    again = open_checkpoints()
    step, state, _ = again.restore(state_of(mesh, 0))
    assert (step, again.said) == (2, [])
    assert_same(state, state_of(mesh, 2))


def test_all_damaged_is_an_error_and_then_a_new_start(two_saved, tmp_path, mesh, open_checkpoints):
    shutil.copytree(two_saved, tmp_path / "c")
    for path in (tmp_path / "c").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])
    checkpoints = open_checkpoints()
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged .*1, 2.*damaged"):
        checkpoints.restore(state_of(mesh, 0))
    assert open_checkpoints().restore(state_of(mesh, 0)) is None


def test_a_state_of_another_shape_is_no_damage(two_saved, tmp_path, mesh, open_checkpoints):
    """A changed program must not throw good checkpoints away."""
    shutil.copytree(two_saved, tmp_path / "c")
    with pytest.raises(CheckpointError, match="kernel"):
        open_checkpoints().restore(state_of(mesh, 0, size=299))
    assert open_checkpoints().steps() == [1, 2]


def test_what_a_killed_save_left_is_ignored_and_cleaned_up(two_saved, tmp_path, mesh, open_checkpoints):
    shutil.copytree(two_saved, tmp_path / "c")
    left = tmp_path / "c" / "3.orbax-checkpoint-tmp"
    shutil.copytree(two_saved / "2", left)
    checkpoints = open_checkpoints()
    assert checkpoints.restore(state_of(mesh, 0))[0] == 2
    assert not left.exists()


def test_full_disk_leaves_earlier_checkpoints_good(tmp_path):
    """With a small tmpfs where it can be mounted, else with a limit on the size of files."""
    script = tmp_path / "fill.py"
    script.write_text(_FILL)
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], capture_output=True, check=False
    )
    try:
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(script), str(small), "limit" if mounted.returncode else "tmpfs"]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", str(small)], check=True)
    assert done.returncode == 0, done.stderr
    assert "fine" in done.stdout


_FILL = """
import resource, shutil, signal, sys
from pathlib import Path
import jax, numpy as np
from experiments.checkpoints import CheckpointError, Checkpoints

ROOT = Path(__file__).resolve().parents[2]

directory, kind = Path(sys.argv[1]), sys.argv[2]
rng = np.random.default_rng(0)
small = {"w": jax.numpy.asarray(rng.normal(size=1000).astype(np.float32))}
large = {"w": jax.numpy.asarray(rng.normal(size=1_000_000).astype(np.float32))}
checkpoints = Checkpoints(directory / "c")
checkpoints.save(1, small)
checkpoints.wait()
if kind == "limit":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
message = ""
try:
    checkpoints.save(2, large)
    checkpoints.wait()
except CheckpointError as error:
    message = str(error)
assert str(directory) in message and "MB free" in message and "[1]" in message, message
print(message)
try:
    checkpoints.close()
except CheckpointError:
    pass
again = Checkpoints(directory / "c")  # there is room for a small one
step, state, _ = again.restore(small)
assert step == 1 and (np.asarray(state["w"]) == np.asarray(small["w"])).all()
again.save(2, small)
again.wait()
assert again.steps() == [1, 2]
again.close()
print("fine")
"""
