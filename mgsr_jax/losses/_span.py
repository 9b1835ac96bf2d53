"""Span correlation: the relation between adjacent tokens of one phrase."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mgsr_jax.losses._logits import clean_pair, same_columns, zero_where_masked
from mgsr_jax.losses._mesh_axes import Axis, axes_of_type
from mgsr_jax.losses._over_vocabulary import over_vocabulary
from mgsr_jax.losses._vocabulary import Vocabulary

# In float32 a smaller relative distance cannot be distinguished from 0.
ROUNDING = 8 * 2.0**-23


@jax.jit
def span_pairs(
    span_ids: Int[Array, "*B T"], where: Bool[Array, "*B T"] | None = None
) -> Bool[Array, "*B T"]:
    """Mask of span pairs: tokens t and t+1 are in one span, and both are scored.

    Args:
      span_ids: the phrase of each position; a negative id means that there is none.
        Neighbouring phrases have different ids. [..., T]
      where: the positions that are scored; None means all of them. [..., T]

    Returns:
      True at t for the pair (t, t+1), False at the last position. The mean of
      `span_correlation` is taken over these positions. [..., T]

    >>> print(span_pairs(jnp.array([4, 4, 4, 5, -1, -1])))
    [ True  True False False False False]
    """
    inside = span_ids >= 0
    if where is not None:
        inside &= where
    same = span_ids[..., :-1] == span_ids[..., 1:]
    return _append(same & inside[..., :-1] & inside[..., 1:], False)


@jax.jit(static_argnames=("vocab_size", "vocab_axis"))
def span_correlation(
    student_logits: Float[Array, "*B T Vs"],
    teacher_logits: Float[Array, "*B T Vt"],
    span_ids: Int[Array, "*B T"],
    *,
    where: Bool[Array, "*B T"] | None = None,
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
) -> Float[Array, "*B T"]:
    """Distance of teacher and student in the relation of two adjacent tokens.

    span_t = || p_t * p_{t+1} - q_t * q_{t+1} ||_2,  p = softmax(teacher_logits),
                                                     q = softmax(student_logits)

    where t and t+1 are in the same span and both scored; 0 elsewhere. The product is
    taken class by class. Take the mean over `span_pairs`. A distance that float32
    cannot resolve (below 1e-6 of the teacher's relation) is 0, with gradient 0.

    MGSR, arXiv 2407.10068, span-level loss. We read the norm as not squared.

    Args:
      student_logits: any float dtype. [..., T, Vs]
      teacher_logits: any float dtype; they get no gradient. [..., T, Vt]
      span_ids: the phrase of the label at t; negative where there is none. [..., T]
      where: the positions that are scored; None means all of them. [..., T]
      vocab_size: columns at or beyond it are padding, with probability 0 on both
        sides. Required where Vs and Vt differ.
      vocab_axis: mesh axis that V is split over; read from the type on Explicit axes.

    Returns:
      float32; at t the value of the pair (t, t+1), 0 at the last position. Positions
      in no pair get no gradient. [..., T]

    Raises:
      ValueError: Vs and Vt differ and `vocab_size` is None; `vocab_size` is larger
        than Vs or Vt; leading axes differ.

    >>> student = jnp.zeros((3, 2))
    >>> teacher = jnp.array([[9.0, 0.0], [9.0, 0.0], [9.0, 0.0]])
    >>> span_ids = jnp.array([7, 7, -1])
    >>> [f"{x:.4f}" for x in span_correlation(student, teacher, span_ids)]
    ['0.7903', '0.0000', '0.0000']
    """
    _check_rows_are_whole(student_logits)
    pairs = span_pairs(span_ids, where)
    # Nothing wraps around: the last position is never the first of a pair.
    second = jnp.roll(pairs, 1, axis=-1)

    def local(
        vocabulary: Vocabulary, student: Array, teacher: Array, in_a_pair: Array
    ) -> tuple[Array, Array]:
        student, teacher = same_columns(
            vocabulary, *clean_pair(vocabulary, student, teacher, in_a_pair, vocab_size)
        )
        p = jnp.exp(vocabulary.log_softmax(teacher))
        q = jnp.exp(vocabulary.log_softmax(student))
        r_p, r_q = p[..., :-1, :] * p[..., 1:, :], q[..., :-1, :] * q[..., 1:, :]
        return vocabulary.sum(jnp.square(r_p - r_q)), vocabulary.sum(jnp.square(r_p))

    both = (student_logits, teacher_logits)
    squared, scale = over_vocabulary(local, vocab_axis, both, pairs | second)
    squared, scale = _append(squared, 0.0), _append(scale, 0.0)
    # The norm has slope 1 however close to 0. For two equal distributions its gradient
    # would be the direction of their rounding errors, and at exactly 0 it would be nan.
    apart = pairs & (squared > ROUNDING**2 * scale)
    return zero_where_masked(jnp.sqrt(jnp.where(apart, squared, 1.0)), apart)


def _check_rows_are_whole(logits: Float[Array, "*B T V"]) -> None:
    split = axes_of_type(logits)
    if split[-2] is not None:
        raise ValueError(
            f"logits {logits.shape} are split as {split}, over positions too; expected "
            "rows whole on a device, since pairs of neighbours would be cut: reshard"
        )


def _append(x: Array, value: float | bool) -> Array:
    """Append one entry to the last axis."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)], constant_values=value)
