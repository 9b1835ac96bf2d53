"""DAC-KL's candidates: the K most probable classes of the teacher.

This is the only part of DAC-KL that reads the whole vocabulary.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mgsr_jax.losses._logits import clean, clean_pair
from mgsr_jax.losses._mesh_axes import Axis
from mgsr_jax.losses._over_vocabulary import over_vocabulary
from mgsr_jax.losses._teacher import TopKTeacher, check_positions, top_k_log_probs
from mgsr_jax.losses._vocabulary import Vocabulary
from mgsr_jax.typing import Leaf


class Candidates(NamedTuple):
    """The teacher's K most probable classes, descending; the first is the target.

    Attributes:
      teacher: the teacher's log-probabilities; -inf for a class that cannot occur.
        [..., K]
      student: the student's, normalised over the whole vocabulary. [..., K]
      teacher_rest: log of the teacher's mass on all other classes than the target,
        1 - p_1. [...]
    """

    teacher: Leaf
    student: Leaf
    teacher_rest: Leaf


def find_candidates(
    student_logits: Float[Array, "*B Vs"],
    teacher: Float[Array, "*B Vt"] | TopKTeacher,
    num_candidates: int,
    where: Bool[Array, "*B"] | None,
    vocab_size: int | None,
    vocab_axis: Axis,
) -> Candidates:
    """The candidates at each position.

    K is `num_candidates`, or the number of classes where there are fewer.

    Raises:
      ValueError: as in `dac_kl`.
    """
    if isinstance(teacher, TopKTeacher):
        return _of_top_k_teacher(
            student_logits, teacher, num_candidates, where, vocab_size, vocab_axis
        )

    def local(
        vocabulary: Vocabulary, student: Array, teacher: Array, where: Array | None
    ) -> Candidates:
        student, teacher = clean_pair(vocabulary, student, teacher, where, vocab_size)
        classes = vocab_size or vocabulary.width(teacher)
        top, indices = vocabulary.top_k(teacher, min(num_candidates, classes))
        largest = top[..., :1]
        is_target = vocabulary.columns(teacher) == indices[..., :1]
        # 1 - p_1 as a sum over the others: a subtraction would leave only rounding.
        rest = vocabulary.logsumexp(jnp.where(is_target, -jnp.inf, teacher - largest))
        total = jnp.logaddexp(0.0, rest)
        return Candidates(
            teacher=top - largest - total[..., None],
            student=_log_probs_at(vocabulary, student, indices),
            teacher_rest=rest - total,
        )

    return over_vocabulary(local, vocab_axis, (student_logits, teacher), where)


def _of_top_k_teacher(
    student_logits: Float[Array, "*B V"],
    teacher: TopKTeacher,
    num_candidates: int,
    where: Bool[Array, "*B"] | None,
    vocab_size: int | None,
    vocab_axis: Axis,
) -> Candidates:
    """`find_candidates` for a teacher that is already cut to K classes and a tail."""
    check_positions(student_logits, teacher)
    log_p, log_tail, indices = top_k_log_probs(teacher, where)
    log_p, order = lax.top_k(log_p, log_p.shape[-1])
    others = jnp.concatenate([log_p[..., 1:], log_tail[..., None]], axis=-1)
    indices = jnp.take_along_axis(indices, order, axis=-1)[..., :num_candidates]

    def local(
        vocabulary: Vocabulary, student: Array, where: Array | None, indices: Array
    ) -> Array:
        student = clean(vocabulary, student, where, vocab_size)
        return _log_probs_at(vocabulary, student, indices)

    return Candidates(
        teacher=log_p[..., :num_candidates],
        student=over_vocabulary(local, vocab_axis, (student_logits,), where, indices),
        teacher_rest=Vocabulary().logsumexp(others),
    )


def _log_probs_at(
    vocabulary: Vocabulary, logits: Float[Array, "*B V"], indices: Int[Array, "*B K"]
) -> Float[Array, "*B K"]:
    """Log-probabilities of the classes `indices`, normalised over all classes."""
    # Subtracted before the sum, so that large logits cost no precision.
    largest = vocabulary.max(logits)[..., None]
    total = vocabulary.sum(jnp.exp(logits - largest))[..., None]
    return vocabulary.take(logits, indices) - largest - jnp.log(total)
