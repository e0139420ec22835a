"""PX: each weight's share of the paths that carry the neural tangent kernel."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from prune_jax.scores.path_flow import Flow, active_flow, weight_flow
from prune_jax.tree import Prunable, PyTree, is_kernel, merge, path_name, select, widen


def px(
    apply_fn: Callable,
    params: PyTree,
    inputs: PyTree,
    *,
    balance: bool = False,
    prunable: Prunable = is_kernel,
) -> PyTree:
    """Path eXclusion, ``theta_j^2 dR/d(theta_j^2) / R`` (Iurada et al. 2024, eq. 9).

    With ``f(x)_k = sum over paths p to k of v_p(theta) a_p(x) x_p`` (path value, activity, input), the trace of the
    neural tangent kernel is at most the product of two path sums (eqs. 6-8), and R pairs them per output:

    ``R = sum_k z1_k z2_k,  z1_k = sum_{x, p to k} a_p(x) x_p^2,  z2_k = sum_{p to k} v_p^2``.

    z1 is the network with every weight 1 on squared inputs, gated as the real forward pass on x is gated; z2 the
    network with squared weights on ones, all gates open. Neither is built by hand: ``apply_fn``'s jaxpr is evaluated
    once for each, so any JAX function will do whose nonlinearities are piecewise linear: ReLU and its kin, max-pool
    (the argmax is the gate), average pools, convolutions, skip connections, ``scan``, ``remat``. Only z2 depends on
    the weights, and not on the data, so its derivative costs one example's backward pass.

    Dividing by R, a constant for the ranking, makes a score the share of R that runs through the weight: where every
    path crosses every layer, the scores of each layer sum to 1.

    In a dense network whose last layer joins every feature to every output, z1 is the same for all outputs and
    cancels: data decide only once weights are zero. Hence the rounds of ``prune_jax.iterative_masks``, 100 in the
    paper.

    Those rounds feed the outputs that are ahead: an output with few paths left has little of R, its weights score low,
    and in the end it has no path at all (of a ResNet-20 with 1 % of its weights, three classes of ten). ``balance``
    gives every output an equal say, by the mean of ``log(z1_k z2_k)`` in place of ``log R``: the fewer paths an output
    has, the larger is the share of each weight on them, and the last one is never cut. That is not in the paper, and
    needs no data: z1_k is then a summand that no weight moves.

    What counts as a weight is whatever multiplies a signal, parameter or constant; BatchNorm on running averages is
    the factor ``scale / sqrt(var + eps)``, so scores equal those of the network with BatchNorm folded. A weight that
    is exactly zero carries no path. Biases and BatchNorm shifts only move the gates. Each branch of ``jnp.where`` is
    a path. Flows are float32 or wider at any compute precision, and rescaled on the way, so depth does not overflow.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs``, one array with the leading axis of ``inputs``. Examples must
            not interact.
        params: pytree of parameters.
        inputs: one batch of floating-point inputs, leading axis = examples.
        balance: the mean over outputs of the weight's share of each, in place of its share of their sum.
        prunable: which leaves are scored, ``(path, leaf) -> bool``; by default ``is_kernel``.

    Returns:
        Pytree like ``params``, float32 or wider, >= 0, larger = keep; None where not scored; all 0 without an active
        path.

    Raises:
        NotImplementedError: an operation that is not piecewise linear in the inputs, such as GELU or softmax; the
            primitive and the source line are named.
        TypeError: inputs that are not floating point.
        ValueError: outputs without the batch axis, or that no path reaches.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from prune_jax import scores
        >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0], [1.0]])}
        >>> s = scores.px(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, jnp.array([[1.0]]))
        >>> s["a"]  # paths of value 3 and 2: shares 9/13 and 4/13
        Array([[0.6923077 , 0.30769232]], dtype=float32)

    Reference: Iurada et al., Finding Lottery Tickets in Vision Models via Data-driven Spectral Foresight Pruning,
    arXiv:2406.01820.
    """
    _check_inputs(inputs)
    batch = jax.tree.leaves(inputs)[0].shape[0]
    active = active_flow(apply_fn, params, inputs)
    if active.flow.ndim == 0 or active.flow.shape[0] != batch:
        raise ValueError(f"apply_fn's output has shape {active.flow.shape}, its leading axis must be the batch {batch}")
    z1 = active.flow.sum(0, keepdims=True)

    weights = select(params, prunable)
    example = jax.tree.map(lambda x: x[:1], inputs)  # z2 knows no data: one example's shape is enough

    def log_r(weights: PyTree) -> jax.Array:
        z2: Flow = weight_flow(apply_fn, merge(weights, params), example)
        products = z1 * z2.flow  # up to a power of two, which is a summand of the logarithm
        r = products.ravel() if balance else products.sum()[None]
        alive = r > 0
        return jnp.sum(jnp.where(alive, jnp.log(jnp.where(alive, r, 1)), 0)) / jnp.maximum(alive.sum(), 1)

    # theta^2 dR/d(theta^2) / R = theta d(log R)/dtheta / 2
    return jax.tree.map(lambda w, g: 0.5 * jnp.abs(widen(w) * widen(g)), weights, jax.grad(log_r)(weights))


def _check_inputs(inputs: PyTree) -> None:
    leaves = jax.tree_util.tree_flatten_with_path(inputs)[0]
    if not leaves:
        raise ValueError("inputs is empty; px needs one batch of inputs")
    for path, leaf in leaves:
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"inputs {path_name(path)!r} have dtype {dtype}; px squares floating-point inputs")
        if jnp.ndim(leaf) == 0 or leaf.shape[0] != leaves[0][1].shape[0]:
            raise ValueError(f"inputs {path_name(path)!r} have shape {jnp.shape(leaf)}; the leading axis is the batch")
