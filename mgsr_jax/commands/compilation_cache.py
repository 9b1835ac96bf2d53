"""The folder of compiled programs, which all commands share."""

import os
from pathlib import Path

import jax


def use_compilation_cache() -> None:
    """Keep compiled programs on disk, so that a command's second start is quicker.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false
    turns the cache off. A folder that cannot be written to costs a warning of JAX.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = caches / "mgsr_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))
