"""Continuous batching: a row that ends makes room for a row that waits.

In lock step every row waits for the longest one. Here `decode_rows` rows are decoded at
a time and are exchanged once enough of them have ended. Rows with the most left to
write go first, so that few places are idle at the end. A row's tokens depend neither on
its place nor on when it is decoded; its cache stays in the pool while it waits.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from mgsr_jax.sharding import batch_shards

# Share of idle places at which rows are exchanged; an exchange copies caches.
IDLE = 0.25


@runtime_checkable
class _State(Protocol):
    """Rows in progress; a pytree whose every leaf has rows as its first axis."""

    @property
    def rows(self) -> Any: ...

    @property
    def done(self) -> Any: ...


State = TypeVar("State", bound=_State)
PerRow = TypeVar("PerRow")


def until_done(
    extend: Callable[[State, PerRow], State],
    pool: State,
    per_row: PerRow,
    decode_rows: int | None,
) -> State:
    """The `pool` of R rows after `extend` has been applied until every row is done.

    On a mesh each device exchanges its own rows only. The loop over steps is named
    "extend", the one over exchanges "exchange"; a roofline states their trips.

    Args:
      extend: takes a state of `decode_rows` rows, with their part of `per_row`, one
        step further.
      pool: the state of all R rows.
      per_row: arrays with a first axis of R, passed along.
      decode_rows: rows that are extended at a time; None extends all R together.

    Raises:
      ValueError: the number of devices that rows are sharded over does not divide
        `decode_rows` or R.
    """
    if decode_rows is None or decode_rows >= pool.done.shape[0]:
        with jax.named_scope("extend"):
            return _while_any_left(lambda pool: extend(pool, per_row), pool)
    shards = batch_shards()
    if decode_rows % shards or pool.done.shape[0] % shards:
        raise ValueError(
            f"{pool.done.shape[0]} rows, decode_rows={decode_rows}, over {shards} "
            "devices; expected multiples of the number of devices"
        )
    size = decode_rows // shards
    idle = max(1, int(IDLE * size))

    def exchange(pool: State) -> State:
        chosen = _next_rows(pool, shards, size)
        active, active_per_row = _gather(pool, chosen), _gather(per_row, chosen)
        waiting = jnp.sum(~pool.done.reshape(shards, -1), axis=1)

        def cond(active: State) -> Bool[Array, ""]:
            running = jnp.sum(~active.done.reshape(shards, -1), axis=1)
            should_exchange = (waiting > size) & (running <= size - idle)
            return jnp.any(running > 0) & ~jnp.any(should_exchange)

        with jax.named_scope("extend"):
            active = lax.while_loop(cond, lambda x: extend(x, active_per_row), active)
        return _scatter(pool, chosen, active)

    with jax.named_scope("exchange"):
        return _while_any_left(exchange, pool)


def _while_any_left(advance: Callable[[State], State], pool: State) -> State:
    return lax.while_loop(lambda pool: jnp.any(~pool.done), advance, pool)


def _next_rows(pool: _State, shards: int, size: int) -> Int[Array, "D C"]:
    """Per shard, the rows to extend next: those with the most left to write."""
    lengths = pool.rows.lengths
    order = jnp.where(pool.done, jnp.iinfo(lengths.dtype).max, lengths)
    return jnp.argsort(order.reshape(shards, -1), axis=1)[:, :size]


def _gather(tree: PerRow, chosen: Int[Array, "D C"]) -> PerRow:
    """The chosen rows of every leaf."""

    def gather(leaf: Array) -> Array:
        by_shard = leaf.reshape(chosen.shape[0], -1, *leaf.shape[1:])
        picked = jax.vmap(lambda x, i: x[i])(by_shard, chosen)
        return picked.reshape(-1, *leaf.shape[1:])

    return jax.tree.map(gather, tree)


def _scatter(tree: State, chosen: Int[Array, "D C"], rows: State) -> State:
    """Every leaf with the chosen rows replaced by `rows`."""

    def scatter(leaf: Array, new: Array) -> Array:
        by_shard, new = (
            x.reshape(chosen.shape[0], -1, *leaf.shape[1:]) for x in (leaf, new)
        )
        return jax.vmap(lambda x, i, n: x.at[i].set(n))(by_shard, chosen, new).reshape(
            leaf.shape
        )

    return jax.tree.map(scatter, tree, rows)
