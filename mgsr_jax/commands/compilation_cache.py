"""The folder of compiled programs, which all commands share."""

import os
from pathlib import Path

import jax

FOLDER = Path("~/.cache/mgsr_jax/xla")
"""Where JAX's own settings name no other folder."""


def use_compilation_cache() -> None:
    """Keep compiled programs on disk, so that a command's second start is quicker.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false
    turns the cache off. A folder that cannot be written to costs a warning of JAX.
    """
    if compilation_cache_folder() is None:
        home = os.environ.get("XDG_CACHE_HOME")
        folder = Path(home) / "mgsr_jax" / "xla" if home else FOLDER.expanduser()
        jax.config.update("jax_compilation_cache_dir", str(folder))


def compilation_cache_folder() -> str | None:
    """The folder that JAX is set to; None: it keeps no programs."""
    return jax.config.values["jax_compilation_cache_dir"]
