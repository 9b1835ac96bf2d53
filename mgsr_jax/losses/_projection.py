"""A head's matrix whose gradient is summed in place.

Autodiff forms the head's whole gradient for one chunk of tokens and then adds it to the
sum. That is one more array of the head's size, on a CPU most of the memory that a
chunked loss needs. A `Projection` gives the two factors of that product instead, and
`add_product` multiplies them block by block into the sum.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mgsr_jax.losses._mesh_axes import split_by_xla
from mgsr_jax.typing import Leaf

_BLOCK = 2**22  # bytes of the sum per block: they fit in a CPU's cache
_FEW_ROWS = 64  # rows of hidden states

Tape = tuple[Float[Array, "N V"], Float[Array, "N D"]]
"""Zeros whose gradients are the factors of the kernel's gradient."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projection:
    """A matrix that `project` multiplies hidden states with.

    Where it is differentiated in `shared` of `chunked`, `fn` gets a `Taped` instead.

    Attributes:
      kernel: the matrix. [V, D]
    """

    kernel: Leaf

    def new_tape(self, tokens: Float[Array, "N D"]) -> Tape:
        """A tape for these tokens, in their precision."""
        (columns, width), count = self.kernel.shape, tokens.shape[0]
        factors = (jnp.zeros((count, n), tokens.dtype) for n in (columns, width))
        d_logits, hidden = (varying_as(x, tokens, self.kernel) for x in factors)
        return d_logits, hidden


