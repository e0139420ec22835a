"""Strict JAX settings for every test: four CPU devices, no silent rank promotion, warnings are errors (pyproject)."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

pytest.register_assert_rewrite("contract", "study_runs")  # checks shared by all optax transforms, and by all studies
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
