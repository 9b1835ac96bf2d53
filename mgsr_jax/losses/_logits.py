"""Logits prepared for a loss: float32, masked, over the vocabulary that both share."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from mgsr_jax.losses._vocabulary import Vocabulary


def clean(
    vocabulary: Vocabulary,
    logits: Float[Array, "*B V"],
    where: Bool[Array, "*B"] | None,
    vocab_size: int | None,
) -> Float[Array, "*B V"]:
    """Cast to float32; set masked positions to 0 and padding columns to -inf.

    Padding columns are those at or beyond `vocab_size`. Both are selections before
    anything else, so no masked entry reaches a value or a gradient, not even nan.

    Raises:
      ValueError: `vocab_size` is not in 1..V.
    """
    columns = vocabulary.width(logits)
    if vocab_size is not None and not 1 <= vocab_size <= columns:
        raise ValueError(
            f"vocab_size={vocab_size} for logits of {columns} columns; expected 1 to "
            f"{columns}: pass the tokenizer's size, or None where no column is padding"
        )
    logits = logits.astype(jnp.float32)
    if where is not None:
        logits = jnp.where(where[..., None], logits, 0.0)
    if vocab_size is not None:
        # A comparison instead of a slice keeps a sharded V where it is.
        logits = jnp.where(vocabulary.columns(logits) < vocab_size, logits, -jnp.inf)
    return logits


def clean_pair(
    vocabulary: Vocabulary,
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    where: Bool[Array, "*B"] | None,
    vocab_size: int | None,
) -> tuple[Float[Array, "*B Vs"], Float[Array, "*B Vt"]]:
    """Clean both; the teacher's logits get no gradient. Columns are not added or cut.

    Raises:
      ValueError: their positions differ, or their numbers of columns differ and
        `vocab_size` is None.
    """
    student, teacher = student_logits.shape, teacher_logits.shape
    if student[:-1] != teacher[:-1]:
        raise ValueError(
            f"student_logits {student} and teacher_logits {teacher} differ in their "
            "positions; expected equal leading axes: run both models on the same tokens"
        )
    if student[-1] != teacher[-1] and vocab_size is None:
        raise ValueError(
            f"student_logits have {student[-1]} columns, teacher_logits {teacher[-1]}; "
            "expected vocab_size: pass the size of the tokenizer that both models share"
        )
    return (
        clean(vocabulary, student_logits, where, vocab_size),
        clean(vocabulary, lax.stop_gradient(teacher_logits), where, vocab_size),
    )


def same_columns(
    vocabulary: Vocabulary,
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
) -> tuple[Float[Array, "*B V"], Float[Array, "*B V"]]:
    """Widen the narrower of the two with columns of -inf.

    Raises:
      ValueError: the widths differ and V is split over devices, so that a device's
        columns are not the same for both.
    """
    widths = [vocabulary.width(x) for x in (student_logits, teacher_logits)]
    if vocabulary.axis is not None and widths[0] != widths[1]:
        raise ValueError(
            f"student_logits have {widths[0]} columns, teacher_logits {widths[1]}, "
            f"split over the mesh axis {vocabulary.axis!r}; expected equal numbers: "
            "pad both heads to the same multiple of the axis size"
        )
    columns = max(student_logits.shape[-1], teacher_logits.shape[-1])

    def widen(logits: Float[Array, "*B V"]) -> Float[Array, "*B W"]:
        missing = columns - logits.shape[-1]
        unpadded = [(0, 0)] * (logits.ndim - 1)
        return jnp.pad(logits, [*unpadded, (0, missing)], constant_values=-jnp.inf)

    return widen(student_logits), widen(teacher_logits)


def zero_where_masked(
    values: Float[Array, "*B"], where: Bool[Array, "*B"] | None
) -> Float[Array, "*B"]:
    """`values`, and exactly 0 at masked positions."""
    return values if where is None else jnp.where(where, values, 0.0)
