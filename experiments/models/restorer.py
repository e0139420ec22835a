"""A trained Functa as a restorer of images: what it makes of small, noisy or incomplete ones."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import functa_jax as fj
from experiments.models.functa import Functa, to_unit

_BLOCK = 32  # images restored at once


@dataclass(frozen=True)
class Effort:
    """How hard latents are fitted.

    Attributes:
      steps: gradient steps; beyond those of training, each dimension's smallest learned rate is used on.
      rate: factor on the learned rates, which are as bold as whole, clean images allow.
      penalty: weight of the squared norm of the latent, in units in which the mean fitted latent of a clean image
        would cost as much as not fitting it at all.
    """

    steps: int
    rate: float = 1.0
    penalty: float = 0.0


@dataclass(frozen=True)
class Restorer:
    """Restores images (N, H, W, C), float32 on [0, 1], with the network and the rates that a run has learned.

    Attributes:
      functa: the trained Functa.
      params: its parameters and rates, on the host.
      penalty_unit: mean squared error without a fit / mean squared norm of a fitted latent, over clean images.
    """

    functa: Functa
    params: fj.MetaParams
    penalty_unit: float

    @classmethod
    def of(cls, functa: Functa, params: fj.MetaParams, clean: np.ndarray) -> "Restorer":
        """The restorer of a trained Functa, with the unit of penalties measured on clean uint8 images."""
        latents, _ = functa.fit(params, clean)
        norm = float(np.mean(np.sum(np.square(latents.reshape(len(latents), -1)), axis=1)))
        nothing = functa.render(params, np.zeros_like(latents[:1])) / 255.0
        error = float(jnp.mean(jnp.square(nothing - to_unit(jnp.asarray(clean)))))
        return cls(functa, jax.device_get(params), error / norm)

    def super_resolve(self, images: np.ndarray, factor: int, effort: Effort) -> np.ndarray:
        """Images whose pixels are means of factor x factor pixels, at the Functa's own size. 1: denoises."""
        return self._in_blocks(self._super_resolve, (images,), effort, samples=factor)

    def denoise(self, images: np.ndarray, effort: Effort) -> np.ndarray:
        """Noisy images without what the latents cannot say."""
        return self.super_resolve(images, 1, effort)

    def inpaint(self, images: np.ndarray, known: np.ndarray, effort: Effort) -> np.ndarray:
        """Images of which only the pixels with the flat indices `known` (N, n) are read."""
        return self._in_blocks(self._inpaint, (images, known), effort)

    def _in_blocks(
        self, restore: Callable[..., Any], arrays: tuple[np.ndarray, ...], effort: Effort, **static: int
    ) -> np.ndarray:
        count = len(arrays[0])
        padded = [np.concatenate([a, np.repeat(a[:1], -count % _BLOCK, axis=0)]) for a in arrays]
        numbers = np.array([effort.rate, effort.penalty * self.penalty_unit], np.float32)
        found = [
            np.asarray(
                restore(self.params, *(a[i : i + _BLOCK] for a in padded), numbers, steps=effort.steps, **static)
            )
            for i in range(0, count, _BLOCK)
        ]
        return np.clip(np.concatenate(found)[:count], 0, 1)

    def _options(self, params: fj.MetaParams, numbers: Any, steps: int) -> dict[str, Any]:
        factor, penalty = numbers
        rates = fj.continued_rates(params.rates, steps) if self.functa.rates_per_step else params.rates
        return {
            "steps": steps,
            "learning_rate": factor * rates,
            "rates_per_step": self.functa.rates_per_step,
            "latent_penalty": penalty,
            "batched": True,
        }

    @cached_property
    def _super_resolve(self) -> Callable[..., Any]:
        def restore(params: fj.MetaParams, images: Any, numbers: Any, *, steps: int, samples: int) -> Any:
            options = self._options(params, numbers, steps)
            shape, start = self.functa.image_shape[:2], self.functa.latent_init
            apply_fn = self.functa.model.apply
            return fj.super_resolve(apply_fn, params.model, images, start, shape, samples=samples, **options)

        return jax.jit(restore, static_argnames=("steps", "samples"))

    @cached_property
    def _inpaint(self) -> Callable[..., Any]:
        def restore(params: fj.MetaParams, images: Any, known: Any, numbers: Any, *, steps: int) -> Any:
            options = self._options(params, numbers, steps)
            apply_fn = self.functa.model.apply
            return fj.inpaint(apply_fn, params.model, images, known, self.functa.latent_init, **options)

        return jax.jit(restore, static_argnames="steps")
