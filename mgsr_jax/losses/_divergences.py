"""Divergences between the whole distributions of teacher and student."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from mgsr_jax.losses._logits import clean_pair, same_columns, zero_where_masked
from mgsr_jax.losses._vocabulary import Axis, Vocabulary, over_vocabulary

Divergence = Callable[..., Float[Array, "*B"]]


@jax.jit(static_argnames=("vocab_size", "vocab_axis"))
def forward_kl(
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    *,
    where: Bool[Array, "*B"] | None = None,
    temperature: ScalarLike = 1.0,
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
) -> Float[Array, "*B"]:
    """KL(teacher || student), in nats.

    FKL_t = sum_v p_v (log p_v - log q_v),  p = softmax(teacher_logits_t / temperature),
                                            q = softmax(student_logits_t / temperature)

    Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.
    There is no factor temperature^2: the caller weighs the loss.

    Args:
      student_logits: any float dtype. [..., Vs]
      teacher_logits: any float dtype; they get no gradient. [..., Vt]
      where: the positions to score; None for all of them. [...]
      temperature: divides both logits; a number or a traced scalar.
      vocab_size: columns at or beyond it are padding, with probability 0 on both
        sides. Needed where Vs and Vt differ.
      vocab_axis: mesh axis that V is split over; read from the type on Explicit axes.

    Returns:
      float32, exactly 0 and without gradient at masked positions. Infinite where a
      student's logit is -inf and the teacher's probability is not 0. [...]

    Raises:
      ValueError: Vs and Vt differ and there is no `vocab_size`, or it is larger than
        one of them; leading axes differ.

    >>> student = jnp.array([[0.0, 0.0], [3.0, 0.0]])
    >>> teacher = jnp.array([[3.0, 0.0], [3.0, 0.0]])
    >>> [f"{kl:.4f}" for kl in forward_kl(student, teacher)]
    ['0.5023', '0.0000']
    """
    return _per_token(
        _kl,
        student_logits,
        teacher_logits,
        where,
        temperature,
        vocab_size,
        vocab_axis,
    )


def _per_token(
    divergence: Divergence,
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    where: Bool[Array, "*B"] | None,
    temperature: ScalarLike,
    vocab_size: int | None,
    vocab_axis: Axis,
    *numbers: ScalarLike,
) -> Float[Array, "*B"]:
    """`divergence(vocabulary, log_p, log_q, *numbers)` at every scored position."""

    def local(
        vocabulary: Vocabulary,
        student: Array,
        teacher: Array,
        where: Array | None,
        temperature: ScalarLike,
        *numbers: ScalarLike,
    ) -> Array:
        student, teacher = same_columns(
            vocabulary, *clean_pair(vocabulary, student, teacher, where, vocab_size)
        )
        log_p = vocabulary.log_softmax(teacher / temperature)
        log_q = vocabulary.log_softmax(student / temperature)
        return divergence(vocabulary, log_p, log_q, *numbers)

    logits = (student_logits, teacher_logits)
    values = over_vocabulary(local, vocab_axis, logits, where, temperature, *numbers)
    return zero_where_masked(values, where)


def _kl(
    vocabulary: Vocabulary, log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]
) -> Float[Array, "*B"]:
    """sum_v p_v (log p_v - log q_v); classes with p = 0 add 0, and no gradient."""
    p = jnp.exp(log_p)
    # The selection stands before the product too: 0 * inf would be nan backwards.
    ratio = jnp.where(p > 0, log_p - log_q, 0.0)
    return vocabulary.sum(p * ratio)
