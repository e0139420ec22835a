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
from contract import CHECKS, Case, random_tree

from experiments import optimizers
from functa_jax import relative_adam
from optim_jax import L1, GroupLasso, SparseGroup, dessilbi
from prune_jax import gradual_pruning, keep_masks, l1_penalty, l1_proximal
from prune_jax.graph import dependency_groups, group_regulariser

# Groups come alive within a few steps at these settings, so that the checks see a path in motion.
QUICK = {"learning_rate": 0.05, "kappa": 1.2, "mu": 0.2}


def masked_adamw(learning_rate):
    masks = jax.tree.map(lambda leaf: leaf > -0.5, random_tree(2))
    return keep_masks(masks, optax.adamw(learning_rate))


def pruned_adamw(learning_rate, criterion="magnitude"):
    base = optax.adamw(learning_rate)
    return gradual_pruning(base, [0.2, 0.4], every=2, begin=1, criterion=criterion, scope="local")


def proximal_sgd(strength, learning_rate):
    return optax.chain(optax.sgd(learning_rate), l1_proximal(strength, learning_rate))


def proximal_group(learning_rate):
    rate = optax.constant_schedule(learning_rate)
    return optimizers.proximal(optax.sgd(learning_rate), rate, 1e-2, optimizers.penalty(0.1))


@functools.cache
def groups():
    def network(params, x):  # (batch, 3, 4, 2) -> (batch, 1, 2, 8) -> (batch, 8)
        conv = params["conv"]["kernel"]
        x = jax.lax.conv_general_dilated(x, conv, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x + params["conv"]["bias"].reshape(1, 1, 1, -1)).reshape(len(x), -1)
        return x @ params["dense"]["kernel"] + params["dense"]["bias"].reshape(1, -1)

    return dependency_groups(network, random_tree(0), jnp.ones((1, 3, 4, 2)))


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
    Case("keep_masks", masked_adamw, {"learning_rate": 0.05}, for_one_tree=True),
    Case("gradual_pruning", pruned_adamw, {"learning_rate": 0.05}),
    Case("gradual_pruning-movement", lambda: pruned_adamw(0.05, criterion="movement")),
    Case("l1_penalty", l1_penalty, {"strength": 1e-2}, minimizes=False),
    Case("l1_proximal", proximal_sgd, {"strength": 1e-2, "learning_rate": 0.05}),
    Case("group_regulariser", lambda: group_regulariser(groups(), 1e-2), minimizes=False, for_one_tree=True),
    Case("proximal", lambda: proximal_group(0.05)),
    Case("averaging", lambda: optimizers.averaging(optax.adam(0.05), 0.9)),
    Case("relative_adam", relative_adam, {"learning_rate": 0.05}, needs_params=False),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check, case):
    check(case)


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
