"""KL in both directions, their mean, and total variation."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from mgsr_jax.losses._mesh_axes import Axis
from mgsr_jax.losses._per_token import check_temperature, per_token
from mgsr_jax.losses._vocabulary import Vocabulary

# In float32 log-probabilities x with a distance below this times (1 + |x|) are equal.
ROUNDING = 8 * 2.0**-23


def forward_kl(
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    *,
    where: Bool[Array, "*B"] | None = None,
    temperature: ScalarLike = 1.0,
    teacher_temperature: ScalarLike | None = None,
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
) -> Float[Array, "*B"]:
    """KL(teacher || student), in nats.

    FKL_t = sum_v p_v (log p_v - log q_v),  p = softmax(teacher_logits_t / temperature),
                                            q = softmax(student_logits_t / temperature)

    Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.
    There is no factor temperature^2: weights are the caller's.

    Args:
      student_logits: any float dtype. [..., Vs]
      teacher_logits: any float dtype; they get no gradient. [..., Vt]
      where: the positions to score; None means all of them. [...]
      temperature: divides both logits; a number or a traced scalar.
      teacher_temperature: divides the teacher's logits in place of `temperature`; below
        it the student learns a sharpened teacher. None: `temperature`.
      vocab_size: columns at or beyond it are padding, with probability 0 on both
        sides. Required where Vs and Vt differ.
      vocab_axis: mesh axis that V is split over; read from the type on Explicit axes.

    Returns:
      float32, exactly 0 and without gradient at masked positions. Infinite where a
      student's logit is -inf and the teacher's probability is not 0; then only the
      other classes have a gradient. [...]

    Raises:
      ValueError: Vs and Vt differ and `vocab_size` is None; `vocab_size` is larger
        than Vs or Vt; leading axes differ; a temperature is a number not above 0.

    >>> student = jnp.array([[0.0, 0.0], [3.0, 0.0]])
    >>> teacher = jnp.array([[3.0, 0.0], [3.0, 0.0]])
    >>> [f"{kl:.4f}" for kl in forward_kl(student, teacher)]
    ['0.5023', '0.0000']
    """
    numbers = ()
    if teacher_temperature is not None:
        check_temperature(teacher_temperature, "teacher_temperature")
        numbers = (temperature / teacher_temperature,)
    return per_token(
        _kl_of_sharpened if numbers else kl,
        student_logits,
        teacher_logits,
        where,
        temperature,
        vocab_size,
        vocab_axis,
        *numbers,
    )


def reverse_kl(
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    *,
    where: Bool[Array, "*B"] | None = None,
    temperature: ScalarLike = 1.0,
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
) -> Float[Array, "*B"]:
    """KL(student || teacher), in nats.

    RKL_t = sum_v q_v (log q_v - log p_v),  p and q as in `forward_kl`

    Gu et al., "MiniLLM", arXiv 2306.08543, take this divergence over whole sequences;
    GKD, arXiv 2306.13649, takes it per token.

    Args:
      student_logits, teacher_logits, where, temperature, vocab_size, vocab_axis: as in
        `forward_kl`.

    Returns:
      float32, exactly 0 and without gradient at masked positions. Infinite where a
      teacher's logit is -inf and the student's probability is not 0; then only the
      other classes have a gradient. [...]

    Raises:
      ValueError: as in `forward_kl`.

    >>> student = jnp.array([[0.0, 0.0], [3.0, 0.0]])
    >>> teacher = jnp.array([[3.0, 0.0], [3.0, 0.0]])
    >>> [f"{kl:.4f}" for kl in reverse_kl(student, teacher)]
    ['0.8554', '0.0000']
    """
    return per_token(
        _reverse_kl,
        student_logits,
        teacher_logits,
        where,
        temperature,
        vocab_size,
        vocab_axis,
    )


def symmetric_kl(
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    *,
    where: Bool[Array, "*B"] | None = None,
    temperature: ScalarLike = 1.0,
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
) -> Float[Array, "*B"]:
    """The mean of forward and reverse KL, in nats.

    SKL_t = (KL(p || q) + KL(q || p)) / 2 = 1/2 sum_v (p_v - q_v) (log p_v - log q_v)

    It is half of the divergence J of Kullback and Leibler, "On information and
    sufficiency" (1951), which is also named after Jeffreys.

    Args:
      student_logits, teacher_logits, where, temperature, vocab_size, vocab_axis: as in
        `forward_kl`.

    Returns:
      float32, exactly 0 and without gradient at masked positions. Infinite where
      either direction is infinite. [...]

    Raises:
      ValueError: as in `forward_kl`.

    >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([3.0, 0.0])
    >>> print(f"{symmetric_kl(student, teacher):.4f}")
    0.6789
    """
    return per_token(
        _symmetric_kl,
        student_logits,
        teacher_logits,
        where,
        temperature,
        vocab_size,
        vocab_axis,
    )


def total_variation(
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    *,
    where: Bool[Array, "*B"] | None = None,
    temperature: ScalarLike = 1.0,
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
) -> Float[Array, "*B"]:
    """Total variation distance: the largest difference on any set of classes.

    TV_t = 1/2 sum_v |p_v - q_v|,  p and q as in `forward_kl`

    Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation",
    arXiv 2307.15190, use it as a loss for distillation.

    Args:
      student_logits, teacher_logits, where, temperature, vocab_size, vocab_axis: as in
        `forward_kl`.

    Returns:
      float32 in 0..1, exactly 0 and without gradient at masked positions. A class
      whose two log-probabilities agree to 1e-6 (1 + |log p|) adds 0 and has gradient 0:
      our choice at the corner of |x|. This is eight times what float32 resolves; at p =
      1e-9 it is a relative difference of 2e-5. [...]

    Raises:
      ValueError: as in `forward_kl`.

    >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([3.0, 0.0])
    >>> print(f"{total_variation(student, teacher):.4f}")
    0.4526
    """
    return per_token(
        _total_variation,
        student_logits,
        teacher_logits,
        where,
        temperature,
        vocab_size,
        vocab_axis,
    )


def kl(
    vocabulary: Vocabulary, log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]
) -> Float[Array, "*B"]:
    """KL(p || q) = sum_v p_v (log p_v - log q_v).

    Classes with p = 0 add 0 and have no gradient. Classes with q = 0 and p > 0 add
    infinity. They have no gradient either: it would be infinite in p and nan in the
    logits.
    """
    p = jnp.exp(log_p)
    infinite = (p > 0) & (log_q == -jnp.inf)
    # Selected before the product: the gradient of 0 * inf would be nan.
    ratio = jnp.where((p > 0) & ~infinite, log_p - log_q, 0.0)
    return vocabulary.sum(jnp.where(infinite, jnp.inf, p * ratio))


def _kl_of_sharpened(
    vocabulary: Vocabulary,
    log_p: Float[Array, "*B V"],
    log_q: Float[Array, "*B V"],
    exponent: Float[Array, ""],
) -> Float[Array, "*B"]:
    """KL of p^exponent, normalised."""
    return kl(vocabulary, vocabulary.log_softmax(exponent * log_p), log_q)


def _reverse_kl(
    vocabulary: Vocabulary, log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]
) -> Float[Array, "*B"]:
    return kl(vocabulary, log_q, log_p)


def _symmetric_kl(
    vocabulary: Vocabulary, log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]
) -> Float[Array, "*B"]:
    return (kl(vocabulary, log_p, log_q) + kl(vocabulary, log_q, log_p)) / 2


def _total_variation(
    vocabulary: Vocabulary, log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]
) -> Float[Array, "*B"]:
    return vocabulary.sum(gap(log_p, log_q)) / 2


def gap(
    log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]
) -> Float[Array, "*B V"]:
    """|p_v - q_v|; 0, without gradient, where the two are equal in float32.

    The slope of |x| does not vanish at 0: for two equal models the rounding errors
    would set the direction of a gradient of full size.
    """
    larger = jnp.maximum(log_p, log_q)
    equal = jnp.abs(log_p - log_q) <= ROUNDING * (1 + jnp.abs(larger))
    return jnp.where(equal, 0.0, jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)))


def weighted(
    weight: Float[Array, "..."], divergence: Float[Array, "*B"]
) -> Float[Array, "*B"]:
    """weight * divergence; 0 where the weight is 0 and the divergence infinite."""
    unweighted = (weight == 0) & (divergence == jnp.inf)
    return weight * jnp.where(unweighted, 0.0, divergence)