class Taped:
    """A kernel in use, whose gradient is read from a tape.

    It is neither an array nor a tree of arrays, so that it can only be cast, and
    multiplied once by `project`: the tape would miss any other use of the kernel.

    Args:
      kernel: the matrix. [V, D]
      tape: zeros; their gradients are the two factors, the gradient of the logits
        [N, V] and the hidden states [N, D].
    """

    def __init__(self, kernel: Float[Array, "V D"], tape: Tape):
        self._kernel, self._tape = kernel, tape
        self._uses: list[tuple[int, ...]] = []

    def astype(self, dtype: DTypeLike) -> "Taped":
        """The same kernel in another precision; both share the one allowed use."""
        cast = Taped(self._kernel.astype(dtype), self._tape)
        cast._uses = self._uses
        return cast

    def multiply(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The product that `project` returns."""
        if self._uses or hidden.shape != self._tape[1].shape:
            raise ValueError(
                f"a Projection is multiplied with {hidden.shape}, "
                f"{'again' if self._uses else 'first'}; expected once per chunk, with "
                f"{self._tape[1].shape}: pass the kernel itself for other uses"
            )
        self._uses.append(hidden.shape)
        hidden = varying_as(hidden, self._kernel)
        return _taped_product(hidden, self._kernel, *self._tape)


def project(
    hidden: Float[Array, "*B D"], kernel: Float[Array, "V D"] | Projection | Taped
) -> Float[Array, "*B V"]:
    """Logits of hidden states, float32 for arguments of any float dtype.

    logits_v = sum_d hidden_d kernel_vd

    With a `Projection` in the `shared` of `chunked` the gradient of the kernel needs no
    second array of its size. Everywhere else a `Projection` acts as its kernel.

    Args:
      hidden: [..., D]
      kernel: [V, D], a `Projection` of such a matrix, or the `Taped` in its place.

    Raises:
      ValueError: a `Projection` is multiplied twice in one chunk, or with other hidden
        states than one per token of the chunk.

    >>> print(project(jnp.ones((1, 2)), jnp.array([[1.0, 2.0], [3.0, 4.0]])))
    [[3. 7.]]
    """
    if isinstance(kernel, Taped):
        return kernel.multiply(hidden)
    return _product(hidden, kernel.kernel if isinstance(kernel, Projection) else kernel)


def varying_as(x: Array, *others: Array) -> Array:
    """`x`, typed as varying over the mesh axes that `others` vary over."""
    for other in others:
        scalar = lax.stop_gradient(other[(0,) * other.ndim]).astype(x.dtype)
        x = jnp.where(False, scalar, x)
    return x


def _product(hidden: Array, kernel: Array) -> Array:
    if math.prod(hidden.shape[:-1]) > _FEW_ROWS:
        return _product_of_many(hidden, kernel)
    return lax.platform_dependent(
        hidden, kernel, cpu=_product_of_few, default=_product_of_many
    )


def _product_of_many(hidden: Array, kernel: Array) -> Array:
    return jnp.einsum(
        "vd,...d->...v", kernel, hidden, preferred_element_type=jnp.float32
    )


def _product_of_few(hidden: Array, kernel: Array) -> Array:
    """The product for a few rows, which takes as long as reading the kernel.

    XLA on a CPU reads the kernel faster if the rows are columns in memory too. The
    barriers prevent it from transposing the product instead.
    """
    columns = lax.optimization_barrier(hidden.reshape(-1, hidden.shape[-1]).T)
    product = jnp.matmul(kernel, columns, preferred_element_type=jnp.float32)
    return lax.optimization_barrier(product).T.reshape(*hidden.shape[:-1], -1)


@jax.custom_vjp
def _taped_product(
    hidden: Array, kernel: Array, tape_logits: Array, tape_hidden: Array
) -> Array:
    return _product(hidden, kernel)


Residuals = tuple[Array, Array, tuple[Array, Array]]
"""Hidden states, kernel, and a scalar in the dtype of each half of the tape."""


def _forward(
    hidden: Array, kernel: Array, tape_logits: Array, tape_hidden: Array
) -> tuple[Array, Residuals]:
    like = (jnp.zeros((), tape_logits.dtype), jnp.zeros((), tape_hidden.dtype))
    return _product(hidden, kernel), (hidden, kernel, like)


def _backward(
    residuals: Residuals, d_logits: Array
) -> tuple[Array, None, Array, Array]:
    hidden, kernel, (like_logits, like_hidden) = residuals
    d_hidden = jnp.einsum(
        "nv,vd->nd",
        d_logits.astype(kernel.dtype),
        kernel,
        preferred_element_type=jnp.float32,
    )
    factors = d_logits.astype(like_logits.dtype), hidden.astype(like_hidden.dtype)
    return d_hidden.astype(hidden.dtype), None, *factors


_taped_product.defvjp(_forward, _backward)


def add_product(
    total: Float[Array, "V D"],
    d_logits: Float[Array, "N V"],
    hidden: Float[Array, "N D"],
) -> Float[Array, "V D"]:
    """total + d_logits^T hidden, one block of rows at a time on a CPU.

    XLA on a CPU does not fuse product and sum: it would write the whole product first.
    """

    def product(d_logits: Array) -> Array:
        return jnp.einsum(
            "nv,nd->vd", d_logits, hidden, preferred_element_type=jnp.float32
        )

    rows, width = total.shape
    block = min(rows, max(1, _BLOCK // (4 * width)))
    # Where XLA may split the rows over devices it would gather each block.
    if block == rows or split_by_xla():
        return total + product(d_logits)

    def add_block(i: Int[Array, ""], total: Array) -> Array:
        start = jnp.minimum(i * block, rows - block)
        columns = lax.dynamic_slice_in_dim(d_logits, start, block, axis=1)
        # The last block starts earlier, to be full; rows that it repeats add 0.
        is_new = jnp.arange(block)[None] >= i * block - start
        added = product(jnp.where(is_new, columns, 0))
        old = lax.dynamic_slice_in_dim(total, start, block)
        return lax.dynamic_update_slice_in_dim(total, old + added, start, axis=0)

    return lax.platform_dependent(
        total,
        d_logits,
        cpu=lambda total, _: lax.fori_loop(0, -(-rows // block), add_block, total),
        default=lambda total, d_logits: total + product(d_logits),
    )
