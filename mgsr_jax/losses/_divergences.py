"""KL in both directions, their mean, total variation; how a divergence is walked.

`per_token` is that walk, for every divergence in this folder that needs nothing but the
two distributions: log-probabilities of both over the same columns, then one function of
them at each position. What it computes is jitted; what is public stands outside, where
a number is still a number and can be checked.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from mgsr_jax.losses._logits import clean_pair, same_columns, zero_where_masked
from mgsr_jax.losses._vocabulary import Axis, Vocabulary, over_vocabulary

Divergence = Callable[..., Float[Array, "*B"]]

# A relative distance of log-probabilities that float32 cannot tell from none.
ROUNDING = 8 * 2.0**-23


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
      student's logit is -inf and the teacher's probability is not 0; the gradient is
      then that of the other classes. [...]

    Raises:
      ValueError: Vs and Vt differ and there is no `vocab_size`, or it is larger than
        one of them; leading axes differ.

    >>> student = jnp.array([[0.0, 0.0], [3.0, 0.0]])
    >>> teacher = jnp.array([[3.0, 0.0], [3.0, 0.0]])
    >>> [f"{kl:.4f}" for kl in forward_kl(student, teacher)]
    ['0.5023', '0.0000']
    """
    return per_token(
        kl,
        student_logits,
        teacher_logits,
        where,
        temperature,
        vocab_size,
        vocab_axis,
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

    Gu et al., "MiniLLM", arXiv 2306.08543, where the same divergence is taken over
    whole sequences; a token at a time: GKD, arXiv 2306.13649.

    Args:
      student_logits, teacher_logits, where, temperature, vocab_size, vocab_axis: as in
        `forward_kl`.

    Returns:
      float32, exactly 0 and without gradient at masked positions. Infinite where a
      teacher's logit is -inf and the student's probability is not 0; the gradient is
      then that of the other classes. [...]

    Raises:
      ValueError: as `forward_kl`.

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

    Half of the divergence J of Kullback and Leibler, "On information and sufficiency"
    (1951), also named after Jeffreys.

    Args:
      student_logits, teacher_logits, where, temperature, vocab_size, vocab_axis: as in
        `forward_kl`.

    Returns:
      float32, exactly 0 and without gradient at masked positions. Infinite where
      either direction is. [...]

    Raises:
      ValueError: as `forward_kl`.

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
    """Total variation distance: the most that the two differ on any set of classes.

    TV_t = 1/2 sum_v |p_v - q_v|,  p and q as in `forward_kl`

    As a loss for distillation: Wen et al., "f-Divergence Minimization for
    Sequence-Level Knowledge Distillation", arXiv 2307.15190.

    Args:
      student_logits, teacher_logits, where, temperature, vocab_size, vocab_axis: as in
        `forward_kl`.

    Returns:
      float32 in 0..1, exactly 0 and without gradient at masked positions. A class on
      which both agree, to the 1e-6 of a log-probability that float32 resolves, adds 0
      and has gradient 0: our choice at the corner of |x|. [...]

    Raises:
      ValueError: as `forward_kl`.

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


def per_token(
    divergence: Divergence,
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    where: Bool[Array, "*B"] | None,
    temperature: ScalarLike,
    vocab_size: int | None,
    vocab_axis: Axis,
    *numbers: ScalarLike,
) -> Float[Array, "*B"]:
    """`divergence(vocabulary, log_p, log_q, *numbers)` at every scored position.

    Raises:
      ValueError: a temperature that is a number and not above 0.
    """
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature={temperature}; expected a number above 0")
    return jitted_per_token(
        divergence,
        student_logits,
        teacher_logits,
        where,
        temperature,
        vocab_size,
        vocab_axis,
        *numbers,
    )


@jax.jit(static_argnames=("divergence", "vocab_size", "vocab_axis"))
def jitted_per_token(
    divergence: Divergence,
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    where: Bool[Array, "*B"] | None,
    temperature: ScalarLike,
    vocab_size: int | None,
    vocab_axis: Axis,
    *numbers: ScalarLike,
) -> Float[Array, "*B"]:
    """What `per_token` compiles."""

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
        values = (jnp.asarray(number, jnp.float32) for number in numbers)
        return divergence(vocabulary, log_p, log_q, *values)

    logits = (student_logits, teacher_logits)
    values = over_vocabulary(local, vocab_axis, logits, where, temperature, *numbers)
    return zero_where_masked(values, where)


def kl(
    vocabulary: Vocabulary, log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]
) -> Float[Array, "*B"]:
    """sum_v p_v (log p_v - log q_v).

    Classes with p = 0 add 0, and no gradient; those with q alone 0 add infinity, and
    no gradient either: it would be infinite in p, and nan behind a softmax.
    """
    p = jnp.exp(log_p)
    infinite = (p > 0) & (log_q == -jnp.inf)
    # The selection stands before the product too: 0 * inf would be nan backwards.
    ratio = jnp.where((p > 0) & ~infinite, log_p - log_q, 0.0)
    return vocabulary.sum(jnp.where(infinite, jnp.inf, p * ratio))


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
    """|p_v - q_v|; 0, without gradient, where float32 cannot tell the two apart.

    Its slope does not vanish at 0: of two equal models the rounding errors would decide
    the direction of a gradient of full size.
    """
    larger = jnp.maximum(log_p, log_q)
    equal = jnp.abs(log_p - log_q) <= ROUNDING * (1 + jnp.abs(larger))
    return jnp.where(equal, 0.0, jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)))


def weighted(
    weight: Float[Array, "..."], divergence: Float[Array, "*B"]
) -> Float[Array, "*B"]:
    """weight * divergence; 0 where the weight is 0 and the divergence infinite."""
    nothing = (weight == 0) & (divergence == jnp.inf)
    return weight * jnp.where(nothing, 0.0, divergence)


def check_fraction(name: str, number: ScalarLike) -> None:
    """Raises ValueError where a number is not in 0..1; what is traced is not known."""
    if isinstance(number, int | float) and not 0 <= number <= 1:
        raise ValueError(f"{name}={number}; expected a number from 0 to 1")
