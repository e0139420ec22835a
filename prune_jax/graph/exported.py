"""A pruned network in one file that runs without the code it came from, on CPUs, GPUs and TPUs.

The file: one line that names the format and its version, the SHA-256 of all that follows, and a zip archive of the
program (StableHLO, by ``jax.export``), the parameters as raw bytes, and ``header.json`` with their paths, shapes and
types and the plan. Nothing in it is a pickle: reading a file runs no code of its own.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from prune_jax.graph.program import abstract, keys
from prune_jax.graph.pruning import Pruned
from prune_jax.graph.schema import check_plan

MAGIC, VERSION = b"prune_jax.graph network ", b"1\n"
PLATFORMS = ("cpu", "cuda", "tpu")
KNOWN = (*PLATFORMS, "rocm")
DIGEST = hashlib.sha256().digest_size


def save_exported(
    path: str | os.PathLike,
    pruned: Pruned,
    *args: Any,
    platforms: Sequence[str] = PLATFORMS,
    free_batch: bool = True,
) -> None:
    """Write a pruned network to a file, whole or not at all.

    Args:
        path: File to write; a file of this name is replaced.
        pruned: From ``prune``; trained or recovered parameters go in by ``dataclasses.replace(pruned, params=...)``.
        *args: Example arguments after the parameters, arrays or ``jax.ShapeDtypeStruct``.
        platforms: Where it shall run: among "cpu", "cuda", "rocm" and "tpu".
        free_batch: Whether the first axis of every argument is a batch size that stays free. If not, the shapes are
            those of ``args``, which may hold symbolic sizes of their own (``jax.export.symbolic_shape``).

    Raises:
        ValueError: Another platform; an argument without axes, which cannot have a batch size; a parameter that is a
            PRNG key.
        OSError: The file cannot be written.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> from prune_jax.graph import load_exported, prune
        >>> params = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2))}
        >>> small = prune(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, jnp.ones((1, 3)), ratio=0.5)
        >>> path = tempfile.mkdtemp() + "/small.jaxnet"
        >>> save_exported(path, small, jnp.ones((1, 3)))
        >>> again = load_exported(path)
        >>> again.fn(again.params, jnp.ones((7, 3))).shape
        (7, 2)

    Reference: https://docs.jax.dev/en/latest/export/export.html (programs stay readable for at least six months).
    """
    if isinstance(platforms, str) or not platforms or not set(platforms) <= set(KNOWN):
        raise ValueError(f"platforms must be some of {', '.join(KNOWN)}, got {platforms!r}")
    flat, tree = jax.tree_util.tree_flatten_with_path(pruned.params)
    leaves = [x for _, x in flat]
    for where, x in flat:
        if jnp.issubdtype(x.dtype, jax.dtypes.extended):
            raise ValueError(f"parameter {'/'.join(keys(where))!r} is of type {x.dtype}, which a file cannot hold")
    specs = _free(abstract(args)) if free_batch else abstract(args)

    def run(leaves: list, *args: Any) -> Any:
        return pruned.fn(jax.tree.unflatten(tree, leaves), *args)

    program = export.export(jax.jit(run), platforms=platforms)(abstract(leaves), *specs)
    header = {
        "parameters": [
            {"path": list(keys(where)), "shape": list(np.shape(x)), "dtype": jnp.dtype(x.dtype).name}
            for where, x in flat
        ],
        "plan": pruned.plan,
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("header.json", json.dumps(header))
        archive.writestr("program", bytes(program.serialize()))
        archive.writestr("parameters", b"".join(np.ascontiguousarray(x).tobytes() for x in leaves))
    content = buffer.getvalue()
    _write_whole(Path(path), MAGIC + VERSION + hashlib.sha256(content).digest() + content)


def load_exported(path: str | os.PathLike) -> Pruned:
    """Read a network that ``save_exported`` wrote.

    Args:
        path: The file.

    Returns:
        ``fn`` (under jit too, but neither under vmap nor with derivatives), ``params`` and ``plan``. The parameters are
        nested dicts by path, whatever they were before.

    Raises:
        ValueError: Not such a file, damaged, or of a version that this library does not read.
        OSError: The file cannot be read.
    """
    content = Path(path).read_bytes()
    start = len(MAGIC)
    if content[:start] != MAGIC:
        raise ValueError(f"{path} is no network written by save_exported")
    version, _, rest = content[start:].partition(b"\n")
    if version + b"\n" != VERSION:
        raise ValueError(
            f"{path} has version {version.decode(errors='replace')!r}; this library reads {VERSION.decode().strip()!r}"
        )
    digest, body = rest[:DIGEST], rest[DIGEST:]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError(f"{path} is damaged: its {len(content)} bytes do not match their checksum; export it again")
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        header = json.loads(archive.read("header.json"))
        program = export.deserialize(bytearray(archive.read("program")))
        raw = archive.read("parameters")
    check_plan(header["plan"])
    paths, leaves, at = [], [], 0
    for entry in header["parameters"]:
        dtype = jnp.dtype(entry["dtype"])
        count = int(np.prod(entry["shape"], dtype=int))
        leaves.append(jnp.asarray(np.frombuffer(raw, dtype, count, at).reshape(entry["shape"])))
        paths.append(tuple(entry["path"]))
        at += count * dtype.itemsize

    def fn(params: Any, *args: Any) -> Any:
        given = dict(_leaves(params))
        if set(given) != set(paths):
            raise ValueError(
                f"parameters must have the leaves {['/'.join(p) for p in paths]}, got {['/'.join(p) for p in given]}"
            )
        return program.call([given[p] for p in paths], *args)

    return Pruned(fn, _nested(paths, leaves), header["plan"])


def _leaves(params: Any) -> list[tuple[tuple[str, ...], Any]]:
    return [(keys(where), x) for where, x in jax.tree_util.tree_flatten_with_path(params)[0]]


def _nested(paths: list[tuple[str, ...]], leaves: list) -> Any:
    if paths == [()]:
        return leaves[0]
    tree: dict = {}
    for path, leaf in zip(paths, leaves, strict=True):
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def _free(specs: Any) -> Any:
    """The same shapes with one symbol for all first axes."""
    (batch,) = export.symbolic_shape("batch")

    def free(spec: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if not spec.shape:
            raise ValueError("an argument without axes has no batch axis: give free_batch=False and symbolic shapes")
        return jax.ShapeDtypeStruct((batch, *spec.shape[1:]), spec.dtype)

    return jax.tree.map(free, specs)


def _write_whole(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
