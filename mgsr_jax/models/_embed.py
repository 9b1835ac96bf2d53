"""An embedding whose output has the dtype of its parameter."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


class Embed(nnx.Module):
    """Rows of a table [size, width].

    `nnx.Embed` returns the dtype that it was constructed with, which would make a
    bfloat16 model compute in float32.
    """

    def __init__(self, size: int, width: int, *, stddev: float, rngs: nnx.Rngs):
        init = nnx.initializers.normal(stddev)
        self.embedding = nnx.Param(init(rngs.params(), (size, width)))

    def __call__(self, ids: Int[Array, "#B T"]) -> Float[Array, "#B T D"]:
        return jnp.take(self.embedding[...], ids, axis=0)

    def clipped(self, ids: Int[Array, "#B T"]) -> Float[Array, "#B T D"]:
        """The rows of `ids`; an id beyond the table reads the last row."""
        return jnp.take(self.embedding[...], ids, axis=0, mode="clip")
