"""Reductions over the vocabulary, whether it is whole or split over a mesh axis.

A loss is written once, for the columns that a device holds, with the reductions of a
`Vocabulary`; `over_vocabulary` runs it. No array of the size of V is gathered.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mgsr_jax.losses._mesh_axes import Axis
from mgsr_jax.losses._top_k import top_k


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The reductions over the last axis of logits that the losses need.

    Attributes:
      axis: the mesh axis that V is split over, in equal consecutive parts.
      part: index of this device's part; None reads it from `axis`.
      rows_by_xla: as in `top_k`.
    """

    axis: Axis = None
    part: Int[Array, ""] | None = None
    rows_by_xla: bool | None = None

    def width(self, x: Float[Array, "*B V"]) -> int:
        """The number of columns of all devices together."""
        return x.shape[-1] * (1 if self.axis is None else lax.axis_size(self.axis))

    def columns(self, x: Float[Array, "*B V"]) -> Int[Array, "*B V"]:
        """The index of every column in the whole vocabulary."""
        local = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
        return local + self._first(x)

    def sum(self, x: Float[Array, "*B V"]) -> Float[Array, "*B"]:
        """Sum over the columns."""
        total = jnp.sum(x, axis=-1)
        return total if self.axis is None else lax.psum(total, self.axis)

    def max(self, x: Float[Array, "*B V"]) -> Float[Array, "*B"]:
        """The largest column; without gradient."""
        largest = lax.stop_gradient(jnp.max(x, axis=-1))
        return largest if self.axis is None else lax.pmax(largest, self.axis)

    def logsumexp(self, x: Float[Array, "*B V"]) -> Float[Array, "*B"]:
        """log sum_v exp(x_v); -inf, and no gradient, where every column is -inf."""
        largest = self.max(x)
        largest = jnp.where(largest > -jnp.inf, largest, 0.0)
        total = self.sum(jnp.exp(x - largest[..., None]))
        empty = total == 0  # false for nan, which is returned
        log = jnp.log(jnp.where(empty, 1.0, total)) + largest
        return jnp.where(empty, -jnp.inf, log)

    def log_softmax(self, x: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
        """Log-probabilities; shifted first, so that large logits cost no precision."""
        shifted = x - self.max(x)[..., None]
        return shifted - jnp.log(self.sum(jnp.exp(shifted)))[..., None]

    def top_k(
        self, x: Float[Array, "*B V"], k: int
    ) -> tuple[Float[Array, "*B K"], Int[Array, "*B K"]]:
        """The `k` largest values, descending, and their columns; ties: first column."""
        if self.axis is None:
            return top_k(x, k)
        largest = functools.partial(top_k, rows_by_xla=self.rows_by_xla)
        values, indices = largest(x, min(k, x.shape[-1]))
        last = x.ndim - 1
        values, indices = (
            lax.all_gather(candidates, self.axis, axis=last, tiled=True)
            for candidates in (values, indices + self._first(x))
        )
        values, order = largest(values, k)
        indices = jnp.take_along_axis(indices, order, axis=-1)
        # Already equal on every device; only pmax makes the type invariant.
        return lax.pmax(values, self.axis), lax.pmax(indices, self.axis)

    def take(
        self, x: Float[Array, "*B V"], indices: Int[Array, "*B K"]
    ) -> Float[Array, "*B K"]:
        """The columns `indices`; -inf for an index that is no column."""
        exists = (indices >= 0) & (indices < self.width(x))
        indices = indices - self._first(x)
        taken = jnp.take_along_axis(x, indices, axis=-1, mode="clip")
        if self.axis is not None:
            is_local = (indices >= 0) & (indices < x.shape[-1])
            taken = lax.psum(jnp.where(is_local, taken, 0.0), self.axis)
        return jnp.where(exists, taken, -jnp.inf)

    def without(
        self, x: Float[Array, "*B V"], indices: Int[Array, "*B K"]
    ) -> Float[Array, "*B V"]:
        """`x` with -inf in the columns `indices`."""
        local = indices - self._first(x)
        local = jnp.where((local >= 0) & (local < x.shape[-1]), local, x.shape[-1])
        # Per row: one scatter over all rows would gather the logits of a split batch.
        drop = jnp.vectorize(
            lambda x, local: x.at[local].set(-jnp.inf, mode="drop"),
            signature="(v),(k)->(v)",
        )
        return drop(x, local)

    def _first(self, x: Float[Array, "*B V"]) -> int | Int[Array, ""]:
        """The index of this device's first column in the whole vocabulary."""
        if self.axis is None:
            return 0
        part = lax.axis_index(self.axis) if self.part is None else self.part
        return part * x.shape[-1]
