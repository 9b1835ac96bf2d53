"""Dense layers; the order of their product where a step has one token a row."""

from typing import Any

from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from mgsr_jax.losses import project


def linear(
    size_in: int, size_out: int, *, bias: bool, stddev: float, rngs: nnx.Rngs
) -> nnx.Linear:
    """x @ kernel + bias, the kernel drawn with the standard deviation `stddev`."""
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
    """`lax.dot_general(x, kernel)`; in decoding with the kernel as the left operand.

    A step of decoding multiplies a few rows, and takes as long as reading the kernel.
    XLA on a CPU reads it faster in this order, stored [out, in].
    """
    if x.shape[-2] > 1:
        return lax.dot_general(x, kernel, *dimensions, **kwargs)
    return project(x, kernel.T).astype(x.dtype)
