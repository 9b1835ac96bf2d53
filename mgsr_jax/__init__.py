"""Distillation of large language models in JAX.

`mgsr_jax.losses` needs nothing but jax (and jaxtyping, for its signatures). Everything
else comes with the `[train]` extra.
"""

__version__ = "0.1.0"
