"""Adaptive KL: forward and reverse KL, weighted by the error in head and tail."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, ScalarLike

from mgsr_jax.losses._divergences import gap, kl, weighted
from mgsr_jax.losses._mesh_axes import Axis
from mgsr_jax.losses._per_token import check_fraction, per_token
from mgsr_jax.losses._vocabulary import Vocabulary

# Floats at or above 0 have the same order as their bits read as integers.
BITS_OF_INFINITY = 0x7F800000
PASSES = (BITS_OF_INFINITY + 1).bit_length()


def adaptive_kl(
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    *,
    where: Bool[Array, "*B"] | None = None,
    temperature: ScalarLike = 1.0,
    head_mass: ScalarLike = 0.5,
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
) -> Float[Array, "*B"]:
    """Forward and reverse KL, weighted by the differences in head and tail.

    AKL_t = (g_head KL(p || q) + g_tail KL(q || p)) / (g_head + g_tail), in nats
    g_head = sum_{v in head} |p_v - q_v|,  g_tail = sum_{v not in head} |p_v - q_v|

    with p and q as in `forward_kl`. The head is the smallest set of the teacher's most
    probable classes whose mass is at least `head_mass`. The weights have no gradient.
    Both are 1/2 where both gaps are 0.

    AKL, arXiv 2404.02657. Our choice: all classes that are as probable as the least
    probable one of the head belong to the head, so that the order of the vocabulary
    does not matter. The head is found without a sort: its threshold is bisected, in 31
    sums over the vocabulary.

    Args:
      student_logits, teacher_logits, where, temperature, vocab_size, vocab_axis: as in
        `forward_kl`.
      head_mass: the teacher probability that the head holds, from 0 to 1; a number or
        a traced scalar. At 0 the head is empty, which gives `reverse_kl`; at 1 the head
        is every class that can occur.

    Returns:
      float32, exactly 0 and without gradient at masked positions. Infinite where a KL
      with a weight above 0 is infinite. [...]

    Raises:
      ValueError: as in `forward_kl`; `head_mass` is a number outside 0..1.

    >>> student, teacher = jnp.array([0.0, 0.0, 0.0]), jnp.array([3.0, 0.0, 0.0])
    >>> print(f"{adaptive_kl(student, teacher):.4f}")
    0.8642
    """
    check_fraction("head_mass", head_mass)
    return per_token(
        _adaptive_kl,
        student_logits,
        teacher_logits,
        where,
        temperature,
        vocab_size,
        vocab_axis,
        head_mass,
    )


def _adaptive_kl(
    vocabulary: Vocabulary,
    log_p: Float[Array, "*B V"],
    log_q: Float[Array, "*B V"],
    head_mass: Float[Array, ""],
) -> Float[Array, "*B"]:
    head = _head(vocabulary, log_p, head_mass)
    gaps = lax.stop_gradient(gap(log_p, log_q))
    g_head = vocabulary.sum(jnp.where(head, gaps, 0.0))
    g_tail = vocabulary.sum(jnp.where(head, 0.0, gaps))
    total = g_head + g_tail
    head_weight, tail_weight = (
        jnp.where(total > 0, g / jnp.where(total > 0, total, 1.0), 0.5)
        for g in (g_head, g_tail)
    )
    forward = weighted(head_weight, kl(vocabulary, log_p, log_q))
    return forward + weighted(tail_weight, kl(vocabulary, log_q, log_p))


def _head(
    vocabulary: Vocabulary, log_p: Float[Array, "*B V"], head_mass: Float[Array, ""]
) -> Bool[Array, "*B V"]:
    """Mask of the head: the classes with -log p up to a threshold, found by bisection.

    The threshold is the smallest float above which the classes hold a mass of at most
    1 - head_mass. The mass of the tail is summed, not of the head: where the tail is
    small, its sum is exact.
    """
    # XLA must not compute it twice: classes at the threshold might change sides.
    costs = lax.optimization_barrier(jnp.abs(log_p))
    bits = lax.bitcast_convert_type(costs, jnp.int32)
    p = jnp.exp(-costs)
    allowed = (1 - head_mass) * vocabulary.sum(p)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        too_low, high_enough = bounds
        middle = too_low + (high_enough - too_low) // 2
        tail = vocabulary.sum(jnp.where(bits > middle[..., None], p, 0.0))
        enough = tail <= allowed
        return (
            jnp.where(enough, too_low, middle),
            jnp.where(enough, middle, high_enough),
        )

    # Same varying mesh axes as `allowed`; a loop carry must keep its type.
    zero = (0 * allowed).astype(jnp.int32)
    # A threshold of -1 gives the empty head, so the search starts below it.
    _, threshold = lax.fori_loop(0, PASSES, halve, (zero - 2, zero + BITS_OF_INFINITY))
    return bits <= threshold[..., None]
