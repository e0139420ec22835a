"""Matrix products and convolutions as plain regressions: rows of inputs times a matrix are rows of outputs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn


@dataclasses.dataclass(frozen=True)
class Product:
    """One equation y = x * w whose operand number ``side`` is the weight w; G regressions of m outputs on k inputs.

    G counts batch entries of a dot product that w has too, or the groups of a convolution. The three functions give the
    operands of any size as (G, n, k), (G, k, m) and (G, n, m); each but the first only moves entries about.
    """

    eqn: JaxprEqn
    side: int

    @property
    def is_convolution(self) -> bool:
        """Whether inputs are windows of an image."""
        return self.eqn.primitive.name == "conv_general_dilated"

    @property
    def summed(self) -> tuple[int, ...]:
        """The weight's axes that meet the activation's."""
        if self.is_convolution:
            return (self.eqn.params["dimension_numbers"].rhs_spec[1],)
        return tuple(self.eqn.params["dimension_numbers"][0][self.side])

    def _split(self, side: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        contract, batch = (of[side] for of in self.eqn.params["dimension_numbers"])
        return batch, contract, tuple(d for d in range(rank) if d not in contract and d not in batch)

    def inputs(self, x: Any, w: Any) -> Any:
        """The activation as rows (G, n, k)."""
        if self.is_convolution:
            return _windows(self.eqn, x, w)
        batch, contract, free = self._split(1 - self.side, x.ndim)
        return _three(jnp.transpose(x, (*batch, *free, *contract)), len(batch), len(free))

    def matrix(self, w: Any, x: Any) -> Any:
        """The weight as matrices (G, k, m)."""
        if self.is_convolution:
            numbers = self.eqn.params["dimension_numbers"]
            w = jnp.transpose(w, numbers.rhs_spec)  # outputs, inputs of a group, window
            groups = x.shape[numbers.lhs_spec[1]] // w.shape[1]
            return jnp.swapaxes(w.reshape(groups, w.shape[0] // groups, math.prod(w.shape[1:])), 1, 2)
        batch, contract, free = self._split(self.side, w.ndim)
        return _three(jnp.transpose(w, (*batch, *contract, *free)), len(batch), len(contract))

    def outputs(self, y: Any, matrix: Any) -> Any:
        """The product as rows (G, n, m), given the weight's (G, k, m)."""
        groups, _, m = matrix.shape
        n = y.size // (groups * m)
        if self.is_convolution:
            y = jnp.transpose(y, self.eqn.params["dimension_numbers"].out_spec)  # images, channels, space
            y = y.reshape(y.shape[0], groups, m, math.prod(y.shape[2:]))
            return jnp.transpose(y, (1, 0, 3, 2)).reshape(groups, n, m)
        # batch, free axes of the left, free axes of the right
        return y.reshape(groups, n, m) if self.side == 1 else jnp.swapaxes(y.reshape(groups, m, n), 1, 2)


def _three(x: Any, first: int, second: int) -> Any:
    shape = x.shape
    middle = first + second
    return x.reshape(math.prod(shape[:first]), math.prod(shape[first:middle]), math.prod(shape[middle:]))


def _windows(eqn: JaxprEqn, x: Any, w: Any) -> Any:
    """Every window of a convolution as a row: shifted slices, stacked (G, images * places, channels * window)."""
    p = eqn.params
    numbers = p["dimension_numbers"]
    x, w = jnp.transpose(x, numbers.lhs_spec), jnp.transpose(w, numbers.rhs_spec)
    padding = [(0, 0, 0)] * 2
    padding += [(low, high, d - 1) for (low, high), d in zip(p["padding"], p["lhs_dilation"], strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), padding)
    window, strides, dilation = w.shape[2:], p["window_strides"], p["rhs_dilation"]
    places = [
        (size - (n - 1) * d - 1) // s + 1 for size, n, d, s in zip(x.shape[2:], window, dilation, strides, strict=True)
    ]
    slices = []
    for offset in itertools.product(*map(range, window)):
        start = [i * d for i, d in zip(offset, dilation, strict=True)]
        stop = [i + (n - 1) * s + 1 for i, n, s in zip(start, places, strides, strict=True)]
        slices.append(lax.slice(x, [0, 0, *start], [*x.shape[:2], *stop], [1, 1, *strides]))
    count, channels = x.shape[:2]
    stacked = jnp.stack(slices, axis=2)  # images, channels, window, space
    groups = channels // w.shape[1]
    rows = stacked.reshape(count, groups, w.shape[1] * math.prod(window), math.prod(places))
    return jnp.transpose(rows, (1, 0, 3, 2)).reshape(groups, count * math.prod(places), rows.shape[2])
