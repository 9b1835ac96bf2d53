"""Generation: prefill, then one `lax.while_loop` over a static cache.

A row's next token depends on its own tokens and on random numbers keyed by (example,
stream, round, position), so a sample does not depend on the batch it was drawn in.

Cache slot = position. A query sees the slots up to its own position, so a row is cut
back by setting its length: what lies beyond is never seen and is written over later.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mgsr_jax.decoding.continuous_batching import in_slots
from mgsr_jax.losses._top_k import top_k as largest
from mgsr_jax.rows import Rows, prompts_only
from mgsr_jax.sharding import axis_size, constrain
from mgsr_jax.typing import BATCH_AXES, Leaf, Model, Params, PRNGKey, RowKeys

STUDENT, TEACHER = 0, 1
"""Streams of random numbers."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Rows in the making.

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


def start(
    model: Model,
    params: Params,
    rows: Rows,
    *,
    dtype: Any = jnp.float32,
    prefill_width: int | None = None,
) -> DecodeState:
    """Prompts read, nothing written yet.

    `params` best come as they are trained: a stack of layers compiles faster. `dtype`
    is that of computation and cache; no prompt is longer than `prefill_width` (S).
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
        # What lies beyond a prompt is never seen.
        hidden=jnp.pad(hidden, ((0, 0), (0, width - hidden.shape[1]), (0, 0))),
        done=jnp.zeros_like(rows.lengths, dtype=bool),
    )


def row_keys(
    key: PRNGKey, example: Int[Array, "B"], stream: int, round: Int[Array, ""] | int
) -> RowKeys:
    """One key a row; the position is folded in where a token is drawn."""

    def fold(example: Int[Array, ""]) -> PRNGKey:
        by_stream = jax.random.fold_in(jax.random.fold_in(key, example), stream)
        return jax.random.fold_in(by_stream, round)

    return jax.vmap(fold)(example)


def decode(
    model: Model,
    params: Params,
    state: DecodeState,
    *,
    keys: RowKeys,
    max_length: int | Int[Array, ""],
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_ids: tuple[int, ...],
    vocab_size: int | None = None,
    no_repeat_ngram: int = 0,
    slots: int | None = None,
) -> DecodeState:
    """Extends every row that is not done until it ends or is `max_length` long.

    Args:
      model, params: the student; `params` best come from `model.decode_params`.
      state: where to go on; from `start` at first.
      keys: one a row, see `row_keys`. [B]
      max_length: tokens of prompt and response; at most the rows' width S.
      temperature: 0 is greedy. Numbers and lengths are traced, the rest is static.
      top_k: keep the k most probable tokens; 0 keeps all.
      top_p: then keep the fewest most probable tokens that hold this mass.
      eos_ids: tokens that end a row; the one that does is part of the row.
      vocab_size: columns at or beyond it are never drawn.
      no_repeat_ngram: forbid tokens that would repeat an n-gram of the row; 0 is off.
      slots: rows that are decoded at once; a row that ends makes room for one that
        waits. None decodes all of them together. It changes the time alone: the caches
        of all rows are kept.

    Returns:
      The state with every row done.
    """
    width = state.rows.tokens.shape[1]
    limit = jnp.minimum(max_length, width)
    head = model.head_params(params)

    def extend(state: DecodeState, keys: RowKeys) -> DecodeState:
        rows = state.rows
        # A finished row runs along: it rewrites its last slot with the same values.
        position = rows.lengths - 1
        last = take(rows.tokens, position)[:, None]
        hidden, cache = model.forward(
            params, last, positions=position[:, None], cache=state.cache
        )
        logits = mask_vocab(model.unembed(head, hidden[:, 0]), vocab_size)
        if no_repeat_ngram:
            repeats = _would_repeat(rows, no_repeat_ngram, logits.shape[-1])
            logits = jnp.where(repeats, -jnp.inf, logits)
        token = sample(
            logits,
            jax.vmap(jax.random.fold_in)(keys, rows.lengths),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        slot = jnp.where(state.done, width, rows.lengths)
        lengths = jnp.where(state.done, rows.lengths, rows.lengths + 1)
        return DecodeState(
            rows=dataclasses.replace(
                rows, tokens=put(rows.tokens, slot, token), lengths=lengths
            ),
            cache=cache,
            hidden=put(state.hidden, position, hidden[:, 0]),
            done=state.done | ends(token, eos_ids) | (lengths >= limit),
        )

    state = dataclasses.replace(state, done=state.done | (state.rows.lengths >= limit))
    return in_slots(extend, state, keys, slots)


def unread(model: Model, params: Params, rows: Rows) -> DecodeState:
    """Rows of which nothing was read yet; in the precision of `params`."""
    batch, width = rows.tokens.shape
    hidden, _ = jax.eval_shape(model.forward, params, rows.tokens)
    return DecodeState(
        rows=dataclasses.replace(rows, lengths=jnp.ones_like(rows.lengths)),
        cache=model.init_cache(batch, width, hidden.dtype),
        hidden=jnp.zeros(hidden.shape, hidden.dtype),
        done=rows.lengths <= 1,
    )


def read_whole(
    model: Model, params: Params, rows: Rows, *, slots: int | None = None
) -> DecodeState:
    """Reads rows that nothing was read of, each at once, by the kernel of `attention`.

    Args:
      model, params: as they are trained, a stack of layers.
      slots: as for `decode`.
    """

    def extend(state: DecodeState, lengths: Int[Array, "B"]) -> DecodeState:
        hidden, cache = model.forward(params, state.rows.tokens, cache=state.cache)
        return DecodeState(
            rows=dataclasses.replace(state.rows, lengths=lengths),
            cache=cache,
            hidden=hidden,
            done=jnp.ones_like(state.done),
        )

    return in_slots(extend, unread(model, params, rows), rows.lengths, slots)


def read(
    model: Model,
    params: Params,
    state: DecodeState,
    rows: Rows,
    *,
    block: int | None = None,
    slots: int | None = None,
) -> DecodeState:
    """Goes on from `state` to the end of `rows`, whose tokens are all there.

    Args:
      model, params: as they are trained, a stack of layers.
      state: what was read of the same rows before, `state.rows.lengths` tokens; from
        `read_whole` at first.
      block: tokens of a row that are read at once; None: 64, or all of them where
        weights are split over fsdp, for they are put together once for each block.
      slots: as for `decode`.
    """
    width = rows.tokens.shape[1]
    block = block or (64 if axis_size("fsdp") == 1 else width)

    def extend(state: DecodeState, lengths: Int[Array, "B"]) -> DecodeState:
        so_far = state.rows.lengths
        positions = so_far[:, None] - 1 + jnp.arange(block)[None]
        tokens = jnp.take_along_axis(
            state.rows.tokens, jnp.minimum(positions, width - 1), axis=1
        )
        hidden, cache = model.forward(
            params, tokens, positions=positions, cache=state.cache
        )
        so_far = jnp.minimum(so_far + block, lengths)
        return DecodeState(
            rows=dataclasses.replace(state.rows, lengths=so_far),
            cache=cache,
            hidden=put(state.hidden, positions, hidden),
            done=so_far >= lengths,
        )

    so_far = state.rows.lengths
    state = dataclasses.replace(
        state,
        rows=dataclasses.replace(rows, lengths=so_far),
        done=so_far >= rows.lengths,
    )
    return in_slots(extend, state, rows.lengths, slots)


@partial(
    jax.jit,
    static_argnames=(
        "model",
        "top_k",
        "top_p",
        "eos_ids",
        "vocab_size",
        "prefill_width",
        "no_repeat_ngram",
        "slots",
        "dtype",
    ),
)
def generate(
    model: Model,
    params: Params,
    rows: Rows,
    *,
    key: PRNGKey,
    max_length: int | Int[Array, ""],
    eos_ids: tuple[int, ...],
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    vocab_size: int | None = None,
    prefill_width: int | None = None,
    no_repeat_ngram: int = 0,
    slots: int | None = None,
    dtype: Any = jnp.float32,
) -> Rows:
    """New responses to the prompts of `rows`, which keep their width.

    `dtype` is that of weights and cache; see `start` and `decode` for the rest.
    """
    prompts = prompts_only(rows)
    state = decode(
        model,
        model.decode_params(params, dtype),
        start(model, params, prompts, dtype=dtype, prefill_width=prefill_width),
        keys=row_keys(key, rows.example, STUDENT, 0),
        max_length=max_length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_ids=eos_ids,
        vocab_size=vocab_size,
        no_repeat_ngram=no_repeat_ngram,
        slots=slots,
    )
    return state.rows


def sample(
    logits: Float[Array, "B V"],
    keys: RowKeys,
    *,
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Int[Array, "B"]:
    """One token a row by the Gumbel-max rule: argmax(logits + temperature * noise).

    Dividing the sum by the temperature shows that this samples softmax(logits /
    temperature); at 0 it is the argmax. Filters work in float32, top-k before top-p.
    """
    logits = logits.astype(jnp.float32)
    if top_k or top_p < 1.0:
        # A filter compares all of a row; over a split axis lax.top_k has been wrong on
        # GPUs (jax-ml/jax#19271).
        logits = constrain(logits, P(BATCH_AXES))
    if top_k:
        kth = largest(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if top_p < 1.0:
        logits = jnp.where(_nucleus(logits, temperature, top_p), logits, -jnp.inf)

    def draw() -> Float[Array, "B V"]:
        return jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)

    noise = jax.lax.cond(temperature > 0, draw, lambda: jnp.zeros_like(logits))
    return _first_max(logits + temperature * noise)


def _first_max(x: Float[Array, "B V"]) -> Int[Array, "B"]:
    """`argmax` as two reductions of one number: XLA on a CPU makes vectors of them."""
    index = jnp.arange(x.shape[-1], dtype=jnp.int32)
    is_max = x == jnp.max(x, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_max, index, x.shape[-1] - 1), axis=-1)


def take(buffer: Array, index: Int[Array, "B"]) -> Array:
    """`buffer[b, index[b]]` of every row."""
    return jax.vmap(lambda row, i: row[i])(buffer, index)


def put(buffer: Array, index: Int[Array, "B *T"], value: Array) -> Array:
    """Writes `value[b]` at `buffer[b, index[b]]`; beyond the end it is dropped."""
    return jax.vmap(lambda c, i, x: c.at[i].set(x.astype(c.dtype), mode="drop"))(
        buffer, index, value
    )


def ends(token: Int[Array, "B"], eos_ids: tuple[int, ...]) -> Bool[Array, "B"]:
    """True where a token is one of the stop ids."""
    return jnp.isin(token, jnp.asarray(eos_ids, token.dtype))


def _nucleus(
    logits: Float[Array, "B V"], temperature: float | Float[Array, ""], top_p: float
) -> Bool[Array, "B V"]:
    """The fewest most probable tokens that hold the mass `top_p`; at least one."""
    scale = jnp.where(temperature > 0, temperature, 1.0)
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(ordered / scale, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1)
    return logits >= least[:, None]


def _would_repeat(rows: Rows, n: int, vocab: int) -> Bool[Array, "B V"]:
    """Tokens that would complete an n-gram which the row already holds."""

    def one(tokens: Int[Array, "S"], length: Int[Array, ""]) -> Bool[Array, "V"]:
        width = tokens.shape[0]
        tail = jax.lax.dynamic_slice(tokens, (length - (n - 1),), (n - 1,))
        starts = jnp.arange(width - n + 1)
        windows = tokens[starts[:, None] + jnp.arange(n)[None]]
        same = jnp.all(windows[:, :-1] == tail[None], axis=-1)
        known = (starts + n <= length) & (length >= n)
        index = jnp.where(same & known, windows[:, -1], vocab)
        return jnp.zeros(vocab, bool).at[index].set(True, mode="drop")

    return jax.vmap(one)(rows.tokens, rows.lengths)


def mask_vocab(
    logits: Float[Array, "B V"], vocab_size: int | None
) -> Float[Array, "B V"]:
    """Minus infinity in the columns at or beyond `vocab_size`."""
    if vocab_size is None:
        return logits
    columns = jnp.arange(logits.shape[-1])[None]
    return jnp.where(columns < vocab_size, logits, -jnp.inf)
