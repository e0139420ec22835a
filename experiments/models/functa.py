"""A Functa as the studies use it: a modulated SIREN, the grid of its images, and the inner loop it was trained with."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import functa_jax as fj
from experiments.training import replicate

_BLOCK = 32  # images fitted at once on each device


@dataclass(frozen=True)
class Functa:
    """Fits latents to images and renders them.

    Attributes:
      model: the network.
      image_shape: (height, width, channels) of the images.
      latent_shape: (L,) of a vector, (h, w, c) of a grid.
      inner_steps: gradient steps to fit one.
      rates_per_step: whether each inner step has its own rates.
      mesh: devices to fit a whole set on, along one axis `data`.
    """

    model: fj.ModulatedSiren | fj.SpatialModulatedSiren
    image_shape: tuple[int, int, int]
    latent_shape: tuple[int, ...]
    inner_steps: int
    rates_per_step: bool
    mesh: Mesh

    @property
    def coords(self) -> Array:
        """Pixel centres, (N, 2)."""
        return fj.coordinate_grid(self.image_shape[:2]).reshape(-1, 2)

    @property
    def latent_init(self) -> Array:
        """Where every image starts, of `latent_shape`."""
        return jnp.zeros(self.latent_shape)

    def initialise(self, key: Array, *, rate: float | None, rate_scale: float) -> tuple[Any, Array]:
        """Variables of the network and the inner rates: all `rate`, or else `rate_scale` / curvature."""
        model_key, curvature_key = jax.random.split(key)
        variables = self.model.init(model_key, self.coords, self.latent_init)
        shape = (self.inner_steps, *self.latent_shape) if self.rates_per_step else self.latent_shape
        if rate is not None:
            return variables, jnp.full(shape, rate)
        curvature = fj.curvature(self.model.apply, variables, self.coords, self.latent_init, curvature_key)
        return variables, jnp.full(shape, rate_scale / curvature)

    def loss(self, params: fj.MetaParams, points: Array, targets: Array, **options: Any) -> Array:
        """`meta_loss` of a batch: points (N, 2), targets (B, N, C)."""
        return fj.meta_loss(
            self.model.apply,
            params.model,
            points,
            targets,
            self.latent_init,
            steps=self.inner_steps,
            learning_rate=params.rates,
            rates_per_step=self.rates_per_step,
            batched=True,
            **options,
        )

    def fit(self, params: fj.MetaParams, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Latents (N, ...) and mean squared errors (N,) of uint8 images (N, H, W, C), over all devices."""
        block = _BLOCK * self.mesh.size
        missing = -len(images) % block
        padded = np.concatenate([images, np.repeat(images[:1], missing, axis=0)])
        blocks = replicate(padded.reshape(-1, block, *images.shape[1:]), self.mesh)
        latents, errors = jax.device_get(self._fit_blocks(params, blocks))
        return latents.reshape(len(padded), *latents.shape[2:])[: len(images)], errors.reshape(-1)[: len(images)]

    def render(self, params: fj.MetaParams, latents: np.ndarray, scale: int = 1) -> np.ndarray:
        """uint8 images (N, scale H, scale W, C)."""
        height, width, _ = self.image_shape
        local = jax.device_get(params.model)  # each process renders for itself
        images = fj.render(self.model.apply, local, latents, (scale * height, scale * width))
        return np.asarray(jnp.rint(jnp.clip(images, 0, 1) * 255), dtype=np.uint8)

    @cached_property
    def _fit_blocks(self) -> Callable[[fj.MetaParams, Array], tuple[Array, Array]]:
        def one(params: fj.MetaParams, images: Array) -> tuple[Array, Array]:
            latents, losses = fj.fit_latents(
                self.model.apply,
                params.model,
                self.coords,
                to_unit(images).reshape(len(images), -1, images.shape[-1]),
                self.latent_init,
                steps=self.inner_steps,
                learning_rate=params.rates,
                rates_per_step=self.rates_per_step,
                batched=True,
            )
            return latents, losses[:, -1]

        @jax.jit
        def all_blocks(params: fj.MetaParams, blocks: Array) -> tuple[Array, Array]:
            shared = jax.lax.with_sharding_constraint(blocks, NamedSharding(self.mesh, P(None, "data")))
            found = jax.lax.map(lambda images: one(params, images), shared)
            return jax.lax.with_sharding_constraint(found, NamedSharding(self.mesh, P()))

        return all_blocks


def to_unit(images: Array) -> Array:
    """uint8 images as float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255
