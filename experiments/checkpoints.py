"""Checkpoints of a training run: asynchronous, checksummed, the newest few and the best one kept."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
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
        self._ratings: dict[int, float] = {}  # step -> best_metric
        self._orbax = ocp.training.Checkpointer(
            self.directory, preservation_policy=_NewestAndBest(keep, self._ratings), cleanup_tmp_directories=True
        )
        for step in self.steps():
            with contextlib.suppress(Exception):  # damaged; found again, and said, when it is loaded
                self._rate(step, self._record(step)["metrics"])

    def save(
        self, step: int, state: PyTree, *, metrics: dict[str, float] | None = None, extra: dict[str, Any] | None = None
    ) -> None:
        """Starts saving; returns once the arrays are copied. An error of the save before it is raised here.

        Args:
          step: number of steps made.
          state: pytree of arrays.
          metrics: of this state; without `best_metric` among them it cannot become the best.
          extra: anything JSON can hold, returned by `restore`.

        Raises:
          CheckpointError: the disk is full or the directory not writable. Earlier checkpoints are unharmed.
        """
        record: dict[str, Any] = {"arrays": digests(state), "metrics": metrics or {}, "extra": extra or {}}
        record["digest"] = _digest_of_json(record)
        self._rate(step, record["metrics"])
        self._guarded(lambda: self._orbax.save_async(step, state, force=True, custom_metadata=record))

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
          CheckpointError: there are checkpoints, but every one is damaged; or they are of other arrays than `like`.
        """
        found = self.steps()
        for step in reversed(found):
            problem = ""
            try:
                state, extra = self._load(step, like)
            except _OtherArrays as error:  # the program has changed; the checkpoint is good
                raise CheckpointError(f"checkpoint {step} in {self.directory} does not fit: {error}") from None
            except Exception as error:  # Orbax raises whatever its storage layer does
                problem = _first_line(error)
            if not _any_process(bool(problem)):
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
        step = _best(self._ratings, self.steps())
        if step is None:
            raise CheckpointError(f"no checkpoint in {self.directory} has the metric {self._best_metric!r}")
        return step, self.load(step, like)

    def load(self, step: int, like: PyTree) -> PyTree:
        """Returns the state of the checkpoint at `step`, and never another one.

        Raises:
          CheckpointError: it is not there, is damaged, or is of other arrays than `like`.
        """
        if step not in self.steps():
            raise CheckpointError(f"there is no checkpoint {step} in {self.directory}, only {self.steps()}")
        try:
            return self._load(step, like)[0]
        except _OtherArrays as error:
            raise CheckpointError(f"checkpoint {step} in {self.directory} does not fit: {error}") from None
        except Exception as error:  # Orbax raises whatever its storage layer does
            raise CheckpointError(f"checkpoint {step} in {self.directory} is damaged: {_first_line(error)}") from error

    def _rate(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._best_metric is not None and self._best_metric in metrics:
            self._ratings[step] = metrics[self._best_metric]

    def _record(self, step: int) -> dict[str, Any]:
        record = dict(self._orbax.metadata(step).custom_metadata or {})
        if record.pop("digest", None) != _digest_of_json(record):
            raise ValueError("checksum of the metadata does not match")
        return record

    def _load(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        record = self._record(step)
        saved = record["arrays"]
        other = _changed({name: text.rpartition(" ")[0] for name, text in saved.items()}, _forms(like))
        if other:
            raise _OtherArrays("it has not the arrays that this program trains; they differ in " + ", ".join(other))
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        state = self._orbax.load(step, abstract)
        damaged = _changed(saved, digests(state))
        if damaged:
            raise ValueError(f"checksum of {', '.join(damaged)} does not match")
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
            raise CheckpointError(
                f"could not write a checkpoint to {self.directory} ({free / 1e6:.1f} MB free): {_first_line(error)}. "
                f"Earlier checkpoints are unharmed (steps {self.steps()}); make room and run the same command again."
            ) from error


class _OtherArrays(Exception):
    """A good checkpoint of arrays with other names, dtypes or shapes."""


@dataclasses.dataclass(frozen=True)
class _NewestAndBest(ocp.training.preservation_policies.PreservationPolicy):
    """Which checkpoints stay. Orbax has such a policy, but cannot be opened when the file of its metrics is damaged."""

    keep: int
    ratings: Mapping[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        kept = {*steps[-self.keep :], _best(self.ratings, steps)}
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _best(ratings: Mapping[int, float], steps: Sequence[int]) -> int | None:
    return max((step for step in steps if step in ratings), key=lambda step: ratings[step], default=None)


def digests(state: PyTree) -> dict[str, str]:
    """Returns "dtype(shape) digest" of every array of a pytree, by its path."""
    forms, found = _forms(state), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        # Replicated over processes as well: every process reads its own copy.
        array = np.asarray(leaf if leaf.is_fully_addressable else leaf.addressable_data(0))
        digest = hashlib.blake2b(np.ascontiguousarray(array).view(np.uint8).data, digest_size=16).hexdigest()
        name = jax.tree_util.keystr(path)
        found[name] = f"{forms[name]} {digest}"
    return found


def _forms(tree: PyTree) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype.name}{leaf.shape}" for path, leaf in leaves}


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__


def _digest_of_json(record: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()


def _any_process(condition: bool) -> bool:
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.process_allgather(np.array(condition)).any())
