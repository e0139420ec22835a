"""Published checkpoints of ViT and Swin, read into the modules of this package.

| file | model | layout |
|---|---|---|
| `.npz` | ViT | Google's: both numberings of the encoder blocks' parts, `pre_logits` |
| `.safetensors` | ViT | timm's: ViT, DeiT, distilled DeiT, registers |
| `.safetensors` | Swin | timm's, and that of the original code |

Nothing is unpickled. A `.pth` file from the original Swin or DeiT code is turned into `.safetensors` by

    safetensors.torch.save_file(torch.load("in.pth", weights_only=True)["model"], "out.safetensors")
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import flax
import jax
import jax.numpy as jnp
import numpy as np
from einops import EinopsError
from safetensors import SafetensorError
from safetensors.flax import load_file

from prune_jax.models import key_tables
from prune_jax.models.key_tables import Entry, Grid
from prune_jax.models.swin import Swin
from prune_jax.models.vit import ViT

HEADS = ("class_head", "distillation_head")
TABLES = (".relative_position_index", ".attn_mask")  # in Swin files, but computed and not learned
BFLOAT16 = jnp.dtype(jnp.bfloat16)
SHOWN = 20  # keys named in an error; more are counted


def load_weights(
    model: ViT | Swin,
    path: str | PathLike,
    *,
    head: Literal["load", "zeros"] = "load",
    position_grid: Grid | None = None,
) -> dict[str, Any]:
    """Reads a published checkpoint into the variables of a model.

    Every parameter of the model must be in the file and every parameter of the file in the model. Two things are
    fitted: position embeddings for another grid of patches, and relative position biases for another window, are
    resampled bicubically. Google's weights want ``gelu="tanh"``, all others the default.

    Args:
      model: the module whose variables are wanted.
      path: a `.npz` or `.safetensors` file.
      head: "load" takes the file's head; "zeros" makes a new one of zeros, for any number of classes, to fine-tune
        from (with it go the `pre_logits` of the file, unless the model has them).
      position_grid: rows and columns of patches that a ViT's file has positions for; None takes them to be as many as
        each other where they can be, otherwise the model's.

    Returns:
      ``{"params": ...}`` as ``model.init`` gives, float32.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged file or one of another kind; missing, unexpected or non-finite parameters, or wrong shapes:
        all are named; positions that fit no grid, or more than one; a ``position_grid`` for a Swin, which has none.

    Example:
      >>> import tempfile
      >>> from safetensors.numpy import save_file
      >>> model = ViT(num_classes=10, image_size=8, patch=4, width=8, depth=1, heads=2)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_file({"cls_token": np.zeros((1, 1, 8), np.float32)}, f"{folder}/cut.safetensors")
      ...     load_weights(model, f"{folder}/cut.safetensors")
      Traceback (most recent call last):
      ValueError: ...cut.safetensors does not fit the model: missing 'blocks.0.attn.proj.bias', ...
    """
    if head not in ("load", "zeros"):
        raise ValueError(f"head must be 'load' or 'zeros', got {head!r}")
    path = Path(path)
    if position_grid is not None and isinstance(model, Swin):
        raise ValueError(f"position_grid must be None for a Swin, which has no position embedding, got {position_grid}")
    arrays = _read(path)
    entries = _entries(model, path, arrays, position_grid)
    fresh = [e for e in entries if head == "zeros" and e.path.split("/")[0] in HEADS]
    loaded = [e for e in entries if e not in fresh]
    if head == "zeros":
        arrays = _without_head(model, arrays)
    _check_keys(path, loaded, arrays)
    shapes = _shapes(model, arrays)
    if absent := set(shapes) - {e.path for e in entries}:  # such as registers, which Google's layout has no keys for
        raise ValueError(f"{path} does not fit the model: files of this layout never hold {_list(absent)}")
    params = {e.path: _parameter(path, e, arrays, shapes[e.path]) for e in loaded}
    params |= {e.path: jnp.zeros(shapes[e.path], jnp.float32) for e in fresh}
    return {"params": flax.traverse_util.unflatten_dict(params, sep="/")}


def _read(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file, by key, without what is no parameter.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged file or one of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{path} must be a .npz or .safetensors file; see prune_jax.models.weights for other kinds")
    try:
        if path.suffix == ".npz":
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
        else:
            arrays = {key: np.asarray(x) for key, x in load_file(path).items()}
    # whatever a damaged or foreign file makes the two readers raise
    except (SafetensorError, zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError) as e:
        raise ValueError(f"{path} is damaged or no {path.suffix} file: {e}") from e
    except (AttributeError, TypeError, KeyError, SyntaxError) as e:
        raise ValueError(f"{path} is damaged or no {path.suffix} file: {e!r}") from e
    return {key: x for key, x in arrays.items() if not key.endswith(TABLES)}


def _entries(model: ViT | Swin, path: Path, keys: Collection[str], position_grid: Grid | None) -> list[Entry]:
    """The table of this file's layout."""
    if isinstance(model, Swin):
        if path.suffix == ".npz":
            raise ValueError(f"{path} is a .npz file, which holds Google's ViT; a Swin is read from .safetensors")
        return key_tables.swin(model, keys)
    if path.suffix == ".npz":
        return key_tables.google_vit(model, keys, position_grid)
    return key_tables.timm_vit(model, position_grid)


