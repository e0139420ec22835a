"""What ViT and Swin share: attention with free widths, the MLP, and per-layer settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.linen.dtypes import promote_dtype
from jax import Array, lax

from prune_jax.tree import check_count, is_real, widen

Gelu = Literal["exact", "tanh"]

# Truncated normal of deviation 0.02, the initialisation of ViT's, DeiT's and Swin's published training code.
initialise = nn.initializers.truncated_normal(0.02)


class Attention(nn.Module):
    """Multi-head self-attention whose head counts and head dims are free: softmax(scale q k^T) v, projected.

    One matmul makes queries, keys and values. Its columns are sorted by head, and inside a head into query, key, value,
    so that heads stay whole when they are sharded or cut. The steps are methods of their own, so that a caller can
    look at the probabilities or change them in between::

        q, k, v = attention.project(x)
        e = attention.exponentials(q, k)
        y = attention.combine(e, v)  # the same as attention(x)

    The softmax is normalised after its product with the values, which is smaller than it: on a CPU that saves a
    quarter of the attention's time beside its matmuls.

    Attributes:
      width: channels in and out.
      heads: number of heads.
      qk_dim: query and key channels of each head.
      v_dim: value channels of each head.
      scale: factor on q k^T. Explicit, because a head whose dims are pruned keeps the scale it was trained with.
      compute_dtype: dtype of the matmuls; None keeps float32. The softmax is always in float32.
    """

    width: int
    heads: int
    qk_dim: int
    v_dim: int
    scale: float
    compute_dtype: Any = None

    def setup(self) -> None:
        """Declares the two projections."""
        self.qkv = dense(self.heads * (2 * self.qk_dim + self.v_dim), self.compute_dtype)
        self.proj = dense(self.width, self.compute_dtype)

    def __call__(self, x: Array, *, bias: Array | None = None, weights: Array | None = None) -> Array:
        """Tokens (B, N, D) -> (B, N, D); `bias` and `weights` as `exponentials` takes them."""
        q, k, v = self.project(x)
        return self.combine(self.exponentials(q, k, bias=bias, weights=weights), v)

    def project(self, x: Array) -> tuple[Array, Array, Array]:
        """Tokens (B, N, D) -> queries and keys (B, heads, N, qk_dim), values (B, heads, N, v_dim)."""
        qkv = rearrange(self.qkv(x), "b n (h d) -> b h n d", h=self.heads)
        q, k, v = jnp.split(qkv, (self.qk_dim, 2 * self.qk_dim), axis=-1)
        return q, k, v

    def project_apart(self, queries: Array, x: Array) -> tuple[Array, Array, Array]:
        """Queries of some tokens only, keys and values of all: as `project`, with q of (B, K, D) and k, v of (B, N, D).

        The columns that make queries are taken from the kernel, so that the matmuls do no more than is asked.
        """
        if self.is_initializing():
            self.project(x)  # makes the parameters
        parts = self.qkv.variables["params"]
        kernel, bias = (rearrange(parts[name], "... (h c) -> ... h c", h=self.heads) for name in ("kernel", "bias"))

        def times(x: Array, columns: slice) -> Array:
            x, w, b = promote_dtype(x, kernel[..., columns], bias[..., columns], dtype=self.compute_dtype)
            y = x @ rearrange(w, "d h c -> d (h c)") + rearrange(b, "h c -> 1 1 (h c)")
            return rearrange(y, "b n (h c) -> b h n c", h=self.heads)

        k, v = jnp.split(times(x, slice(self.qk_dim, None)), (self.qk_dim,), axis=-1)
        return times(queries, slice(self.qk_dim)), k, v

    def exponentials(self, q: Array, k: Array, *, bias: Array | None = None, weights: Array | None = None) -> Array:
        """What the softmax divides by its sums, float32; `normalised` makes attention probabilities of it.

        Args:
          q: queries (B, heads, N, qk_dim).
          k: keys (B, heads, M, qk_dim).
          bias: (W, heads, N, M), added to the logits; W divides B, entry i goes to sequences i, i + W, i + 2 W, ...
          weights: non-negative factors on the exponentials; any shape that broadcasts to (B, heads, N, M) by axes of
            size one. Zero removes a key (DynamicViT's policy) that is not NaN, the number
            of patches a token stands for is ToMe's proportional attention. Each query needs one positive weight.

        Returns:
          (B, heads, N, M); without weights the largest of a row is 1.
        """
        logits = jnp.einsum("bhnd,bhmd->bhnm", q * self.scale, k, preferred_element_type=jnp.float32)
        if bias is not None:
            logits = (logits.reshape(-1, *bias.shape) + bias[None]).reshape(logits.shape)
        if weights is None:
            return jnp.exp(logits - lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
        # The largest kept logit is the reference, so that a removed key cannot push the kept ones to zero; the cap
        # keeps the removed key's own exponential finite, which its gradient is made of.
        kept = jnp.where(weights > 0, logits, -jnp.inf)
        top = lax.stop_gradient(kept.max(axis=-1, keepdims=True))
        return weights * jnp.exp(jnp.minimum(logits - top, 30.0))

    def combine(self, exponentials: Array, v: Array) -> Array:
        """Exponentials (B, heads, N, M), or probabilities, and values (B, heads, M, v_dim) -> (B, N, D).

        A head is switched off by multiplying its values by zero.
        """
        mixed = jnp.matmul(
            exponentials.astype(v.dtype), v, preferred_element_type=jnp.promote_types(v.dtype, jnp.float32)
        )
        mixed = (mixed / exponentials.sum(axis=-1, keepdims=True)).astype(v.dtype)
        return self.proj(rearrange(mixed, "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    """Two dense layers with a GELU between; dropout after each.

    Attributes:
      width: channels in and out.
      hidden: channels between.
      gelu: "exact" (by the error function; timm, DeiT, Swin) or "tanh" (Google's ViT).
      dropout: rate, in training.
      compute_dtype: dtype of the matmuls; None keeps float32.
    """

    width: int
    hidden: int
    gelu: Gelu = "exact"
    dropout: float = 0.0
    compute_dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """(..., D) -> (..., D)."""
        x = dense(self.hidden, self.compute_dtype, name="fc1")(x)
        x = jax.nn.gelu(x) if self.gelu == "tanh" else exact_gelu(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = dense(self.width, self.compute_dtype, name="fc2")(x)
        return nn.Dropout(self.dropout, deterministic=not train)(x)


class Block(nn.Module):
    """The parts of a transformer block, for one to put together: x + attention(norm(x)), then x + mlp(norm(x)).

    Attributes:
      width: channels of a token.
      heads: number of heads.
      qk_dim: query and key channels of each head.
      v_dim: value channels of each head.
      mlp_hidden: hidden channels of the MLP.
      scale: factor on the attention logits.
      gelu: "exact" or "tanh".
      dropout: rate after the attention and in the MLP, in training.
      drop_path: rate at which a residual branch of an example is dropped, in training.
      compute_dtype: dtype of the matmuls; None keeps float32.
    """

    width: int
    heads: int
    qk_dim: int
    v_dim: int
    mlp_hidden: int
    scale: float
    gelu: Gelu = "exact"
    dropout: float = 0.0
    drop_path: float = 0.0
    compute_dtype: Any = None

    norm_epsilon: ClassVar[float]  # of both norms
    token_axes: ClassVar[tuple[int, ...]]  # all axes of the input but the first: a branch is dropped by example

    def setup(self) -> None:
        """Declares the parts."""
        dtype = self.compute_dtype
        self.norm1 = nn.LayerNorm(epsilon=self.norm_epsilon, dtype=dtype)
        self.attention = Attention(self.width, self.heads, self.qk_dim, self.v_dim, self.scale, dtype)
        self.norm2 = nn.LayerNorm(epsilon=self.norm_epsilon, dtype=dtype)
        self.mlp = Mlp(self.width, self.mlp_hidden, self.gelu, self.dropout, dtype)
        self.drop_branch = nn.Dropout(self.drop_path, broadcast_dims=self.token_axes)
        self.drop_units = nn.Dropout(self.dropout)

    def add(self, x: Array, branch: Array, *, train: bool = False) -> Array:
        """x plus the attention's output, which training drops at random."""
        branch = self.drop_units(branch, deterministic=not train)
        return x + self.drop_branch(branch, deterministic=not train)

    def feed_forward(self, x: Array, *, train: bool = False) -> Array:
        """x + mlp(norm(x)), for each token by itself."""
        branch = self.mlp(self.norm2(x), train=train)
        return x + self.drop_branch(branch, deterministic=not train)


def normalised(exponentials: Array) -> Array:
    """Attention probabilities, whose rows sum to 1, from `Attention.exponentials`."""
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def exact_gelu(x: Array) -> Array:
    """x Phi(x) by erf, as torch computes it; on a CPU its gradient is cheaper than that of jax.nn.gelu, by erfc.

    In float32 at least: 1 + erf(x) of a negative x is all rounding in half precision.
    """
    wide = widen(x)
    return (0.5 * wide * (1 + lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def dense(features: int, compute_dtype: Any, *, use_bias: bool = True, name: str | None = None) -> nn.Dense:
    """A linear layer with the initialisation of the published models."""
    return nn.Dense(features, use_bias=use_bias, dtype=compute_dtype, kernel_init=initialise, name=name)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth: the rate of each block, from 0 in the first linearly to `rate` in the last."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


BLOCK_WIDTHS = ("heads", "qk_dim", "v_dim", "mlp_hidden", "scale")  # set for each block, in the order of fill_widths


def plain(value: Any) -> Any:
    """A setting given as an array, of numpy or JAX, as a number or a tuple of them; all else as it is.

    Example:
      >>> plain(np.array([1, 2])), plain(np.array(0.5)), plain(3)
      ((1, 2), 0.5, 3)
    """
    if not isinstance(value, np.ndarray | jax.Array):
        return value
    return tuple(plain(np.asarray(part)) for part in np.asarray(value)) if value.ndim else value.item()


def each_layer(name: str, value: Any, depth: int) -> tuple:
    """A setting as one value a layer.

    Raises:
      ValueError: a sequence of another length.
    """
    value = plain(value)
    if not isinstance(value, Sequence):
        return (value,) * depth
    if len(value) != depth:
        raise ValueError(f"{name} must be one value or a sequence of {depth}, got {value!r}")
    return tuple(value)


def fill_widths(
    width: int, heads: int, qk_dim: int | None, v_dim: int | None, mlp_hidden: int | None, scale: float | None
) -> dict[str, Any]:
    """The widths of one block, with the published defaults where they are None.

    Raises:
      ValueError: a width that is not a whole number of at least 1, or a head dim is not given and the heads do not
        divide the width.
    """
    given = {"width": width, "heads": heads, "qk_dim": qk_dim, "v_dim": v_dim, "mlp_hidden": mlp_hidden}
    for name, value in given.items():
        if value is not None:
            check_count(name, value, 1)
    if width % heads and None in (qk_dim, v_dim):
        raise ValueError(f"heads must divide the width, got {heads} heads and width {width}; or give qk_dim and v_dim")
    qk_dim = width // heads if qk_dim is None else qk_dim
    return {
        "width": width,
        "heads": heads,
        "qk_dim": qk_dim,
        "v_dim": width // heads if v_dim is None else v_dim,
        "mlp_hidden": 4 * width if mlp_hidden is None else mlp_hidden,
        "scale": qk_dim**-0.5 if scale is None else scale,
    }


def check_blocks(gelu: str, dropout: float, drop_path: float) -> None:
    """Raises ValueError unless `gelu` is one of the two forms and the rates are in [0, 1]."""
    if gelu not in ("exact", "tanh"):
        raise ValueError(f"gelu must be 'exact' or 'tanh', got {gelu!r}")
    for name, rate in (("dropout", dropout), ("drop_path", drop_path)):
        if not (is_real(rate) and 0 <= rate <= 1):
            raise ValueError(f"{name} must be from 0 to 1, got {rate!r}")
