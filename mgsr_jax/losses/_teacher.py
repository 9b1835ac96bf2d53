"""A teacher that is cut to its K most probable classes, as the teacher cache stores it.

All other classes together are one more class, the tail. A student with too much or too
little probability on the tail has a loss for it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mgsr_jax.losses._logits import clean, zero_where_masked
from mgsr_jax.losses._mesh_axes import Axis
from mgsr_jax.losses._over_vocabulary import over_vocabulary
from mgsr_jax.losses._vocabulary import Vocabulary
from mgsr_jax.typing import Leaf

# The tail is 1 minus a sum; float32 cannot distinguish a smaller tail from 0.
ROUNDING = 2.0**-20


class TopKTeacher(NamedTuple):
    """The K most probable classes of each position and the logsumexp of all classes.

    log p_k = logits_k - logsumexp; all other classes share the rest, 1 - sum_k p_k.
    Only differences to `logsumexp` matter: the same constant may be added to `logits`
    and to `logsumexp`. The temperature is always 1.

    Attributes:
      logits: the teacher's logits of the K classes, in any order; any float dtype.
        [..., K]
      indices: their columns in the vocabulary, all different. int [..., K]
      logsumexp: log of the sum of exp(logits) over the whole vocabulary. float [...]
    """

    logits: Leaf
    indices: Leaf
    logsumexp: Leaf


@jax.jit(static_argnames=("k", "vocab_size", "vocab_axis"))
def top_k_teacher(
    teacher_logits: Float[Array, "*B V"],
    k: int,
    *,
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
) -> TopKTeacher:
    """The K most probable classes of dense logits.

    logits_k = z_k - z_1,  logsumexp = log sum_v exp(z_v - z_1),  z_1 >= z_2 >= ...

    The logits are relative to the largest, so that large ones cost the tail no
    precision.

    Args:
      teacher_logits: any float dtype. [..., V]
      k: the number of classes to keep; all of them where there are fewer.
      vocab_size: columns at or beyond it are padding, with probability 0.
      vocab_axis: mesh axis that V is split over; read from the type on Explicit axes.

    Returns:
      A `TopKTeacher` in descending order; logits float32, indices int32.

    Raises:
      ValueError: `k` is below 1; `vocab_size` is not in 1..V.

    >>> teacher = top_k_teacher(jnp.array([3.0, 9.0, 7.0, 7.5]), 2)
    >>> print(teacher.logits, teacher.indices, f"{teacher.logsumexp:.4f}")
    [ 0.  -1.5] [1 3] 0.3082
    """
    if k < 1:
        raise ValueError(f"k={k}; expected at least 1")

    def local(vocabulary: Vocabulary, logits: Array) -> TopKTeacher:
        logits = clean(vocabulary, logits, None, vocab_size)
        tokens = vocab_size or vocabulary.width(logits)
        top, indices = vocabulary.top_k(logits, min(k, tokens))
        logsumexp = vocabulary.logsumexp(logits - top[..., :1])
        return TopKTeacher(top - top[..., :1], indices, logsumexp)

    return over_vocabulary(local, vocab_axis, (lax.stop_gradient(teacher_logits),))


@jax.jit
def held_mass(
    teacher: TopKTeacher, *, where: Bool[Array, "*B"] | None = None
) -> Float[Array, "*B"]:
    """Probability that the teacher gives to its K classes together.

    held_t = sum_k exp(logits_k - logsumexp)

    Report it with a loss on a `TopKTeacher`: it shows how much the cut loses.

    Args:
      teacher: K classes per position.
      where: the positions to compute; None means all of them. [...]

    Returns:
      float32 in 0..1, 0 where masked. [...]

    >>> teacher = top_k_teacher(jnp.array([3.0, 9.0, 7.0, 7.5]), 2)
    >>> print(f"{held_mass(teacher):.4f}")
    0.8987
    """
    log_p, _, _ = top_k_log_probs(teacher, where)
    return zero_where_masked(jnp.sum(jnp.exp(log_p), axis=-1), where)


@jax.jit(static_argnames=("vocab_size", "vocab_axis"))
def forward_kl_top_k(
    student_logits: Float[Array, "*B V"],
    teacher: TopKTeacher,
    *,
    where: Bool[Array, "*B"] | None = None,
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
) -> Float[Array, "*B"]:
    """KL(teacher || student) over the teacher's K classes and the tail, in nats.

    FKL_t = sum_k p_k (log p_k - log q_k) + p_tail (log p_tail - log q_tail)
    p_tail = 1 - sum_k p_k,  q_tail = sum of q_v over all other classes

    It is at least 0 and at most `forward_kl`, and equal to `forward_kl` where K is the
    whole vocabulary. Tunix and MaxText renormalise both sides over the K classes; then
    the other classes would get no gradient at all. A p_tail below 1e-6, which float32
    cannot distinguish from 0, is 0.

    Our choice. `forward_kl` bounds it by the data-processing inequality: Kullback and
    Leibler, "On information and sufficiency" (1951).

    Args:
      student_logits: any float dtype. [..., V]
      teacher: its K most probable classes, at temperature 1; they get no gradient.
      where: the positions to score; None means all of them. [...]
      vocab_size: columns at or beyond it are padding, with probability 0.
      vocab_axis: mesh axis that V is split over; read from the type on Explicit axes.

    Returns:
      float32, exactly 0 and without gradient at masked positions. [...]

    Raises:
      ValueError: leading axes differ; `vocab_size` is not in 1..V.

    >>> student, dense = jnp.array([1.0, 0.0, 0.0]), jnp.array([2.0, 1.0, 0.0])
    >>> print(f"{forward_kl_top_k(student, top_k_teacher(dense, 1)):.4f}")
    0.0167
    """
    check_positions(student_logits, teacher)
    log_p, log_p_tail, indices = top_k_log_probs(teacher, where)

    def local(
        vocabulary: Vocabulary, logits: Array, where: Array | None, indices: Array
    ) -> tuple[Array, Array]:
        log_q = vocabulary.log_softmax(clean(vocabulary, logits, where, vocab_size))
        tail = vocabulary.logsumexp(vocabulary.without(log_q, indices))
        return vocabulary.take(log_q, indices), tail

    log_q, log_q_tail = over_vocabulary(
        local, vocab_axis, (student_logits,), where, indices
    )
    log_p = jnp.concatenate([log_p, log_p_tail[..., None]], axis=-1)
    log_q = jnp.concatenate([log_q, log_q_tail[..., None]], axis=-1)
    p = jnp.exp(log_p)
    # Selected before the product: the gradient of 0 * inf would be nan.
    ratio = jnp.where(p > 0, log_p - log_q, 0.0)
    return zero_where_masked(jnp.sum(p * ratio, axis=-1), where)


def top_k_log_probs(
    teacher: TopKTeacher, where: Bool[Array, "*B"] | None
) -> tuple[Float[Array, "*B K"], Float[Array, "*B"], Int[Array, "*B K"]]:
    """Log-probabilities of the K classes and of the tail, and the classes' columns.

    The tail is 1 minus the mass of the K classes. At masked positions the distribution
    is uniform over columns 0..K-1.
    """
    logits, indices, total = lax.stop_gradient(teacher)
    logits, total = logits.astype(jnp.float32), total.astype(jnp.float32)
    indices = indices.astype(jnp.int32)
    if where is not None:
        first = lax.broadcasted_iota(jnp.int32, indices.shape, indices.ndim - 1)
        logits = jnp.where(where[..., None], logits, 0.0)
        total = jnp.where(where, total, math.log(logits.shape[-1]))
        indices = jnp.where(where[..., None], indices, first)
    held = Vocabulary().logsumexp(logits) - total
    tail = -jnp.expm1(jnp.minimum(held, 0.0))
    exists = tail > ROUNDING
    log_tail = jnp.where(exists, jnp.log(jnp.where(exists, tail, 1.0)), -jnp.inf)
    return logits - total[..., None], log_tail, indices


def check_positions(student_logits: Float[Array, "..."], teacher: TopKTeacher) -> None:
    """Raise ValueError where the positions of student and teacher differ."""
    student, held = student_logits.shape, teacher.indices.shape
    if student[:-1] != held[:-1]:
        raise ValueError(
            f"student_logits {student} and the teacher's indices {held} differ "
            "in positions; expected equal leading axes: take the teacher's classes for "
            "the tokens that the student reads"
        )
