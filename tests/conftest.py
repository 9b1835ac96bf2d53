"""The rig: eight CPU devices, and every check that production runs without."""

import atexit
import tempfile

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)

# Many tests build the same program anew; within one session it is compiled once.
_cache = tempfile.TemporaryDirectory(prefix="mgsr-compiled-")
atexit.register(_cache.cleanup)
jax.config.update("jax_compilation_cache_dir", _cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
