"""The alpha-beta divergence, formed so that nothing cancels and nothing overflows."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from mgsr_jax.losses._divergences import per_token
from mgsr_jax.losses._vocabulary import Axis, Vocabulary

# exp of it is finite in float32, with room for a product.
LARGE = 80.0


def alpha_beta_divergence(
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    *,
    where: Bool[Array, "*B"] | None = None,
    temperature: ScalarLike = 1.0,
    alpha: ScalarLike = 0.2,
    beta: ScalarLike = 0.7,
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
) -> Float[Array, "*B"]:
    """A family with both KLs, Hellinger and squared distance in it; at least 0.

    AB_t = -1/(a b) sum_v (p_v^a q_v^b - a/(a+b) p_v^(a+b) - b/(a+b) q_v^(a+b))

    with a = alpha, b = beta, and p and q as in `forward_kl`. What it is elsewhere:

    a -> 1, b -> 0    KL(p || q), `forward_kl`
    a -> 0, b -> 1    KL(q || p), `reverse_kl`
    a = b = 1/2       2 sum (sqrt p - sqrt q)^2, 4 times the squared Hellinger distance
    a = b = 1         1/2 sum (p - q)^2
    a + b = 1         (1 - sum p^a q^b) / (a b), Amari's alpha divergence

    ABKD, arXiv 2505.04560; the family is that of Cichocki et al., "Generalized
    Alpha-Beta Divergences and Their Application to Robust Nonnegative Matrix
    Factorization" (2011).

    Args:
      student_logits, teacher_logits, where, temperature, vocab_size, vocab_axis: as in
        `forward_kl`.
      alpha: the teacher's exponent; a number or a traced scalar.
      beta: the student's exponent; a number or a traced scalar. Neither of the two, nor
        their sum, may be 0.

    Returns:
      float32, exactly 0 and without gradient at masked positions. Finite where both
      exponents are positive, whatever probabilities are 0. A negative exponent, or sum,
      of a probability near 0 gives infinity, without gradient from that class. [...]

    Raises:
      ValueError: as `forward_kl`; `alpha`, `beta` or their sum is the number 0.

    >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([3.0, 0.0])
    >>> print(f"{alpha_beta_divergence(student, teacher):.4f}")
    0.8316
    """
    _check_exponents(alpha, beta)
    return per_token(
        _alpha_beta,
        student_logits,
        teacher_logits,
        where,
        temperature,
        vocab_size,
        vocab_axis,
        alpha,
        beta,
    )


def _alpha_beta(
    vocabulary: Vocabulary,
    log_p: Float[Array, "*B V"],
    log_q: Float[Array, "*B V"],
    alpha: Float[Array, ""],
    beta: Float[Array, ""],
) -> Float[Array, "*B"]:
    """With the larger probability of each class, h^(a+b), taken out.

    Let l be the smaller one and c its exponent, x = log(l / h) <= 0. The class adds

        h^(a+b) (expm1((a+b) x) / (a+b) - expm1(c x) / c) / (a + b - c)

    in which the constants of the equation, whose sum is 0, no longer stand.
    """
    total = alpha + beta
    p_is_smaller = log_p < log_q
    of_smaller = jnp.where(p_is_smaller, alpha, beta)
    of_larger = jnp.where(p_is_smaller, beta, alpha)
    # A class on which they agree, as on one that neither has, adds 0.
    equal = log_p == log_q
    larger = jnp.where(equal, 0.0, jnp.maximum(log_p, log_q))
    x = jnp.where(equal, 0.0, jnp.minimum(log_p, log_q)) - larger
    # Above 0 with a negative exponent alone.
    power = jnp.maximum(total * x, of_smaller * x)
    infinite = jnp.maximum(total * larger, 0.0) + jnp.maximum(power, 0.0) > LARGE
    larger, x = (jnp.where(infinite, 0.0, value) for value in (larger, x))
    terms = jnp.expm1(total * x) / total - jnp.expm1(of_smaller * x) / of_smaller
    terms = jnp.exp(total * larger) * terms / of_larger
    return vocabulary.sum(jnp.where(infinite, jnp.inf, terms))


def _check_exponents(alpha: ScalarLike, beta: ScalarLike) -> None:
    """What is traced is not known yet, and not checked."""
    known = [x for x in (alpha, beta) if isinstance(x, int | float)]
    if 0 in known or (len(known) == 2 and sum(known) == 0):
        raise ValueError(
            f"alpha={alpha}, beta={beta}; expected neither to be 0, nor their sum: at "
            "(1, 0) call forward_kl and at (0, 1) reverse_kl, which are the limits"
        )
