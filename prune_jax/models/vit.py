"""Vision transformers whose every width is an argument, so that a pruned one is an ordinary one.

References: Dosovitskiy et al. 2021, arXiv:2010.11929 (ViT); Touvron et al. 2021, arXiv:2012.12877 (DeiT, distillation
token); Darcet et al. 2024, arXiv:2309.16588 (registers).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange, repeat
from jax import Array

from prune_jax.models.layers import (
    BLOCK_WIDTHS,
    Block,
    Gelu,
    check_blocks,
    dense,
    drop_path_rates,
    each_layer,
    fill_widths,
    initialise,
)
from prune_jax.tree import check_count, widen

SIZES: dict[str, dict[str, Any]] = {
    "Ti": {"width": 192, "depth": 12, "heads": 3},
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
}


class EncoderBlock(Block):
    """One encoder block: x + attention(norm(x)), then x + mlp(norm(x)); attributes as of `layers.Block`.

    Methods that change which tokens a block computes, or how they attend, put it together from its parts::

        q, k, v = block.attention.project(block.norm1(x))
        e = block.attention.exponentials(q, k)
        x = block.add(x, block.attention.combine(e, v), train=train)
        x = block.feed_forward(x, train=train)  # the same as block(x, train=train)
    """

    norm_epsilon = 1e-6
    token_axes = (1, 2)

    def __call__(self, x: Array, *, weights: Array | None = None, train: bool = False) -> Array:
        """Tokens (B, N, D) -> (B, N, D); `weights` as `Attention.exponentials` takes them."""
        x = self.add(x, self.attention(self.norm1(x), weights=weights), train=train)
        return self.feed_forward(x, train=train)


class ViT(nn.Module):
    """Vision transformer, with DeiT's distillation token and registers as options.

    Tokens are ordered: class token, distillation token, registers (`prefix` tokens in all), then patches row by row.

    A function of the bound module reaches every part, so a method that looks between the blocks needs no copy of the
    model: ``embed``, ``blocks``, ``head`` are the parts of ``__call__``::

        def forward(model, images):
            x = model.embed(images)
            for block in model.blocks:
                x = block(x)
            return model.head(x)

        model.apply(variables, images, method=forward)  # the same as model.apply(variables, images)

    and so does a module that holds a ViT as an attribute.

    Attributes:
      num_classes: outputs.
      image_size: height and width, or one number for both.
      patch: side of a patch; divides the image size.
      width: channels of a token.
      depth: number of blocks.
      heads: heads of each layer, one number or one a layer.
      qk_dim: query and key channels of a head, one number or one a layer; None is width / heads.
      v_dim: value channels of a head, likewise.
      mlp_hidden: hidden channels of the MLP, one number or one a layer; None is 4 width.
      scale: factor on the attention logits, likewise; None is qk_dim ** -0.5. A pruned model keeps the dense one's.
      pool: what the head sees: "token" (class token) or "mean" (of the patches; there is no class token).
      distilled: adds a distillation token with a head of its own; the logits are the mean of both.
      registers: tokens without position that only take part in attention.
      pre_logits: width of a tanh layer before the head (Google's pre-training); None has no such layer.
      gelu: "exact" (timm, DeiT) or "tanh" (Google's weights).
      dropout: rate after embedding, attention and MLP layers, in training (rng "dropout").
      drop_path: stochastic depth; the rate of the last block, in training.
      compute_dtype: dtype of the matmuls, such as jnp.bfloat16; None keeps float32. Parameters and tokens stay float32.

    Example:
      >>> import jax
      >>> model = vit("Ti", image_size=32, patch=4, num_classes=10, depth=2)
      >>> images, key = jnp.zeros((5, 32, 32, 3)), jax.random.key(0)
      >>> jax.eval_shape(lambda: model.init_with_output(key, images))[0].shape
      (5, 10)
      >>> narrow = model.clone(heads=(2, 3), qk_dim=(16, 24), v_dim=(32, 64), mlp_hidden=(100, 700), scale=64**-0.5)
      >>> variables = jax.eval_shape(narrow.init, key, images)
      >>> variables["params"]["blocks_0"]["mlp"]["fc1"]["kernel"].shape
      (192, 100)
    """

    num_classes: int
    image_size: int | Sequence[int] = 224
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int | Sequence[int] = 12
    qk_dim: int | Sequence[int] | None = None
    v_dim: int | Sequence[int] | None = None
    mlp_hidden: int | Sequence[int] | None = None
    scale: float | Sequence[float] | None = None
    pool: Literal["token", "mean"] = "token"
    distilled: bool = False
    registers: int = 0
    pre_logits: int | None = None
    gelu: Gelu = "exact"
    dropout: float = 0.0
    drop_path: float = 0.0
    compute_dtype: Any = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = each_layer("image_size", self.image_size, 2)
        check_count("patch", self.patch, 1)
        if rows % self.patch or columns % self.patch:
            raise ValueError(f"patch must divide the image size, got patch {self.patch} and image_size {rows, columns}")
        return rows // self.patch, columns // self.patch

    @property
    def class_tokens(self) -> int:
        """Tokens that heads look at: class and distillation token."""
        return (self.pool == "token") + self.distilled

    @property
    def prefix(self) -> int:
        """Tokens before the patches: class and distillation token, registers."""
        return self.class_tokens + self.registers

    @property
    def block_widths(self) -> list[dict[str, Any]]:
        """Each block's width, heads, qk_dim, v_dim, mlp_hidden and scale, with the defaults filled in."""
        settings = {name: each_layer(name, getattr(self, name), self.depth) for name in BLOCK_WIDTHS}
        return [fill_widths(self.width, **{name: x[i] for name, x in settings.items()}) for i in range(self.depth)]

    def setup(self) -> None:
        """Declares the parts."""
        self._check()
        dtype = self.compute_dtype
        self.embedding = dense(self.width, dtype)
        if self.pool == "token":
            self.class_token = self.param("class_token", initialise, (1, 1, self.width))
        if self.distilled:
            self.distillation_token = self.param("distillation_token", initialise, (1, 1, self.width))
        if self.registers:
            self.register_tokens = self.param("register_tokens", initialise, (1, self.registers, self.width))
        positions = self.class_tokens + self.grid[0] * self.grid[1]
        self.position_embedding = self.param("position_embedding", initialise, (1, positions, self.width))
        self.drop_units = nn.Dropout(self.dropout)
        rates = drop_path_rates(self.drop_path, self.depth)
        common = {"gelu": self.gelu, "dropout": self.dropout, "compute_dtype": dtype}
        self.blocks = [EncoderBlock(**w, **common, drop_path=r) for w, r in zip(self.block_widths, rates, strict=True)]
        self.norm = nn.LayerNorm(epsilon=1e-6, dtype=dtype)
        if self.pre_logits is not None:
            self.pre_logits_dense = dense(self.pre_logits, dtype)
        self.class_head = dense(self.num_classes, dtype)
        if self.distilled:
            self.distillation_head = dense(self.num_classes, dtype)

    def __call__(self, images: Array, *, train: bool = False) -> Array:
        """Images (B, H, W, C) -> logits (B, num_classes), float32."""
        return self.head(self.encode(images, train=train))

    def encode(self, images: Array, *, train: bool = False) -> Array:
        """Images (B, H, W, C) -> tokens after the last block (B, prefix + patches, D), not normalised."""
        x = self.embed(images, train=train)
        for block in self.blocks:
            x = block(x, train=train)
        return x

    def embed(self, images: Array, *, train: bool = False) -> Array:
        """Images (B, H, W, C) -> tokens with positions (B, prefix + patches, D).

        Raises:
          ValueError: images of another size.
        """
        rows, columns = self.grid
        if images.ndim != 4 or images.shape[1:3] != (rows * self.patch, columns * self.patch):
            raise ValueError(
                f"images must be (batch, {rows * self.patch}, {columns * self.patch}, channels), got {images.shape}"
            )
        # a convolution whose stride is its size is one matmul
        patches = rearrange(images, "b (i p) (j q) c -> b (i j) (p q c)", p=self.patch, q=self.patch)
        x = widen(self.embedding(patches))  # tokens stay float32: in half precision every sum of a block would round
        prefix = [self.class_token] if self.pool == "token" else []
        prefix += [self.distillation_token] if self.distilled else []
        x = self._after(prefix, x) + self.position_embedding.astype(x.dtype)
        if self.registers:
            x = jnp.concatenate(
                [x[:, : self.class_tokens], self._after([self.register_tokens], x[:, self.class_tokens :])], axis=1
            )
        return self.drop_units(x, deterministic=not train)

    def head(self, tokens: Array, *, weights: Array | None = None) -> Array:
        """Tokens after the last block (B, N, D) -> logits (B, num_classes), float32; the mean of both if distilled.

        `weights` (B, N - prefix) are those of the patches where pool is "mean"; other pooling sees no patches.
        """
        logits = self.heads_apart(tokens, weights=weights)
        return sum(logits[1:], logits[0]) / len(logits)

    def heads_apart(self, tokens: Array, *, weights: Array | None = None) -> tuple[Array, ...]:
        """Tokens after the last block (B, N, D) -> the logits of each head: class, then distillation."""
        if self.pool == "mean":
            patches = self.norm(tokens[:, self.prefix :])
            if weights is not None:
                total = weights.sum(axis=1, keepdims=True)
                # an image that has lost all patches divides by one's worth: a small number would blow up the gradient
                share = weights / jnp.where(total > 0, total, 1) * weights.shape[1]
                patches = patches * share[..., None].astype(patches.dtype)
            seen = patches.mean(axis=1, keepdims=True)
        else:
            seen = self.norm(tokens[:, : self.class_tokens])
        features = seen[:, 0]
        if self.pre_logits is not None:
            features = jnp.tanh(self.pre_logits_dense(features))
        logits = [self.class_head(features)]
        if self.distilled:
            logits.append(self.distillation_head(seen[:, 1]))
        return tuple(x.astype(jnp.float32) for x in logits)

    def _after(self, tokens: Sequence[Array], x: Array) -> Array:
        """Learned tokens (1, n, D) put before those of each example (B, N, D)."""
        wide = [repeat(t.astype(x.dtype), "1 n d -> b n d", b=x.shape[0]) for t in tokens]
        return jnp.concatenate([*wide, x], axis=1)

    def _check(self) -> None:
        check_blocks(self.gelu, self.dropout, self.drop_path)
        check_count("depth", self.depth, 1)
        check_count("registers", self.registers, 0)
        if self.pool not in ("token", "mean"):
            raise ValueError(f"pool must be 'token' or 'mean', got {self.pool!r}")
        if self.distilled and self.pool == "mean":
            raise ValueError("distilled needs pool='token': the class and the distillation token have a head each")


def vit(size: str, *, num_classes: int, **settings: Any) -> ViT:
    """A ViT of a published size.

    Args:
      size: "Ti", "S", "B" or "L".
      num_classes: outputs.
      **settings: any attribute of `ViT`.

    Returns:
      The module.

    Raises:
      ValueError: no such size.

    Example:
      >>> vit("S", num_classes=10, image_size=32, patch=4).grid
      (8, 8)
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    return ViT(num_classes=num_classes, **(SIZES[size] | settings))
