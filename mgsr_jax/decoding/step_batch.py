"""All micro-batches of a step as one batch, and back, on any mesh."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mgsr_jax.rows import Rows

T = TypeVar("T")


def joined(micro_batches: tuple[Rows, ...]) -> Rows:
    """All rows as one batch, in which every device keeps the rows that it has."""

    def join(*parts: Array) -> Array:
        return jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])

    return jax.tree.map(join, *micro_batches)


def repeated(tree: T, samples: int, parts: int) -> T:
    """Joined rows `samples` times: all parts of the first sample, then of the second.

    Every device keeps the rows that it has.
    """

    def repeat(x: Array) -> Array:
        by_part = x.reshape(-1, 1, parts, *x.shape[1:])
        shape = (by_part.shape[0], samples, *by_part.shape[2:])
        return jnp.broadcast_to(by_part, shape).reshape(-1, *x.shape[1:])

    return jax.tree.map(repeat, tree)


def split(tree: T, parts: int) -> tuple[T, ...]:
    """The inverse of `joined`, for every leaf of a tree."""

    def part(i: int) -> T:
        def take(x: Array) -> Array:
            by_part = x.reshape(-1, parts, *x.shape[1:])
            return jax.lax.index_in_dim(by_part, i, axis=1, keepdims=False)

        return jax.tree.map(take, tree)

    return tuple(part(i) for i in range(parts))
