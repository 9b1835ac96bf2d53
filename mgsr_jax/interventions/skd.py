"""Speculative knowledge distillation (SKD): the teacher replaces badly ranked tokens.

  y_i ~ q(. | y_<i)                                                     the student
  if y_i is not among the K most probable tokens of p(. | y_<i):
      y_i ~ p(. | y_<i)                                                 the teacher

Source: Xu et al. (arXiv 2410.11325), the algorithm. The teacher draws from its whole
distribution there; K is 25 in the authors' configuration. Ours: the teacher's
temperature of 1, ties at rank K are accepted, and end-of-sequence is a token like any
other. The released code tests a second draw and scores one token late; it is not
followed.

The student drafts a block of tokens, the teacher reads it in one pass, the first
rejected token is replaced and the rest of the draft is cut away. A token's random key
depends on its position, so the rows are those of a loop over single tokens.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mgsr_jax.decoding.continuous_batching import until_done
from mgsr_jax.decoding.decode import (
    DecodeState,
    Decoding,
    extend,
    put,
    take,
)
from mgsr_jax.decoding.reading import read_whole
from mgsr_jax.decoding.sampling import (
    ANCESTRAL,
    STUDENT_STREAM,
    TEACHER_STREAM,
    Sampling,
    is_eos,
    mask_vocab,
    row_keys,
    sample,
)
from mgsr_jax.interventions.outcome import InterventionInfo, Outcome, Pair
from mgsr_jax.losses import forward_kl
from mgsr_jax.sharding import BATCH, constrain
from mgsr_jax.typing import Leaf, Params, PRNGKey, RowKeys


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """Settings of SKD.

    Attributes:
      top_k: a token of the student is kept if it is among so many of the teacher's.
      draft_tokens: tokens that the student drafts before the teacher reads. It changes
        time only: `draft_tokens * decode_rows` logits of the teacher exist at a time.
      teacher_sampling: how the teacher draws a token.
    """

    top_k: int = 25
    draft_tokens: int = 8
    teacher_sampling: Sampling = ANCESTRAL


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Pool:
    """Rows in progress.

    Attributes:
      student: the rows, with the student's cache and hidden states.
      teacher: the same rows, with the teacher's.
      info: their statistics so far.
    """

    student: Leaf
    teacher: Leaf
    info: Leaf

    @property
    def rows(self) -> Leaf:
        """The rows, for `until_done`."""
        return self.student.rows

    @property
    def done(self) -> Leaf:
        """The rows that are finished. [B]"""
        return self.student.done


@dataclasses.dataclass(frozen=True)
class _Skd:
    """Models, their heads and settings, which stay the same in every block."""

    pair: Pair
    student_head: Params
    teacher_head: Params
    decoding: Decoding
    acceptance: Acceptance


@jax.named_scope("write_together")
def write_together(
    pair: Pair,
    state: DecodeState,
    *,
    key: PRNGKey | RowKeys,
    decoding: Decoding,
    acceptance: Acceptance = Acceptance(),
    prefill_width: int | None = None,
) -> Outcome:
    """Extend prompts to responses of student and teacher.

    Args:
      pair: the student that `state` is of, and the teacher.
      state: prompts, from `start`.
      key: of the step, or one per row.
      decoding: how the student draws a token. `decode_rows` also bounds the rows that
        the teacher reads at a time.
      acceptance: settings of SKD.
      prefill_width: no prompt is longer than this; default: the rows' width S.
    """
    rows = state.rows
    skd = _Skd(pair, *pair.heads(), decoding, acceptance)
    read = read_whole(
        pair.teacher,
        pair.teacher_params,
        rows,
        decode_rows=decoding.decode_rows,
        read_width=prefill_width,
    )
    info = InterventionInfo(
        teacher_wrote=jnp.zeros_like(rows.tokens, dtype=bool),
        kl=jnp.zeros(rows.lengths.shape),
        student_generated=jnp.zeros_like(rows.lengths),
        teacher_scored=rows.prompt_lengths - 1,
    )
    done = state.done | decoding.is_full(rows)
    pool = _Pool(dataclasses.replace(state, done=done), read, info)
    keys = (
        row_keys(key, rows.example, STUDENT_STREAM, 0),
        row_keys(key, rows.example, TEACHER_STREAM, 0),
    )
    pool = until_done(partial(_write_block, skd), pool, keys, decoding.decode_rows)
    return Outcome(pool.student.rows, pool.info, pool.teacher.hidden)


def _write_block(skd: _Skd, pool: _Pool, keys: tuple[RowKeys, RowKeys]) -> _Pool:
    """Draft a block, read it, and replace its first rejected token."""
    student_keys, teacher_keys = keys
    start = pool.rows.lengths
    drafted = _draft(skd, pool.student, student_keys)
    teacher, logits = _read(skd, pool.teacher, drafted, start)
    index = start[:, None] + jnp.arange(skd.acceptance.draft_tokens)[None]
    tokens = jnp.take_along_axis(
        drafted.rows.tokens, jnp.minimum(index, drafted.rows.tokens.shape[1] - 1), 1
    )
    rejected = _ranks(logits, tokens) >= skd.acceptance.top_k
    rejected = rejected & (index < drafted.rows.lengths[:, None])
    first, replaces = jnp.argmax(rejected, axis=1), jnp.any(rejected, axis=1)
    logits = take(logits, first)
    token_keys = jax.vmap(jax.random.fold_in)(teacher_keys, start + first)
    token = sample(logits, token_keys, skd.acceptance.teacher_sampling)
    position = jnp.where(replaces, start + first, drafted.rows.tokens.shape[1])
    student = _cut(skd, drafted, position, token)
    kl = _kl(skd, drafted, start + first, logits)
    own, drafts = pool.info, drafted.rows.lengths - start
    return _Pool(
        student,
        dataclasses.replace(teacher, rows=student.rows, done=student.done),
        InterventionInfo(
            teacher_wrote=put(own.teacher_wrote, position, replaces),
            kl=jnp.where(replaces & ~jnp.any(own.teacher_wrote, axis=1), kl, own.kl),
            student_generated=own.student_generated + drafts,
            teacher_scored=own.teacher_scored + drafts,
        ),
    )


def _draft(skd: _Skd, state: DecodeState, keys: RowKeys) -> DecodeState:
    """The student's state after a block of its tokens, fewer where a row ends."""
    return extend(
        skd.pair.student,
        skd.pair.student_params,
        state,
        keys,
        skd.decoding,
        tokens=skd.acceptance.draft_tokens,
    )


