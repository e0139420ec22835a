"""Fitting latents to a whole data set, kept on disk chunk by chunk, so that nothing is fitted twice."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import functa_jax as fj
from experiments import logs
from experiments.files import naming
from experiments.models.functa import Functa
from functa_jax import functaset

ImagesOf = Callable[[int, int], np.ndarray]  # (start, stop) -> uint8 (stop - start, H, W, C)


@dataclass
class Fitter:
    """Fits the parts of a functaset, going on from the chunks that are on disk.

    A chunk, or a whole part, counts only if all that it was made from is as asked now; damaged ones are said and made
    again.

    Attributes:
      functa: fits the images.
      params: its parameters and rates.
      model: checksum of the trained model.
      size: images of a chunk.
      progress: told of every chunk.
      warn: called with a line of text for each damaged file.
      writes: whether this process writes the files.
    """

    functa: Functa
    params: fj.MetaParams
    model: str
    size: int
    progress: logs.Progress
    warn: Callable[[str], None]
    writes: bool = True
    _done: int = field(default=0, init=False)
    _compiled: bool = field(default=False, init=False)

    def part(
        self,
        path: Path,
        images_of: ImagesOf,
        labels: np.ndarray,
        recipe: dict[str, Any],
        statistics: functaset.Functaset | None = None,
    ) -> functaset.Functaset:
        """One part: read from `path`, or fitted and written there.

        Args:
          path: of the file; chunks are kept in a folder beside it until the file is whole.
          images_of: the images by their place.
          labels: (N,).
          recipe: what the latents depend on besides the model; kept as metadata.
          statistics: whose mean and std to take; None: its own.

        Raises:
          OSError: the disk is full or the directory not writable; chunks so far are unharmed.
        """
        whole = self._read(path, recipe)
        if whole is not None:
            self._advance(len(whole), whole.psnr)
            return whole
        folder = path.with_suffix(".chunks")
        chunks = [self._chunk(folder, images_of, labels, start, recipe) for start in range(0, len(labels), self.size)]
        timed = [chunk for chunk in chunks if chunk.metadata["seconds"] is not None]
        speed = {
            "seconds": sum(chunk.metadata["seconds"] for chunk in timed),
            "timed_images": sum(map(len, timed)),
        }
        whole = functaset.join(chunks, {"recipe": recipe, **speed})
        if statistics is not None:
            whole = whole.with_statistics_of(statistics)
        if jax.process_count() > 1:  # all have read the chunks before the first process removes them
            multihost_utils.sync_global_devices(f"{path.name} fitted")
        if self.writes:
            with naming(path):
                functaset.save(whole, path)
            shutil.rmtree(folder)
        return whole

    def _chunk(
        self, folder: Path, images_of: ImagesOf, labels: np.ndarray, start: int, recipe: dict[str, Any]
    ) -> functaset.Functaset:
        labels = labels[start : start + self.size]
        path = folder / f"{start:08}.npz"
        recipe = {**recipe, "start": start, "size": self.size}
        chunk = self._read(path, recipe)
        if chunk is None:
            images = images_of(start, start + len(labels))
            begun = time.monotonic()
            filled = np.concatenate([images, np.repeat(images[:1], self.size - len(images), axis=0)])  # one compilation
            latents, errors = self.functa.fit(self.params, filled)
            seconds = time.monotonic() - begun if self._compiled else None  # the first one compiled
            chunk = functaset.make_functaset(
                latents[: len(images)],
                labels=labels,
                psnr=np.asarray(fj.psnr_from_mse(errors[: len(images)])),
                model=self.model,
                metadata={"recipe": recipe, "seconds": seconds},
            )
            if self.writes:
                with naming(path):
                    functaset.save(chunk, path)
            if not self._compiled:
                self._compiled = True
                self.progress.start_clock(self._done + len(images))
        self._advance(len(chunk), chunk.psnr)
        return chunk

    def _read(self, path: Path, recipe: dict[str, Any]) -> functaset.Functaset | None:
        if not path.exists():
            return None
        try:
            found = functaset.load(path)
        except functaset.FunctasetError as error:
            self.warn(f"{error}; fitting it again")
            return None
        return found if found.model == self.model and found.metadata.get("recipe") == recipe else None

    def _advance(self, count: int, psnr: np.ndarray) -> None:
        self._done += count
        if not self._compiled:
            self.progress.start_clock(self._done)  # what is read counts for nothing in the speed
        self.progress.update(self._done, {"psnr": float(np.mean(psnr))})
