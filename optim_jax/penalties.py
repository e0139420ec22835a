"""Proximal maps of sparsity penalties, and which leaf gets which: one small class a penalty."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


class Penalty:
    """Base class of penalties: `prox` is the maths, `active` says which groups it leaves nonzero.

    A subclass is a frozen dataclass of plain numbers. It is a pytree node without leaves, so that it can travel in an
    optimizer's state through jit, scan and checkpoints.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_static(cls)

    def prox(self, z: Array) -> Array:
        """Return argmin over x of ||x - z||^2 / 2 + penalty(x), an array like `z`."""
        raise NotImplementedError

    def active(self, z: Array) -> Array:
        """Return whether `prox(z)` is nonzero: bool, one entry a group, of `z`'s rank so that it broadcasts to `z`."""
        raise NotImplementedError


def _check_strength(strength: float) -> None:
    if not strength > 0:
        raise ValueError(f"strength must be > 0, got {strength}.")


@dataclasses.dataclass(frozen=True)
class L1(Penalty):
    """Soft threshold of every element: penalty strength * sum |x_i|, each element a group of its own.

    prox(z)_i = sign(z_i) * max(0, |z_i| - strength).

    Args:
      strength: weight of the penalty, > 0.

    Raises:
      ValueError: if `strength` is not positive.

    Example:
      >>> print(L1().prox(jnp.array([-3.0, 0.5, 2.0])))
      [-2.  0.  1.]
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        _check_strength(self.strength)

    def prox(self, z: Array) -> Array:
        """Soft-threshold each element of `z`."""
        return jnp.sign(z) * jnp.maximum(jnp.abs(z) - self.strength, 0)

    def active(self, z: Array) -> Array:
        """Return which elements exceed the threshold, an array shaped like `z`."""
        return jnp.abs(z) > self.strength


@dataclasses.dataclass(frozen=True)
class GroupLasso(Penalty):
    """Shrinkage of whole slices along `axis`: penalty strength * sum over groups g of c_g * ||x_g||_2.

    prox(z)_g = z_g * max(0, 1 - strength * c_g / ||z_g||_2), with c_g = 1 (the official DessiLBI code), or
    c_g = sqrt(elements in g) if `scale_by_size` (Yuan and Lin, 2006), which treats groups of all sizes alike.

    A group is what one index of `axis` selects: the default -1 makes the output filters of an HWIO kernel and the
    neurons of an (in, out) kernel; -2 the input channels of both; (-2, -1) the single 2-d filters of an HWIO kernel.

    Args:
      axis: axis, or axes, that index the groups.
      strength: weight of the penalty, > 0.
      scale_by_size: whether the threshold grows with the square root of the group's size.

    Raises:
      ValueError: if `strength` is not positive, or when an array has no such axis.

    Example:
      >>> print(GroupLasso().prox(jnp.array([[3.0, 0.3], [4.0, 0.4]])))
      [[2.4 0. ] [3.2 0. ]]

    Reference: Yuan and Lin, "Model selection and estimation in regression with grouped variables", 2006.
    """

    axis: int | tuple[int, ...] = -1
    strength: float = 1.0
    scale_by_size: bool = False

    def __post_init__(self) -> None:
        _check_strength(self.strength)

    def prox(self, z: Array) -> Array:
        """Shrink each group of `z` towards zero by its norm."""
        norm, threshold = self._norm_and_threshold(z)
        # The inner where keeps the branch not taken free of 0/0.
        shrinkage = jnp.where(norm > threshold, 1 - threshold / jnp.where(norm > threshold, norm, 1), 0)
        return shrinkage * z

    def active(self, z: Array) -> Array:
        """Return which groups' norms exceed the threshold, of `z`'s rank with 1 on the axes summed over."""
        norm, threshold = self._norm_and_threshold(z)
        return norm > threshold

    def _norm_and_threshold(self, z: Array) -> tuple[Array, float]:
        kept = {self.axis} if isinstance(self.axis, int) else set(self.axis)
        if not all(-z.ndim <= axis < z.ndim for axis in kept):
            raise ValueError(f"GroupLasso(axis={self.axis}) needs these axes, but the array has shape {z.shape}.")
        summed = tuple(axis for axis in range(z.ndim) if axis not in kept and axis - z.ndim not in kept)
        squared = jnp.sum(jnp.square(jnp.abs(z)), axis=summed, keepdims=True)
        # The root has no derivative at 0: groups of zeros take another number's, or reverse mode makes 0 * inf of it.
        norm = jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)
        size = math.prod(z.shape[axis] for axis in summed)
        return norm, self.strength * (math.sqrt(size) if self.scale_by_size else 1.0)


@dataclasses.dataclass(frozen=True)
class SparseGroup(Penalty):
    """Sparse-group lasso: an L1 and a group penalty on one leaf, so that kept groups are sparse inside.

    prox(z) = group.prox(l1.prox(z)), which is exact for this sum of penalties (Friedman et al., 2010, eq. 9).

    Args:
      l1: the penalty of elements.
      group: the penalty of groups; its groups are the ones whose activation is recorded.

    Example:
      >>> print(SparseGroup(L1(1.0), GroupLasso(axis=-1)).prox(jnp.array([[4.0, 1.5], [5.0, 0.5]])))
      [[2.4 0. ] [3.2 0. ]]

    Reference: Friedman, Hastie and Tibshirani, "A note on the group lasso and a sparse group lasso", 2010,
    arXiv:1001.0736.
    """

    l1: L1 = L1(0.5)
    group: GroupLasso = GroupLasso(strength=0.5)

    def prox(self, z: Array) -> Array:
        """Soft-threshold the elements, then shrink the groups."""
        return self.group.prox(self.l1.prox(z))

    def active(self, z: Array) -> Array:
        """Return which groups stay nonzero after both maps."""
        return self.group.active(self.l1.prox(z))


@dataclasses.dataclass(frozen=True)
class PenaltyRule:
    """Which leaf gets which penalty: `assign(path, shape)` returns a `Penalty`, or None for an unstructured leaf.

    It wraps the function because `optax.inject_hyperparams` takes every bare callable for a schedule.

    Args:
      assign: function of a leaf's path, such as `"conv1/kernel"`, and its shape.

    Example:
      >>> rule = PenaltyRule(lambda path, shape: GroupLasso(-2) if path.startswith("conv") else None)
      >>> assign_penalties(rule, {"conv1": {"kernel": jnp.ones((3, 3, 4, 8))}, "head": jnp.ones((8, 10))})
      {'conv1': {'kernel': GroupLasso(axis=-2, strength=1.0, scale_by_size=False)}, 'head': None}
    """

    assign: Callable[[str, tuple[int, ...]], Penalty | None]


def _by_rank(path: str, shape: tuple[int, ...]) -> Penalty | None:
    return {4: GroupLasso(axis=-1), 2: L1()}.get(len(shape))


default_penalty = PenaltyRule(_by_rank)
"""The official DessiLBI code's choice: output filters of 4-d kernels (HWIO) are groups, elements of 2-d kernels stand
alone, all other leaves are unstructured."""


def assign_penalties(penalty: Penalty | PenaltyRule | Callable[..., Penalty | None], params: Any) -> Any:
    """Return a tree like `params` with each leaf's penalty, or None where a leaf is unstructured.

    Args:
      penalty: a rule, or its bare function of path and shape; one `Penalty` goes to every leaf of two or more
        dimensions, which leaves biases and normalisation alone.
      params: pytree of arrays.

    Raises:
      TypeError: if `penalty`, or what the rule returns, is none of these.
      ValueError: if no leaf gets a penalty, although there are leaves, or if a penalty does not fit its leaf.

    Example:
      >>> assign_penalties(L1(), {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)})
      {'bias': None, 'kernel': L1(strength=1.0)}
    """
    if isinstance(penalty, Penalty):
        assign: Callable[..., Any] = lambda path, shape: penalty if len(shape) >= 2 else None  # noqa: E731
    elif isinstance(penalty, PenaltyRule):
        assign = penalty.assign
    elif callable(penalty):
        assign = penalty
    else:
        raise TypeError(
            f"penalty must be a Penalty, a PenaltyRule or a function of (path, shape), got {penalty!r}; under "
            f"optax.inject_hyperparams, which takes functions for schedules, wrap the function in PenaltyRule."
        )

    matched = False

    def one(path: Any, leaf: Array) -> Penalty | None:
        nonlocal matched
        name = leaf_name(path)
        chosen = assign(name, leaf.shape)
        if chosen is None:
            return None
        if not isinstance(chosen, Penalty):
            raise TypeError(f"penalty must give a Penalty or None for leaf {name!r}, got {chosen!r}.")
        try:
            jax.eval_shape(chosen.active, leaf)
        except ValueError as error:
            raise ValueError(f"penalty {chosen} does not fit leaf {name!r} of shape {leaf.shape}: {error}") from error
        matched = True
        return chosen

    assigned = jax.tree_util.tree_map_with_path(one, params)
    if not matched and jax.tree.leaves(params):
        shapes = {leaf_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
        raise ValueError(f"penalty matches no leaf, so that nothing would be made sparse; the leaves are {shapes}.")
    return assigned


def leaf_name(path: Any) -> str:
    """Return a leaf's path in a pytree as text, such as `"conv1/kernel"`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def map_structured(function: Callable[..., Any], penalties: Any, *trees: Any) -> Any:
    """Map function(penalty, *leaves) over the leaves that `penalties` structures; the others become None.

    Args:
      function: function of a `Penalty` and of one leaf, or subtree, of each tree.
      penalties: what `assign_penalties` returned.
      *trees: pytrees like `penalties`.

    Example:
      >>> map_structured(lambda p, x: x * p.strength, {"kernel": L1(2.0), "bias": None}, {"kernel": 3.0, "bias": 1.0})
      {'bias': None, 'kernel': 6.0}
    """
    return jax.tree.map(
        lambda p, *xs: None if p is None else function(p, *xs),
        penalties,
        *trees,
        is_leaf=lambda p: p is None or isinstance(p, Penalty),
    )
