"""`lax.top_k` that leaves the rows of a batch on the devices that hold them.

XLA gathers the operand of a top-k whole on every device, even where only leading axes
are split (jax 0.10, all back ends): for logits that is the batch times V. Rows do not
depend on each other; this says so to the partitioner.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int


def top_k(
    x: Float[Array, "*B V"], k: int, *, rows_by_xla: bool | None = None
) -> tuple[Float[Array, "*B K"], Int[Array, "*B K"]]:
    """The `k` largest of the last axis, descending, and where they stand.

    Of equals the first wins. Without gradient: stop it before. `rows_by_xla` says that
    the rows are for XLA to place; None that they are outside of every shard_map alone.
    Within two the partitioner's hook aborts XLA (jax 0.10).
    """
    if rows_by_xla is None:
        types = jax.sharding.get_abstract_mesh().axis_types
        rows_by_xla = AxisType.Manual not in types
    if not rows_by_xla:
        return _top_k(x, k)

    @custom_vmap
    def by_row(x: Array) -> Any:
        return _partitioned(k, x.ndim)(x)

    @by_row.def_vmap
    def _(axis_size: int, batched: Any, x: Array) -> Any:
        return top_k(x, k, rows_by_xla=True), (True, True)

    values, indices = by_row(x)
    return values, indices


def _top_k(x: Array, k: int) -> tuple[Array, Array]:
    # The barrier keeps a later slice of the K from being merged with the one in here,
    # which XLA then takes for a sort of all of V (40 times the time on CPU).
    # One barrier each: XLA (jax 0.10) aborts on one around both before an all-gather.
    values, indices = lax.top_k(x, k)
    return lax.optimization_barrier(values), lax.optimization_barrier(indices)


@functools.cache
def _partitioned(k: int, ndim: int) -> Any:
    def whole(x: Array) -> tuple[Array, Array]:
        return _top_k(x, k)

    def partition(mesh: Any, operands: Any, results: Any) -> Any:
        of_rows = _whole_last_axis(operands[0])
        return mesh, whole, (of_rows, of_rows), (of_rows,)

    rows = " ".join(f"b{axis}" for axis in range(ndim - 1))
    function = custom_partitioning(whole)
    function.def_partition(
        partition=partition,
        sharding_rule=f"{rows} v -> {rows} k, {rows} k",
        need_replication_factors=("v", "k"),
    )
    return jax.jit(function)


def _whole_last_axis(x: jax.ShapeDtypeStruct) -> Any:
    """A placement of rows: the sharding rule does not keep XLA from splitting V."""
    if isinstance(x.sharding, NamedSharding):
        return NamedSharding(x.sharding.mesh, P(*x.sharding.spec[:-1]))
    if x.sharding.shard_shape(x.shape)[-1] != x.shape[-1]:
        raise ValueError(
            f"logits of {x.shape[-1]} columns are split over an Auto axis inside a "
            "shard_map over other axes; expected its name: pass vocab_axis"
        )
    return x.sharding
