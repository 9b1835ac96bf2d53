"""SCRG, sequence correction and re-generation: revise a response of the student.

The paper (arXiv 2407.10068) finds the student's worst token in its own sample, puts the
teacher's token there and lets the student re-generate the rest:

  y^T_t ~ p_t, the teacher's token given the student's prefix
  j = argmax over { t : y_t != y^T_t } of KL(p_t || q_t)
  y_j := y^T_j;  the student re-generates y_{>j}

Our choices where the paper is silent: the direction of the KL; a teacher's
end-of-sequence token ends the row; a row without disagreement stays unchanged; later
rounds search only behind the last correction, so that no correction is undone.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mgsr_jax.decoding.decode import DecodeState, Decoding, decode, put, take
from mgsr_jax.decoding.reading import read_on, read_whole
from mgsr_jax.decoding.sampling import (
    ANCESTRAL,
    GREEDY,
    STUDENT_STREAM,
    TEACHER_STREAM,
    Sampling,
    is_eos,
    mask_vocab,
    row_keys,
    sample,
)
from mgsr_jax.losses import forward_kl
from mgsr_jax.rows import Rows
from mgsr_jax.sharding import constrain
from mgsr_jax.typing import Model, Params, PRNGKey, RowKeys

CANDIDATES = 4
"""Positions per row whose teacher token is drawn at a time, largest KL first."""

SCORED_POSITIONS = 16
"""Positions of the decoded rows whose logits exist at a time."""


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

    student: Model
    student_params: Params
    teacher: Model
    teacher_params: Params
    decoding: Decoding
    teacher_sampling: Sampling


def revise(
    student: Model,
    student_params: Params,
    teacher: Model,
    teacher_params: Params,
    state: DecodeState,
    *,
    key: PRNGKey | RowKeys,
    decoding: Decoding,
    rounds: int = 1,
    teacher_token: Literal["sample", "argmax"] = "sample",
) -> tuple[DecodeState, ScrgInfo, Float[Array, "B S D"]]:
    """Correct every row's worst token and re-generate what follows, `rounds` times.

    The student is scored on the hidden states that decoding left, and both models
    continue in their own caches from the corrected token.

    Args:
      student, student_params: as for `decode`, which made `state`.
      teacher, teacher_params: the model that corrects, with stacked layers.
      state: finished rows.
      key: the key that the rows were generated with, or one per row; rounds are folded
        into it.
      decoding: how the student re-generates. `decode_rows` also bounds the rows that
        the teacher reads at a time.
      rounds: corrections per row, at most.
      teacher_token: "sample" draws y^T at temperature 1 (the paper), "argmax" takes the
        most probable token.

    Returns:
      The finished rows, the corrections, and the teacher's hidden states on the rows:
      index t predicts token t + 1.

    Raises:
      ValueError: an unknown `teacher_token`.
    """
    if teacher_token not in ("sample", "argmax"):
        raise ValueError(f"teacher_token={teacher_token!r}; expected sample or argmax")
    scrg = _Scrg(
        student=student,
        student_params=student_params,
        teacher=teacher,
        teacher_params=teacher_params,
        decoding=decoding,
        teacher_sampling=ANCESTRAL if teacher_token == "sample" else GREEDY,
    )

    def one_round(carry: _Carry, round: Int[Array, ""]) -> tuple[_Carry, ScrgInfo]:
        error, token = _detect(scrg, carry, key, round)
        carry = _correct(scrg, carry, error, token)
        carry = _rewrite(scrg, carry, key, round)
        return _read_on(scrg, carry), error

    read = read_whole(
        teacher, teacher_params, state.rows, decode_rows=decoding.decode_rows
    )
    carry = _Carry(state, read, state.rows.prompt_lengths - 1)
    carry, info = lax.scan(one_round, carry, jnp.arange(1, rounds + 1))
    return carry.student, info, carry.teacher.hidden


def _detect(
    scrg: _Scrg, carry: _Carry, key: PRNGKey | RowKeys, round: Int[Array, ""]
) -> tuple[ScrgInfo, Int[Array, "B"]]:
    """Each row's error position, and the teacher's token for it."""
    rows, vocab_size = carry.student.rows, scrg.decoding.vocab_size
    student_head = scrg.student.head_params(scrg.student_params)
    # All-gathered over fsdp once per round, not once per chunk of positions.
    teacher_head = constrain(scrg.teacher.head_params(scrg.teacher_params), P("tensor"))
    kl = _score(
        partial(scrg.student.unembed, student_head),
        partial(scrg.teacher.unembed, teacher_head),
        carry,
        scrg.decoding,
    )
    keys = row_keys(key, rows.example, TEACHER_STREAM, round)

    def propose(index: Int[Array, "B C"]) -> Int[Array, "B C"]:
        hidden = carry.teacher.hidden
        before = jnp.take_along_axis(hidden, index[..., None] - 1, axis=1)
        logits = scrg.teacher.unembed(
            teacher_head, before.reshape(-1, before.shape[-1])
        )
        token_keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, index)
        tokens = sample(
            mask_vocab(logits, vocab_size),
            token_keys.reshape(-1),
            scrg.teacher_sampling,
        )
        return tokens.reshape(index.shape)

    return locate_error(rows, kl, carry.corrected_to, propose)


def _correct(
    scrg: _Scrg, carry: _Carry, error: ScrgInfo, token: Int[Array, "B"]
) -> _Carry:
    """Both models' states with the teacher's token at the error."""
    return _Carry(
        correct(carry.student, error, token, scrg.decoding),
        correct(carry.teacher, error, token, scrg.decoding),
        jnp.maximum(carry.corrected_to, error.error_position),
    )


def _rewrite(
    scrg: _Scrg, carry: _Carry, key: PRNGKey | RowKeys, round: Int[Array, ""]
) -> _Carry:
    """The student re-generates everything behind the corrections."""
    written = decode(
        scrg.student,
        scrg.student_params,
        carry.student,
        keys=row_keys(key, carry.student.rows.example, STUDENT_STREAM, round),
        decoding=scrg.decoding,
    )
    return carry._replace(student=written)


def _read_on(scrg: _Scrg, carry: _Carry) -> _Carry:
    """The teacher reads what the student re-generated."""
    read = read_on(
        scrg.teacher,
        scrg.teacher_params,
        carry.teacher,
        carry.student.rows,
        decode_rows=scrg.decoding.decode_rows,
    )
    return carry._replace(teacher=read)


class _Search(NamedTuple):
    """The state of the search for each row's error.

    Attributes:
      kl: KL of the positions that the teacher was not asked about yet, else -inf.
      error: the errors so far.
      token: the teacher's tokens for them.
    """

    kl: Float[Array, "B S"]
    error: ScrgInfo
    token: Int[Array, "B"]


def locate_error(
    rows: Rows,
    kl: Float[Array, "B S"],
    corrected_to: Int[Array, "B"],
    propose: Callable[[Int[Array, "B C"]], Int[Array, "B C"]],
) -> tuple[ScrgInfo, Int[Array, "B"]]:
    """Each row's error position j, and the teacher's token for it.

      j = argmax of the KL over { t > corrected_to in the response : y_t != y^T_t }

    Drawing a teacher token costs V random numbers, so tokens are drawn from the largest
    KL downwards until one differs from the student's.

    Args:
      rows: the student's rows.
      kl: KL(teacher || student) for the token of the same index.
      corrected_to: only later indices are searched.
      propose: returns the teacher's tokens for the given indices.
    """
    index = jnp.arange(rows.tokens.shape[1])[None]
    eligible = (index > corrected_to[:, None]) & (index < rows.lengths[:, None])

    def ask(search: _Search) -> _Search:
        left, error, token = search
        values, index = lax.top_k(left, min(CANDIDATES, left.shape[1]))
        proposal = propose(index)
        written = jnp.take_along_axis(rows.tokens, index, axis=1)
        differs = (proposal != written) & (values > -jnp.inf)
        first = jnp.argmax(differs, axis=1)
        new = jnp.any(differs, axis=1) & ~error.corrected
        error = ScrgInfo(
            error_position=jnp.where(new, take(index, first), error.error_position),
            kl=jnp.where(new, take(values, first), error.kl),
            corrected=error.corrected | new,
        )
        left = put(left, index, jnp.full_like(values, -jnp.inf))
        return _Search(left, error, jnp.where(new, take(proposal, first), token))

    def any_left(search: _Search) -> Bool[Array, ""]:
        unasked = jnp.any(search.kl > -jnp.inf, axis=1)
        return jnp.any(~search.error.corrected & unasked)

    no_error = ScrgInfo(
        error_position=jnp.full_like(rows.lengths, -1),
        kl=jnp.zeros_like(kl[:, 0]),
        corrected=jnp.zeros_like(rows.lengths, dtype=bool),
    )
    kl = jnp.where(eligible, kl, -jnp.inf)
    search = _Search(kl, no_error, jnp.zeros_like(rows.lengths))
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


Unembed = Callable[[Float[Array, "B C D"]], Float[Array, "B C V"]]


def _score(
    student_unembed: Unembed,
    teacher_unembed: Unembed,
    carry: _Carry,
    decoding: Decoding,
) -> Float[Array, "B S"]:
    """KL(teacher || student) for the token at each index behind the last correction.

    Logits exist for a few positions at a time.
    """
    rows = carry.student.rows
    batch, width = rows.tokens.shape
    # Scaled by the share of rows that are decoded together, so that a chunk holds the
    # same number of tokens.
    chunk = max(1, SCORED_POSITIONS * (decoding.decode_rows or batch) // batch)
    chunk = min(chunk, width - 1)

    def score(i: Int[Array, ""], kl: Float[Array, "B S"]) -> Float[Array, "B S"]:
        # The last chunk is shifted left to stay full; positions that overlap are
        # recomputed to the same value.
        start = jnp.minimum(i * chunk, width - 1 - chunk)
        student, teacher = (
            lax.dynamic_slice_in_dim(state.hidden, start, chunk, 1)
            for state in (carry.student, carry.teacher)
        )
        values = forward_kl(
            student_unembed(student),
            teacher_unembed(teacher),
            vocab_size=decoding.vocab_size,
        )
        # The output at t predicts token t + 1.
        return lax.dynamic_update_slice_in_dim(kl, values, start + 1, axis=1)

    first = jnp.min(carry.corrected_to) // chunk
    last = (jnp.max(rows.lengths) - 2) // chunk
    return lax.fori_loop(first, last + 1, score, jnp.zeros(rows.tokens.shape))
