"""The loop over the chunks of one device's tokens, with and without gradients."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from mgsr_jax.losses._chunk_window import divide
from mgsr_jax.losses._projection import Projection, Taped, add_product

ChunkLoss = Callable[[PyTree, Array, PyTree], tuple[Array, PyTree]]
"""A function (shared, tokens_chunk, aux_chunk) -> (scalar, metric sums)."""

Variable = Array | tuple[Array, Array]
"""The input that a chunk differentiates a leaf of `shared` in: see `_variable`."""


class ChunkSums(NamedTuple):
    """Sums over all chunks.

    Attributes:
      value: sum of the scalars. float32
      metrics: sums of the metrics.
      d_shared: gradient of `shared`, with None at leaves that need none.
      d_tokens: gradient of the tokens; None in a pass without gradients.
    """

    value: PyTree
    metrics: PyTree
    d_shared: PyTree
    d_tokens: PyTree


@dataclasses.dataclass(frozen=True)
class ChunkLoop:
    """A sum of `fn` over the chunks of one device's tokens.

    Attributes:
      fn, chunk_size, overlap: as in `chunked`; so are the arguments of the methods.
    """

    fn: ChunkLoss
    chunk_size: int
    overlap: int

    @jax.named_scope("chunks")
    def sums(
        self,
        shared: PyTree,
        tokens: Float[Array, "*B D"],
        aux: PyTree,
        where: Bool[Array, "*B"] | None,
    ) -> ChunkSums:
        """Sum without gradients."""
        tokens, aux, where = _flat(tokens, aux, where)
        windows = divide(len(tokens), self.chunk_size, self.overlap, where)

        def of_chunk(i: int | Int[Array, ""]) -> tuple[Array, PyTree]:
            return self._evaluate(shared, *windows.read(i, (tokens, aux)))

        def add_chunk(i: Int[Array, ""], sums: PyTree) -> PyTree:
            return jax.tree.map(jnp.add, sums, of_chunk(i))

        zeros = _zeros_of(lambda: of_chunk(0))
        value, metrics = lax.fori_loop(0, windows.chunks, add_chunk, zeros)
        return ChunkSums(value, metrics, jax.tree.map(lambda _: None, shared), None)

    @jax.named_scope("chunks")
    def sums_and_gradients(
        self,
        shared: PyTree,
        tokens: Float[Array, "*B D"],
        aux: PyTree,
        where: Bool[Array, "*B"] | None,
        *,
        wanted: list[bool],
    ) -> ChunkSums:
        """Sum with the gradients of `tokens` and of the `wanted` leaves of `shared`.

        A chunk's gradient for its tokens overwrites them, since no later chunk reads
        them again.
        """
        shape, parts = tokens.shape, _Differentiated(shared, wanted)
        tokens, aux, where = _flat(tokens, aux, where)
        windows = divide(len(tokens), self.chunk_size, self.overlap, where)

        def of_chunk(variables: list[Variable], tokens: Array, aux: PyTree) -> PyTree:
            return self._evaluate(parts.shared_with(variables), tokens, aux)

        gradient = jax.value_and_grad(of_chunk, (0, 1), has_aux=True)

        def add_chunk(i: Int[Array, ""], carry: PyTree) -> PyTree:
            sums, totals, tokens, of_next = carry
            read = windows.read(i, (tokens, aux))
            values, (d_variables, d_read) = gradient(parts.variables(read[0]), *read)
            sums = jax.tree.map(jnp.add, sums, values)
            totals = [_add(t, d) for t, d in zip(totals, d_variables, strict=True)]
            tokens = windows.write(i, tokens, d_read[: windows.stride], of_next)
            return sums, totals, tokens, d_read[windows.stride :]

        first = windows.read(0, (tokens, aux))
        carry = (
            _zeros_of(lambda: of_chunk(parts.variables(first[0]), *first)),
            parts.zeros(),
            tokens,
            jnp.zeros_like(tokens, shape=(self.overlap, *tokens.shape[1:])),
        )
        sums, totals, d_tokens, _ = lax.fori_loop(0, windows.chunks, add_chunk, carry)
        if where is not None:
            d_tokens = jnp.where(where[:, None], d_tokens, 0)
        value, metrics = sums
        d_shared = parts.gradients(totals)
        return ChunkSums(value, metrics, d_shared, d_tokens.reshape(shape))

    def _evaluate(
        self, shared: PyTree, tokens: Array, aux: PyTree
    ) -> tuple[Float[Array, ""], PyTree]:
        value, metrics = self.fn(shared, tokens, aux)
        return value.astype(jnp.float32), metrics


class _Differentiated:
    """The leaves of `shared` and the gradients of those that are differentiated.

    A `Projection` counts as one leaf; in the tree of gradients the leaf is its kernel.
    """

    def __init__(self, shared: PyTree, wanted: list[bool]) -> None:
        self._leaves, self._tree = jax.tree.flatten(shared, is_leaf=_is_projection)
        self._gradient_tree = jax.tree.structure(shared)
        self._wanted = wanted

    def variables(self, tokens: Float[Array, "N D"]) -> list[Variable]:
        """The inputs that a chunk with these tokens is differentiated in."""
        return [_variable(leaf, tokens) for leaf in self._chosen()]

    def shared_with(self, variables: list[Variable]) -> PyTree:
        """`shared` with the variables in place of the differentiated leaves."""
        remaining = iter(variables)
        return self._tree.unflatten(
            _with_variable(leaf, next(remaining)) if wanted else leaf
            for leaf, wanted in zip(self._leaves, self._wanted, strict=True)
        )

    def zeros(self) -> list[Float[Array, "..."]]:
        """Sums of gradients before the first chunk."""
        return [jnp.zeros_like(_array(leaf), jnp.float32) for leaf in self._chosen()]

    def gradients(self, totals: list[Float[Array, "..."]]) -> PyTree:
        """The sums in the tree and the dtypes of `shared`."""
        remaining = iter(totals)
        return self._gradient_tree.unflatten(
            next(remaining).astype(_array(leaf).dtype) if wanted else None
            for leaf, wanted in zip(self._leaves, self._wanted, strict=True)
        )

    def _chosen(self) -> list[Array | Projection]:
        pairs = zip(self._leaves, self._wanted, strict=True)
        return [leaf for leaf, wanted in pairs if wanted]


def _is_projection(x: PyTree) -> bool:
    return isinstance(x, Projection)


def _array(leaf: Array | Projection) -> Array:
    return leaf.kernel if isinstance(leaf, Projection) else leaf


def _variable(leaf: Array | Projection, tokens: Float[Array, "N D"]) -> Variable:
    """The leaf to differentiate: a Projection's tape, otherwise the array itself."""
    return leaf.new_tape(tokens) if isinstance(leaf, Projection) else leaf


def _with_variable(leaf: Array | Projection, variable: PyTree) -> Array | Taped:
    return Taped(leaf.kernel, variable) if isinstance(leaf, Projection) else variable


def _add(total: Float[Array, "..."], gradient: Variable) -> Float[Array, "..."]:
    """`total` plus the gradient of a leaf, or of a tape: the product of its factors."""
    if isinstance(gradient, tuple):
        return add_product(total, *gradient)
    return total + gradient.astype(total.dtype)


def _flat(
    tokens: Float[Array, "*B D"], aux: PyTree, where: Bool[Array, "*B"] | None
) -> tuple[Float[Array, "N D"], PyTree, Bool[Array, " N"] | None]:
    """Flatten the leading axes of every array into one."""
    leading = tokens.ndim - 1
    return jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[leading:]), (tokens, aux, where)
    )


def _zeros_of(function: Callable[[], PyTree]) -> PyTree:
    """Zeros of the types that `function` returns; it is traced but not computed."""
    return jax.jit(lambda: jax.tree.map(jnp.zeros_like, function()))()
