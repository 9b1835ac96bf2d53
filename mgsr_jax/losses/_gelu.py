"""Exact GELU whose derivative traces inside a `shard_map`.

Since jax 0.12 the derivative of `jax.nn.gelu(approximate=False)` does not trace there:
the derivative of `erfc` evaluates a polynomial, and the polynomial's coefficients are
not marked as varying over the mesh.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def gelu(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """gelu(x) = x Phi(x), with the standard normal distribution function Phi."""
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
