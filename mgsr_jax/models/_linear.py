"""Linear layers whose product is fast when each row has one token."""

from typing import Any

from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from mgsr_jax.losses import project


def linear(
    size_in: int, size_out: int, *, bias: bool, stddev: float, rngs: nnx.Rngs
) -> nnx.Linear:
    """A layer x @ kernel + bias, with a kernel drawn from N(0, stddev^2)."""
    return nnx.Linear(
        size_in,
        size_out,
        use_bias=bias,
        kernel_init=nnx.initializers.normal(stddev),
        dot_general=kernel_first,
        rngs=rngs,
    )


def kernel_first(
    x: Float[Array, "*B T I"],
    kernel: Float[Array, "I O"],
    *dimensions: Any,
    **kwargs: Any,
) -> Float[Array, "*B T O"]:
    """`lax.dot_general(x, kernel)`, with the kernel on the left for one token per row.

    A decoding step multiplies a few rows, so its time is the time to read the kernel.
    XLA on CPU reads a kernel faster as the left operand, stored [out, in].
    """
    if x.shape[-2] > 1:
        return lax.dot_general(x, kernel, *dimensions, **kwargs)
    return project(x, kernel.T).astype(x.dtype)
