"""Finished rows read into a cache: hidden states of text that another model wrote.

SCRG's teacher reads the student's rows this way, and reads on from a corrected token in
the same cache.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mgsr_jax.decoding.continuous_batching import until_done
from mgsr_jax.decoding.decode import DecodeState, put
from mgsr_jax.rows import Rows
from mgsr_jax.sharding import axis_size
from mgsr_jax.typing import Model, Params

BLOCK = 64
"""Tokens per row that `read_on` computes at a time."""


def unread(model: Model, params: Params, rows: Rows) -> DecodeState:
    """The state before any of `rows` is read, in the precision of `params`."""
    batch, width = rows.tokens.shape
    hidden, _ = jax.eval_shape(model.forward, params, rows.tokens)
    return DecodeState(
        rows=dataclasses.replace(rows, lengths=jnp.ones_like(rows.lengths)),
        cache=model.init_cache(batch, width, hidden.dtype),
        hidden=jnp.zeros(hidden.shape, hidden.dtype),
        done=rows.lengths <= 1,
    )


@jax.named_scope("read_whole")
def read_whole(
    model: Model,
    params: Params,
    rows: Rows,
    *,
    decode_rows: int | None = None,
    read_width: int | None = None,
) -> DecodeState:
    """Read each row in one forward pass, by the model's own attention kernel.

    Args:
      model, params: as trained, with stacked layers.
      rows: finished rows.
      decode_rows: rows that are read at a time; None reads all together.
      read_width: no row is longer than this; default: their width S.
    """

    def extend(state: DecodeState, lengths: Int[Array, "B"]) -> DecodeState:
        tokens = state.rows.tokens[:, :read_width]
        hidden, cache = model.forward(params, tokens, cache=state.cache)
        unread = state.hidden.shape[1] - hidden.shape[1]
        hidden = jnp.pad(hidden, ((0, 0), (0, unread), (0, 0)))
        return DecodeState(
            rows=dataclasses.replace(state.rows, lengths=lengths),
            cache=cache,
            hidden=hidden,
            done=jnp.ones_like(state.done),
        )

    return until_done(extend, unread(model, params, rows), rows.lengths, decode_rows)


@jax.named_scope("read_on")
def read_on(
    model: Model,
    params: Params,
    state: DecodeState,
    rows: Rows,
    *,
    block: int | None = None,
    decode_rows: int | None = None,
) -> DecodeState:
    """Read on from `state` to the end of `rows`, whose tokens are complete.

    Args:
      model, params: as trained, with stacked layers.
      state: `state.rows.lengths` tokens of the same rows have been read; from
        `read_whole` at first.
      rows: the rows to read to their end.
      block: tokens per row that are read at a time. Default: BLOCK, or the whole row
        where weights are sharded over fsdp, since each block all-gathers them.
      decode_rows: rows that are read at a time; None reads all together.
    """
    width = rows.tokens.shape[1]
    block = block or (BLOCK if axis_size("fsdp") == 1 else width)

    def extend(state: DecodeState, lengths: Int[Array, "B"]) -> DecodeState:
        read = state.rows.lengths
        positions = read[:, None] - 1 + jnp.arange(block)[None]
        tokens = jnp.take_along_axis(
            state.rows.tokens, jnp.minimum(positions, width - 1), axis=1
        )
        hidden, cache = model.forward(
            params, tokens, positions=positions, cache=state.cache
        )
        read = jnp.minimum(read + block, lengths)
        return DecodeState(
            rows=dataclasses.replace(state.rows, lengths=read),
            cache=cache,
            hidden=put(state.hidden, positions, hidden),
            done=read >= lengths,
        )

    read = state.rows.lengths
    state = dataclasses.replace(
        state,
        rows=dataclasses.replace(rows, lengths=read),
        done=read >= rows.lengths,
    )
    return until_done(extend, state, rows.lengths, decode_rows)
