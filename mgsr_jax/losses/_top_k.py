"""`lax.top_k` that keeps the rows of a batch on the devices that hold them.

XLA gathers the whole operand of a top-k on every device, even where only leading axes
are split (jax 0.10, all back ends): for logits that is the batch times V. Rows do not
depend on each other; `top_k` declares that to XLA's partitioner.

TPUs and GPUs have a kernel only for a small K. Beyond it `lax.top_k` sorts all of V;
`top_k` finds the same classes without a sort.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, Sharding, reshard
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree

from mgsr_jax.losses._mesh_axes import axes_of_type, explicit_axes, manual_axes
from mgsr_jax.losses._threshold import threshold

TPU_KERNEL, GPU_KERNEL = 128, 16
"""The largest K for which the compiler calls a kernel."""


def top_k(
    x: Float[Array, "*B V"], k: int, *, rows_by_xla: bool | None = None
) -> tuple[Float[Array, "*B K"], Int[Array, "*B K"]]:
    """The `k` largest values of the last axis, descending, and their indices.

    The first of equal values wins; -0 equals 0, and is returned as 0. There is no
    gradient: stop it before the call.

    Args:
      x: [..., V]
      k: number of values.
      rows_by_xla: whether XLA's partitioner places the rows. None means: outside of
        every shard_map. Inside two of them the partitioner's hook aborts XLA
        (jax 0.10).
    """
    if explicit := explicit_axes(x):
        return _over_explicit_rows(x, k, explicit)
    if rows_by_xla is None:
        rows_by_xla = not manual_axes()
    if not rows_by_xla:
        return _top_k(x, k)

    @custom_vmap
    def per_row(x: Array) -> tuple[Array, Array]:
        return _partitioned(k, x.ndim)(x)

    @per_row.def_vmap
    def _(
        axis_size: int, batched: PyTree, x: Array
    ) -> tuple[tuple[Array, Array], tuple[bool, bool]]:
        return top_k(x, k, rows_by_xla=True), (True, True)

    values, indices = per_row(x)
    return values, indices


def _over_explicit_rows(
    x: Float[Array, "*B V"], k: int, axes: set[str]
) -> tuple[Float[Array, "*B K"], Int[Array, "*B K"]]:
    """`top_k` where types carry the sharding; V is all-gathered if it is split.

    The partitioner's hook does not compile there (jax 0.12).
    """
    rows = P(*axes_of_type(x)[:-1])
    on_device = jax.shard_map(
        functools.partial(_top_k, k=k),
        mesh=jax.typeof(x).sharding.mesh,
        in_specs=rows,
        out_specs=rows,
        axis_names=axes,
    )
    return on_device(reshard(x, rows))


def _top_k(x: Array, k: int) -> tuple[Array, Array]:
    # XLA sorts -0 below 0, although the two are equal.
    x = jnp.where(x == 0, jnp.zeros_like(x), x)
    if k <= GPU_KERNEL:
        values, indices = lax.top_k(x, k)
    else:
        values, indices = lax.platform_dependent(
            x,
            tpu=functools.partial(_in_parts, k=k),
            cuda=functools.partial(_by_threshold, k=k),
            rocm=functools.partial(_by_threshold, k=k),
            default=functools.partial(_sorted, k=k),
        )
    # Without a barrier XLA merges a later slice of the K with the slice in top_k, and
    # then sorts all of V (40 times the time on CPU). Each result has a barrier of its
    # own: XLA (jax 0.10) aborts on one around both before an all-gather.
    return lax.optimization_barrier(values), lax.optimization_barrier(indices)


def _sorted(x: Array, k: int) -> tuple[Array, Array]:
    values, indices = lax.top_k(x, k)
    return values, indices


def _in_parts(x: Array, k: int) -> tuple[Array, Array]:
    """`lax.top_k` in parts that the TPU's kernel finds.

    A part is searched where the parts before it found nothing. The smallest float
    counts as -inf.
    """
    lowest = jnp.finfo(x.dtype).min
    left, found = jnp.maximum(x, lowest), []
    column = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    for start in range(0, k, TPU_KERNEL):
        values, indices = lax.top_k(left, min(TPU_KERNEL, k - start))
        found.append((values, indices))
        last, index = values[..., -1:], indices[..., -1:]
        is_found = (left > last) | ((left == last) & (column <= index))
        left = jnp.where(is_found, -jnp.inf, left)
    values, indices = (
        jnp.concatenate(parts, axis=-1) for parts in zip(*found, strict=True)
    )
    return jnp.where(values == lowest, -jnp.inf, values), indices


def _by_threshold(x: Array, k: int) -> tuple[Array, Array]:
    """`lax.top_k` by the k-th largest value; only k values are sorted."""
    kth = threshold(x, jnp.ones_like(x, jnp.float32), k)
    is_larger, is_kth = x > kth, x == kth
    missing = k - jnp.sum(is_larger, axis=-1, keepdims=True)
    is_found = is_larger | (is_kth & (jnp.cumsum(is_kth, axis=-1) <= missing))
    # The number of classes found so far reaches n at the n-th of them.
    search = jnp.vectorize(
        lambda count: jnp.searchsorted(count, jnp.arange(1, k + 1)),
        signature="(v)->(k)",
    )
    indices = search(jnp.cumsum(is_found, axis=-1, dtype=jnp.int32))
    values, order = lax.top_k(jnp.take_along_axis(x, indices, axis=-1), k)
    return values, jnp.take_along_axis(indices, order, axis=-1)


@functools.cache
def _partitioned(k: int, ndim: int) -> Callable[[Array], tuple[Array, Array]]:
    """`_top_k` that XLA's partitioner may split over rows."""

    def local(x: Array) -> tuple[Array, Array]:
        return _top_k(x, k)

    def partition(
        mesh: Mesh, operands: tuple[jax.ShapeDtypeStruct, ...], results: PyTree
    ) -> tuple[Mesh, Callable[[Array], tuple[Array, Array]], PyTree, PyTree]:
        rows = _whole_last_axis(operands[0])
        return mesh, local, (rows, rows), (rows,)

    rows = " ".join(f"b{axis}" for axis in range(ndim - 1))
    function = custom_partitioning(local)
    function.def_partition(
        partition=partition,
        sharding_rule=f"{rows} v -> {rows} k, {rows} k",
        need_replication_factors=("v", "k"),
    )
    return jax.jit(function)


def _whole_last_axis(x: jax.ShapeDtypeStruct) -> Sharding:
    """The sharding of `x` with its last axis whole.

    The sharding rule does not prevent XLA from splitting V.

    Raises:
      ValueError: V is split over an axis that has no name here.
    """
    if isinstance(x.sharding, NamedSharding):
        return NamedSharding(x.sharding.mesh, P(*x.sharding.spec[:-1]))
    if x.sharding.shard_shape(x.shape)[-1] != x.shape[-1]:
        raise ValueError(
            f"logits of {x.shape[-1]} columns are split over an Auto axis inside a "
            "shard_map over other axes; expected the axis by name: pass vocab_axis"
        )
    return x.sharding
