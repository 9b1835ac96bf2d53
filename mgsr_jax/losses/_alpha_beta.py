"""The alpha-beta divergence, without cancellation and overflow."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from mgsr_jax.losses._mesh_axes import Axis
from mgsr_jax.losses._per_token import per_token
from mgsr_jax.losses._vocabulary import Vocabulary

# exp(LARGE) is finite in float32, and so is its product with another factor.
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
    """Alpha-beta divergence: a family with both KLs, Hellinger and squared distance.

    AB_t = -1/(a b) sum_v (p_v^a q_v^b - a/(a+b) p_v^(a+b) - b/(a+b) q_v^(a+b))

    with a = alpha, b = beta, and p and q as in `forward_kl`. It is at least 0. Members
    of the family:

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
      beta: the student's exponent; a number or a traced scalar. Neither exponent may
        be 0, and their sum may not be 0.

    Returns:
      float32, exactly 0 and without gradient at masked positions. Finite if both
      exponents are positive, even where probabilities are 0. With a negative exponent,
      or a negative sum, a probability near 0 gives infinity, and no gradient flows from
      that class. [...]

    Raises:
      ValueError: as in `forward_kl`; `alpha`, `beta` or their sum is the number 0.

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
    """The divergence with h^(a+b) factored out; h is the larger of p_v and q_v.

    Let l be the smaller of the two, c its exponent, and x = log(l / h) <= 0. A class
    adds

        h^(a+b) (expm1((a+b) x) / (a+b) - expm1(c x) / c) / (a + b - c)

    The constants of the equation, which sum to 0, are no longer in it.
    """
    total = alpha + beta
    p_is_smaller = log_p < log_q
    smaller_exponent = jnp.where(p_is_smaller, alpha, beta)
    larger_exponent = jnp.where(p_is_smaller, beta, alpha)
    # A class with equal probabilities adds 0, also where both are 0.
    equal = log_p == log_q
    larger = jnp.where(equal, 0.0, jnp.maximum(log_p, log_q))
    x = jnp.where(equal, 0.0, jnp.minimum(log_p, log_q)) - larger
    # Only a negative exponent makes `power` positive.
    power = jnp.maximum(total * x, smaller_exponent * x)
    infinite = jnp.maximum(total * larger, 0.0) + jnp.maximum(power, 0.0) > LARGE
    larger, x = (jnp.where(infinite, 0.0, value) for value in (larger, x))
    terms = jnp.expm1(total * x) / total
    terms -= jnp.expm1(smaller_exponent * x) / smaller_exponent
    terms = jnp.exp(total * larger) * terms / larger_exponent
    return vocabulary.sum(jnp.where(infinite, jnp.inf, terms))


def _check_exponents(alpha: ScalarLike, beta: ScalarLike) -> None:
    """Raise ValueError if a number or their sum is 0; traced values pass."""
    known = [x for x in (alpha, beta) if isinstance(x, int | float)]
    if 0 in known or (len(known) == 2 and sum(known) == 0):
        raise ValueError(
            f"alpha={alpha}, beta={beta}; expected neither to be 0, nor their sum: at "
            "(1, 0) call forward_kl and at (0, 1) reverse_kl, which are the limits"
        )
