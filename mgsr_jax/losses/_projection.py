"""A head's matrix whose gradient is added up in place.

Autodiff forms the gradient of a head for one chunk of tokens whole, and adds it to the
sum after that: one more array of the head's size, which on a CPU is most of what a
chunked loss needs. A `Projection` shows the two factors of that product instead of the
product, and `add_product` multiplies them block by block into the sum.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jaxtyping import Array, Float

from mgsr_jax.typing import Leaf

_BLOCK = 2**22  # bytes of the sum at once: what a CPU's cache holds
_FEW = 64  # rows of hidden states


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projection:
    """A matrix that `project` multiplies hidden states with.

    In `shared` of `chunked`, where it is differentiated, `fn` finds a `Taped` in its
    place.

    Attributes:
      kernel: [V, D]
    """

    kernel: Leaf

    def new_tape(self, tokens: Float[Array, "N D"]) -> tuple[Array, Array]:
        """Zeros in place of the factors, in the precision of the hidden states."""
        (columns, width), count = self.kernel.shape, tokens.shape[0]
        factors = (jnp.zeros((count, n), tokens.dtype) for n in (columns, width))
        d_logits, hidden = (varying_as(x, tokens, self.kernel) for x in factors)
        return d_logits, hidden


class Taped:
    """A projection whose gradient is read from a tape: its two factors.

    Neither an array nor a tree of arrays, so that nothing but `project`, once, and
    `astype` can be done with it: any other use of the kernel would go unnoticed by the
    tape.

    Args:
      kernel: [V, D]
      tape: zeros, the gradients of which are the factors: logits' [N, V] and hidden
        states' [N, D].
    """

    def __init__(self, kernel: Array, tape: tuple[Array, Array]):
        self._kernel, self._tape, self._uses = kernel, tape, []

    def astype(self, dtype: Any) -> "Taped":
        """The same in another precision; `project` is still for once."""
        cast = Taped(self._kernel.astype(dtype), self._tape)
        cast._uses = self._uses
        return cast

    def multiply(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """What `project` computes."""
        if self._uses or hidden.shape != self._tape[1].shape:
            raise ValueError(
                f"a Projection is multiplied with {hidden.shape}, "
                f"{'again' if self._uses else 'first'}; expected once a chunk, with "
                f"{self._tape[1].shape}: pass the kernel itself for other uses"
            )
        self._uses.append(hidden.shape)
        hidden = varying_as(hidden, self._kernel)
        return _taped_product(hidden, self._kernel, *self._tape)


def project(
    hidden: Float[Array, "*B D"], kernel: Float[Array, "V D"] | Projection | Taped
) -> Float[Array, "*B V"]:
    """Logits of hidden states, float32 whatever the arguments are.

    logits_v = sum_d hidden_d kernel_vd

    With a `Projection` in the `shared` of `chunked` the gradient of the kernel needs no
    second array of its size; everywhere else it is the same as its kernel.

    Args:
      hidden: [..., D]
      kernel: [V, D], or what stands for a `Projection` of it.

    Raises:
      ValueError: a `Projection` is multiplied twice in one chunk, or with other hidden
        states than one for each of its tokens.

    >>> print(project(jnp.ones((1, 2)), jnp.array([[1.0, 2.0], [3.0, 4.0]])))
    [[3. 7.]]
    """
    if isinstance(kernel, Taped):
        return kernel.multiply(hidden)
    return _product(hidden, kernel.kernel if isinstance(kernel, Projection) else kernel)


def varying_as(x: Array, *others: Array) -> Array:
    """`x`, typed in a shard_map as different on each device wherever the others are."""
    for other in others:
        one = lax.stop_gradient(other[(0,) * other.ndim]).astype(x.dtype)
        x = jnp.where(False, one, x)
    return x


def _product(hidden: Array, kernel: Array) -> Array:
    if math.prod(hidden.shape[:-1]) <= _FEW:
        return lax.platform_dependent(hidden, kernel, cpu=_of_few, default=_of_many)
    return _of_many(hidden, kernel)


def _of_many(hidden: Array, kernel: Array) -> Array:
    return jnp.einsum(
        "vd,...d->...v", kernel, hidden, preferred_element_type=jnp.float32
    )


def _of_few(hidden: Array, kernel: Array) -> Array:
    """The product of a few rows takes as long as reading the kernel.

    XLA on a CPU reads it faster where the rows are columns in memory too, for which it
    has to be held back from transposing the product instead.
    """
    columns = lax.optimization_barrier(hidden.reshape(-1, hidden.shape[-1]).T)
    product = jnp.matmul(kernel, columns, preferred_element_type=jnp.float32)
    return lax.optimization_barrier(product).T.reshape(*hidden.shape[:-1], -1)


@jax.custom_vjp
def _taped_product(hidden: Array, kernel: Array, d_logits: Array, out: Array) -> Array:
    return _product(hidden, kernel)


def _forward(hidden: Array, kernel: Array, d_logits: Array, out: Array) -> Any:
    like = (jnp.zeros((), d_logits.dtype), jnp.zeros((), out.dtype))
    return _product(hidden, kernel), (hidden, kernel, like)


def _backward(kept: Any, d_logits: Array) -> Any:
    hidden, kernel, (of_logits, of_hidden) = kept
    d_hidden = jnp.einsum(
        "nv,vd->nd",
        d_logits.astype(kernel.dtype),
        kernel,
        preferred_element_type=jnp.float32,
    )
    factors = d_logits.astype(of_logits.dtype), hidden.astype(of_hidden.dtype)
    return d_hidden.astype(hidden.dtype), None, *factors


_taped_product.defvjp(_forward, _backward)


def add_product(
    total: Float[Array, "V D"],
    d_logits: Float[Array, "N V"],
    hidden: Float[Array, "N D"],
) -> Float[Array, "V D"]:
    """total + d_logits^T hidden, where XLA does not fuse them: a block after the other.

    On a CPU the product would be written whole before it is added.
    """

    def product(d_logits: Array) -> Array:
        return jnp.einsum(
            "nv,nd->vd", d_logits, hidden, preferred_element_type=jnp.float32
        )

    rows, width = total.shape
    block = min(rows, max(1, _BLOCK // (4 * width)))
    if block == rows or _placed_by_xla():
        return total + product(d_logits)

    def add(i: Any, total: Array) -> Array:
        start = jnp.minimum(i * block, rows - block)
        part = lax.dynamic_slice_in_dim(d_logits, start, block, axis=1)
        # The last block begins earlier, to be whole: what it has twice counts once.
        new = jnp.arange(block)[None] >= i * block - start
        part = product(jnp.where(new, part, 0))
        old = lax.dynamic_slice_in_dim(total, start, block)
        return lax.dynamic_update_slice_in_dim(total, old + part, start, axis=0)

    return lax.platform_dependent(
        total,
        d_logits,
        cpu=lambda total, d_logits: lax.fori_loop(0, -(-rows // block), add, total),
        default=lambda total, d_logits: total + product(d_logits),
    )


def _placed_by_xla() -> bool:
    """Whether rows may be split over devices: a block would have to be gathered."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    return any(kind != AxisType.Manual and size > 1 for kind, size in sizes)