def _read(
    skd: _Skd, state: DecodeState, drafted: DecodeState, start: Int[Array, "B"]
) -> tuple[DecodeState, Float[Array, "B N V"]]:
    """The teacher's state behind the draft, and its logits for the draft's tokens."""
    teacher, tokens = skd.pair.teacher, drafted.rows.tokens
    positions = start[:, None] - 1 + jnp.arange(skd.acceptance.draft_tokens)[None]
    read = jnp.take_along_axis(
        tokens, jnp.minimum(positions, tokens.shape[1] - 1), axis=1
    )
    hidden, cache = teacher.forward(
        skd.pair.teacher_params, read, positions=positions, cache=state.cache
    )
    logits = teacher.unembed(skd.teacher_head, hidden.reshape(-1, hidden.shape[-1]))
    logits = mask_vocab(logits, skd.decoding.vocab_size)
    state = dataclasses.replace(
        state, cache=cache, hidden=put(state.hidden, positions, hidden)
    )
    return state, logits.reshape(*read.shape, -1)


def _ranks(
    logits: Float[Array, "B N V"], tokens: Int[Array, "B N"]
) -> Int[Array, "B N"]:
    """Number of classes that are more probable than each token."""
    # Not a gather: the classes may be sharded over devices.
    columns = jnp.arange(logits.shape[-1])[None, None]
    is_own: Bool[Array, "B N V"] = columns == tokens[..., None]
    own = jnp.max(jnp.where(is_own, logits, -jnp.inf), axis=-1, keepdims=True)
    return jnp.sum(logits > own, axis=-1)


def _cut(
    skd: _Skd, state: DecodeState, position: Int[Array, "B"], token: Int[Array, "B"]
) -> DecodeState:
    """`state` with `token` as the last one; rows with a position S stay."""
    rows, width = state.rows, state.rows.tokens.shape[1]
    replaces = position < width
    rows = dataclasses.replace(
        rows,
        tokens=put(rows.tokens, position, token),
        lengths=jnp.where(replaces, position + 1, rows.lengths),
    )
    ended = is_eos(token, skd.decoding.eos_ids) | skd.decoding.is_full(rows)
    return dataclasses.replace(
        state, rows=rows, done=jnp.where(replaces, ended, state.done)
    )


def _kl(
    skd: _Skd,
    drafted: DecodeState,
    index: Int[Array, "B"],
    teacher_logits: Float[Array, "B V"],
) -> Float[Array, "B"]:
    """KL(teacher || student) in nats for the token at each row's index."""
    before = constrain(take(drafted.hidden, index - 1), BATCH)
    student_logits = skd.pair.student.unembed(skd.student_head, before)
    vocab_size = skd.decoding.vocab_size
    return forward_kl(student_logits, teacher_logits, vocab_size=vocab_size)
