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
from jaxtyping import Array, Bool, Float, Int

from mgsr_jax.decode import (
    STUDENT,
    TEACHER,
    DecodeState,
    decode,
    ends,
    mask_vocab,
    put,
    row_keys,
    sample,
    take,
)
from mgsr_jax.losses import forward_kl
from mgsr_jax.rows import Rows
from mgsr_jax.typing import Model, Params, PRNGKey, RowKeys


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
) -> tuple[DecodeState, ScrgInfo]:
    """Corrects every row's worst token and re-generates what follows, `rounds` times.

    One teacher pass a round scores every row; the student is scored on the hidden
    states that decoding left, and goes on in its own cache from the corrected token.

    Args:
      student, student_params: as for `decode`, which made `state`.
      teacher, teacher_params: the model that corrects.
      state: finished rows.
      key: the key that the rows were generated with; rounds are folded into it.
      teacher_token: "sample" draws y^T at temperature 1 (the paper), "argmax" takes the
        most probable token.
      slots: rows that the teacher reads, and that are decoded, at once; they divide the
        rows. None takes all of them together. It changes time and memory alone.
      chunk_size: positions of those rows whose logits are alive at a time.
      temperature, top_k, top_p: of the student's re-generation; the rest as `decode`.

    Raises:
      ValueError: an unknown `teacher_token`; slots that do not divide the rows.
    """
    if teacher_token not in ("sample", "argmax"):
        raise ValueError(
            f'teacher_token must be "sample" or "argmax", got {teacher_token!r}'
        )

    score = partial(
        _score,
        student,
        student_params,
        teacher,
        teacher_params,
        draw=teacher_token == "sample",
        vocab_size=vocab_size,
        chunk_size=chunk_size,
    )
    rewrite = partial(
        decode,
        student,
        student_params,
        max_length=max_length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_ids=eos_ids,
        vocab_size=vocab_size,
        slots=slots,
    )

    def one_round(carry, round):
        state, corrected_to = carry
        keys = row_keys(key, state.rows.example, TEACHER, round)
        proposal, kl = _in_groups(slots, score, state.rows, state.hidden, keys)
        info = locate_error(state.rows, proposal, kl, corrected_to)
        state = correct(state, info, proposal, max_length=max_length, eos_ids=eos_ids)
        state = rewrite(state, keys=row_keys(key, state.rows.example, STUDENT, round))
        return (state, jnp.maximum(corrected_to, info.error_position)), info

    carry = (state, state.rows.prompt_lengths - 1)
    (state, _), info = jax.lax.scan(one_round, carry, jnp.arange(1, rounds + 1))
    return state, info


def locate_error(
    rows: Rows,
    proposal: Int[Array, "B S"],
    kl: Float[Array, "B S"],
    corrected_to: Int[Array, "B"],
) -> ScrgInfo:
    """j = argmax of the KL over the response's disagreements behind `corrected_to`.

    `proposal` and `kl` belong to the token of the same index.
    """
    index = jnp.arange(rows.tokens.shape[1])[None]
    candidate = (
        (index > corrected_to[:, None])
        & (index < rows.lengths[:, None])
        & (rows.tokens != proposal)
    )
    position = jnp.argmax(jnp.where(candidate, kl, -jnp.inf), axis=-1)
    found = jnp.any(candidate, axis=-1)
    return ScrgInfo(
        error_position=jnp.where(found, position, -1).astype(jnp.int32),
        kl=jnp.where(found, take(kl, position), 0.0),
        corrected=found,
    )


def correct(
    state: DecodeState,
    error: ScrgInfo,
    proposal: Int[Array, "B S"],
    *,
    max_length: int | Int[Array, ""],
    eos_ids: tuple[int, ...],
) -> DecodeState:
    """Puts the teacher's token at the error and ends the row there, ready to go on."""
    rows, found = state.rows, error.corrected
    width = rows.tokens.shape[1]
    position = jnp.where(found, error.error_position, width)
    token = take(proposal, error.error_position)
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


def _in_groups(size: int | None, fn: Callable[..., Any], *arguments: Any) -> Any:
    """`fn(*arguments)` for `size` rows at a time."""
    rows = arguments[0].lengths.shape[0]
    if size is None or size >= rows:
        return fn(*arguments)
    if rows % size:
        raise ValueError(
            f"{rows} rows in groups of slots={size}; expected a divisor of the rows"
        )
    # Every group takes its rows from all devices alike.
    groups = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(size, -1, *x.shape[1:]), 1, 0), arguments
    )
    results = jax.lax.map(lambda group: fn(*group), groups)
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, *x.shape[2:]), results
    )


def _score(
    student: Model,
    student_params: Params,
    teacher: Model,
    teacher_params: Params,
    rows: Rows,
    student_hidden: Float[Array, "B S D"],
    keys: RowKeys,
    *,
    draw: bool,
    vocab_size: int | None,
    chunk_size: int,
) -> tuple[Int[Array, "B S"], Float[Array, "B S"]]:
    """The teacher's token and KL(teacher || student) for the token at each index.

    Logits exist for `chunk_size` positions at a time, and only where there are
    responses.
    """
    student_head = student.head_params(student_params)
    teacher_head = teacher.head_params(teacher_params)
    teacher_hidden, _ = teacher.forward(teacher_params, rows.tokens)
    batch, width = rows.tokens.shape
    chunk_size = min(chunk_size, width - 1)

    def of_chunk(i: Any, found: Any) -> Any:
        # The last chunk begins earlier: it says of a position what was said before.
        start = jnp.minimum(i * chunk_size, width - 1 - chunk_size)

        def cut(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, start, chunk_size, axis=1)

        student_logits = student.unembed(student_head, cut(student_hidden))
        teacher_logits = teacher.unembed(teacher_head, cut(teacher_hidden))
        # The output at t is about token t + 1.
        index = start + 1 + jnp.arange(chunk_size)
        at_index = jax.vmap(jax.random.fold_in, (None, 0))
        tokens = sample(
            mask_vocab(teacher_logits.reshape(batch * chunk_size, -1), vocab_size),
            jax.vmap(at_index, (0, None))(keys, index).reshape(-1),
            temperature=1.0 if draw else 0.0,
        )
        kl = forward_kl(student_logits, teacher_logits, vocab_size=vocab_size)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(x, new, start + 1, axis=1)
            for x, new in zip(found, (tokens.reshape(kl.shape), kl), strict=True)
        )

    first = (jnp.min(rows.prompt_lengths) - 1) // chunk_size
    last = (jnp.max(rows.lengths) - 2) // chunk_size
    nothing = jnp.zeros((batch, width), jnp.int32), jnp.zeros((batch, width))
    return jax.lax.fori_loop(first, last + 1, of_chunk, nothing)
