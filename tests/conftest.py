"""Strict JAX settings for every test: four CPU devices, no silent rank promotion, warnings are errors (pyproject).

Compiled programs are kept in a folder of this process alone: the user's cache stays out of the tests, and no process
reads what another is still writing.
"""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

pytest.register_assert_rewrite("contract", "study_runs")  # checks shared by all optax transforms, and by all studies
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

compiled = tempfile.mkdtemp(prefix="compiled-")
atexit.register(shutil.rmtree, compiled, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", compiled)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

OPTIMISED = ("functa_jax", "optim_jax")  # their tests look at rounding errors of the programs that users get


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    """Tests compile small programs and run them once: XLA's dearest optimisations cost a quarter of their time."""
    quick = request.path.parent.name not in OPTIMISED
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