def _without_head(model: ViT | Swin, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    head = ["head", "head_dist"]
    if isinstance(model, ViT) and model.pre_logits is None:
        head.append("pre_logits")
    return {key: x for key, x in arrays.items() if re.split(r"[./]", key)[0] not in head}


def _check_keys(path: Path, entries: Sequence[Entry], arrays: Mapping[str, np.ndarray]) -> None:
    needed = {key for e in entries for key in e.keys}
    wrong = {"missing": needed - set(arrays), "unexpected": set(arrays) - needed}
    if any(wrong.values()):
        named = "; ".join(f"{kind} {_list(keys)}" for kind, keys in wrong.items() if keys)
        raise ValueError(f"{path} does not fit the model: {named}")
    bad = [key for key in needed if not np.issubdtype(arrays[key].dtype, np.floating) and arrays[key].dtype != BFLOAT16]
    if bad:
        raise ValueError(f"{path}: parameters must be floating point, which {_list(bad)} are not")


def _shapes(model: ViT | Swin, arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's parameters, for images of as many channels as the file's patch embedding takes."""
    google = "embedding/kernel" in arrays
    kernel = arrays["embedding/kernel" if google else "patch_embed.proj.weight"]
    channels = kernel.shape[2 if google else 1] if kernel.ndim == 4 else 1  # another number of axes is an error later
    size = (model.grid[0] * model.patch, model.grid[1] * model.patch) if isinstance(model, ViT) else (model.patch,) * 2
    images = jax.ShapeDtypeStruct((1, *size, channels), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return {path: x.shape for path, x in flax.traverse_util.flatten_dict(shapes, sep="/").items()}


def _parameter(path: Path, entry: Entry, arrays: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> jax.Array:
    sources = [arrays[key].astype(np.float32) for key in entry.keys]
    of = ", ".join(f"{key!r} of shape {x.shape}" for key, x in zip(entry.keys, sources, strict=True))
    try:
        value = entry.convert(*sources)
    except (EinopsError, ValueError, IndexError) as e:
        raise ValueError(f"{path}: {of} cannot become {entry.path!r} of shape {shape}: {e}") from e
    if value.shape != shape:
        hint = "; for another number of classes pass head='zeros'" if entry.path.split("/")[0] in HEADS else ""
        raise ValueError(f"{path}: {of} gives {entry.path!r} the shape {value.shape}, the model has {shape}{hint}")
    if not np.isfinite(value).all():
        raise ValueError(f"{path}: {of} holds numbers that are not finite")
    return jnp.asarray(value)


def _list(keys: Collection[str]) -> str:
    names = ", ".join(repr(key) for key in sorted(keys)[:SHOWN])
    return names + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")
