"""Divergences to a mixture of teacher and student.

Jensen-Shannon and the skewed KLs mix probabilities; TAID mixes logits. Mixtures are
computed in log space and are exact at weights 0 and 1.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, ScalarLike

from mgsr_jax.losses._divergences import kl, weighted
from mgsr_jax.losses._mesh_axes import Axis
from mgsr_jax.losses._per_token import check_fraction, per_token
from mgsr_jax.losses._vocabulary import Vocabulary

# exp(LARGE) is finite in float32, and so is its product with another factor.
LARGE = 80.0


def jensen_shannon(
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    *,
    where: Bool[Array, "*B"] | None = None,
    temperature: ScalarLike = 1.0,
    beta: ScalarLike = 0.5,
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
) -> Float[Array, "*B"]:
    """Generalised Jensen-Shannon divergence, in nats; `beta` weighs the teacher.

    JSD_t = beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q

    with p and q as in `forward_kl`. It is at most -beta log(beta) - (1 - beta)
    log(1 - beta), so it is 0 at beta 0 and 1, with zero gradient. Divided by beta it
    tends to KL(p || q) as beta goes to 0; divided by 1 - beta it tends to KL(q || p) as
    beta goes to 1. Some libraries, such as TRL, compute these limits at beta 0 and 1:
    call `forward_kl` or `reverse_kl` for them.

    GKD, arXiv 2306.13649, section 2 (there D_JSD(beta)).

    Args:
      student_logits, teacher_logits, where, temperature, vocab_size, vocab_axis: as in
        `forward_kl`.
      beta: the teacher's weight, from 0 to 1; a number or a traced scalar.

    Returns:
      float32, finite, exactly 0 and without gradient at masked positions. [...]

    Raises:
      ValueError: as in `forward_kl`; `beta` is a number outside 0..1.

    >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([3.0, 0.0])
    >>> [f"{jensen_shannon(student, teacher, beta=b):.4f}" for b in (0.1, 0.5, 0.9)]
    ['0.0461', '0.1449', '0.0676']
    """
    check_fraction("beta", beta)
    return per_token(
        _jensen_shannon,
        student_logits,
        teacher_logits,
        where,
        temperature,
        vocab_size,
        vocab_axis,
        beta,
    )


def skewed_forward_kl(
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    *,
    where: Bool[Array, "*B"] | None = None,
    temperature: ScalarLike = 1.0,
    alpha: ScalarLike = 0.1,
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
) -> Float[Array, "*B"]:
    """KL of the teacher to a mixture that holds some of the teacher, in nats.

    SFKL_t = KL(p || m),  m = alpha p + (1 - alpha) q,  p and q as in `forward_kl`

    It is at most -log(alpha). It is `forward_kl` at alpha 0, and 0 at alpha 1, with
    zero gradient.

    DistiLLM, arXiv 2402.03898 (there alpha-SKL). The gradient flows through the
    mixture, as in the paper.

    Args:
      student_logits, teacher_logits, where, temperature, vocab_size, vocab_axis: as in
        `forward_kl`.
      alpha: the teacher's weight in the mixture, from 0 to 1; a number or a traced
        scalar.

    Returns:
      float32, exactly 0 and without gradient at masked positions. Infinite only at
      alpha 0 where `forward_kl` is infinite. [...]

    Raises:
      ValueError: as in `forward_kl`; `alpha` is a number outside 0..1.

    >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([3.0, 0.0])
    >>> [f"{skewed_forward_kl(student, teacher, alpha=a):.4f}" for a in (0.0, 0.1)]
    ['0.5023', '0.4242']
    """
    check_fraction("alpha", alpha)
    return per_token(
        _skewed_forward_kl,
        student_logits,
        teacher_logits,
        where,
        temperature,
        vocab_size,
        vocab_axis,
        alpha,
    )


def skewed_reverse_kl(
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    *,
    where: Bool[Array, "*B"] | None = None,
    temperature: ScalarLike = 1.0,
    alpha: ScalarLike = 0.1,
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
) -> Float[Array, "*B"]:
    """KL of the student to a mixture that holds some of the student, in nats.

    SRKL_t = KL(q || m),  m = (1 - alpha) p + alpha q,  p and q as in `forward_kl`

    It is at most -log(alpha). It is `reverse_kl` at alpha 0, and 0 at alpha 1, with
    zero gradient.

    DistiLLM, arXiv 2402.03898 (there alpha-SRKL). The gradient flows through the
    mixture, as in the paper.

    Args:
      student_logits, teacher_logits, where, temperature, vocab_size, vocab_axis: as in
        `forward_kl`.
      alpha: the student's weight in the mixture, from 0 to 1; a number or a traced
        scalar.

    Returns:
      float32, exactly 0 and without gradient at masked positions. Infinite only at
      alpha 0 where `reverse_kl` is infinite. [...]

    Raises:
      ValueError: as in `forward_kl`; `alpha` is a number outside 0..1.

    >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([3.0, 0.0])
    >>> [f"{skewed_reverse_kl(student, teacher, alpha=a):.4f}" for a in (0.0, 0.1)]
    ['0.8554', '0.5448']
    """
    check_fraction("alpha", alpha)
    return per_token(
        _skewed_reverse_kl,
        student_logits,
        teacher_logits,
        where,
        temperature,
        vocab_size,
        vocab_axis,
        alpha,
    )


def taid(
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    *,
    mix: ScalarLike,
    where: Bool[Array, "*B"] | None = None,
    temperature: ScalarLike = 1.0,
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
) -> Float[Array, "*B"]:
    """KL of a teacher between the student and the teacher to the student, in nats.

    TAID_t = KL(m || q),
    m = softmax(((1 - mix) stop_gradient(student_logits_t) + mix teacher_logits_t)
                / temperature),  q as in `forward_kl`

    It is `forward_kl` at mix 1, and 0 at mix 0, with zero gradient. `mix` grows during
    training; the caller sets its schedule. No gradient flows through m.

    TAID, arXiv 2501.16937 (there t).

    Args:
      student_logits, teacher_logits, where, temperature, vocab_size, vocab_axis: as in
        `forward_kl`.
      mix: the teacher's share of the logits, from 0 to 1; a number or a traced scalar.

    Returns:
      float32, exactly 0 and without gradient at masked positions. A class with a logit
      of -inf on either side has probability 0 in m; nan where no class is left. [...]

    Raises:
      ValueError: as in `forward_kl`; `mix` is a number outside 0..1.

    >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([3.0, 0.0])
    >>> [f"{taid(student, teacher, mix=m):.4f}" for m in (0.0, 0.5, 1.0)]
    ['0.0000', '0.2181', '0.5023']
    """
    check_fraction("mix", mix)
    return per_token(
        _taid,
        student_logits,
        teacher_logits,
        where,
        temperature,
        vocab_size,
        vocab_axis,
        mix,
    )


def _jensen_shannon(
    vocabulary: Vocabulary,
    log_p: Float[Array, "*B V"],
    log_q: Float[Array, "*B V"],
    beta: Float[Array, ""],
) -> Float[Array, "*B"]:
    log_m = _log_mixture(beta, log_p, log_q)
    teacher_term = weighted(beta, kl(vocabulary, log_p, log_m))
    return teacher_term + weighted(1 - beta, kl(vocabulary, log_q, log_m))


def _skewed_forward_kl(
    vocabulary: Vocabulary,
    log_p: Float[Array, "*B V"],
    log_q: Float[Array, "*B V"],
    alpha: Float[Array, ""],
) -> Float[Array, "*B"]:
    return kl(vocabulary, log_p, _log_mixture(alpha, log_p, log_q))


def _skewed_reverse_kl(
    vocabulary: Vocabulary,
    log_p: Float[Array, "*B V"],
    log_q: Float[Array, "*B V"],
    alpha: Float[Array, ""],
) -> Float[Array, "*B"]:
    return kl(vocabulary, log_q, _log_mixture(alpha, log_q, log_p))


def _taid(
    vocabulary: Vocabulary,
    log_p: Float[Array, "*B V"],
    log_q: Float[Array, "*B V"],
    mix: Float[Array, ""],
) -> Float[Array, "*B"]:
    """TAID from log-probabilities: they differ from the logits only by a constant."""

    def scaled(weight: Array, logits: Array) -> Array:
        excluded = logits == -jnp.inf
        product = jnp.where(weight > 0, -jnp.inf, 0.0)  # 0 * -inf would be nan
        return jnp.where(excluded, product, weight * jnp.where(excluded, 0.0, logits))

    mixed = scaled(1 - mix, lax.stop_gradient(log_q)) + scaled(mix, log_p)
    return kl(vocabulary, vocabulary.log_softmax(mixed), log_q)


def _log_mixture(
    weight: Float[Array, ""], log_a: Float[Array, "*B V"], log_b: Float[Array, "*B V"]
) -> Float[Array, "*B V"]:
    """log(weight exp(log_a) + (1 - weight) exp(log_b)).

    It is -inf, without gradient, where every log with a weight above 0 is -inf. The
    weight is a factor here, not a logarithm in a sum, so that its gradient is finite at
    0 and 1 too.
    """
    a = jnp.where(weight > 0, log_a, -jnp.inf)
    b = jnp.where(weight < 1, log_b, -jnp.inf)
    largest = lax.stop_gradient(jnp.maximum(a, b))
    largest = jnp.where(largest > -jnp.inf, largest, 0.0)
    # A log of weight 0 can be far above `largest`.
    a, b = (jnp.exp(jnp.minimum(x - largest, LARGE)) for x in (log_a, log_b))
    total = weight * a + (1 - weight) * b
    empty = total == 0
    return jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1.0, total)) + largest)
