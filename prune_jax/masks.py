"""Mask pytrees: made from scores, applied, counted. True keeps a weight, False cuts it, None leaves a leaf alone."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prune_jax.selection import MAX_GROUP_SIZE, keep_largest
from prune_jax.tree import PyTree, check_bool, check_count, is_none, map_masked, path_filter, path_name, widen

Scope = str | Callable[[str], str | None]
Exclude = str | Callable[[str], bool] | None


class LayerStatistics(NamedTuple):
    """One leaf's mask in numbers: weights kept, weights in all, fraction removed."""

    kept: int
    total: int
    sparsity: float


def make_masks(
    scores: PyTree,
    sparsity: float,
    scope: Scope = "global",
    *,
    exclude: Exclude = None,
    block: tuple[int, int] | None = None,
) -> PyTree:
    """Masks that cut the lowest scores.

    In each group of N scores exactly ``floor(sparsity * N)`` of the smallest are cut, as the decimals are written or
    meant: of 100, 0.29 are 29 and ``1 - 0.9`` are 10, though the products of these floats are below that. Among equal
    scores the earlier ones in the tree are cut first, so the result is deterministic.

    Args:
        scores: pytree of floating-point scores, larger = keep; None where a leaf is not to be pruned.
        sparsity: fraction removed, in [0, 1].
        scope: what competes: ``"global"`` (all leaves together), ``"local"`` (each leaf by itself), or a function
            from a leaf's path (such as ``"encoder/mlp/fc1/kernel"``) to a module's name; leaves of one name compete
            with each other, and None leaves a leaf alone.
        exclude: leaves to leave alone: a regular expression searched for in the path, or a predicate on the path.
        block: ``(rows, columns)`` of the last two axes: whole blocks are cut, by the sum of their scores; exact
            counts are then counts of blocks.

    Returns:
        Pytree of bool like ``scores``: True = keep; None where a leaf is left alone.

    Raises:
        ValueError: sparsity outside [0, 1], NaN scores, an unknown scope, a block that is not two whole numbers, or a
            shape that blocks do not divide.
        TypeError: scores that are not floating point, or a traced sparsity (counts must be known when tracing).

    Example:
        >>> import jax.numpy as jnp
        >>> from prune_jax import make_masks
        >>> make_masks({"w": jnp.array([3.0, 1.0, 2.0, 4.0]), "bias": None}, 0.5)
        {'bias': None, 'w': Array([ True, False, False,  True], dtype=bool)}
    """
    sparsity = check_sparsity(sparsity)
    groups = group_leaves(scores, scope, exclude)
    if callable(scope):  # what it leaves alone is not looked at either
        excluded, module = path_filter(exclude), scope
        exclude = lambda path: excluded(path) or module(path) is None  # noqa: E731
    _check_scores(scores, exclude)
    if block is None:
        return masks_from_counts(scores, groups, cut_counts(scores, groups, sparsity))
    if not isinstance(block, Sequence) or len(block) != 2:
        raise ValueError(f"block must be (rows, columns) of the last two axes, got {block!r}")
    for name, side in zip(("block's rows", "block's columns"), block, strict=True):
        check_count(name, side, 1)
    blocks = _map_named(lambda name, leaf: _block_sums(name, leaf, block), scores, exclude)
    _check_scores(blocks, None)  # inf - inf
    masks = masks_from_counts(blocks, groups, cut_counts(blocks, groups, sparsity))
    return jax.tree.map(lambda mask: mask.repeat(block[0], -2).repeat(block[1], -1), masks)


