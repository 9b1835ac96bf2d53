"""The division of a device's tokens into chunks that are read and written."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, PyTree


class Windows(NamedTuple):
    """The chunks of a device's tokens: consecutive windows that overlap.

    Attributes:
      chunks: number of chunks to compute.
      stride: number of tokens that belong to each chunk.
      overlap: number of tokens that a chunk also reads of the next one.
      order: token indices in the order in which they are divided into chunks; None
        keeps the stored order. [N]
    """

    chunks: int | Int[Array, ""]
    stride: int
    overlap: int
    order: Int[Array, " N"] | None

    def read(self, i: int | Int[Array, ""], tree: PyTree) -> PyTree:
        """The rows of chunk `i` in every leaf: its own, then the overlap.

        Rows beyond the last token are zero. In stored order the last window is shifted
        left to stay full, and the rows in it that belong to the chunk before are zero.
        """
        start = i * self.stride
        return jax.tree.map(lambda x: self._read(start, x), tree)

    def _read(self, start: int | Int[Array, ""], x: Array) -> Array:
        if self.order is not None:
            rows = self._ordered(start, self.order)
            return x.at[rows].get(mode="fill", fill_value=0)
        first, is_new = self._shifted(start, x)
        own = lax.dynamic_slice_in_dim(x, first, self.stride)
        own = jnp.where(is_new, own, jnp.zeros_like(own))
        following = start + self.stride + jnp.arange(self.overlap)
        return jnp.concatenate([own, x.at[following].get(mode="fill", fill_value=0)])

    def write(
        self, i: int | Int[Array, ""], x: Array, own: Array, overlap: Array
    ) -> Array:
        """Write gradients over the rows that `read` returned: the transpose of `read`.

        `own` are the gradients of the chunk's own rows; `overlap` are those that the
        chunk before it has formed for the first of these rows.
        """
        start = i * self.stride
        if self.order is not None:
            rows = self._ordered(start, self.order)
            x = x.at[rows[: self.stride]].set(own, mode="drop")
            return x.at[rows[: self.overlap]].add(overlap, mode="drop")
        first, is_new = self._shifted(start, x)
        own = jnp.where(is_new, own, lax.dynamic_slice_in_dim(x, first, self.stride))
        x = lax.dynamic_update_slice_in_dim(x, own, first, axis=0)
        return x.at[start + jnp.arange(self.overlap)].add(overlap, mode="drop")

    def _ordered(
        self, start: int | Int[Array, ""], order: Int[Array, " N"]
    ) -> Int[Array, " rows"]:
        """Token indices of a window in `order`; N, which is no token, past the end."""
        places = start + jnp.arange(self.stride + self.overlap)
        return order.at[places].get(mode="fill", fill_value=len(order))

    def _shifted(
        self, start: int | Int[Array, ""], x: Array
    ) -> tuple[Int[Array, ""], Bool[Array, "..."]]:
        """The first of `stride` rows that all exist, and which of the rows are new."""
        first = jnp.minimum(start, len(x) - self.stride)
        is_new = jnp.arange(self.stride) >= start - first
        return first, is_new.reshape(-1, *[1] * (x.ndim - 1))


def divide(
    tokens: int, chunk_size: int, overlap: int, where: Bool[Array, " N"] | None
) -> Windows:
    """Windows of at most `chunk_size` tokens, the overlap included.

    With `where`, its tokens come first, and chunks without any of them are not counted.
    """
    chunks = max(1, math.ceil(tokens / (chunk_size - overlap)))
    # All chunks have one size, so that little is padded.
    stride = min(tokens, max(overlap, math.ceil(tokens / chunks)))
    if where is None:
        return Windows(chunks, stride, overlap, None)
    order = jnp.argsort(~where, stable=True)
    return Windows(-(-jnp.sum(where) // stride), stride, overlap, order)
