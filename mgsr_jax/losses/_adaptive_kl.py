"""Adaptive KL: both directions, weighed by whether head or tail is further off."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, ScalarLike

from mgsr_jax.losses._divergences import check_fraction, gap, kl, per_token, weighted
from mgsr_jax.losses._vocabulary import Axis, Vocabulary

# Floats that are not negative order as their bits do, read as integers.
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
    """Forward and reverse KL, weighed by how far apart the two are in head and tail.

    AKL_t = (g_head KL(p || q) + g_tail KL(q || p)) / (g_head + g_tail), in nats
    g_head = sum_{v in head} |p_v - q_v|,  g_tail = sum_{v not in head} |p_v - q_v|

    with p and q as in `forward_kl`. The head is the fewest most probable classes of the
    teacher that hold `head_mass`. The weights carry no gradient, and are 1/2 each where
    both gaps are 0.

    AKL, arXiv 2404.02657. Our choice: all classes that are as probable as the least
    probable one of the head belong to it, so that their order in the vocabulary does
    not matter. The head is found without a sort: its threshold is bisected, in 31 sums
    over the vocabulary.

    Args:
      student_logits, teacher_logits, where, temperature, vocab_size, vocab_axis: as in
        `forward_kl`.
      head_mass: the teacher probability that the head holds, from 0 to 1; a number or
        a traced scalar. At 0 the head is empty, so this is `reverse_kl`; at 1 it is
        every class that can occur.

    Returns:
      float32, exactly 0 and without gradient at masked positions. Infinite where a KL
      with a weight above 0 is. [...]

    Raises:
      ValueError: as `forward_kl`; `head_mass` is a number outside 0..1.

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
    of_head, of_tail = (
        jnp.where(total > 0, g / jnp.where(total > 0, total, 1.0), 0.5)
        for g in (g_head, g_tail)
    )
    forward = weighted(of_head, kl(vocabulary, log_p, log_q))
    return forward + weighted(of_tail, kl(vocabulary, log_q, log_p))


def _head(
    vocabulary: Vocabulary, log_p: Float[Array, "*B V"], head_mass: Float[Array, ""]
) -> Bool[Array, "*B V"]:
    """Which classes are the head; by halving what its largest -log p can be.

    It is the smallest float at which the classes above it hold at most 1 - head_mass.
    The tail is what is added up: where it is small its mass is exact, the head's not.
    """
    # Kept as it is: were it computed anew, classes at the threshold might move.
    costs = lax.optimization_barrier(jnp.abs(log_p))
    bits = lax.bitcast_convert_type(costs, jnp.int32)
    p = jnp.exp(-costs)
    allowed = (1 - head_mass) * vocabulary.sum(p)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        too_low, fits = bounds
        middle = too_low + (fits - too_low) // 2
        tail = vocabulary.sum(jnp.where(bits > middle[..., None], p, 0.0))
        good = tail <= allowed
        return jnp.where(good, too_low, middle), jnp.where(good, middle, fits)

    # Of the sum's type: as varying over the devices of a mesh as it is.
    zero = (0 * allowed).astype(jnp.int32)
    # Below 0 the head is empty, which is the lowest that can fit.
    _, threshold = lax.fori_loop(0, PASSES, halve, (zero - 2, zero + BITS_OF_INFINITY))
    return bits <= threshold[..., None]
