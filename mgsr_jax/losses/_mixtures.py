"""Divergences to a mixture of teacher and student.

Jensen-Shannon and the skewed KLs mix probabilities; TAID mixes logits. Mixtures are
formed in log space and are exact at weights 0 and 1.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, ScalarLike

from mgsr_jax.losses._divergences import check_fraction, kl, per_token, weighted
from mgsr_jax.losses._vocabulary import Axis, Vocabulary

# exp of it is finite in float32, with room for a product.
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
    log(1 - beta), so 0 at beta 0 and 1, with zero gradient. Divided by beta it tends to
    KL(p || q) as beta goes to 0, and divided by 1 - beta to KL(q || p) as beta goes to
    1. Some libraries compute those two at beta 0 and 1 (TRL does): call `forward_kl`
    or `reverse_kl` for them.

    GKD, arXiv 2306.13649, section 2 (there D_JSD(beta)).

    Args:
      student_logits, teacher_logits, where, temperature, vocab_size, vocab_axis: as in
        `forward_kl`.
      beta: the teacher's weight, from 0 to 1; a number or a traced scalar.

    Returns:
      float32, finite, exactly 0 and without gradient at masked positions. [...]

    Raises:
      ValueError: as `forward_kl`; `beta` is a number outside 0..1.

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

    At most -log(alpha). `forward_kl` at alpha 0; 0 at alpha 1, with zero gradient.

    DistiLLM, arXiv 2402.03898 (there alpha-SKL). The gradient flows through the
    mixture, as it does there.

    Args:
      student_logits, teacher_logits, where, temperature, vocab_size, vocab_axis: as in
        `forward_kl`.
      alpha: the teacher's weight in the mixture, from 0 to 1; a number or a traced
        scalar.

    Returns:
      float32, exactly 0 and without gradient at masked positions. Infinite only at
      alpha 0, where `forward_kl` is. [...]

    Raises:
      ValueError: as `forward_kl`; `alpha` is a number outside 0..1.

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

    At most -log(alpha). `reverse_kl` at alpha 0; 0 at alpha 1, with zero gradient.

    DistiLLM, arXiv 2402.03898 (there alpha-SRKL). The gradient flows through the
    mixture, as it does there.

    Args:
      student_logits, teacher_logits, where, temperature, vocab_size, vocab_axis: as in
        `forward_kl`.
      alpha: the student's weight in the mixture, from 0 to 1; a number or a traced
        scalar.

    Returns:
      float32, exactly 0 and without gradient at masked positions. Infinite only at
      alpha 0, where `reverse_kl` is. [...]

    Raises:
      ValueError: as `forward_kl`; `alpha` is a number outside 0..1.

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
    """KL of a teacher on the way from the student to the teacher, in nats.

    TAID_t = KL(m || q),
    m = softmax(((1 - mix) stop_gradient(student_logits_t) + mix teacher_logits_t)
                / temperature),  q as in `forward_kl`

    `forward_kl` at mix 1; 0 at mix 0, with zero gradient. `mix` grows over a training
    run; its schedule is the caller's. No gradient flows through m.

    TAID, arXiv 2501.16937 (there t).

    Args:
      student_logits, teacher_logits, where, temperature, vocab_size, vocab_axis: as in
        `forward_kl`.
      mix: the teacher's share of the logits, from 0 to 1; a number or a traced scalar.

    Returns:
      float32, exactly 0 and without gradient at masked positions. A logit of -inf on
      either side is a class that m does not have, and nan where that leaves none. [...]

    Raises:
      ValueError: as `forward_kl`; `mix` is a number outside 0..1.

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
    of_teacher = weighted(beta, kl(vocabulary, log_p, log_m))
    return of_teacher + weighted(1 - beta, kl(vocabulary, log_q, log_m))


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
    """From log-probabilities: a constant is all that tells them from the logits."""

    def share(weight: Array, logits: Array) -> Array:
        none = logits == -jnp.inf
        product = jnp.where(weight > 0, -jnp.inf, 0.0)  # and not nan, as 0 * -inf
        return jnp.where(none, product, weight * jnp.where(none, 0.0, logits))

    mixed = share(1 - mix, lax.stop_gradient(log_q)) + share(mix, log_p)
    return kl(vocabulary, vocabulary.log_softmax(mixed), log_q)


def _log_mixture(
    weight: Float[Array, ""], log_a: Float[Array, "*B V"], log_b: Float[Array, "*B V"]
) -> Float[Array, "*B V"]:
    """log(weight exp(log_a) + (1 - weight) exp(log_b)).

    -inf, without gradient, where what has weight is -inf. The weight is a factor and
    not a logarithm in a sum, so that its gradient is finite at 0 and 1 too.
    """
    a = jnp.where(weight > 0, log_a, -jnp.inf)
    b = jnp.where(weight < 1, log_b, -jnp.inf)
    largest = lax.stop_gradient(jnp.maximum(a, b))
    largest = jnp.where(largest > -jnp.inf, largest, 0.0)
    # What has no weight may be far above the largest of what has.
    a, b = (jnp.exp(jnp.minimum(x - largest, LARGE)) for x in (log_a, log_b))
    total = weight * a + (1 - weight) * b
    none = total == 0
    return jnp.where(none, -jnp.inf, jnp.log(jnp.where(none, 1.0, total)) + largest)
