"""Thresholds of a row by the weight of what is greater, found by bisection.

Floats are compared as integers in the same order, so 32 passes over a row find any
threshold. A bitonic sort of V = 32,000 values makes 120.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt

PASSES = 32  # one for each bit
SIGN = 1 << 31


def threshold(
    x: Float[Array, "*B V"], weights: Float[Array, "*B V"], limit: float | int
) -> Float[Array, "*B 1"]:
    """The smallest t of each row for which what is greater weighs less than a limit.

      t = min {x_v : sum_{u : x_u > x_v} w_u < limit}

    With weights of one and the limit k, t is the k-th largest value. With probabilities
    and the limit p, values of at least t are the nucleus of mass p: of equal values all
    or none. -inf where all weights together are below the limit.

    >>> threshold(jnp.array([3.0, 1.0, 2.0]), jnp.array([0.5, 0.2, 0.3]), 0.6)
    Array([2.], dtype=float32)

    Args:
      x: values, compared in float32, in which -0 equals 0. [..., V]
      weights: at least 0. [..., V]
      limit: above 0.
    """
    keys = _ordered_bits(x)

    def halve(_: Array | int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        above = jnp.sum(jnp.where(keys > middle, weights, 0.0), axis=-1, keepdims=True)
        fits = above < limit
        return jnp.where(fits, low, middle + 1), jnp.where(fits, middle, high)

    # Like the rows: on an Explicit mesh the bounds need their sharding.
    low = _ordered_bits(jnp.full_like(x[..., :1], -jnp.inf))
    _, high = lax.fori_loop(0, PASSES, halve, (low, low | ~low))
    return _floats(high)


def _ordered_bits(x: Float[Array, "*B V"]) -> UInt[Array, "*B V"]:
    """Unsigned integers in the order of the float32 values."""
    x = jnp.where(x == 0, 0.0, x).astype(jnp.float32)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(SIGN)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _floats(keys: UInt[Array, "*B V"]) -> Float[Array, "*B V"]:
    """The values of `_ordered_bits`."""
    sign = jnp.uint32(SIGN)
    bits = jnp.where(keys >= sign, keys & ~sign, ~keys)
    return lax.bitcast_convert_type(bits, jnp.float32)
