"""Which arrays of a published file make which parameter, and how: one table for each layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import numpy as np
from einops import rearrange

from prune_jax.models.swin import Swin
from prune_jax.models.vit import ViT

Convert = Callable[..., Any]
Grid = tuple[int, int]  # rows and columns of patches


class Entry(NamedTuple):
    """A parameter's path here, the keys in the file it is made of, and the function of their arrays that makes it."""

    path: str
    keys: tuple[str, ...]
    convert: Convert


def google_vit(model: ViT, keys: Collection[str], position_grid: Grid | None = None) -> list[Entry]:
    """Google's ViT. Newer files number the parts of a block by kind, older ones in one sequence."""
    in_sequence = "Transformer/encoderblock_0/LayerNorm_2/scale" in keys
    attention, norm2, mlp = (1, 2, 3) if in_sequence else (0, 1, 0)

    def layer(path: str, key: str, kernel: Convert = np.asarray) -> list[Entry]:
        return [
            Entry(f"{path}/kernel", (f"{key}/kernel",), kernel),
            Entry(f"{path}/bias", (f"{key}/bias",), np.asarray),
        ]

    def norm(path: str, key: str) -> list[Entry]:
        return [Entry(f"{path}/{part}", (f"{key}/{part}",), np.asarray) for part in ("scale", "bias")]

    entries = layer("embedding", "embedding", lambda w: rearrange(w, "p q c o -> (p q c) o"))
    if model.pool == "token":
        entries.append(Entry("class_token", ("cls",), np.asarray))
    positions = "Transformer/posembed_input/pos_embedding"
    entries.append(Entry("position_embedding", (positions,), lambda t: split_positions(model, t, position_grid)[0]))
    for i in range(model.depth):
        ours, theirs = f"blocks_{i}", f"Transformer/encoderblock_{i}"
        heads = f"{theirs}/MultiHeadDotProductAttention_{attention}"
        for part in ("kernel", "bias"):
            each = tuple(f"{heads}/{name}/{part}" for name in ("query", "key", "value"))
            entries.append(Entry(f"{ours}/attention/qkv/{part}", each, _join_heads))
        entries += layer(f"{ours}/attention/proj", f"{heads}/out", lambda w: rearrange(w, "h d o -> (h d) o"))
        entries += norm(f"{ours}/norm1", f"{theirs}/LayerNorm_0") + norm(f"{ours}/norm2", f"{theirs}/LayerNorm_{norm2}")
        entries += layer(f"{ours}/mlp/fc1", f"{theirs}/MlpBlock_{mlp}/Dense_0")
        entries += layer(f"{ours}/mlp/fc2", f"{theirs}/MlpBlock_{mlp}/Dense_1")
    entries += norm("norm", "Transformer/encoder_norm")
    if model.pre_logits is not None:
        entries += layer("pre_logits_dense", "pre_logits")
    return entries + layer("class_head", "head")


def timm_vit(model: ViT, position_grid: Grid | None = None) -> list[Entry]:
    """timm's ViT and DeiT. Position embeddings may cover all tokens, all but the registers, or the patches alone."""
    entries = _linear("embedding", "patch_embed.proj", lambda w: rearrange(w, "o c p q -> (p q c) o"))
    if model.pool == "token":
        entries.append(Entry("class_token", ("cls_token",), np.asarray))
    if model.distilled:
        entries.append(Entry("distillation_token", ("dist_token",), np.asarray))
    if model.registers:
        of_registers = lambda r, t: r + split_positions(model, t, position_grid)[1]  # noqa: E731
        entries.append(Entry("register_tokens", ("reg_token", "pos_embed"), of_registers))
    entries.append(Entry("position_embedding", ("pos_embed",), lambda t: split_positions(model, t, position_grid)[0]))
    for i, widths in enumerate(model.block_widths):
        entries += _block(f"blocks_{i}", f"blocks.{i}", widths)
    entries += _norm("norm", "norm")
    if model.pre_logits is not None:
        entries += _linear("pre_logits_dense", "pre_logits.fc")
    entries += _linear("class_head", "head")
    return entries + (_linear("distillation_head", "head_dist") if model.distilled else [])


def swin(model: Swin, keys: Collection[str]) -> list[Entry]:
    """timm's Swin, which merges patches at the start of a stage, and the original, which does so at its end."""
    first = 0 if "layers.0.downsample.reduction.weight" in keys else 1
    entries = _linear("embedding", "patch_embed.proj", lambda w: rearrange(w, "o c p q -> (p q c) o"))
    entries += _norm("embedding_norm", "patch_embed.norm")
    for stage, blocks in enumerate(model.block_widths):
        if stage > 0:
            theirs = f"layers.{stage - 1 + first}.downsample"
            entries += _norm(f"merging_{stage - 1}/norm", f"{theirs}.norm")
            entries.append(
                Entry(f"merging_{stage - 1}/reduction/kernel", (f"{theirs}.reduction.weight",), np.transpose)
            )
        for b, widths in enumerate(blocks):
            ours, theirs = f"blocks_{stage}_{b}", f"layers.{stage}.blocks.{b}"
            table = f"{theirs}.attn.relative_position_bias_table"
            side = 2 * model.windows[stage] - 1
            entries.append(Entry(f"{ours}/relative_position_bias", (table,), lambda t, side=side: _biases(t, side)))
            entries += _block(ours, theirs, widths)
    entries += _norm("norm", "norm")
    return entries + _linear("class_head", "head.fc" if "head.fc.weight" in keys else "head")


