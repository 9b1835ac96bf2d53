"""Differences of logits between all pairs of classes, matched in one pass over V."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, ScalarLike

from mgsr_jax.losses._mesh_axes import Axis
from mgsr_jax.losses._per_token import check_fraction, per_token
from mgsr_jax.losses._vocabulary import Vocabulary


def logit_difference(
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    *,
    where: Bool[Array, "*B"] | None = None,
    temperature: ScalarLike = 1.0,
    alpha: ScalarLike = 0.0,
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
) -> Float[Array, "*B"]:
    """Squared error in the logit differences of all pairs of classes.

    LD_t = 1/4 sum_{u,v} w_u w_v (d_u - d_v)^2 = 1/2 sum_v w_v (d_v - sum_u w_u d_u)^2
    d = (student_logits_t - teacher_logits_t) / temperature
    w = alpha p + (1 - alpha) q,  p and q as in `forward_kl`

    The weights w have no gradient. A constant that is added to all logits changes
    nothing, and no softmax hides an error in the logits of classes that w reaches.

    CSD, arXiv 2509.25837, of which we read the abstract and the published code: its
    gradient for w = q is w (d - sum w d), which is ours at alpha 0. Our choice: for
    other weights the code takes two sets of weights for u and v, we take their mixture;
    and the temperature divides the logits in d too, as in our other losses.

    Args:
      student_logits, teacher_logits, where, temperature, vocab_size, vocab_axis: as in
        `forward_kl`.
      alpha: the teacher's share of the weights, from 0 to 1; a number or a traced
        scalar.

    Returns:
      float32, exactly 0 and without gradient at masked positions. It is not bounded by
      the mass of the classes: two large logits that differ cost the square of their
      difference. Infinite where one side excludes a class with w above 0 and the other
      does not; such a class has no gradient. [...]

    Raises:
      ValueError: as in `forward_kl`; `alpha` is a number outside 0..1.

    >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([3.0, 0.0])
    >>> [f"{logit_difference(student, teacher, alpha=a):.4f}" for a in (0.0, 1.0)]
    ['1.1250', '0.2033']
    """
    check_fraction("alpha", alpha)
    return per_token(
        _logit_difference,
        student_logits,
        teacher_logits,
        where,
        temperature,
        vocab_size,
        vocab_axis,
        alpha,
    )


def _logit_difference(
    vocabulary: Vocabulary,
    log_p: Float[Array, "*B V"],
    log_q: Float[Array, "*B V"],
    alpha: Float[Array, ""],
) -> Float[Array, "*B"]:
    """Half the variance of log q - log p, which differs from d by a constant."""
    weights = lax.stop_gradient(alpha * jnp.exp(log_p) + (1 - alpha) * jnp.exp(log_q))
    excluded_by_p, excluded_by_q = log_p == -jnp.inf, log_q == -jnp.inf
    infinite = (weights > 0) & (excluded_by_p != excluded_by_q)
    # Selected before the difference: the gradient of inf - inf would be nan.
    difference = jnp.where(excluded_by_p | excluded_by_q, 0.0, log_q - log_p)
    # Subtracted before the square, since a difference of two large sums would round.
    # The mean's own gradient is 0: it is where the sum of squares is smallest.
    mean = lax.stop_gradient(vocabulary.sum(weights * difference))
    terms = weights * jnp.square(difference - mean[..., None]) / 2
    return vocabulary.sum(jnp.where(infinite, jnp.inf, terms))
