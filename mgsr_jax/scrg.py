"""SCRG, sequence correction and re-generation: revise what the student wrote.

The paper (arXiv 2407.10068) looks for the student's worst token in its own sample, puts
the teacher's token there and lets the student write the rest again:

  y^T_t ~ p_t, the teacher's token given the student's prefix
  j = argmax over { t : y_t != y^T_t } of KL(p_t || q_t)
  y_j := y^T_j;  y_{>j} is generated again by the student

Our choices where the paper is silent: the direction of the KL; a teacher's
end-of-sequence token ends the row; a row without disagreement stays as it is; later
rounds look only behind the last correction, so that none is undone.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mgsr_jax.decoding.decode import (
    STUDENT,
    TEACHER,
    DecodeState,
    decode,
    ends,
    mask_vocab,
    put,
    read,
    read_whole,
    row_keys,
    sample,
    take,
)
from mgsr_jax.losses import forward_kl
from mgsr_jax.rows import Rows
from mgsr_jax.sharding import constrain
from mgsr_jax.typing import Model, Params, PRNGKey, RowKeys

CANDIDATES = 4
"""Tokens of a row, those of the largest KL, of which the teacher is asked at once."""


class ScrgInfo(NamedTuple):
    """What a round of `revise` found; it returns one record with an axis for rounds.

    Attributes:
      error_position: index into `rows.tokens` of the corrected token, -1 for none.
        [B] or [R, B]
      kl: KL(teacher || student) there, in nats; 0 where nothing was corrected.
      corrected: rows that were.
    """

    error_position: Int[Array, "*R B"]
    kl: Float[Array, "*R B"]
    corrected: Bool[Array, "*R B"]


def revise(
    student: Model,
    student_params: Params,
    teacher: Model,
    teacher_params: Params,
    state: DecodeState,
    *,
    key: PRNGKey,
    max_length: int | Int[Array, ""],
    eos_ids: tuple[int, ...],
    rounds: int = 1,
    teacher_token: Literal["sample", "argmax"] = "sample",
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    vocab_size: int | None = None,
    slots: int | None = None,
    chunk_size: int = 16,
) -> tuple[DecodeState, ScrgInfo, Float[Array, "B S D"]]:
    """Corrects every row's worst token and re-generates what follows, `rounds` times.

    The student is scored on the hidden states that decoding left, and goes on in its
    own cache from the corrected token. So does the teacher.

    Args:
      student, student_params: as for `decode`, which made `state`.
      teacher, teacher_params: the model that corrects.
      state: finished rows.
      key: the key that the rows were generated with; rounds are folded into it.
      teacher_token: "sample" draws y^T at temperature 1 (the paper), "argmax" takes the
        most probable token.
      slots: rows that are decoded, and that the teacher reads, at once, as for
        `decode`. It changes time and memory alone.
      chunk_size: positions of those rows whose logits are alive at a time.
      temperature, top_k, top_p: of the student's re-generation; the rest as `decode`.

    Returns:
      The finished rows, what was corrected, and the teacher's hidden states on the
      rows: index t predicts token t + 1.

    Raises:
      ValueError: an unknown `teacher_token`.
    """
    if teacher_token not in ("sample", "argmax"):
        raise ValueError(f"teacher_token={teacher_token!r}; expected sample or argmax")
    batch = state.rows.lengths.shape[0]
    detect = partial(
        _detect,
        (student, student.head_params(student_params)),
        (teacher, teacher.head_params(teacher_params)),
        draw=teacher_token == "sample",
        vocab_size=vocab_size,
        # Of all rows, as many positions as make the same number of tokens.
        chunk_size=max(1, chunk_size * (slots or batch) // batch),
    )
    read_on = partial(read, teacher, teacher_params, slots=slots)
    ending: dict[str, Any] = dict(max_length=max_length, eos_ids=eos_ids)
    rewrite = partial(
        decode,
        student,
        student_params,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        vocab_size=vocab_size,
        slots=slots,
        **ending,
    )

    def one_round(carry, round):
        state, heard, corrected_to = carry
        keys = partial(row_keys, key, state.rows.example, round=round)
        info, token = detect(state, heard, keys(TEACHER), corrected_to)
        state, heard = (correct(x, info, token, **ending) for x in (state, heard))
        state = rewrite(state, keys=keys(STUDENT))
        heard = read_on(heard, state.rows)
        return (state, heard, jnp.maximum(corrected_to, info.error_position)), info

    heard = read_whole(teacher, teacher_params, state.rows, slots=slots)
    carry = (state, heard, state.rows.prompt_lengths - 1)
    (state, heard, _), info = lax.scan(one_round, carry, jnp.arange(1, rounds + 1))
    return state, info, heard.hidden


def locate_error(
    rows: Rows,
    kl: Float[Array, "B S"],
    corrected_to: Int[Array, "B"],
    propose: Callable[[Int[Array, "B C"]], Int[Array, "B C"]],
) -> tuple[ScrgInfo, Int[Array, "B"]]:
    """j = argmax of the KL over the response's disagreements behind `corrected_to`.

    The teacher is asked, by `propose(index)`, from the largest KL downwards until it
    disagrees: its token costs V random numbers at each index. `kl` belongs to the token
    of the same index. The teacher's token comes second.
    """
    index = jnp.arange(rows.tokens.shape[1])[None]
    eligible = (index > corrected_to[:, None]) & (index < rows.lengths[:, None])

    def ask(found: Any) -> Any:
        left, error, token = found
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
        asked = put(left, index, jnp.full_like(values, -jnp.inf))
        return asked, error, jnp.where(new, take(proposal, first), token)

    def goes_on(found: Any) -> Bool[Array, ""]:
        left, error, _ = found
        return jnp.any(~error.corrected & jnp.any(left > -jnp.inf, axis=1))

    nothing = ScrgInfo(
        error_position=jnp.full_like(rows.lengths, -1),
        kl=jnp.zeros_like(kl[:, 0]),
        corrected=jnp.zeros_like(rows.lengths, dtype=bool),
    )
    start = jnp.where(eligible, kl, -jnp.inf), nothing, jnp.zeros_like(rows.lengths)
    _, error, token = lax.while_loop(goes_on, ask, start)
    return error, token


def correct(
    state: DecodeState,
    error: ScrgInfo,
    token: Int[Array, "B"],
    *,
    max_length: int | Int[Array, ""],
    eos_ids: tuple[int, ...],
) -> DecodeState:
    """Puts the teacher's token at the error and ends the row there, ready to go on."""
    rows, found = state.rows, error.corrected
    width = rows.tokens.shape[1]
    position = jnp.where(found, error.error_position, width)
    lengths = jnp.where(found, position + 1, rows.lengths)
    limit = jnp.minimum(max_length, width)
    return dataclasses.replace(
        state,
        rows=dataclasses.replace(
            rows,
            tokens=put(rows.tokens, position, token),
            lengths=lengths,
        ),
        done=~found | ends(token, eos_ids) | (lengths >= limit),
    )


