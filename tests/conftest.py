"""The rig: eight CPU devices, and every check that production runs without."""

import atexit
import gc
import os
import tempfile
from collections.abc import Generator

import jax
import pytest

# Compilation takes most of the tests' time. Without most of XLA's optimisations it is
# twice as quick. `MGSR_TEST_COMPILER=full` compiles as users do.
QUICK = os.environ.get("MGSR_TEST_COMPILER", "quick") == "quick"
if QUICK:
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"  # of commands in tests
    if jax.__version_info__ < (0, 11):  # a flag that XLA does not know ends the process
        flags = os.environ.get("XLA_FLAGS", ""), "--xla_cpu_use_fusion_emitters=false"
        os.environ["XLA_FLAGS"] = " ".join(flags)

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

# Many tests build the same program again. Within one session it is compiled once: the
# variables pass the cache on to the workers of pytest-xdist and to commands that tests
# start.
if "MGSR_TEST_SESSION" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="mgsr-compiled-")
    atexit.register(_cache.cleanup)
    os.environ["MGSR_TEST_SESSION"] = _cache.name
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
jax.config.update("jax_compilation_cache_dir", os.environ["MGSR_TEST_SESSION"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.hookimpl(wrapper=True)
def pytest_collect_file() -> Generator[
    None, list[pytest.Collector], list[pytest.Collector]
]:
    """Collect test files only as test files.

    pytest would look for doctests in them too, with import errors ignored. That leaves
    a test file that cannot be imported as an empty module, and its tests never run.
    """
    collectors = yield
    return [c for c in collectors if type(c).__name__ != "DoctestModule"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark exhaustive tests as slow, so that `-m "not slow"` leaves both out."""
    for item in items:
        if item.get_closest_marker("exhaustive"):
            item.add_marker("slow")


@pytest.fixture(autouse=True, scope="module")
def few_programs_in_memory() -> Generator[None]:
    """Forget the programs of a module: a worker of all modules would hold 5 GB."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def full_compiler() -> Generator[None]:
    """Compile as users do; sums without optimisations are less precise."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", QUICK)
