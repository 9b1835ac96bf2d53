"""Exact GELU whose derivative traces inside a `shard_map`.

`jax.nn.gelu(approximate=False)` does not since jax 0.12: the derivative of its `erfc`
evaluates a polynomial and does not mark the coefficients as varying over the mesh.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def gelu(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """x times the standard normal's cumulative distribution at x."""
    return 0.5 * x * _erfc(-x * math.sqrt(0.5))


@jax.custom_jvp
def _erfc(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    return lax.erfc(x)


@_erfc.defjvp
def _erfc_jvp(
    primals: tuple[Float[Array, "*B"]], tangents: tuple[Float[Array, "*B"]]
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    (x,), (dx,) = primals, tangents
    return _erfc(x), -2.0 / math.sqrt(math.pi) * (dx * jnp.exp(-jnp.square(x)))
