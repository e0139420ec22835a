"""A shared SIREN whose layers are shifted and scaled by a small latent: the latent is the image.

Reference: Dupont et al., "From data to functa", 2022, arXiv:2201.12204, section 3.1.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from functa_jax.siren import Dense, frequencies, sine

Modulate = Literal["shift", "scale", "both"]


class LatentToModulation(nn.Module):
    """Maps a latent to the modulations of all sine layers: m = z M + c, or an MLP (SiLU) in front of that map.

    Attributes:
      width: units a sine layer.
      layers: number of sine layers.
      modulate: "shift", "scale" or "both".
      hidden: widths of the MLP's hidden layers; () is the linear map of the paper.
      kernel_scale: factor on the (LeCun normal) initialisation of the last map.
    """

    width: int
    layers: int
    modulate: Modulate = "shift"
    hidden: Sequence[int] = ()
    kernel_scale: float = 1.0

    @nn.compact
    def __call__(self, latent: Array) -> tuple[Array | None, Array | None]:
        """Latents (..., L) -> scale and shift, each (..., layers, width) or None; scale is centred on 1."""
        if self.modulate not in ("shift", "scale", "both"):
            raise ValueError(f"modulate must be 'shift', 'scale' or 'both', got {self.modulate!r}")
        h = latent
        for i, features in enumerate(self.hidden):
            h = nn.silu(nn.Dense(features, name=f"hidden_{i}")(h))
        kinds = 2 if self.modulate == "both" else 1
        init = nn.initializers.variance_scaling(self.kernel_scale**2, "fan_in", "truncated_normal")
        m = nn.Dense(kinds * self.layers * self.width, kernel_init=init, name="modulations")(h)
        m = m.reshape(*latent.shape[:-1], kinds, self.layers, self.width)
        scale = None if self.modulate == "shift" else 1 + m[..., 0, :, :]
        shift = None if self.modulate == "scale" else m[..., -1, :, :]
        return scale, shift


class ModulatedSiren(nn.Module):
    """SIREN modulated by a latent vector: a = h W_l + b_l; a = scale_l * a + shift_l; h = sin(w0 a).

    w0 multiplies after bias and modulation; the output layer has no sine and no modulation and adds `offset`.

    Attributes:
      width: units in each hidden layer.
      depth: number of linear layers, the output layer included (depth - 1 sines).
      out_features: channels of the signal.
      w0: frequency factor, one number or one a sine layer.
      modulate: which modulations the latent gives: "shift" (the paper), "scale" or "both".
      hidden: hidden widths of the latent-to-modulation MLP; () is a linear map.
      modulation_scale: factor on the initialisation of the map to the modulations.
      offset: constant added to the output (0.5 centres images in [0, 1]).
      compute_dtype: dtype of the big matmuls (e.g. jnp.bfloat16); None keeps float32.

    Example:
      >>> import jax
      >>> model = ModulatedSiren(width=32, depth=3, out_features=1)
      >>> coords, latent = jnp.zeros((28, 28, 2)), jnp.zeros(16)
      >>> variables = jax.jit(model.init)(jax.random.key(0), coords, latent)
      >>> jax.jit(model.apply)(variables, coords, latent).shape
      (28, 28, 1)
      >>> jax.jit(model.apply)(variables, coords.reshape(-1, 2), jnp.zeros((5, 16))).shape  # five images at once
      (5, 784, 1)

    Reference: Dupont et al. 2022, arXiv:2201.12204, section 3.1 and appendix A.
    """

    width: int = 256
    depth: int = 6
    out_features: int = 3
    w0: float | Sequence[float] = 30.0
    modulate: Modulate = "shift"
    hidden: Sequence[int] = ()
    modulation_scale: float = 1.0
    offset: float = 0.5
    compute_dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, coords: Array, latent: Array) -> Array:
        """Evaluates one image at any coordinates, or a batch of images at flat lists of points.

        Args:
          coords: (..., d) for one latent; (N, d), shared, or (B, N, d), each image its own, for a batch.
          latent: (L,) for one image, (B, L) for a batch.

        Returns:
          (..., out_features) for one latent, (B, N, out_features) for a batch.

        Raises:
          ValueError: a batch of latents with coordinates of another shape than those.
        """
        points, latents = as_batch(coords, latent, ("L",))
        w0s = frequencies(self.w0, self.depth)
        to_modulation = LatentToModulation(
            self.width, self.depth - 1, self.modulate, self.hidden, self.modulation_scale, name="latent_to_modulation"
        )
        scale, shift = to_modulation(latents)
        h = modulated_sines(points, w0s, self.width, scale, shift, lambda m: m[:, None], self.compute_dtype)
        y = Dense(self.out_features, w0s[-1], compute_dtype=self.compute_dtype, name="output")(h) + self.offset
        return y.reshape(*coords.shape[:-1], self.out_features) if latent.ndim == 1 else y


def modulated_sines(
    points: Array,
    w0s: Sequence[float],
    width: int,
    scale: Array | None,
    shift: Array | None,
    at_points: Callable[[Array], Array],
    compute_dtype: jnp.dtype | None,
) -> Array:
    """The sine layers of a modulated SIREN, made inside the module that calls this.

    Args:
      points: (1 or B, N, d).
      w0s: frequency factor of each layer.
      width: units in each layer.
      scale, shift: (B, ..., layers, width), or None.
      at_points: one layer's modulations (B, ..., width) -> those of each point, (B, 1 or N, width).
      compute_dtype: of the matmuls.

    Returns:
      (B, N, width).
    """
    h = points
    for layer, w0 in enumerate(w0s):
        a = Dense(width, w0, first=layer == 0, compute_dtype=compute_dtype, name=f"layer_{layer}")(h)
        if scale is not None:
            a = at_points(scale[..., layer, :]) * a
        if shift is not None:
            a = a + at_points(shift[..., layer, :])
        h = sine(w0 * a)
    return h


def as_batch(coords: Array, latent: Array, one: tuple[str, ...]) -> tuple[Array, Array]:
    """Brings coordinates and latents to (1 or B, N, d) and (B, ...); `one` names the dimensions of one latent.

    Raises:
      ValueError: shapes that do not go together.
    """
    if latent.ndim == len(one):
        return coords.reshape(1, -1, coords.shape[-1]), latent[None]
    if latent.ndim == len(one) + 1 and coords.ndim == 2:
        return coords[None], latent
    if latent.ndim == len(one) + 1 and coords.ndim == 3 and coords.shape[0] == latent.shape[0]:
        return coords, latent
    names = ", ".join(one)
    raise ValueError(
        f"coords {coords.shape} do not go with latent {latent.shape}: use latent ({names}{',' * (len(one) == 1)}) with "
        f"coords (..., d), or latents (B, {names}) with coords (N, d) or (B, N, d)"
    )
