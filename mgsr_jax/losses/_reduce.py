"""Sums with their counts, so that a mean is taken once, after all additions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mgsr_jax.typing import Leaf


class Sum(NamedTuple):
    """A sum over scored positions. Add those of micro-batches and hosts by field.

    Attributes:
      total: the sum. float32 scalar
      count: the number of positions in it. float32 scalar
    """

    total: Leaf
    count: Leaf


@jax.jit
def masked_sum(values: Float[Array, "*B"], where: Bool[Array, "*B"]) -> Sum:
    """Sum and count of `values` over the positions where `where` is True.

    total = sum_i where_i * values_i,  count = sum_i where_i

    Values elsewhere are not read: they may be nan. Add the sums of micro-batches and
    divide once; a mean of means gives short batches too much weight (trl#6006).

    Args:
      values: any float dtype, any shape.
      where: which positions count, in the same shape.

    >>> values, where = jnp.array([1.0, 2.0, jnp.nan]), jnp.array([True, True, False])
    >>> total, count = masked_sum(values, where)
    >>> print(total, count)
    3.0 2.0
    """
    kept = jnp.where(where, values.astype(jnp.float32), 0.0)
    return Sum(jnp.sum(kept), jnp.sum(where, dtype=jnp.float32))


@jax.jit
def masked_mean(
    values: Float[Array, "*B"], where: Bool[Array, "*B"]
) -> Float[Array, ""]:
    """Mean of `values` where `where` is True; 0, with zero gradient, if it never is.

    mean = total / max(count, 1)

    Args:
      values: any float dtype, any shape.
      where: which positions count, in the same shape.

    >>> print(masked_mean(jnp.array([1.0, 2.0, 9.0]), jnp.array([True, True, False])))
    1.5
    >>> print(masked_mean(jnp.array([1.0, 2.0]), jnp.array([False, False])))
    0.0
    """
    total, count = masked_sum(values, where)
    return total / jnp.maximum(count, 1.0)
