"""Forward and reverse KL mixed: by the teacher's entropy, or class by class."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, ScalarLike

from mgsr_jax.losses._divergences import kl, weighted
from mgsr_jax.losses._mesh_axes import Axis
from mgsr_jax.losses._per_token import per_token
from mgsr_jax.losses._vocabulary import Vocabulary


def entropy_gated_kl(
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    *,
    where: Bool[Array, "*B"] | None = None,
    temperature: ScalarLike = 1.0,
    threshold: ScalarLike = 0.8,
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
) -> Float[Array, "*B"]:
    """Reverse KL, plus forward KL where the teacher is uncertain, in nats.

    EGKL_t = KL(q || p) + g_t KL(p || q),  g_t = 1 where H(p) > threshold, else 0
    H(p) = -sum_v p_v log p_v,  p and q as in `forward_kl`

    Reverse KL would pull the student to one of several continuations that the teacher
    holds possible; forward KL makes it cover all of them.

    EOPD, arXiv 2603.07079, of which we read the abstract, and public notes on the paper
    and its code: the threshold 0.8, and a forward KL that is added, not put in place
    of the reverse KL. Our choice: both KLs are over the whole vocabulary. The paper's
    reverse KL is an estimate from the sampled token, and its forward KL reads only the
    teacher's 16 most probable classes.

    Args:
      student_logits, teacher_logits, where, temperature, vocab_size, vocab_axis: as in
        `forward_kl`.
      threshold: the teacher's entropy above which forward KL is added, in nats and at
        `temperature`; a number or a traced scalar.

    Returns:
      float32, exactly 0 and without gradient at masked positions. Infinite where a KL
      that counts is infinite. [...]

    Raises:
      ValueError: as in `forward_kl`.

    >>> student = jnp.array([[0.0, 0.0], [0.0, 0.0]])
    >>> teacher = jnp.array([[3.0, 0.0], [0.5, 0.0]])  # entropies of 0.19 and 0.66
    >>> [f"{kl:.4f}" for kl in entropy_gated_kl(student, teacher, threshold=0.5)]
    ['0.8554', '0.0612']
    """
    return per_token(
        _entropy_gated_kl,
        student_logits,
        teacher_logits,
        where,
        temperature,
        vocab_size,
        vocab_axis,
        threshold,
    )


def per_class_kl(
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    *,
    where: Bool[Array, "*B"] | None = None,
    temperature: ScalarLike = 1.0,
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
) -> Float[Array, "*B"]:
    """Forward KL for classes that the student underrates, reverse KL for the others.

    PCKL_t = sum_v (a_v p_v log(p_v / q_v) + (1 - a_v) q_v log(q_v / p_v)), in nats
    a_v = p_v / (p_v + q_v),  p and q as in `forward_kl`

    The weights a have no gradient. Its value is twice that of `symmetric_kl`, since
    a p - (1 - a) q = p - q; only the gradients differ.

    ToDi, arXiv 2505.16297, of which we read the abstract and public summaries: a is the
    sigmoid of log(p / q), without gradient.

    Args:
      student_logits, teacher_logits, where, temperature, vocab_size, vocab_axis: as in
        `forward_kl`.

    Returns:
      float32, exactly 0 and without gradient at masked positions. Infinite where one
      side excludes a class and the other does not; such a class has no gradient. [...]

    Raises:
      ValueError: as in `forward_kl`.

    >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([3.0, 0.0])
    >>> print(f"{per_class_kl(student, teacher):.4f}")
    1.3577
    """
    return per_token(
        _per_class_kl,
        student_logits,
        teacher_logits,
        where,
        temperature,
        vocab_size,
        vocab_axis,
    )


def entropy_of(
    vocabulary: Vocabulary, log_p: Float[Array, "*B V"]
) -> Float[Array, "*B"]:
    """-sum_v p_v log p_v; classes with p = 0 add 0."""
    p = jnp.exp(log_p)
    return -vocabulary.sum(p * jnp.where(p > 0, log_p, 0.0))


def _entropy_gated_kl(
    vocabulary: Vocabulary,
    log_p: Float[Array, "*B V"],
    log_q: Float[Array, "*B V"],
    threshold: Float[Array, ""],
) -> Float[Array, "*B"]:
    uncertain = entropy_of(vocabulary, log_p) > threshold
    forward = weighted(uncertain.astype(jnp.float32), kl(vocabulary, log_p, log_q))
    return kl(vocabulary, log_q, log_p) + forward


def _per_class_kl(
    vocabulary: Vocabulary, log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]
) -> Float[Array, "*B"]:
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    infinite = (p > 0) & (log_q == -jnp.inf) | (q > 0) & (log_p == -jnp.inf)
    both = (log_p > -jnp.inf) & (log_q > -jnp.inf)
    # Selected before the products: the gradient of 0 * inf would be nan.
    ratio = jnp.where(both, log_p - log_q, 0.0)
    teachers = lax.stop_gradient(jax.nn.sigmoid(ratio))
    terms = (teachers * p - (1 - teachers) * q) * ratio
    return vocabulary.sum(jnp.where(infinite, jnp.inf, terms))
