"""Strict JAX settings for every test: four CPU devices, no silent rank promotion, warnings are errors (pyproject)."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far more than they compute: without LLVM's optimisations they take two thirds of the time.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax
import pytest

pytest.register_assert_rewrite("contract", "study_runs")  # checks shared by all optax transforms, and by all studies
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