def split_positions(model: ViT, table: np.ndarray, position_grid: Grid | None = None) -> tuple[Any, Any]:
    """A file's position embedding (1, n, D) as ours (1, class tokens + patches, D), and the registers' part of it.

    Tokens that the file gives no position get zeros. Patches are resampled bicubically (antialiased, as timm does)
    where the file's grid is not the model's.

    Raises:
      ValueError: a number of positions that no grid has, or more than one may have.
    """
    count, width = table.shape[1:]
    lead, grid = _layout(model, count, position_grid)
    before = np.zeros((1, model.prefix, width), table.dtype)
    before[:, :lead] = table[:, :lead]
    patches: Any = table[:, lead:].reshape(1, *grid, width)
    if grid != model.grid:
        patches = np.asarray(jax.image.resize(patches, (1, *model.grid, width), "bicubic"))
    patches = patches.reshape(1, -1, width)
    return np.concatenate([before[:, : model.class_tokens], patches], 1), before[:, model.class_tokens :]


def _layout(model: ViT, count: int, position_grid: Grid | None) -> tuple[int, Grid]:
    """How many of a file's positions come before those of the patches, and the grid of these.

    The file has the model's tokens, else its keys would not fit, but it may give positions to all, to all but the
    registers, or to the patches alone. Its grid is ``position_grid`` where that is given, otherwise square if it can
    be, since published ones are; otherwise the model's.
    """
    layouts: dict[int, Grid] = {}
    for lead in (model.prefix, model.class_tokens, 0):
        patches = count - lead
        side = math.isqrt(max(patches, 0))
        square = side > 0 and side**2 == patches
        grid = position_grid or ((side, side) if square else model.grid)
        if math.prod(grid) == patches:
            layouts[lead] = grid
    exact = {lead: grid for lead, grid in layouts.items() if grid == model.grid and grid[0] == grid[1]}
    layouts = exact or layouts
    if len(layouts) == 1:
        return next(iter(layouts.items()))
    if not layouts:
        wanted = f"square grid of patches or {model.grid}" if position_grid is None else f"grid {position_grid}"
        raise ValueError(f"{count} positions are no {wanted}, with or without {model.prefix} more")
    found = " or ".join(f"{lead} + {rows} x {columns}" for lead, (rows, columns) in layouts.items())
    raise ValueError(f"{count} positions may be {found}: say which by position_grid=(rows, columns)")


def _biases(table: np.ndarray, side: int) -> np.ndarray:
    """Relative position biases (s * s, heads), resampled where the file has another window."""
    source = math.isqrt(len(table))
    if source == side or source**2 != len(table):
        return table
    grid = table.reshape(source, source, -1)
    return np.asarray(jax.image.resize(grid, (side, side, grid.shape[-1]), "bicubic")).reshape(side * side, -1)


def _block(ours: str, theirs: str, widths: dict[str, Any]) -> list[Entry]:
    """timm's and the original Swin's block."""

    def split(w: np.ndarray) -> np.ndarray:
        ends = np.cumsum([widths["heads"] * widths["qk_dim"]] * 2)
        parts = (rearrange(x, "(h d) ... -> ... h d", h=widths["heads"]) for x in np.split(w, ends))
        return _join_heads(*parts)

    return [
        *_norm(f"{ours}/norm1", f"{theirs}.norm1"),
        Entry(f"{ours}/attention/qkv/kernel", (f"{theirs}.attn.qkv.weight",), split),
        Entry(f"{ours}/attention/qkv/bias", (f"{theirs}.attn.qkv.bias",), split),
        *_linear(f"{ours}/attention/proj", f"{theirs}.attn.proj"),
        *_norm(f"{ours}/norm2", f"{theirs}.norm2"),
        *_linear(f"{ours}/mlp/fc1", f"{theirs}.mlp.fc1"),
        *_linear(f"{ours}/mlp/fc2", f"{theirs}.mlp.fc2"),
    ]


def _join_heads(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """(..., heads, dim) each -> (..., heads * 3 dims), sorted by head."""
    return rearrange(np.concatenate([q, k, v], -1), "... h d -> ... (h d)")


def _linear(path: str, key: str, kernel: Convert = np.transpose) -> list[Entry]:
    return [
        Entry(f"{path}/kernel", (f"{key}.weight",), kernel),
        Entry(f"{path}/bias", (f"{key}.bias",), np.asarray),
    ]


def _norm(path: str, key: str) -> list[Entry]:
    return [
        Entry(f"{path}/scale", (f"{key}.weight",), np.asarray),
        Entry(f"{path}/bias", (f"{key}.bias",), np.asarray),
    ]
