"""Generation: prefill, then one `lax.while_loop` over a static cache.

Cache slot = position. A query attends to the slots up to its own position, so a row is
cut back by setting its length: later slots are masked, and overwritten in time.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from mgsr_jax.decoding.continuous_batching import until_done
from mgsr_jax.decoding.sampling import (
    ANCESTRAL,
    STUDENT_STREAM,
    Sampling,
    is_eos,
    mask_vocab,
    repeats_ngram,
    row_keys,
    sample,
)
from mgsr_jax.rows import Rows, prompts_only
from mgsr_jax.typing import Leaf, Model, Params, PRNGKey, RowKeys

TOKENS_PER_CHECK = 8
"""Tokens between two checks whether every row has ended.

The next token waits for a check: all devices exchange a flag, and on a GPU the host
reads it. Finished rows meanwhile write nothing.
"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """How rows are extended. Under `jax.jit` numbers are traced, the rest is static.

    Attributes:
      max_length: tokens of prompt and response; at most the rows' width S.
      eos_ids: tokens that end a row; the one that does belongs to the row.
      sampling: how a token is drawn.
      vocab_size: columns at or beyond it are never drawn.
      no_repeat_ngram: forbid tokens that would repeat an n-gram of the row; 0 is off.
      decode_rows: rows that are decoded at a time; a row that ends makes room for one
        that waits. None decodes all together. It changes time only: the caches of all
        rows are kept.
      max_new_tokens: tokens of response, at most; None: as many as fit.
    """

    max_length: Leaf
    eos_ids: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    sampling: Sampling = ANCESTRAL
    vocab_size: int | None = dataclasses.field(default=None, metadata={"static": True})
    no_repeat_ngram: int = dataclasses.field(default=0, metadata={"static": True})
    decode_rows: int | None = dataclasses.field(default=None, metadata={"static": True})
    max_new_tokens: Leaf | None = None

    def is_full(self, rows: Rows) -> Bool[Array, "B"]:
        """Rows that have as many tokens as they may."""
        limit = jnp.minimum(self.max_length, rows.tokens.shape[1])
        if self.max_new_tokens is not None:
            limit = jnp.minimum(limit, rows.prompt_lengths + self.max_new_tokens)
        return rows.lengths >= limit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Rows in progress.

    Attributes:
      rows: the tokens so far.
      cache: keys and values of the positions below `rows.lengths - 1`.
      hidden: the model's output at those positions; index t predicts token t + 1.
        [B, S, D]
      done: rows that ended in a stop token or are full. [B]
    """

    rows: Leaf
    cache: Leaf
    hidden: Leaf
    done: Leaf


@jax.named_scope("prefill")
def start(
    model: Model,
    params: Params,
    rows: Rows,
    *,
    dtype: Any = jnp.float32,
    prefill_width: int | None = None,
) -> DecodeState:
    """Prefill: the state in which every prompt has been read and nothing written.

    Args:
      params: preferably as trained; stacked layers compile faster.
      rows: prompts.
      dtype: of the computation and the cache.
      prefill_width: no prompt is longer than this; default: the rows' width S.
    """
    batch, width = rows.tokens.shape
    hidden, cache = model.forward(
        jax.tree.map(lambda p: p.astype(dtype), params),
        rows.tokens[:, :prefill_width],
        cache=model.init_cache(batch, width, dtype),
    )
    return DecodeState(
        rows=rows,
        cache=cache,
        # Hidden states beyond a prompt are never read.
        hidden=jnp.pad(hidden, ((0, 0), (0, width - hidden.shape[1]), (0, 0))),
        done=jnp.zeros_like(rows.lengths, dtype=bool),
    )


