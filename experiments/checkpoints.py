"""Checkpoints of a training run: asynchronous, checksummed, the newest few and the best one kept."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

PyTree = Any


class CheckpointError(OSError):
    """Checkpoints cannot be written or read; the message names the directory and what to do."""


class Checkpoints:
    """Checkpoints in one directory, written by Orbax in the background.

    Each carries a digest of every array. Orbax alone loads a flipped bit silently; here it is found, said, and the
    checkpoint before it is used. A save that was killed leaves a temporary folder which is ignored and cleaned up.

    Args:
      directory: of the checkpoints; made if missing.
      keep: how many of the newest are kept.
      best_metric: name of the metric whose largest value marks the best checkpoint, kept besides; None keeps none.
      warn: called with a line of text for each damaged checkpoint.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 3,
        best_metric: str | None = None,
        warn: Callable[[str], None] = lambda message: None,
    ):
        self.directory = Path(directory).resolve()
        self._best_metric, self._warn = best_metric, warn
        policies = ocp.training.preservation_policies
        policy: Any = policies.LatestN(keep)
        if best_metric is not None:
            best = policies.BestN(
                get_metric_fn=lambda metrics: metrics[best_metric], n=1, keep_checkpoints_without_metrics=False
            )
            policy = policies.AnyPreservationPolicy([policy, best])
        self._orbax = ocp.training.Checkpointer(
            self.directory, preservation_policy=policy, cleanup_tmp_directories=True
        )

    def save(
        self, step: int, state: PyTree, *, metrics: dict[str, float] | None = None, extra: dict[str, Any] | None = None
    ) -> None:
        """Starts saving; returns once the arrays are copied. An error of the save before it is raised here.

        Args:
          step: number of steps made.
          state: pytree of arrays.
          metrics: of this state; needed for it to become the best.
          extra: anything JSON can hold, returned by `restore`.

        Raises:
          CheckpointError: the disk is full or the directory not writable. Earlier checkpoints are unharmed.
        """
        record = {"digests": digests(state), "extra": extra or {}}
        self._guarded(lambda: self._orbax.save_async(step, state, force=True, metrics=metrics, custom_metadata=record))

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          CheckpointError: as `save`.
        """
        self._guarded(self._orbax.wait)

    def close(self) -> None:
        """Waits for the last save and frees the threads.

        Raises:
          CheckpointError: as `save`.
        """
        self._guarded(self._orbax.close)

    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk, oldest first."""
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    def restore(self, like: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """Returns step, state and extra of the newest undamaged checkpoint, or None where there is none at all.

        Damaged ones are reported and moved to `damaged/` beside the others.

        Args:
          like: pytree of arrays with the shapes, dtypes and shardings to load into.

        Raises:
          CheckpointError: there are checkpoints, but every one is damaged.
        """
        found = self.steps()
        for step in reversed(found):
            try:
                state, extra = self._load(step, like)
            except Exception as error:  # Orbax raises whatever its storage layer does
                problem = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            else:
                problem = None
            if not _any_process(problem is not None):
                return step, state, extra
            self._set_aside(step, problem or "damaged as another process reads it")
        if found:
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged (steps {found}; moved to {self.directory}/damaged). "
                "Run again to start from the beginning, or put back a good copy."
            )
        return None

    def best(self, like: PyTree) -> tuple[int, PyTree]:
        """Returns step and state of the best checkpoint by `best_metric`.

        Raises:
          CheckpointError: there is none, or it is damaged.
        """
        rated = [c for c in self._orbax.checkpoints if c.metrics and self._best_metric in c.metrics]
        if not rated:
            raise CheckpointError(f"no checkpoint in {self.directory} has the metric {self._best_metric!r}")
        step = max(rated, key=lambda checkpoint: checkpoint.metrics[self._best_metric]).step
        return step, self._load(step, like)[0]

    def _load(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        record = self._orbax.metadata(step).custom_metadata
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        state = self._orbax.load(step, abstract)
        now = digests(state)
        changed = [name for name, digest in record["digests"].items() if now.get(name) != digest]
        if changed or len(now) != len(record["digests"]):
            raise ValueError(f"checksum of {', '.join(changed) or 'the tree'} does not match")
        return state, record["extra"]

    def _set_aside(self, step: int, problem: str) -> None:
        self._warn(f"checkpoint {step} in {self.directory} is damaged ({problem}); using the one before it")
        if jax.process_index() == 0:
            aside = self.directory / "damaged" / str(step)
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"damaged checkpoint {step} set aside")
        self._orbax.reload()

    def _guarded(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            free = shutil.disk_usage(self.directory).free if self.directory.exists() else 0
            reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
            raise CheckpointError(
                f"could not write a checkpoint to {self.directory} ({free / 1e6:.1f} MB free): {reason}. "
                f"Earlier checkpoints are unharmed (steps {self.steps()}); make room and run the same command again."
            ) from error


def digests(state: PyTree) -> dict[str, str]:
    """Digest of every array of a pytree by its path; covers values, dtype and shape."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        # Replicated over processes as well: every process reads its own copy.
        array = np.asarray(leaf if leaf.is_fully_addressable else leaf.addressable_data(0))
        digest = hashlib.blake2b(f"{array.dtype.name}{array.shape}".encode(), digest_size=16)
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        found[jax.tree_util.keystr(path)] = digest.hexdigest()
    return found


def _any_process(condition: bool) -> bool:
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.process_allgather(np.array(condition)).any())
