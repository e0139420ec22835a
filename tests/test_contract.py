"""The contract of `tests/contract.py`, kept by every optax transform of this project."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from contract import CHECKS, SHAPES, Case

from experiments import optimizers
from experiments.studies.bn_probes import path_change
from functa_jax import relative_adam
from optim_jax import L1, GroupLasso, SparseGroup, dessilbi
from prune_jax import gradual_pruning, keep_masks, l1_penalty, l1_proximal
from prune_jax.graph import dependency_groups, group_regulariser

# Groups come alive within a few steps at these settings, so that the checks see a path in motion.
QUICK = {"learning_rate": 0.05, "kappa": 1.2, "mu": 0.2}


def masked_adamw(tree, learning_rate):
    return keep_masks(jax.tree.map(lambda leaf: leaf > -0.5, tree), optax.adamw(learning_rate))


def pruned_adamw(learning_rate, criterion="magnitude"):
    base = optax.adamw(learning_rate)
    return gradual_pruning(base, [0.2, 0.4], every=2, begin=1, criterion=criterion, scope="local")


def proximal_sgd(strength, learning_rate):
    return optax.chain(optax.sgd(learning_rate), l1_proximal(strength, learning_rate))


def proximal_group(strength, learning_rate):
    return optimizers.proximal(optax.sgd(learning_rate), learning_rate, strength, optimizers.penalty(0.1))


def averaged_adam(learning_rate, decay=0.9):
    return optimizers.averaging(optax.adam(learning_rate), decay)


def regularised(tree, strength, alpha):
    return group_regulariser(groups(jax.tree.structure(tree)), strength, alpha)


@functools.cache
def groups(structure):
    """Of a convolution and a dense layer, or of what there is of them in the tree."""

    def network(params, x):  # (batch, 3, 4, 2) -> (batch, 1, 2, 8) -> (batch, 8)
        conv, dense = (dict(params).get(name, {}) for name in ("conv", "dense"))
        if "kernel" in conv:
            x = jax.lax.conv_general_dilated(
                x, conv["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + conv["bias"].reshape(1, 1, 1, -1))
        if isinstance(dense.get("kernel"), jax.Array):
            return x.reshape(len(x), -1) @ dense["kernel"] + dense["bias"].reshape(1, -1)
        return x.sum(-1)

    places = structure.unflatten(range(structure.num_leaves))
    params = jax.tree.map_with_path(lambda path, _: jnp.ones(SHAPES[path[0].key][path[1].key]), places)
    return dependency_groups(network, params, jnp.ones((1, 3, 4, 2)))


CASES = [
    Case("dessilbi-momentum", functools.partial(dessilbi, optax.sgd(1.0, momentum=0.9)), QUICK),
    Case("dessilbi-adamw", functools.partial(dessilbi, optax.adamw(1.0), penalty=L1(0.5)), QUICK),
    Case(
        "dessilbi-inside",
        functools.partial(
            dessilbi,
            optax.trace(0.9),
            penalty=SparseGroup(L1(0.1), GroupLasso(-1, 0.2, scale_by_size=True)),
            coupling="inside",
        ),
        QUICK,
    ),
    Case("keep_masks", masked_adamw, {"learning_rate": 0.05}, per_tree=True),
    Case("gradual_pruning", pruned_adamw, {"learning_rate": 0.05}),
    Case("gradual_pruning-movement", functools.partial(pruned_adamw, criterion="movement"), {"learning_rate": 0.05}),
    Case("l1_penalty", l1_penalty, {"strength": 1e-2}, minimizes=False),
    Case("l1_proximal", proximal_sgd, {"strength": 1e-2, "learning_rate": 0.05}),
    Case("group_regulariser", regularised, {"strength": 1e-2, "alpha": 4.0}, minimizes=False, per_tree=True),
    Case("proximal", proximal_group, {"strength": 1e-2, "learning_rate": 0.05}),
    Case("averaging", averaged_adam, {"learning_rate": 0.05}),
    Case("relative_adam", relative_adam, {"learning_rate": 0.05}, needs_params=False),
    Case("path_change", functools.partial(path_change, "conv"), minimizes=False),
]


# The dearest checks run in the quick suite on two transforms that own state and masks, on the others in the slow one.
DEAR = {
    "keeps_dtypes_also_under_cond",
    "keeps_the_sharding_of_its_state",
    "resumes_from_a_checkpoint_bit_for_bit",
    "scans_thousands_of_steps_as_a_loop_would",
    "trains_a_batch_of_models_under_vmap",
}


def of_matrix(check, case):
    slow = check.__name__ in DEAR and case.name not in ("dessilbi-momentum", "keep_masks")
    return pytest.param(check, case, id=f"{check.__name__}-{case.name}", marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("check", "case"), [of_matrix(check, case) for check in CHECKS for case in CASES])
def test_contract(check, case):
    check(case)


WRAPPERS = {
    "dessilbi": lambda base: dessilbi(base, 1.0, base_is_direction=False),
    "keep_masks": lambda base: keep_masks({"kernel": jnp.ones((2, 2), bool)}, base),
    "gradual_pruning": lambda base: gradual_pruning(base, [0.0], every=1),
    "proximal": lambda base: optimizers.proximal(base, 1.0, 0.0, L1()),
    "averaging": lambda base: optimizers.averaging(base, 0.9),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_extra_arguments_reach_the_base(wrapper):
    def update(updates, state, params=None, *, factor, **_):
        return jax.tree.map(lambda g: -factor * g, updates), state

    base = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx, params = WRAPPERS[wrapper](base), {"kernel": jnp.zeros((2, 2))}
    updates, _ = tx.update({"kernel": jnp.ones((2, 2))}, tx.init(params), params, factor=3.0)
    assert jnp.allclose(updates["kernel"], -3.0)


@pytest.mark.parametrize("decay", [0.9, 0.5])
def test_the_decay_of_an_average_can_be_injected(decay):
    params = {"kernel": jnp.ones((2, 2))}
    tx = optax.inject_hyperparams(averaged_adam)(0.05, decay)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    expected = decay * params["kernel"] + (1 - decay) * (params["kernel"] + updates["kernel"])
    assert jnp.allclose(optax.tree.get(state, "average")["kernel"], expected)


@pytest.mark.slow
def test_sharding_on_eight_devices():
    script = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import contract, test_contract
assert jax.device_count() == 8
for case in test_contract.CASES:
    contract.keeps_the_sharding_of_its_state(case)
"""
    here = Path(__file__).parent
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [here, here.parent])),
        "JAX_PLATFORMS": "cpu",
    }
    subprocess.run([sys.executable, "-c", script], env=env, check=True, timeout=300)