@jax.named_scope("decode")
def decode(
    model: Model,
    params: Params,
    state: DecodeState,
    *,
    keys: RowKeys,
    decoding: Decoding,
) -> DecodeState:
    """Extend every row that is not done until it ends or is full.

    Args:
      model, params: the student; `params` preferably from `model.decode_params`.
      state: from `start`, or a state whose rows were cut back.
      keys: one per row, from `row_keys`. [B]
      decoding: how rows are extended.

    Returns:
      The state with every row done.
    """

    def extend_rows(state: DecodeState, keys: RowKeys) -> DecodeState:
        return extend(model, params, state, keys, decoding, tokens=TOKENS_PER_CHECK)

    done = state.done | decoding.is_full(state.rows)
    # Before the loop: what it carries keeps this placement.
    (rows, done, keys), hidden = model.place_decoding(
        (state.rows, done, keys), state.hidden
    )
    state = DecodeState(rows, state.cache, hidden, done)
    return until_done(extend_rows, state, keys, decoding.decode_rows)


def extend(
    model: Model,
    params: Params,
    state: DecodeState,
    keys: RowKeys,
    decoding: Decoding,
    *,
    tokens: int,
) -> DecodeState:
    """Extend every row by `tokens` tokens, fewer where it ends; as for `decode`."""
    head = model.head_params(params)

    def extend_by_one(_: Int[Array, ""], state: DecodeState) -> DecodeState:
        return _extend_by_token(model, params, head, state, keys, decoding)

    return lax.fori_loop(0, tokens, extend_by_one, state)


def _extend_by_token(
    model: Model,
    params: Params,
    head: Params,
    state: DecodeState,
    keys: RowKeys,
    decoding: Decoding,
) -> DecodeState:
    """Extend every row that is not done by one token."""
    rows, width = state.rows, state.rows.tokens.shape[1]
    # A finished row takes part, but a position S writes nothing.
    position = jnp.where(state.done, width, rows.lengths - 1)
    last = take(rows.tokens, rows.lengths - 1)[:, None]
    hidden, cache = model.forward(
        params, last, positions=position[:, None], cache=state.cache
    )
    logits = mask_vocab(model.unembed(head, hidden[:, 0]), decoding.vocab_size)
    if n := decoding.no_repeat_ngram:
        repeats = repeats_ngram(rows, n, logits.shape[-1])
        logits = jnp.where(repeats, -jnp.inf, logits)
    token_keys = jax.vmap(jax.random.fold_in)(keys, rows.lengths)
    token = sample(logits, token_keys, decoding.sampling)
    index = jnp.where(state.done, width, rows.lengths)
    lengths = jnp.where(state.done, rows.lengths, rows.lengths + 1)
    tokens = put(rows.tokens, index, token)
    rows = dataclasses.replace(rows, tokens=tokens, lengths=lengths)
    ended = is_eos(token, decoding.eos_ids) | decoding.is_full(rows)
    return DecodeState(
        rows=rows,
        cache=cache,
        hidden=put(state.hidden, position, hidden[:, 0]),
        done=state.done | ended,
    )


@partial(jax.jit, static_argnames=("model", "prefill_width", "dtype"))
def generate(
    model: Model,
    params: Params,
    rows: Rows,
    *,
    key: PRNGKey,
    decoding: Decoding,
    prefill_width: int | None = None,
    dtype: Any = jnp.float32,
) -> Rows:
    """New responses to the prompts of `rows`, which keep their width.

    Args:
      model, params: the model that writes.
      rows: their prompts are read, their responses are ignored.
      key: random key of all samples.
      decoding: how rows are extended.
      prefill_width: no prompt is longer than this; default: the rows' width S.
      dtype: of weights and cache.
    """
    prompts = prompts_only(rows)
    state = decode(
        model,
        model.decode_params(params, dtype),
        start(model, params, prompts, dtype=dtype, prefill_width=prefill_width),
        keys=row_keys(key, rows.example, STUDENT_STREAM, 0),
        decoding=decoding,
    )
    return state.rows


def take(buffer: Array, index: Int[Array, "B"]) -> Array:
    """`buffer[b, index[b]]` of every row."""
    return jax.vmap(lambda row, i: row[i])(buffer, index)


def put(buffer: Array, index: Int[Array, "B *T"], value: Array) -> Array:
    """Write `value[b]` at `buffer[b, index[b]]`; an index beyond the end is dropped."""
    return jax.vmap(lambda c, i, x: c.at[i].set(x.astype(c.dtype), mode="drop"))(
        buffer, index, value
    )
