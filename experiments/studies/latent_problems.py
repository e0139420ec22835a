"""The restoration problems of the study `latent-tasks`: what is seen, and who restores it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

import functa_jax as fj
from experiments import classical, logs
from experiments.models.restorer import Effort, Restorer
from experiments.pictures import to_bytes

SHOWN = 8  # images of each problem in the figures
_UNKNOWN = 128  # grey of the pixels that were not seen, in figures


@dataclass(frozen=True)
class Problem:
    """One kind of damage, and how it is undone; images are float32 (N, H, W, C) on [0, 1].

    Attributes:
      task: "super-resolution", "denoising" or "inpainting".
      setting: how bad it is.
      observe: (images, generator) -> what is left of them, arrays with a leading axis N.
      show: what is left, as uint8 images.
      restore: (restorer, observed, effort) -> images.
      classical: method and its parameter -> (observed -> images); the best one on validation images counts.
      as_image: observed -> images, where what is seen is an image of the same size and can be measured as it is.
    """

    task: str
    setting: str
    observe: Callable[[np.ndarray, np.random.Generator], Any]
    show: Callable[[Any], np.ndarray]
    restore: Callable[[Restorer, Any, Effort], np.ndarray]
    classical: Mapping[str, Callable[[Any], np.ndarray]]
    as_image: Callable[[Any], np.ndarray] | None = None


def super_resolution(factor: int, shape: tuple[int, int]) -> Problem:
    """Images shrunk by averaging blocks of pixels; bicubic interpolation enlarges them."""
    return Problem(
        "super-resolution",
        f"{factor}x",
        lambda images, _: classical.block_means(images, factor),
        to_bytes,
        lambda restorer, observed, effort: restorer.super_resolve(observed, factor, effort),
        {"bicubic": lambda observed: classical.bicubic(observed, shape)},
    )


def denoising(sigma: float) -> Problem:
    """Images with Gaussian noise, not clipped; total variation or non-local means removes it."""

    def add_noise(images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        return images + generator.normal(0, sigma, images.shape).astype(np.float32)

    return Problem(
        "denoising",
        f"sigma {sigma:g}",
        add_noise,
        to_bytes,
        lambda restorer, observed, effort: restorer.denoise(observed, effort),
        {
            f"{method}, {strength:g} sigma": partial(_filter, method=method, strength=strength, sigma=sigma)
            for method, strengths in classical.DENOISERS.items()
            for strength in strengths
        },
        lambda observed: np.clip(observed, 0, 1),
    )


def _filter(observed: np.ndarray, *, method: str, strength: float, sigma: float) -> np.ndarray:
    return classical.denoise(observed, method, strength, sigma)


@dataclass(frozen=True)
class Incomplete:
    """Images with the flat indices (N, n) of the pixels that are known."""

    images: np.ndarray
    known: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """Bool (N, H, W), True where known."""
        count, height, width, _ = self.images.shape
        mask = np.zeros((count, height * width), bool)
        np.put_along_axis(mask, self.known, True, axis=1)
        return mask.reshape(count, height, width)


def inpainting(fraction: float) -> Problem:
    """A random subset of the pixels, another one in each image; the biharmonic equation fills the rest."""

    def drop(images: np.ndarray, generator: np.random.Generator) -> Incomplete:
        pixels = images.shape[1] * images.shape[2]
        order = generator.random((len(images), pixels)).argsort(axis=1)
        return Incomplete(images, order[:, : max(1, round(fraction * pixels))].astype(np.int32))

    return Problem(
        "inpainting",
        f"{fraction:.0%} known",
        drop,
        lambda observed: np.where(observed.mask[..., None], to_bytes(observed.images), np.uint8(_UNKNOWN)),
        lambda restorer, observed, effort: restorer.inpaint(observed.images, observed.known, effort),
        {"biharmonic": lambda observed: classical.inpaint(observed.images, observed.mask)},
    )


def solve(
    problem: Problem,
    restorer: Restorer,
    efforts: tuple[Sequence[int], Sequence[float], Sequence[float]],
    images: tuple[np.ndarray, np.ndarray],
    seed: tuple[int, ...],
    log: logs.Log,
) -> list[Any]:
    """Chooses the effort and the classical method by PSNR on validation images, and measures both on test images.

    Args:
      problem: the problem.
      restorer: the trained Functa.
      efforts: numbers of steps and factors on the rates, of which the best pair is chosen first, and penalties.
      images: clean validation and test images, uint8.
      seed: of the damage.
      log: for the first images, as seen and as restored.

    Returns:
      PSNR of what is seen (or None), the classical method, its PSNR, the Functa's PSNR, their SSIM, and the effort.
    """
    held_out, clean = (split.astype(np.float32) / 255 for split in images)
    observed = problem.observe(held_out, np.random.default_rng((*seed, 0)))

    def score(images: np.ndarray) -> float:
        value = _psnr(images, held_out)
        return value if np.isfinite(value) else -np.inf  # too many steps can diverge

    steps, rates, penalties = efforts

    def best(candidates: list[Effort]) -> Effort:
        return max(candidates, key=lambda candidate: score(problem.restore(restorer, observed, candidate)))

    effort = best([Effort(count, rate) for count in steps for rate in rates])
    effort = best([replace(effort, penalty=penalty) for penalty in penalties])
    method = max(problem.classical, key=lambda name: score(problem.classical[name](observed)))

    observed = problem.observe(clean, np.random.default_rng((*seed, 1)))
    by_classical = np.clip(problem.classical[method](observed), 0, 1)
    by_functa = problem.restore(restorer, observed, effort)
    log.images(0, "original", images[1][:SHOWN])
    log.images(0, "seen", problem.show(observed)[:SHOWN])
    log.images(0, "classical", to_bytes(by_classical[:SHOWN]))
    log.images(0, "functa", to_bytes(by_functa[:SHOWN]))
    return [
        None if problem.as_image is None else _psnr(problem.as_image(observed), clean),
        method,
        _psnr(by_classical, clean),
        _psnr(by_functa, clean),
        float(np.mean(classical.ssim(by_classical, clean))),
        float(np.mean(classical.ssim(by_functa, clean))),
        effort.steps,
        effort.rate,
        effort.penalty,
    ]


def _psnr(images: np.ndarray, clean: np.ndarray) -> float:
    return float(jnp.mean(fj.psnr(jnp.clip(images, 0, 1), jnp.asarray(clean))))