def _detect(
    student: tuple[Model, Params],
    teacher: tuple[Model, Params],
    written: DecodeState,
    heard: DecodeState,
    keys: RowKeys,
    corrected_to: Int[Array, "B"],
    *,
    draw: bool,
    vocab_size: int | None,
    chunk_size: int,
) -> tuple[ScrgInfo, Int[Array, "B"]]:
    """Where rows are to be corrected, and the teacher's token there.

    Each model comes with its head, and with what it made of the same rows.
    """
    # Put together once, and not for every chunk.
    teacher = teacher[0], constrain(teacher[1], P("tensor"))
    kl = _score(
        (*student, written.hidden),
        (*teacher, heard.hidden),
        written.rows,
        corrected_to,
        vocab_size=vocab_size,
        chunk_size=chunk_size,
    )

    def propose(index: Int[Array, "B C"]) -> Int[Array, "B C"]:
        model, head = teacher
        before = jnp.take_along_axis(heard.hidden, index[..., None] - 1, axis=1)
        logits = model.unembed(head, before.reshape(-1, before.shape[-1]))
        at_index = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, index)
        tokens = sample(
            mask_vocab(logits, vocab_size),
            at_index.reshape(-1),
            temperature=1.0 if draw else 0.0,
        )
        return tokens.reshape(index.shape)

    return locate_error(written.rows, kl, corrected_to, propose)


def _score(
    student: tuple[Model, Params, Float[Array, "B S D"]],
    teacher: tuple[Model, Params, Float[Array, "B S E"]],
    rows: Rows,
    corrected_to: Int[Array, "B"],
    *,
    vocab_size: int | None,
    chunk_size: int,
) -> Float[Array, "B S"]:
    """KL(teacher || student) for the token at each index behind `corrected_to`.

    Logits exist for `chunk_size` positions at a time.
    """
    width = rows.tokens.shape[1]
    chunk_size = min(chunk_size, width - 1)

    def of_chunk(i: Any, kl: Float[Array, "B S"]) -> Float[Array, "B S"]:
        # The last chunk begins earlier: it says of a position what was said before.
        start = jnp.minimum(i * chunk_size, width - 1 - chunk_size)
        logits = (
            model.unembed(head, lax.dynamic_slice_in_dim(hidden, start, chunk_size, 1))
            for model, head, hidden in (student, teacher)
        )
        # The output at t is about token t + 1.
        return lax.dynamic_update_slice_in_dim(
            kl, forward_kl(*logits, vocab_size=vocab_size), start + 1, axis=1
        )

    first = jnp.min(corrected_to) // chunk_size
    last = (jnp.max(rows.lengths) - 2) // chunk_size
    return lax.fori_loop(first, last + 1, of_chunk, jnp.zeros(rows.tokens.shape))
