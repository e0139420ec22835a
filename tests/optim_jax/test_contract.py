"""The contract of `tests/contract.py`, kept by every optax transform of this project."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import optax
import pytest
from contract import CHECKS, Case

from optim_jax import L1, GroupLasso, SparseGroup, dessilbi

# Groups come alive within a few steps at these settings, so that the checks see a path in motion.
QUICK = {"learning_rate": 0.05, "kappa": 1.2, "mu": 0.2}

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
    paths = os.pathsep.join(map(str, [here, here.parent, here.parent.parent]))
    env = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", script], env=env, check=True, timeout=300)
