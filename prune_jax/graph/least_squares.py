"""Moments of inputs and wanted outputs, gathered chunk by chunk, and the ridge regression between them."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Chunk(NamedTuple):
    """Sums over one chunk of n rows, for each of G separate regressions from k inputs to m outputs."""

    n: int | jax.Array
    mean_x: jax.Array  # (G, k)
    mean_y: jax.Array  # (G, m)
    xx: jax.Array  # (G, k, k), about the chunk's means
    xy: jax.Array  # (G, k, m), about the chunk's means

    def finite(self) -> bool:
        """Whether no input or wanted output was NaN or infinite."""
        return all(np.isfinite(part).all() for part in self[1:])


def chunk_moments(x: jax.Array, y: jax.Array) -> Chunk:
    """Moments of inputs x (G, n, k) and wanted outputs y (G, n, m), in at least float32."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    x, y = x.astype(dtype), y.astype(dtype)
    mean_x, mean_y = x.mean(1), y.mean(1)
    x, y = x - mean_x[:, None], y - mean_y[:, None]
    exact = lax.Precision.HIGHEST
    return Chunk(
        x.shape[1],
        mean_x,
        mean_y,
        jnp.einsum("gni,gnj->gij", x, x, precision=exact),
        jnp.einsum("gni,gnj->gij", x, y, precision=exact),
    )


@dataclasses.dataclass
class Moments:
    """All chunks so far, in float64 (Chan's formula: nothing cancels, however far the means lie from zero)."""

    n: float = 0.0
    mean_x: np.ndarray | float = 0.0
    mean_y: np.ndarray | float = 0.0
    xx: np.ndarray | float = 0.0
    xy: np.ndarray | float = 0.0

    def add(self, chunk: Chunk) -> None:
        """Take in a chunk."""
        rows = float(chunk.n)
        mean_x, mean_y, xx, xy = (np.asarray(part, np.float64) for part in chunk[1:])
        total = self.n + rows
        dx, dy = mean_x - self.mean_x, mean_y - self.mean_y
        weight = self.n * rows / total
        self.xx = self.xx + xx + weight * dx[:, :, None] * dx[:, None]
        self.xy = self.xy + xy + weight * dx[:, :, None] * dy[:, None]
        self.mean_x = self.mean_x + dx * (rows / total)
        self.mean_y = self.mean_y + dy * (rows / total)
        self.n = total


def ridge_update(
    moments: Moments, weights: np.ndarray, ridge: float, *, intercept: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The change of ``weights`` (G, k, m) that fits best without going far, and the shift (G, m) of the outputs.

    Minimises, over D and s, mean |y - x (W + D) - s|^2 + ridge tr(C) / k |D|^2 with the inputs' (co)variance C: the
    solution is D = (C + ridge tr(C) / k I)^-1 (C_xy - C W). Without an intercept s is 0 and C is not centred. The
    fitted error is never larger than that of ``weights``.
    """
    xx, xy = np.asarray(moments.xx) / moments.n, np.asarray(moments.xy) / moments.n
    mean_x, mean_y = np.asarray(moments.mean_x), np.asarray(moments.mean_y)
    if not intercept:
        xx = xx + mean_x[:, :, None] * mean_x[:, None]
        xy = xy + mean_x[:, :, None] * mean_y[:, None]
    k = xx.shape[1]
    scale = np.trace(xx, axis1=1, axis2=2) / k
    change = np.zeros_like(xy)
    for g in np.flatnonzero(scale > 0):  # inputs that never vary say nothing
        change[g] = np.linalg.solve(xx[g] + ridge * scale[g] * np.eye(k), xy[g] - xx[g] @ weights[g])
    shift = mean_y - np.einsum("gk,gkm->gm", mean_x, weights + change) if intercept else np.zeros_like(mean_y)
    return change, shift
