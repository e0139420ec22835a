"""A Functa as the studies use it: a modulated SIREN, the grid of its images, and the inner loop it was trained with."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

import functa_jax as fj
from experiments.pictures import to_bytes
from experiments.training import replicate

_BLOCK = 8  # images fitted at once on each device: on a CPU, so few that they stay in its cache
_BLOCK_OF_ACCELERATORS = 256


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
        latents, errors = fj.fit_images(
            self.model.apply,
            params.model,
            self.coords,
            replicate(images, self.mesh),
            self.latent_init,
            steps=self.inner_steps,
            learning_rate=params.rates,
            rates_per_step=self.rates_per_step,
            block=_BLOCK if jax.default_backend() == "cpu" else _BLOCK_OF_ACCELERATORS,
            mesh=self.mesh,
        )
        return jax.device_get((latents, errors))

    def render(self, params: fj.MetaParams, latents: np.ndarray, scale: int = 1) -> np.ndarray:
        """uint8 images (N, scale H, scale W, C)."""
        height, width, _ = self.image_shape
        local = jax.device_get(params.model)  # each process renders for itself
        images = fj.render(self.model.apply, local, latents, (scale * height, scale * width))
        return to_bytes(np.asarray(images))

    def with_steps(self, params: fj.MetaParams, steps: int) -> tuple["Functa", fj.MetaParams]:
        """The same network with another number of inner steps; steps beyond the trained ones take the last one's rates.

        Raises:
          ValueError: no steps.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if self.rates_per_step:
            chosen = np.minimum(np.arange(steps), self.inner_steps - 1)
            params = params._replace(rates=jax.tree.map(lambda r: r[chosen], params.rates))
        return replace(self, inner_steps=steps), params


def to_unit(images: Array) -> Array:
    """uint8 images as float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255
