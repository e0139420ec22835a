"""Classifiers on latents, to be given normalised ones: MLPs on vectors, convolutions on grids.

Each is called as `head.apply(variables, latents, train=...)`. With `train=True` dropout needs a key in
`rngs={"dropout": key}`, and `mutable=["batch_stats"]` gives the new statistics of the heads that normalise batches.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from functa_jax.spatial import neighbours

Activation = Callable[[Array], Array]


class MLPHead(nn.Module):
    """Hidden layers with an activation, dropout after each, and a linear layer; grids are flattened.

    The default is report A's (one hidden layer of 1024, SiLU, dropout 0.2). Report B's are `hidden=(256, 128)`, its
    MLP1, and `hidden=(256, 128, 64)`, its MLP2, with `nn.relu` and no dropout; the softmax that ends them in its
    appendix is left to the loss here.

    Attributes:
      classes: number of logits.
      hidden: widths of the hidden layers.
      activation: after each of them.
      dropout: share of the hidden units that is dropped in training.

    Example:
      >>> import jax
      >>> head = MLPHead(hidden=(32,))
      >>> variables = jax.jit(head.init)(jax.random.key(0), jnp.zeros((1, 16)))
      >>> jax.jit(head.apply)(variables, jnp.ones((5, 16))).shape
      (5, 10)

    Reference: report A, section 1.4; report B, appendix .2.
    """

    classes: int = 10
    hidden: Sequence[int] = (1024,)
    activation: Activation = nn.silu
    dropout: float = 0.2

    @nn.compact
    def __call__(self, latents: Array, *, train: bool = False) -> Array:
        """Latents (B, ...) -> logits (B, classes)."""
        h = latents.reshape(len(latents), -1)
        for i, features in enumerate(self.hidden):
            h = self.activation(nn.Dense(features, name=f"hidden_{i}")(h))
            h = nn.Dropout(self.dropout, deterministic=not train)(h)
        return nn.Dense(self.classes, name="logits")(h)


class ConvHead(nn.Module):
    """Report A's head for grids: 3x3 convolutions, each with batch normalisation and SiLU; 2x2 max pooling; linear.

    The report gives neither widths nor the reach of the pooling; these are ours.

    Attributes:
      classes: number of logits.
      features: channels of each convolution.

    Example:
      >>> import jax
      >>> head = ConvHead(features=(8, 8))
      >>> variables = jax.jit(head.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 16)))
      >>> jax.jit(head.apply)(variables, jnp.ones((5, 8, 8, 16))).shape
      (5, 10)

    Reference: report A, section 1.4.
    """

    classes: int = 10
    features: Sequence[int] = (64, 64)

    @nn.compact
    def __call__(self, latents: Array, *, train: bool = False) -> Array:
        """Latents (B, h, w, c) -> logits (B, classes)."""
        h = _grid(latents)
        for i, features in enumerate(self.features):
            h = _Conv3x3(features, name=f"conv_{i}")(h)
            h = nn.silu(nn.BatchNorm(use_running_average=not train, name=f"norm_{i}")(h))
        h = nn.max_pool(h, (2, 2), (2, 2), "SAME")
        return nn.Dense(self.classes, name="logits")(h.reshape(len(h), -1))


class ResidualHead(nn.Module):
    """A residual network for grids: stages of two-convolution blocks, the grid halved and widened between stages.

    h = stem(z); in each block h = h + conv(silu(norm(conv(silu(norm(h)))))); between stages the mean of 2x2 cells and a
    linear map to the next width; at the end norm, SiLU, mean over the grid, dropout, linear.

    Attributes:
      classes: number of logits.
      widths: channels of each stage.
      blocks: residual blocks in each stage.
      dropout: before the last layer, in training.
      cell_dropout: share of the grid's cells set to 0 (the mean of normalised latents) in training.

    Example:
      >>> import jax
      >>> head = ResidualHead(widths=(8, 16))
      >>> variables = jax.jit(head.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 16)))
      >>> jax.jit(head.apply)(variables, jnp.ones((5, 8, 8, 16))).shape
      (5, 10)

    Reference: He et al., "Identity Mappings in Deep Residual Networks", 2016, arXiv:1603.05027.
    """

    classes: int = 10
    widths: Sequence[int] = (64, 128)
    blocks: int = 1
    dropout: float = 0.2
    cell_dropout: float = 0.0

    @nn.compact
    def __call__(self, latents: Array, *, train: bool = False) -> Array:
        """Latents (B, h, w, c) -> logits (B, classes)."""

        def activated(x: Array, name: str) -> Array:
            return nn.silu(nn.BatchNorm(use_running_average=not train, name=f"norm_{name}")(x))

        h = nn.Dropout(self.cell_dropout, broadcast_dims=(3,), deterministic=not train)(_grid(latents))
        h = _Conv3x3(self.widths[0], name="stem")(h)
        for stage, width in enumerate(self.widths):
            if stage:
                h = nn.avg_pool(h, (2, 2), (2, 2), "SAME", count_include_pad=False)
                h = nn.Dense(width, use_bias=False, name=f"widen_{stage}")(h)
            for block in range(self.blocks):
                name = f"{stage}_{block}"
                r = _Conv3x3(width, name=f"conv_{name}_a")(activated(h, f"{name}_a"))
                h = h + _Conv3x3(width, name=f"conv_{name}_b")(activated(r, f"{name}_b"))
        h = jnp.mean(activated(h, "last"), axis=(1, 2))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        return nn.Dense(self.classes, name="logits")(h)


class _Conv3x3(nn.Module):
    """3x3 convolution without bias, zeros beyond the border, as one matrix product: fast on a CPU too."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(self.features, use_bias=False, kernel_init=nn.initializers.he_normal())(neighbours(x))


def _grid(latents: Array) -> Array:
    if latents.ndim != 4:
        raise ValueError(f"latents of shape {latents.shape} are no grids; this head needs (B, h, w, c)")
    return latents
