"""SCRG, sequence correction and re-generation: revise a response of the student.

The paper (arXiv 2407.10068) finds the student's worst token in its own sample, puts the
teacher's token there and lets the student re-generate the rest:

  y^T_t ~ p_t, the teacher's token given the student's prefix
  j = argmax over { t : y_t != y^T_t } of KL(p_t || q_t)
  y_j := y^T_j;  the student re-generates y_{>j}

Our choices where the paper is silent: the direction of the KL; a teacher's
end-of-sequence token ends the row; a row without disagreement stays unchanged; later
rounds search only behind the last correction, so that no correction is undone. Other
rules than the argmax are in interventions/positions.py.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mgsr_jax.decoding.decode import DecodeState, Decoding, decode, put, take
from mgsr_jax.decoding.reading import read_on, read_whole
from mgsr_jax.decoding.sampling import (
    ANCESTRAL,
    POSITION_STREAM,
    STUDENT_STREAM,
    TEACHER_STREAM,
    Sampling,
    is_eos,
    mask_vocab,
    row_keys,
    sample,
)
from mgsr_jax.decoding.scoring import token_kl
from mgsr_jax.interventions.outcome import InterventionInfo, Outcome, Pair
from mgsr_jax.interventions.positions import ARGMAX, Position, priorities
from mgsr_jax.rows import Rows
from mgsr_jax.typing import PRNGKey, RowKeys

CANDIDATES = 4
"""Positions per row whose teacher token is drawn at a time, highest priority first."""


class ScrgInfo(NamedTuple):
    """The corrections of one round; `revise` returns a record with an axis for rounds.

    Attributes:
      error_position: index into `rows.tokens` of the corrected token, -1 for none.
        [B] or [R, B]
      kl: KL(teacher || student) there, in nats; 0 where nothing was corrected.
      corrected: rows that were corrected.
    """

    error_position: Int[Array, "*R B"]
    kl: Float[Array, "*R B"]
    corrected: Bool[Array, "*R B"]


class _Carry(NamedTuple):
    """The state of the loop over rounds.

    Attributes:
      student: the rows, with the student's cache and hidden states.
      teacher: the same rows, with the teacher's.
      corrected_to: index of each row's last correction, or of its last prompt token.
    """

    student: DecodeState
    teacher: DecodeState
    corrected_to: Int[Array, "B"]


@dataclasses.dataclass(frozen=True)
class _Scrg:
    """Models, weights and settings that stay the same in every round."""

    pair: Pair
    decoding: Decoding
    teacher_sampling: Sampling
    position: Position


def revise(
    pair: Pair,
    state: DecodeState,
    *,
    key: PRNGKey | RowKeys,
    decoding: Decoding,
    rounds: int = 1,
    teacher_sampling: Sampling = ANCESTRAL,
    position: Position = ARGMAX,
) -> tuple[Outcome, ScrgInfo]:
    """Correct every row's worst token and re-generate what follows, `rounds` times.

    The student is scored on the hidden states that decoding left, and both models
    continue in their own caches from the corrected token.

    Args:
      pair: the student that wrote `state` by `decode`, and the teacher that corrects.
      state: finished rows.
      key: the key that the rows were generated with, or one per row; rounds are folded
        into it.
      decoding: how the student re-generates. `decode_rows` also bounds the rows that
        the teacher reads at a time.
      rounds: corrections per row, at most; 1 or more.
      teacher_sampling: how y^T is drawn; the paper draws it at temperature 1.
      position: the rule for j.

    Returns:
      The finished rows, and the corrections of every round.
    """
    scrg = _Scrg(pair, decoding, teacher_sampling, position)

    def one_round(
        carry: _Carry, round: Int[Array, ""]
    ) -> tuple[_Carry, tuple[ScrgInfo, Int[Array, "B"]]]:
        error, token = _detect(scrg, carry, key, round)
        cut = _correct(scrg, carry, error, token)
        carry = _rewrite(scrg, cut, key, round)
        rewritten = carry.student.rows.lengths - cut.student.rows.lengths
        return _read_on(scrg, carry), (error, rewritten)

    rows = state.rows
    read = read_whole(
        pair.teacher, pair.teacher_params, rows, decode_rows=decoding.decode_rows
    )
    carry = _Carry(state, read, rows.prompt_lengths - 1)
    carry, (info, rewritten) = lax.scan(one_round, carry, jnp.arange(1, rounds + 1))
    statistics = _statistics(rows, info, jnp.sum(rewritten, axis=0))
    return Outcome(carry.student.rows, statistics, carry.teacher.hidden), info


def _statistics(
    samples: Rows, info: ScrgInfo, rewritten: Int[Array, "B"]
) -> InterventionInfo:
    """The record of all rounds; the teacher reads what the student writes, once."""
    index = jnp.arange(samples.tokens.shape[1])[None, None]
    first = jnp.argmax(info.corrected, axis=0)
    return InterventionInfo(
        teacher_wrote=jnp.any(info.error_position[..., None] == index, axis=0),
        kl=jnp.take_along_axis(info.kl, first[None], axis=0)[0],
        student_generated=samples.lengths - samples.prompt_lengths + rewritten,
        teacher_scored=samples.lengths - 1 + rewritten,
    )


def _detect(
    scrg: _Scrg, carry: _Carry, key: PRNGKey | RowKeys, round: Int[Array, ""]
) -> tuple[ScrgInfo, Int[Array, "B"]]:
    """Each row's error position, and the teacher's token for it."""
    pair, rows = scrg.pair, carry.student.rows
    vocab_size = scrg.decoding.vocab_size
    student_head, teacher_head = pair.heads()
    kl = token_kl(
        (
            partial(pair.student.unembed, student_head),
            partial(pair.teacher.unembed, teacher_head),
        ),
        (carry.student.hidden, carry.teacher.hidden),
        rows,
        carry.corrected_to,
        scrg.decoding,
    )
    keys = row_keys(key, rows.example, TEACHER_STREAM, round)

    def propose(index: Int[Array, "B C"]) -> Int[Array, "B C"]:
        hidden = carry.teacher.hidden
        before = jnp.take_along_axis(hidden, index[..., None] - 1, axis=1)
        logits = pair.teacher.unembed(
            teacher_head, before.reshape(-1, before.shape[-1])
        )
        token_keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, index)
        tokens = sample(
            mask_vocab(logits, vocab_size),
            token_keys.reshape(-1),
            scrg.teacher_sampling,
        )
        return tokens.reshape(index.shape)

    index = jnp.arange(rows.tokens.shape[1])[None]
    behind = index > carry.corrected_to[:, None]
    searched = behind & (index < rows.lengths[:, None])
    random = row_keys(key, rows.example, POSITION_STREAM, round)
    priority = priorities(scrg.position, rows, kl, searched, random)
    return locate_error(rows, kl, priority, propose)


def _correct(
    scrg: _Scrg, carry: _Carry, error: ScrgInfo, token: Int[Array, "B"]
) -> _Carry:
    """Both models' states with the teacher's token at the error."""
    return _Carry(
        correct(carry.student, error, token, scrg.decoding),
        correct(carry.teacher, error, token, scrg.decoding),
        jnp.maximum(carry.corrected_to, error.error_position),
    )


@jax.named_scope("rewrite")
def _rewrite(
    scrg: _Scrg, carry: _Carry, key: PRNGKey | RowKeys, round: Int[Array, ""]
) -> _Carry:
    """The student re-generates everything behind the corrections."""
    written = decode(
        scrg.pair.student,
        scrg.pair.student_params,
        carry.student,
        keys=row_keys(key, carry.student.rows.example, STUDENT_STREAM, round),
        decoding=scrg.decoding,
    )
    return carry._replace(student=written)


def _read_on(scrg: _Scrg, carry: _Carry) -> _Carry:
    """The teacher reads what the student re-generated."""
    read = read_on(
        scrg.pair.teacher,
        scrg.pair.teacher_params,
        carry.teacher,
        carry.student.rows,
        decode_rows=scrg.decoding.decode_rows,
    )
    return carry._replace(teacher=read)


class _Search(NamedTuple):
    """The state of the search for each row's error.

    Attributes:
      priority: of the positions that the teacher was not asked about yet, else -inf.
      error: the errors so far.
      token: the teacher's tokens for them.
    """

    priority: Float[Array, "B S"]
    error: ScrgInfo
    token: Int[Array, "B"]


@jax.named_scope("locate_error")
def locate_error(
    rows: Rows,
    kl: Float[Array, "B S"],
    priority: Float[Array, "B S"],
    propose: Callable[[Int[Array, "B C"]], Int[Array, "B C"]],
) -> tuple[ScrgInfo, Int[Array, "B"]]:
    """Each row's error position j, and the teacher's token for it.

      j = argmax of the priority over { t : y_t != y^T_t }

    Drawing a teacher token costs V random numbers, so tokens are drawn from the highest
    priority downwards until one differs from the student's.

    Args:
      rows: the student's rows.
      kl: KL(teacher || student) for the token of the same index.
      priority: from `priorities`; positions with minus infinity are not searched.
      propose: returns the teacher's tokens for the given indices.
    """

    def ask(search: _Search) -> _Search:
        left, error, token = search
        values, index = lax.top_k(left, min(CANDIDATES, left.shape[1]))
        proposal = propose(index)
        written = jnp.take_along_axis(rows.tokens, index, axis=1)
        differs = (proposal != written) & (values > -jnp.inf)
        first = jnp.argmax(differs, axis=1)
        new = jnp.any(differs, axis=1) & ~error.corrected
        position = take(index, first)
        error = ScrgInfo(
            error_position=jnp.where(new, position, error.error_position),
            kl=jnp.where(new, take(kl, position), error.kl),
            corrected=error.corrected | new,
        )
        left = put(left, index, jnp.full_like(values, -jnp.inf))
        return _Search(left, error, jnp.where(new, take(proposal, first), token))

    def any_left(search: _Search) -> Bool[Array, ""]:
        unasked = jnp.any(search.priority > -jnp.inf, axis=1)
        return jnp.any(~search.error.corrected & unasked)

    no_error = ScrgInfo(
        error_position=jnp.full_like(rows.lengths, -1),
        kl=jnp.zeros_like(kl[:, 0]),
        corrected=jnp.zeros_like(rows.lengths, dtype=bool),
    )
    search = _Search(priority, no_error, jnp.zeros_like(rows.lengths))
    search = lax.while_loop(any_left, ask, search)
    return search.error, search.token


def correct(
    state: DecodeState, error: ScrgInfo, token: Int[Array, "B"], decoding: Decoding
) -> DecodeState:
    """`state` with `token` at the error and each corrected row cut off behind it.

    A corrected row is not done, unless `token` ends it or it is full.
    """
    rows, corrected = state.rows, error.corrected
    width = rows.tokens.shape[1]
    position = jnp.where(corrected, error.error_position, width)
    lengths = jnp.where(corrected, position + 1, rows.lengths)
    rows = dataclasses.replace(
        rows, tokens=put(rows.tokens, position, token), lengths=lengths
    )
    ended = is_eos(token, decoding.eos_ids) | decoding.is_full(rows)
    return dataclasses.replace(state, rows=rows, done=~corrected | ended)
