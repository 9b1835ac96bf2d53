"""Logits as every loss reads them: float32, masked, over the vocabulary both share."""

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
    """float32; 0 at masked positions, -inf in columns at or beyond `vocab_size`.

    Both are selections at the very start, so nothing that stands in a masked place
    reaches a value or a gradient, not even nan.

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
        # A comparison and not a slice: it keeps a sharded V in place.
        logits = jnp.where(vocabulary.columns(logits) < vocab_size, logits, -jnp.inf)
    return logits


def clean_pair(
    vocabulary: Vocabulary,
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    where: Bool[Array, "*B"] | None,
    vocab_size: int | None,
) -> tuple[Float[Array, "*B Vs"], Float[Array, "*B Vt"]]:
    """Both cleaned; the teacher's carry no gradient. Each keeps its number of columns.

    Raises:
      ValueError: other positions than each other's, or other columns and no
        `vocab_size` that says which of them are tokens.
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
            "expected vocab_size, the size of the tokenizer that both models share"
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
    """The narrower of the two widened by columns of -inf.

    Raises:
      ValueError: they differ and are split over devices, where equal places hold
        different columns.
    """
    widths = [vocabulary.width(x) for x in (student_logits, teacher_logits)]
    if vocabulary.axis is not None and widths[0] != widths[1]:
        raise ValueError(
            f"student_logits have {widths[0]} columns, teacher_logits {widths[1]}, "
            f"split over the mesh axis {vocabulary.axis!r}; expected equal numbers: "
            "pad both heads to one multiple of the axis"
        )
    columns = max(student_logits.shape[-1], teacher_logits.shape[-1])

    def widen(logits: Float[Array, "*B V"]) -> Float[Array, "*B W"]:
        missing = columns - logits.shape[-1]
        none = [(0, 0)] * (logits.ndim - 1)
        return jnp.pad(logits, [*none, (0, missing)], constant_values=-jnp.inf)

    return widen(student_logits), widen(teacher_logits)


def zero_where_masked(
    values: Float[Array, "*B"], where: Bool[Array, "*B"] | None
) -> Float[Array, "*B"]:
    """`values`, and exactly 0 at masked positions."""
    return values if where is None else jnp.where(where, values, 0.0)
