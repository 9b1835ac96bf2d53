"""One response, token by token: for programs that show text while it is written."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mgsr_jax.decoding.decode import DecodeState, Decoding, extend, start
from mgsr_jax.decoding.sampling import STUDENT_STREAM, row_keys
from mgsr_jax.rows import Rows, from_lists
from mgsr_jax.typing import Model, Params, PRNGKey, RowKeys

_NARROWEST = 64  # tokens; prompts of similar lengths share a compiled prefill


def stream(
    model: Model,
    params: Params,
    prompt: Sequence[int],
    *,
    key: PRNGKey,
    decoding: Decoding,
    width: int,
    dtype: DTypeLike = jnp.float32,
) -> Iterator[int]:
    """The tokens of one response as they are drawn; the stop token comes too.

    They are those that `generate` draws for a single row.

    Args:
      model: model that writes.
      params: its parameters from `model.decode_params`.
      prompt: token ids.
      key: random key of the sample.
      decoding: how the row is extended; `max_length` is at most `width`.
      width: S, number of slots of the cache.
      dtype: dtype of computation and cache.

    Raises:
      ValueError: the prompt is empty, or leaves no room for a response.
    """
    if not 0 < len(prompt) < decoding.max_length:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, expected 1 to "
            f"{decoding.max_length - 1}, less than max_length={decoding.max_length}"
        )
    rows = jax.tree.map(jnp.asarray, from_lists([list(prompt)], [[]], width=width))
    keys = row_keys(key, rows.example, STUDENT_STREAM, 0)
    prefill_width = min(width, max(_NARROWEST, 1 << (len(prompt) - 1).bit_length()))
    state = _prefill(model, params, rows, prefill_width=prefill_width, dtype=dtype)
    for length in range(len(prompt) + 1, decoding.max_length + 1):
        state = _extend_by_token(model, params, state, keys, decoding)
        token = int(state.rows.tokens[0, length - 1])
        yield token
        if token in decoding.eos_ids:
            return


@functools.partial(jax.jit, static_argnames=("model", "prefill_width", "dtype"))
def _prefill(
    model: Model, params: Params, rows: Rows, *, prefill_width: int, dtype: DTypeLike
) -> DecodeState:
    return start(model, params, rows, dtype=dtype, prefill_width=prefill_width)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def _extend_by_token(
    model: Model, params: Params, state: DecodeState, keys: RowKeys, decoding: Decoding
) -> DecodeState:
    return extend(model, params, state, keys, decoding, tokens=1)
