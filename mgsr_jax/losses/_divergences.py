"""Divergences between the whole distributions of teacher and student."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from mgsr_jax.losses._logits import clean_pair, same_columns, zero_where_masked


@jax.jit(static_argnames=("vocab_size",))
def forward_kl(
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    *,
    where: Bool[Array, "*B"] | None = None,
    temperature: ScalarLike = 1.0,
    vocab_size: int | None = None,
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
    student_logits, teacher_logits = same_columns(
        *clean_pair(student_logits, teacher_logits, where, vocab_size)
    )
    log_q = jax.nn.log_softmax(student_logits / temperature, axis=-1)
    log_p = jax.nn.log_softmax(teacher_logits / temperature, axis=-1)
    return zero_where_masked(_kl(log_p, log_q), where)


def _kl(log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """sum_v p_v (log p_v - log q_v); classes with p = 0 add 0, and no gradient."""
    p = jnp.exp(log_p)
    # The selection stands before the product too: 0 * inf would be nan backwards.
    ratio = jnp.where(p > 0, log_p - log_q, 0.0)
    return jnp.sum(p * ratio, axis=-1)
