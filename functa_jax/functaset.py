"""A data set as latents: fitted in batches, normalised, kept in a file that belongs to one model.

Reference: Dupont et al. 2022, arXiv:2201.12204, section 3.2 ("functaset").
"""

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from functa_jax.inner_loop import Apply, fit_latents

PyTree = Any
_DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)
_ARRAYS = ("latents", "labels", "psnr", "mean", "std")


class FunctasetError(ValueError):
    """A file that is no functaset, is damaged, or belongs to another model; the message names it."""


@dataclass(frozen=True)
class Functaset:
    """A data set as latents.

    Attributes:
      latents: (N, ...), float32, as fitted.
      labels: (N,), int32.
      psnr: of each image as its latent renders it, (N,), dB, float32.
      mean: of each dimension of a latent, (...), float32; usually that of the training split, whichever this is.
      std: standard deviation, likewise.
      model: checksum of the network and rates that made the latents, any text.
      metadata: what else is worth knowing, such as the number of steps; anything JSON can hold.

    Example:
      >>> made = make_functaset(np.array([[1.0, 5.0], [3.0, 5.0]]), labels=[0, 1], psnr=[20.0, 21.0], model="a")
      >>> made.normalised.tolist()  # a dimension that never changes becomes 0
      [[-1.0, 0.0], [1.0, 0.0]]
      >>> made.denormalise(made.normalised).tolist()
      [[1.0, 5.0], [3.0, 5.0]]
    """

    latents: np.ndarray
    labels: np.ndarray
    psnr: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    model: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses arrays that do not go together."""
        count, *shape = self.latents.shape
        expected = {"labels": (count,), "psnr": (count,), "mean": tuple(shape), "std": tuple(shape)}
        for name, wanted in expected.items():
            found = getattr(self, name).shape
            if found != wanted:
                raise ValueError(f"{name} has shape {found}; latents {self.latents.shape} need {wanted}")

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def normalised(self) -> np.ndarray:
        """The latents, by `normalise`."""
        return self.normalise(self.latents)

    def normalise(self, latents: np.ndarray) -> np.ndarray:
        """Latents (..., latent shape) with `mean` and `std` taken out; what never changed becomes 0."""
        return (latents - self.mean) * np.where(self.std > 0, 1 / np.where(self.std > 0, self.std, 1), 0)

    def denormalise(self, latents: np.ndarray) -> np.ndarray:
        """Undoes `normalise`, so that what was generated or changed there can be rendered."""
        return latents * self.std + self.mean

    def with_statistics_of(self, other: "Functaset") -> "Functaset":
        """The same latents with the mean and std of another split.

        Raises:
          ValueError: the other split belongs to another model.
        """
        if self.model != other.model:
            raise ValueError(f"the functasets belong to different models: {self.model!r} and {other.model!r}")
        return replace(self, mean=other.mean, std=other.std)


def make_functaset(
    latents: np.ndarray,
    *,
    labels: np.ndarray | Sequence[int],
    psnr: np.ndarray | Sequence[float],
    model: str,
    metadata: Mapping[str, Any] | None = None,
) -> Functaset:
    """A functaset with the mean and std of its own latents.

    Args:
      latents: (N, ...).
      labels: (N,).
      psnr: (N,), dB.
      model: checksum of the network and rates.
      metadata: anything JSON can hold.

    Raises:
      ValueError: no latents, NaN or infinity among them, or arrays of different lengths.
    """
    latents = np.asarray(latents, np.float32)
    if not len(latents):
        raise ValueError("latents is empty; a functaset needs at least one image")
    if not np.isfinite(latents).all():
        bad = np.flatnonzero(~np.isfinite(latents).reshape(len(latents), -1).all(axis=1))
        raise ValueError(f"latents of {len(bad)} images are NaN or infinite, the first of image {bad[0]}")
    mean, std = latents.mean(axis=0, dtype=np.float64), latents.std(axis=0, dtype=np.float64)
    return Functaset(
        latents,
        np.asarray(labels, np.int32),
        np.asarray(psnr, np.float32),
        mean.astype(np.float32),
        std.astype(np.float32),
        model,
        metadata or {},
    )


def join(parts: Sequence[Functaset], metadata: Mapping[str, Any] | None = None) -> Functaset:
    """Parts of one data set, in their order, as one functaset with statistics of its own.

    Args:
      parts: at least one, all of one model.
      metadata: of the whole.

    Raises:
      ValueError: no parts, or parts of different models.
    """
    models = sorted({part.model for part in parts})
    if len(models) != 1:
        raise ValueError(f"parts must be of one model, got {models}")
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("latents", "labels", "psnr")}
    return make_functaset(arrays.pop("latents"), **arrays, model=models[0], metadata=metadata)


def fit_images(
    apply_fn: Apply,
    params: PyTree,
    coords: Array,
    images: Array,
    latent_init: Array,
    *,
    steps: int,
    learning_rate: PyTree,
    rates_per_step: bool = False,
    block: int = 32,
    mesh: Mesh | None = None,
) -> tuple[Array, Array]:
    """Fits every image of a set as in training, `block` of them at once on each device; compiled once.

    Args:
      apply_fn: batched, as this library's modules: latents (B, ...) with coords (N, d) -> (B, N, C). Pass the same
        function again (a module's `apply`, kept) to have no second compilation.
      params: its parameters.
      coords: (N, d).
      images: (M, ..., C) with N pixels each, uint8 in [0, 255] or floats in [0, 1].
      latent_init: where every image starts.
      steps, learning_rate, rates_per_step: as in `fit_latents`, and in training.
      block: images fitted at once on each device; M need not be a multiple.
      mesh: devices along one axis, over which the images of a block are split; None: the default device.

    Returns:
      latents (M, ...) and mean squared errors (M,), on every device of the mesh.

    Raises:
      ValueError: no images, a block below 1, and as `fit_latents`.

    Example:
      >>> f = lambda params, coords, latents: (latents @ coords.T)[..., None]
      >>> latents, errors = fit_images(
      ...     f, None, jnp.eye(2), jnp.array([[[0.5], [0.25]]]), jnp.zeros(2), steps=1, learning_rate=1.0
      ... )
      >>> latents.tolist(), errors.tolist()
      ([[0.5, 0.25]], [0.0])
    """
    if not len(images):
        raise ValueError("images is empty; there is nothing to fit")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    latents, errors = _fit_blocks(
        apply_fn, params, coords, images, latent_init, learning_rate, steps, rates_per_step, block, mesh
    )
    return latents[: len(images)], errors[: len(images)]


@partial(jax.jit, static_argnames=("apply_fn", "steps", "rates_per_step", "block", "mesh"))
def _fit_blocks(
    apply_fn: Apply,
    params: PyTree,
    coords: Array,
    images: Array,
    latent_init: Array,
    learning_rate: PyTree,
    steps: int,
    rates_per_step: bool,
    block: int,
    mesh: Mesh | None,
) -> tuple[Array, Array]:
    size = block * (mesh.size if mesh is not None else 1)
    blocks = -(-len(images) // size)
    missing = blocks * size - len(images)
    filled = jnp.concatenate([images, jnp.broadcast_to(images[:1], (missing, *images.shape[1:]))])
    targets = filled.reshape(blocks, size, -1, images.shape[-1])
    if mesh is not None:
        targets = lax.with_sharding_constraint(targets, NamedSharding(mesh, P(None, *mesh.axis_names)))

    def one(block: Array) -> tuple[Array, Array]:
        if block.dtype == jnp.uint8:
            block = block.astype(jnp.float32) / 255
        latents, losses = fit_latents(
            apply_fn,
            params,
            coords,
            block,
            latent_init,
            steps=steps,
            learning_rate=learning_rate,
            rates_per_step=rates_per_step,
            batched=True,
        )
        return latents, losses[:, -1]

    latents, errors = lax.map(one, targets)
    found = latents.reshape(blocks * size, *latents.shape[2:]), errors.reshape(-1)
    return found if mesh is None else lax.with_sharding_constraint(found, NamedSharding(mesh, P()))


def save(functaset: Functaset, path: Path) -> None:
    """Writes a functaset as `.npz` without pickle, whole or not at all, with a checksum of its content.

    Raises:
      OSError: the disk is full or the directory not writable.
    """
    arrays = {name: getattr(functaset, name) for name in _ARRAYS}
    header = json.dumps({"model": functaset.model, "metadata": dict(functaset.metadata)}, sort_keys=True)
    content = {**arrays, "header": np.array(header), "checksum": np.array(_checksum(arrays, header))}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial_path.open("wb") as file:
            np.savez(file, allow_pickle=False, **content)
            file.flush()
            os.fsync(file.fileno())
        partial_path.replace(path)
    finally:
        partial_path.unlink(missing_ok=True)


def load(path: Path, *, model: str | None = None) -> Functaset:
    """Reads what `save` wrote, and checks all of it.

    Args:
      path: of the file.
      model: checksum of the model that it must belong to; None takes any.

    Raises:
      FileNotFoundError: there is no such file.
      FunctasetError: the file is damaged, cut short or something else, or belongs to another model.
    """
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _ARRAYS}
            header, checksum = str(file["header"]), str(file["checksum"])
        if checksum != _checksum(arrays, header):
            raise ValueError("its checksum does not match")
        about = json.loads(header)
        functaset = Functaset(**arrays, model=about["model"], metadata=about["metadata"])
    except FileNotFoundError:
        raise
    except _DAMAGE as e:
        raise FunctasetError(f"{path} is damaged, or no functaset: {e}") from e
    if model is not None and functaset.model != model:
        raise FunctasetError(f"{path} was made by the model {functaset.model}, not by {model}; make it again")
    return functaset


def _checksum(arrays: Mapping[str, np.ndarray], header: str) -> str:
    digest = hashlib.blake2b(header.encode(), digest_size=16)
    for name in _ARRAYS:
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.name}{array.shape}".encode())
        digest.update(array.view(np.uint8).data if array.ndim else array.tobytes())
    return digest.hexdigest()
