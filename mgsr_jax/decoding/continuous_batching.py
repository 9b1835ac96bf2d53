"""Many rows through few slots: a row that ends makes room for one that waits.

Decoded in lock step, rows wait for the longest of them. Here `slots` of them are
decoded at a time, and are exchanged when enough have ended: those with the most left to
write go first, so that few slots are idle at the end. A row's tokens do not depend on
the slot, nor on when it is there; its cache lies in the pool while it waits.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from mgsr_jax.sharding import batch_shards

# Share of the slots that stand idle before rows are exchanged, which copies caches.
IDLE = 0.25


def in_slots(
    extend: Callable[..., Any], pool: Any, beside: Any, slots: int | None
) -> Any:
    """`pool`, a state of R rows with a field `done`, with every row done.

    `extend(state, beside)` takes a state of `slots` rows one step further, with what
    `beside` has for these rows; None is a slot for each row. On a mesh each device
    exchanges its own rows with its own slots.

    Raises:
      ValueError: the devices that rows are split over do not divide the slots.
    """
    if slots is None or slots >= pool.done.shape[0]:
        return _until_done(lambda pool: extend(pool, beside), pool)
    shards = batch_shards()
    if slots % shards or pool.done.shape[0] % shards:
        raise ValueError(
            f"{pool.done.shape[0]} rows in {slots} slots over {shards} devices; "
            "expected multiples of the number of devices"
        )
    size = slots // shards
    idle = max(1, int(IDLE * size))

    def exchange(pool: Any) -> Any:
        held = _next_rows(pool, shards, size)
        active, beside_active = (_take(x, held) for x in (pool, beside))
        left = jnp.sum(~pool.done.reshape(shards, -1), axis=1)

        def goes_on(active: Any) -> Any:
            running = jnp.sum(~active.done.reshape(shards, -1), axis=1)
            makes_room = (left > size) & (running <= size - idle)
            return jnp.any(running > 0) & ~jnp.any(makes_room)

        active = lax.while_loop(goes_on, lambda x: extend(x, beside_active), active)
        return _put(pool, held, active)

    return _until_done(exchange, pool)


def _until_done(advance: Callable[..., Any], pool: Any) -> Any:
    return lax.while_loop(lambda pool: jnp.any(~pool.done), advance, pool)


def _next_rows(pool: Any, shards: int, size: int) -> Int[Array, "D C"]:
    """On each shard the rows to go on with: those with the most left to write."""
    lengths = pool.rows.lengths
    order = jnp.where(pool.done, jnp.iinfo(lengths.dtype).max, lengths)
    return jnp.argsort(order.reshape(shards, -1), axis=1)[:, :size]


def _take(tree: Any, held: Int[Array, "D C"]) -> Any:
    """The held rows of every leaf."""

    def take(leaf: Array) -> Array:
        by_shard = leaf.reshape(held.shape[0], -1, *leaf.shape[1:])
        return jax.vmap(lambda x, i: x[i])(by_shard, held).reshape(-1, *leaf.shape[1:])

    return jax.tree.map(take, tree)


def _put(tree: Any, held: Int[Array, "D C"], rows: Any) -> Any:
    """Every leaf with the held rows written back."""

    def put(leaf: Array, new: Array) -> Array:
        by_shard, new = (
            x.reshape(held.shape[0], -1, *leaf.shape[1:]) for x in (leaf, new)
        )
        return jax.vmap(lambda x, i, n: x.at[i].set(n))(by_shard, held, new).reshape(
            leaf.shape
        )

    return jax.tree.map(put, tree, rows)
