"""The neural tangent kernel: its matrix, trace and spectrum, exactly or by random probes, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from prune_jax.tree import PyTree, merge, select, widen


def ntk(
    apply_fn: Callable,
    params: PyTree,
    inputs: PyTree,
    *,
    chunk: int = 16,
    probes: int | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """The empirical kernel ``Theta = J J^T``, J the Jacobian of all outputs by all parameters (Jacot et al. 2018).

    Exact: blocks of J, ``chunk`` examples each by reverse mode, are multiplied pairwise, and computed again for each
    pair, so that two blocks of (chunk * K) x (number of parameters) are all that is held. By probes:
    ``Theta ~ mean_s (J v_s)(J v_s)^T`` with random signs v_s, one forward-mode derivative each; unbiased, of rank
    ``probes``.

    The kernel of a pruned network is that of ``lambda p, x: apply_fn(apply_masks(p, masks), x)``.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs`` with leading axis = examples. Examples must not interact.
        params: pytree of parameters; floating-point leaves are differentiated, half precision widened to float32, as
            the inputs are.
        inputs: one batch, leading axis = B examples.
        chunk: examples a block (exact), or probes at a time.
        probes: None = exact, else the number of random probes.
        key: typed PRNG key for the probes.

    Returns:
        (B K, B K) array for K outputs an example; row ``i K + k`` is output k of example i.

    Raises:
        ValueError: chunk or probes below 1, or probes without key or key without probes.

    Example:
        >>> import jax.numpy as jnp
        >>> from prune_jax import ntk
        >>> ntk(lambda p, x: x @ p, jnp.zeros((2, 1)), jnp.array([[1.0, 0.0], [3.0, 4.0]]))
        Array([[ 1.,  3.],
               [ 3., 25.]], dtype=float32)

    Reference: Jacot et al., Neural Tangent Kernel, arXiv:1806.07572.
    """
    keys = _probe_keys(chunk, probes, key)
    params, inputs = widen((params, inputs))
    if keys is not None:
        products = lax.map(_pushforward(apply_fn, params, inputs), keys, batch_size=chunk)
        return jnp.matmul(products.T, products, precision=lax.Precision.HIGHEST) / len(keys)

    jacobian = _example_jacobian(apply_fn, params)

    def row(example: PyTree) -> jax.Array:
        left = jacobian(example)

        def product(other: PyTree) -> jax.Array:
            return jnp.matmul(left, jacobian(other).T, precision=lax.Precision.HIGHEST)

        return lax.map(product, inputs, batch_size=chunk)

    blocks = lax.map(row, inputs, batch_size=chunk)  # (B, B, K, K)
    batch, _, outputs, _ = blocks.shape
    return blocks.transpose(0, 2, 1, 3).reshape(batch * outputs, batch * outputs)


def ntk_trace(
    apply_fn: Callable,
    params: PyTree,
    inputs: PyTree,
    *,
    chunk: int = 16,
    probes: int | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """The trace of the kernel, ``tr Theta = ||J||_F^2``, the sum of its eigenvalues.

    Exact: squared Jacobians, ``chunk`` examples at a time by reverse mode. By probes: ``mean_s ||J v_s||^2`` with
    random signs v_s (Hutchinson), one forward-mode derivative each and no gradient held; unbiased, with relative
    error about ``sqrt(2 tr(Theta^2) / probes) / tr(Theta)`` at most.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs`` with leading axis = examples. Examples must not interact.
        params: pytree of parameters; floating-point leaves are differentiated, half precision widened to float32, as
            the inputs are.
        inputs: one batch, leading axis = examples.
        chunk: examples (exact), or probes at a time.
        probes: None = exact, else the number of random probes.
        key: typed PRNG key for the probes.

    Returns:
        Scalar.

    Raises:
        ValueError: chunk or probes below 1, or probes without key or key without probes.

    Example:
        >>> import jax.numpy as jnp
        >>> from prune_jax import ntk_trace
        >>> ntk_trace(lambda p, x: x @ p, jnp.zeros((2, 1)), jnp.array([[1.0, 0.0], [3.0, 4.0]]))
        Array(26., dtype=float32)

    Reference: Hutchinson, A Stochastic Estimator of the Trace of the Influence Matrix, 1989.
    """
    keys = _probe_keys(chunk, probes, key)
    params, inputs = widen((params, inputs))
    if keys is not None:
        push = _pushforward(apply_fn, params, inputs)
        return lax.map(lambda k: jnp.sum(push(k) ** 2), keys, batch_size=chunk).mean()
    jacobian = _example_jacobian(apply_fn, params)
    return lax.map(lambda x: jnp.sum(jacobian(x) ** 2), inputs, batch_size=chunk).sum()


def ntk_spectrum(apply_fn: Callable, params: PyTree, inputs: PyTree, *, chunk: int = 16) -> jax.Array:
    """The eigenvalues of the exact kernel, largest first.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs`` with leading axis = examples. Examples must not interact.
        params: pytree of parameters; floating-point leaves are differentiated, half precision widened to float32, as
            the inputs are.
        inputs: one batch, leading axis = B examples.
        chunk: examples a block, as in ``ntk``.

    Returns:
        (B K,) array, descending. Rounding can leave zeros slightly negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from prune_jax import ntk_spectrum
        >>> ntk_spectrum(lambda p, x: x @ p, jnp.zeros((2, 1)), jnp.array([[2.0, 0.0], [0.0, 3.0]]))
        Array([9., 4.], dtype=float32)
    """
    return jnp.linalg.eigvalsh(ntk(apply_fn, params, inputs, chunk=chunk))[::-1]


def _floating(params: PyTree) -> PyTree:
    return select(params, lambda path, leaf: True)


def _example_jacobian(apply_fn: Callable, params: PyTree) -> Callable[[PyTree], jax.Array]:
    """One example (no batch axis) -> its Jacobian, (K, number of parameters)."""

    def jacobian(example: PyTree) -> jax.Array:
        def outputs(weights: PyTree) -> jax.Array:
            return apply_fn(merge(weights, params), jax.tree.map(lambda x: x[None], example)).ravel()

        rows, pullback = jax.vjp(outputs, _floating(params))
        (columns,) = jax.vmap(pullback)(jnp.eye(rows.size, dtype=rows.dtype))
        return jnp.concatenate([leaf.reshape(rows.size, -1) for leaf in jax.tree.leaves(columns)], axis=1)

    return jacobian


def _pushforward(apply_fn: Callable, params: PyTree, inputs: PyTree) -> Callable[[jax.Array], jax.Array]:
    """Key -> J v for random signs v, (B K,)."""
    weights = _floating(params)
    leaves, treedef = jax.tree.flatten(weights)

    def push(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, len(leaves))
        signs = [jax.random.rademacher(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
        _, product = jax.jvp(
            lambda w: apply_fn(merge(w, params), inputs), (weights,), (jax.tree.unflatten(treedef, signs),)
        )
        return product.ravel()

    return push


def _probe_keys(chunk: int, probes: int | None, key: jax.Array | None) -> jax.Array | None:
    """One key a probe, or None for the exact kernel."""
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if probes is None and key is None:
        return None
    if probes is None or key is None:
        raise ValueError("probes and key go together: pass both for random probes, neither for the exact kernel")
    if probes < 1:
        raise ValueError(f"probes must be at least 1 (or None for the exact kernel), got {probes}")
    return jax.random.split(key, probes)
