"""What the rest of the package asks of a parameter tree: paths, which leaves are prunable, matching structures."""

from __future__ import annotations

import numbers
import operator
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

PyTree = Any
Prunable = Callable[[str, jax.Array], bool]


def path_name(path: tuple) -> str:
    """A leaf's key path as one string, such as ``params/Dense_0/kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


# How Flax, Haiku, Equinox, timm and the models here name parameters that add or look up instead of multiplying. They
# have two axes where layers are stacked (nn.scan), as the biases of Flax's attention, (heads, features), always have.
_NOT_A_KERNEL = re.compile(r"(^|_)(bias|scale|offset|embedding|embeddings|embed|token|tokens|bias_table)$")


def is_kernel(path: str, leaf: jax.Array) -> bool:
    """Whether a leaf is a weight kernel: two or more axes, and not named as a bias, scale, embedding or token is.

    Args:
        path: the leaf's path, such as ``Dense_0/kernel``; its last name counts (in NNX the one before ``value``).
        leaf: the parameter.

    Returns:
        True for the matrices of dense and the kernels of convolution layers, under whatever name. False for one axis;
        for ``query/bias`` of Flax's attention, with its two axes, and the stacked biases and scales of ``nn.scan``;
        for ``nn.Embed``'s ``embedding``; for ``class_token``, ``position_embedding``, ``pos_embed``, ``cls_token``,
        ``relative_position_bias_table`` and the like. Where these are to be pruned too, give a ``prunable`` of your
        own, such as ``lambda path, leaf: leaf.ndim >= 2``.
    """
    return jnp.ndim(leaf) >= 2 and not _NOT_A_KERNEL.search(path.removesuffix("/value").rpartition("/")[2])


def select(params: PyTree, prunable: Prunable) -> PyTree:
    """``params`` with None in place of every leaf that is not floating point or not ``prunable(path, leaf)``."""

    def keep(path: tuple, leaf: jax.Array) -> jax.Array | None:
        floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return leaf if floating and prunable(path_name(path), leaf) else None

    return jax.tree_util.tree_map_with_path(keep, params)


def merge(selected: PyTree, params: PyTree) -> PyTree:
    """``params`` with the leaves of ``selected`` put back where ``selected`` is not None."""
    return jax.tree.map(lambda s, p: p if s is None else s, selected, params, is_leaf=is_none)


def is_none(node: object) -> bool:
    """Makes None a leaf: ``jax.tree.map(..., is_leaf=is_none)``."""
    return node is None


def path_filter(exclude: str | Callable[[str], bool] | None) -> Callable[[str], bool]:
    """The argument ``exclude`` as a predicate on paths: a regular expression to search for, a function, or None."""
    if exclude is None:
        return lambda path: False
    if isinstance(exclude, str):
        pattern = re.compile(exclude)
        return lambda path: pattern.search(path) is not None
    return exclude


def map_masked(function: Callable, masks: PyTree, tree: PyTree, *rest: PyTree, name: str = "params") -> PyTree:
    """``function(mask, leaf, ...)`` where there is a mask; leaves of ``tree`` without a mask pass unchanged.

    Raises:
        ValueError: ``masks`` and ``tree`` differ in structure or in a leaf's shape; the paths are named.
        TypeError: masks that are not bool.
    """
    _check_same_paths(masks, tree, name)
    check_bool(masks)

    def masked(path: tuple, mask: jax.Array | None, leaf: Any, *others: Any) -> Any:
        if mask is None or isinstance(leaf, optax.MaskedNode):  # MaskedNode: optax.masked hides this leaf from us
            return leaf
        if jnp.shape(mask) != jnp.shape(leaf):
            raise ValueError(
                f"masks: {path_name(path)!r} has shape {jnp.shape(mask)}, {name} has {jnp.shape(leaf)} there; "
                "make the masks from scores of these parameters"
            )
        return function(mask, leaf, *others)

    return jax.tree_util.tree_map_with_path(masked, masks, tree, *rest, is_leaf=is_none)


def widen(tree: PyTree) -> PyTree:
    """Half-precision leaves as float32: products of gradients, and second derivatives more so, leave float16's range.

    Wider leaves, and those that are not floating point, stay.
    """

    def wide(leaf: Any) -> Any:
        dtype = jnp.result_type(leaf)
        half = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
        return jnp.asarray(leaf, jnp.float32) if half else leaf

    return jax.tree.map(wide, tree)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """``tree`` in the dtypes of ``like``."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def require_params(params: PyTree | None, name: str) -> None:
    """An error for ``params=None``, which optax passes when the caller left it out."""
    if params is None:
        raise ValueError(f"{name} needs params: call init(params) and update(gradients, state, params)")


def check_bool(masks: PyTree) -> None:
    """Masks hold bools, None where a leaf is left alone; scores or 0/1 integers in their place are a slip.

    Raises:
        TypeError: another dtype; the path is named.
    """
    for path, mask in jax.tree_util.tree_flatten_with_path(masks)[0]:
        if jnp.result_type(mask) != jnp.bool_:
            raise TypeError(
                f"masks: {path_name(path)!r} has dtype {jnp.result_type(mask)}, masks are bool; make them "
                "by make_masks, or by .astype(bool)"
            )


def is_real(value: Any) -> bool:
    """Whether this is a real number: neither an array nor text, None or a bool; NaN is one."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_count(name: str, value: Any, least: int) -> int:
    """A whole number of at least ``least``.

    Raises:
        ValueError: anything else; the argument is named.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return number


def _check_same_paths(masks: PyTree, tree: PyTree, name: str) -> None:
    def is_leaf(node: object) -> bool:
        return node is None or isinstance(node, optax.MaskedNode)

    def leaves(tree: PyTree) -> dict[tuple, Any]:
        return dict(jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0])

    ours, theirs = leaves(masks), leaves(tree)
    unexpected = [path_name(path) for path, mask in ours.items() if mask is not None and path not in theirs]
    # A None in the masks may stand for a whole subtree, so a leaf is covered if any part of its path is in the masks.
    missing = [path_name(path) for path in theirs if not any(path[:n] in ours for n in range(len(path) + 1))]
    if unexpected or missing:
        raise ValueError(
            f"masks do not match {name}: masks without a leaf {unexpected[:5]}, leaves without a mask {missing[:5]}; "
            "make the masks from scores of these parameters"
        )
    try:
        jax.tree.map(lambda mask, leaf: None, masks, tree, is_leaf=is_leaf)
    except ValueError as error:  # the same names in containers of other types
        raise ValueError(f"masks do not match {name}: {error}") from None
