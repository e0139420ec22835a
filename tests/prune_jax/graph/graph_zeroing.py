"""The property that defines a right cut: zeroing what a plan removes and removing it give the same output."""

import jax
import jax.numpy as jnp
import numpy as np

from prune_jax.graph import prune, smaller_function


def zeroed(plan, params):
    """The dense parameters with everything that the plan removes set to zero."""
    leaves, tree = jax.tree.flatten(params)
    out = []
    for x, entry in zip(leaves, plan["leaves"], strict=True):
        x = np.array(x)
        entries = {keep["axis"]: keep for keep in entry["keep"]}
        for keep in entry["keep"]:
            mask = np.zeros(x.shape, bool)
            positions = np.asarray(keep["positions"])
            for place in np.ndindex(positions.shape[:-1]):
                survivor = dict(zip(keep["rows"], place, strict=True))
                at = [slice(None)] * x.ndim
                for d, i in survivor.items():  # the i-th survivor of axis d, whose survivors may differ along its rows
                    rows = entries[d]["rows"] if d in entries else []
                    at[d] = (
                        np.asarray(entries[d]["positions"])[(*(survivor[e] for e in rows), i)] if d in entries else i
                    )
                at[keep["axis"]] = positions[place]
                mask[tuple(at)] = True
            x = np.where(mask, x, 0)
        out.append(jnp.asarray(x))
    return jax.tree.unflatten(tree, out)


def size(params):
    return sum(x.size for x in jax.tree.leaves(params))


def check(fn, params, *args, tolerance=1e-5, **options):
    """Prune, compare with zeroing, and return what was pruned."""
    pruned = prune(fn, params, *args, **options)
    dense = jax.jit(fn)(zeroed(pruned.plan, params), *args)
    # from the plan alone: what the plan does not say must be found again
    small = jax.jit(smaller_function(fn, params, pruned.plan))(pruned.params, *args)
    for a, b in zip(jax.tree.leaves(dense), jax.tree.leaves(small), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * max(float(jnp.abs(a).max()), 1.0))
    return pruned