def make_nm_masks(scores: PyTree, n: int = 2, m: int = 4, *, axis: int = -2, exclude: Exclude = None) -> PyTree:
    """N:M masks: of every ``m`` neighbours along an axis the ``n`` with the largest scores stay.

    Args:
        scores: pytree of scores, larger = keep; None where a leaf is not to be pruned.
        n: how many stay, in [0, m].
        m: how many neighbours compete.
        axis: the axis of neighbours. -2 is the input axis of Flax kernels, dense (in, out) and HWIO, which is the
            summed axis of the matrix product, as sparse tensor cores need it.
        exclude: as in ``make_masks``.

    Returns:
        Pytree of bool like ``scores``. Among equal scores the earlier ones are cut.

    Raises:
        ValueError: n or m no whole number, n outside [0, m], NaN scores, or an axis that ``m`` does not divide.

    Example:
        >>> import jax.numpy as jnp
        >>> from prune_jax import make_nm_masks
        >>> make_nm_masks({"w": jnp.array([[4.0], [1.0], [3.0], [2.0]])})["w"].ravel()
        Array([ True, False,  True, False], dtype=bool)

    Reference: Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv:2104.08378.
    """
    check_count("n", n, 0)
    check_count("m", m, 1)
    if n > m:
        raise ValueError(f"n={n}, m={m}: need 0 <= n <= m and m >= 1")
    _check_scores(scores, exclude)

    def mask(name: str, leaf: jax.Array) -> jax.Array:
        if leaf.ndim < max(-axis, axis + 1) or leaf.shape[axis] % m:
            raise ValueError(
                f"m={m} does not divide axis {axis} of {name!r} with shape {leaf.shape}; exclude it by path"
            )
        rows = jnp.moveaxis(leaf, axis, -1)
        order = jnp.argsort(rows.reshape(*rows.shape[:-1], -1, m), axis=-1, stable=True)
        keep = jnp.argsort(order, axis=-1) >= m - n  # the rank of each neighbour
        return jnp.moveaxis(keep.reshape(rows.shape), -1, axis)

    return _map_named(mask, scores, exclude)


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Parameters with every cut weight set to exactly zero.

    Args:
        params: any pytree of arrays.
        masks: pytree of bool like ``params``, None where a leaf is left alone.

    Returns:
        Pytree like ``params``, same dtypes.

    Raises:
        ValueError: structures or shapes differ; the paths are named.
        TypeError: masks that are not bool.

    Example:
        >>> import jax.numpy as jnp
        >>> from prune_jax import apply_masks
        >>> apply_masks({"w": jnp.array([5.0, 6.0])}, {"w": jnp.array([True, False])})
        {'w': Array([5., 0.], dtype=float32)}
    """
    # where, not a product: 0 * inf is NaN.
    return map_masked(lambda mask, leaf: jnp.where(mask, leaf, jnp.zeros_like(leaf)), masks, params)


def sparsity(masks: PyTree) -> float | jax.Array:
    """The fraction of the masked leaves' weights that is removed; leaves with None do not count.

    Args:
        masks: pytree of bool, None where a leaf is left alone.

    Returns:
        Fraction in [0, 1]: a float, or a traced scalar inside jit; 0 if nothing is masked.

    Raises:
        TypeError: masks that are not bool.

    Example:
        >>> import jax.numpy as jnp
        >>> from prune_jax import sparsity
        >>> sparsity({"w": jnp.array([True, False, False, False]), "bias": None})
        0.75
    """
    leaves = jax.tree.leaves(masks)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        check_bool(masks)
        cut = sum(jnp.sum(~leaf, dtype=jnp.float32) for leaf in leaves)
        return cut / sum(leaf.size for leaf in leaves)
    statistics = layer_statistics(masks).values()
    total = sum(layer.total for layer in statistics)
    return 1 - sum(layer.kept for layer in statistics) / total if total else 0.0


def layer_statistics(masks: PyTree) -> dict[str, LayerStatistics]:
    """How much of each leaf is left; ``kept == 0`` is a collapsed layer.

    Args:
        masks: pytree of bool, None where a leaf is left alone.

    Returns:
        Path of each masked leaf -> weights kept, weights in all, fraction removed.

    Raises:
        TypeError: masks that are not bool.

    Example:
        >>> import jax.numpy as jnp
        >>> from prune_jax import layer_statistics
        >>> layer_statistics({"w": jnp.array([True, False])})
        {'w': LayerStatistics(kept=1, total=2, sparsity=0.5)}
    """
    check_bool(masks)
    result = {}
    for path, mask in jax.tree_util.tree_flatten_with_path(masks)[0]:
        kept = int(jnp.sum(mask, dtype=jnp.uint32))
        result[path_name(path)] = LayerStatistics(kept, mask.size, 1 - kept / mask.size if mask.size else 0.0)
    return result


def check_sparsity(sparsity: float) -> float:
    """``sparsity`` as a Python float, or an error that says what is wrong with it."""
    if isinstance(sparsity, jax.core.Tracer):
        raise TypeError("sparsity is traced; it must be a number known when tracing, because it decides exact counts")
    if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real | np.ndarray | jax.Array):
        raise TypeError(f"sparsity must be a number in [0, 1], got {sparsity!r}")
    if np.ndim(sparsity):
        raise TypeError(f"sparsity must be one number in [0, 1], got an array of shape {np.shape(sparsity)}")
    value = np.asarray(sparsity)
    # The decimals that a float32 was written with: 0.9, not 0.89999998, of which int(0.9 * 10) would be 8.
    number = float(str(value[()])) if np.issubdtype(value.dtype, np.floating) else float(value)
    if not 0 <= number <= 1:
        raise ValueError(f"sparsity is the fraction removed and must be in [0, 1], got {sparsity!r}")
    return number


def group_leaves(scores: PyTree, scope: Scope, exclude: Exclude) -> list[list[int]]:
    """Which leaves compete: groups of indices into ``jax.tree.leaves(scores, is_leaf=is_none)``."""
    if isinstance(scope, str) and scope not in ("global", "local"):
        raise ValueError(f"scope must be 'global', 'local' or a function from path to module name, got {scope!r}")
    excluded = path_filter(exclude)
    groups: dict[str, list[int]] = {}
    for index, (path, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(scores, is_leaf=is_none)[0]):
        name = path_name(path)
        if leaf is None or excluded(name):
            continue
        module = {"global": "", "local": name}[scope] if isinstance(scope, str) else scope(name)
        if module is not None:
            groups.setdefault(module, []).append(index)
    return list(groups.values())


def cut_counts(scores: PyTree, groups: Sequence[Sequence[int]], sparsity: float) -> np.ndarray:
    """How many to cut in each group: ``floor(sparsity * N)`` but for rounding, uint32."""
    sizes = [0 if leaf is None else leaf.size for leaf in jax.tree.leaves(scores, is_leaf=is_none)]
    totals = [sum(sizes[index] for index in group) for group in groups]
    if max(totals, default=0) > MAX_GROUP_SIZE:
        raise ValueError(f"a group has {max(totals)} weights, more than {MAX_GROUP_SIZE}; use a finer scope")
    # 0.29 * 100 is 28.999999999999996: products are off by a few 1e-16 of themselves.
    return np.array([min(total, int(sparsity * total * (1 + 1e-14))) for total in totals], np.uint32)


def masks_from_counts(scores: PyTree, groups: Sequence[Sequence[int]], counts: np.ndarray | jax.Array) -> PyTree:
    """Masks with ``counts[g]`` (concrete or traced, uint32) of the smallest scores cut in each group."""
    leaves, treedef = jax.tree.flatten(scores, is_leaf=is_none)
    masks: list[jax.Array | None] = [None] * len(leaves)
    for group, count in zip(groups, counts, strict=True):
        for index, mask in zip(group, keep_largest([leaves[index] for index in group], count), strict=True):
            masks[index] = mask
    return jax.tree.unflatten(treedef, masks)


def nan_paths(scores: PyTree) -> list[str]:
    """The paths of leaves that hold a NaN; nothing inside jit, where values are not known."""
    named = jax.tree_util.tree_flatten_with_path(scores)[0]
    if any(isinstance(leaf, jax.core.Tracer) for _, leaf in named):
        return []
    flags = _any_nan([leaf for _, leaf in named])
    return [path_name(path) for (path, _), flag in zip(named, flags, strict=True) if flag]


@jax.jit
def _any_nan(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isnan(leaf).any() for leaf in leaves]


def check_floating(scores: PyTree, exclude: Exclude) -> PyTree:
    """``scores`` without what is excluded; TypeError if a leaf is not a floating-point array."""
    return _map_named(_floating, scores, exclude)


def _check_scores(scores: PyTree, exclude: Exclude) -> None:
    scores = check_floating(scores, exclude)
    if bad := nan_paths(scores):
        raise ValueError(f"scores are NaN in {bad[:5]}; check the inputs and the loss they were computed from")


def _floating(name: str, leaf: jax.Array) -> jax.Array:
    if not hasattr(leaf, "shape"):
        raise TypeError(f"scores: {name!r} is {leaf!r}, scores must be arrays")
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
        raise TypeError(f"scores: {name!r} has dtype {jnp.result_type(leaf)}, scores must be floating point")
    return leaf


def _map_named(function: Callable, scores: PyTree, exclude: Exclude) -> PyTree:
    """``function(path, leaf)`` on every leaf that is not excluded, None elsewhere."""
    excluded = path_filter(exclude)

    def apply(path: tuple, leaf: jax.Array) -> jax.Array | None:
        return None if excluded(path_name(path)) else function(path_name(path), leaf)

    return jax.tree_util.tree_map_with_path(apply, scores)


def _block_sums(name: str, leaf: jax.Array, block: tuple[int, int]) -> jax.Array:
    if leaf.ndim < 2 or leaf.shape[-2] % block[0] or leaf.shape[-1] % block[1]:
        raise ValueError(f"block={block} does not divide {name!r} with shape {leaf.shape}; exclude it by path")
    rows, columns = leaf.shape[-2] // block[0], leaf.shape[-1] // block[1]
    return widen(leaf).reshape(*leaf.shape[:-2], rows, block[0], columns, block[1]).sum((-3, -1))
