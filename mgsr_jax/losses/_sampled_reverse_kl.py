"""Reverse KL estimated from the one token that the student sampled."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from mgsr_jax.losses._divergences import kl
from mgsr_jax.losses._logits import zero_where_masked
from mgsr_jax.losses._mesh_axes import Axis
from mgsr_jax.losses._over_vocabulary import over_vocabulary
from mgsr_jax.losses._per_token import (
    check_fraction,
    check_temperature,
    log_probs_of_both,
)
from mgsr_jax.losses._vocabulary import Vocabulary


def sampled_reverse_kl(
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    tokens: Int[Array, "*B"],
    *,
    where: Bool[Array, "*B"] | None = None,
    temperature: ScalarLike = 1.0,
    baseline: ScalarLike = 1.0,
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
) -> Float[Array, "*B"]:
    """Estimate of KL(student || teacher) from the sampled token y_t, in nats.

    SRKL_t = log q_t[y_t] - log p_t[y_t],  p and q as in `forward_kl`
    gradient = (SRKL_t - baseline KL(q_t || p_t)) gradient of log q_t[y_t]

    Where y_t was sampled from q_t, the expectation of the value is `reverse_kl`, and
    that of the gradient is the gradient of `reverse_kl`, for every `baseline`. A single
    value may be negative. Subtracting the expectation, the closed-form KL, usually
    reduces the gradient's variance: to 0.2 to 0.5 of it on random logits of 50 to 500
    classes. It can raise it where the student is nearly certain of one token.

    vOPD, arXiv 2605.07865, of which we read the abstract and a public
    re-implementation: on-policy distillation as
    policy gradient, with the negative reverse KL as value function and baseline. Our
    choice: the value, which is the plain estimate and not the product that the paper's
    loss is formed from.

    Args:
      student_logits, teacher_logits, where, temperature, vocab_size, vocab_axis: as in
        `forward_kl`. `temperature` should be the one of sampling.
      tokens: y_t, sampled from the student with these logits; other tokens make the
        gradient that of no divergence. Masked positions may hold any value. [...]
      baseline: share of the closed-form KL that is subtracted, from 0 to 1; a number or
        a traced scalar. 0 is plain policy gradient. Classes that only the teacher
        excludes are left out of this KL.

    Returns:
      float32, exactly 0 and without gradient at masked positions. Infinite, without
      gradient, where either side excludes the token. [...]

    Raises:
      ValueError: as in `forward_kl`; `baseline` is a number outside 0..1.

    >>> student, teacher = jnp.zeros((2, 2)), jnp.array([[3.0, 0.0], [3.0, 0.0]])
    >>> values = sampled_reverse_kl(student, teacher, jnp.array([0, 1]))
    >>> [f"{x:.4f}" for x in values], f"{jnp.mean(values):.4f}"
    (['-0.6446', '2.3554'], '0.8554')
    """
    check_temperature(temperature)
    check_fraction("baseline", baseline)
    return _jitted(
        student_logits,
        teacher_logits,
        tokens,
        where,
        temperature,
        baseline,
        vocab_size=vocab_size,
        vocab_axis=vocab_axis,
    )


@jax.jit(static_argnames=("vocab_size", "vocab_axis"))
def _jitted(
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    tokens: Int[Array, "*B"],
    where: Bool[Array, "*B"] | None,
    temperature: ScalarLike,
    baseline: ScalarLike,
    *,
    vocab_size: int | None,
    vocab_axis: Axis,
) -> Float[Array, "*B"]:
    """The compiled part of `sampled_reverse_kl`."""

    def local(
        vocabulary: Vocabulary,
        student: Array,
        teacher: Array,
        tokens: Array,
        where: Array | None,
        temperature: ScalarLike,
    ) -> tuple[Array, Array, Array]:
        log_p, log_q = log_probs_of_both(
            vocabulary, student, teacher, where, temperature, vocab_size
        )
        of_p, of_q = (_at(vocabulary, x, tokens) for x in (log_p, log_q))
        allowed = jnp.where(log_p > -jnp.inf, log_q, -jnp.inf)
        return of_p, of_q, lax.stop_gradient(kl(vocabulary, allowed, log_p))

    logits = (student_logits, teacher_logits)
    of_p, of_q, expected = over_vocabulary(
        local, vocab_axis, logits, tokens, where, temperature
    )
    possible = (of_p > -jnp.inf) & (of_q > -jnp.inf)
    of_p, of_q = jnp.where(possible, of_p, 0.0), jnp.where(possible, of_q, 0.0)
    estimate = lax.stop_gradient(of_q) - of_p
    advantage = estimate - jnp.asarray(baseline, jnp.float32) * expected
    # The second term is 0; only its gradient counts.
    values = estimate + advantage * (of_q - lax.stop_gradient(of_q))
    return zero_where_masked(jnp.where(possible, values, jnp.inf), where)


def _at(
    vocabulary: Vocabulary, log_probs: Float[Array, "*B V"], tokens: Int[Array, "*B"]
) -> Float[Array, "*B"]:
    """The tokens' log-probabilities; -inf for a token that is no column."""
    is_token = vocabulary.columns(log_probs) == tokens[..., None]
    picked = vocabulary.sum(jnp.where(is_token, log_probs, 0.0))
    exists = (tokens >= 0) & (tokens < vocabulary.width(log_probs))
    return jnp.where(exists, picked, -jnp.inf)
