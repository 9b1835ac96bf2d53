"""A table of vectors, in whatever dtype its parameter has."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


class Embed(nnx.Module):
    """Rows of a table [size, width].

    Unlike `nnx.Embed`, which keeps computing in the dtype it was made with and so
    turns a bfloat16 model into a float32 one.
    """

    def __init__(self, size: int, width: int, *, stddev: float, rngs: nnx.Rngs):
        init = nnx.initializers.normal(stddev)
        self.embedding = nnx.Param(init(rngs.params(), (size, width)))

    def __call__(self, ids: Int[Array, "#B T"]) -> Float[Array, "#B T D"]:
        return jnp.take(self.embedding[...], ids, axis=0)

    def clipped(self, ids: Int[Array, "#B T"]) -> Float[Array, "#B T D"]:
        """As a call; an id beyond the table reads the last row."""
        return jnp.take(self.embedding[...], ids, axis=0, mode="clip")
