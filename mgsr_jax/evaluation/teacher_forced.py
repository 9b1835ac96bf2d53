"""Teacher-forced cross-entropy and KL of given responses.

The logits of only 64 positions are in memory at a time.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mgsr_jax import losses
from mgsr_jax.rows import Rows, next_token_view
from mgsr_jax.typing import Model, Params

_CHUNK = 64  # positions


@functools.partial(jax.jit, static_argnames=("model", "vocab_size"))
def response_loss(
    model: Model, params: Params, rows: Rows, *, vocab_size: int | None = None
) -> losses.Sum:
    """Cross-entropy of the rows' responses in nats: sum and number of tokens."""
    view = next_token_view(rows)
    hidden, _ = model.forward(params, view.inputs)
    head = model.head_params(params)

    def chunk_loss(chunk: tuple[Array, ...]) -> losses.Sum:
        hidden, labels, where = chunk
        logits = model.unembed(head, hidden)
        values = losses.cross_entropy(
            logits, labels, where=where, vocab_size=vocab_size
        )
        return losses.masked_sum(values, where)

    sums = jax.lax.map(chunk_loss, _in_chunks(hidden, view.labels, view.where))
    return jax.tree.map(jnp.sum, sums)


@functools.partial(jax.jit, static_argnames=("student", "teacher", "vocab_size"))
def response_kl(
    student: Model,
    student_params: Params,
    teacher: Model,
    teacher_params: Params,
    rows: Rows,
    *,
    vocab_size: int | None = None,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """KL(teacher || student) at each token of the rows' responses.

    Returns:
      The KL in nats, 0 beyond the end of a response, and a mask of the positions that
      exist. Index t is the t-th token of the response, whatever the prompt's length.
    """
    view = next_token_view(rows)
    heads = student.head_params(student_params), teacher.head_params(teacher_params)
    student_hidden, _ = student.forward(student_params, view.inputs)
    teacher_hidden, _ = teacher.forward(teacher_params, view.inputs)

    def chunk_kl(chunk: tuple[Array, ...]) -> Array:
        student_hidden, teacher_hidden, where = chunk
        return losses.forward_kl(
            student.unembed(heads[0], student_hidden),
            teacher.unembed(heads[1], teacher_hidden),
            where=where,
            vocab_size=vocab_size,
        )

    chunks = _in_chunks(student_hidden, teacher_hidden, view.where)
    batch, length = view.where.shape
    kl = jnp.moveaxis(jax.lax.map(chunk_kl, chunks), 0, 1).reshape(batch, -1)
    t = jnp.arange(length)[None]
    first = rows.prompt_lengths[:, None] - 1
    kl = jnp.take_along_axis(kl, jnp.minimum(first + t, length - 1), axis=1)
    where = t < (rows.lengths - rows.prompt_lengths)[:, None]
    return jnp.where(where, kl, 0.0), where


def _in_chunks(*arrays: Array) -> tuple[Array, ...]:
    """[B, T, ...] -> [chunks, B, 64, ...]; zeros (False) fill the last chunk."""

    def split(x: Array) -> Array:
        batch, length = x.shape[:2]
        padding = [(0, 0), (0, -length % _CHUNK)] + [(0, 0)] * (x.ndim - 2)
        chunks = jnp.pad(x, padding).reshape(batch, -1, _CHUNK, *x.shape[2:])
        return jnp.moveaxis(chunks, 1, 0)

    return tuple(map(split, arrays))
