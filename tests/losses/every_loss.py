"""Every loss with one signature, and what the losses read besides logits."""

import jax
import jax.numpy as jnp

from mgsr_jax import losses

B, T, K = 3, 6, 4
LABELS = jnp.array([[1, 2, 0, 4, 4, 3], [0, 1, 2, 3, 4, 5], [5, 5, 1, 0, 2, 2]])
SPAN_IDS = jnp.array([[0, 0, 0, 1, 1, 1], [-1, 2, 2, 2, 3, 3], [4, 4, 4, 4, -1, -1]])
# Rows of every kind: ragged, with a hole, and without a scored position.
WHERE = jnp.array([[1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0]], bool)
CLIP = losses.init_clip_network(jax.random.key(1), num_candidates=K, hidden=4)
# A network that has moved away from its start, so that limits differ by position.
LEARNED = CLIP | {"output": CLIP["output"] | {"kernel": jnp.full((4, 2), 0.3)}}


def cross_entropy(student, teacher, labels, span_ids, **kwargs):
    return losses.cross_entropy(student, labels, **kwargs)


def dac_kl(student, teacher, labels, span_ids, **kwargs):
    return losses.dac_kl(LEARNED, student, teacher, **kwargs).loss


def dac_kl_fixed(student, teacher, labels, span_ids, **kwargs):
    limits = (0.1, jnp.asarray(0.9))
    return losses.dac_kl_fixed(
        limits, student, teacher, num_candidates=K, **kwargs
    ).loss


def span_correlation(student, teacher, labels, span_ids, **kwargs):
    return losses.span_correlation(student, teacher, span_ids, **kwargs)


def taid(student, teacher, labels, span_ids, **kwargs):
    return losses.taid(student, teacher, mix=0.3, **kwargs)


def reverse_kl_top_k(student, teacher, labels, span_ids, **kwargs):
    return losses.reverse_kl_top_k(student, teacher, top_k=K, support="union", **kwargs)


def sampled_reverse_kl(student, teacher, labels, span_ids, **kwargs):
    return losses.sampled_reverse_kl(student, teacher, labels, **kwargs)


def _of_two_distributions(loss):
    def run(student, teacher, labels, span_ids, **kwargs):
        return loss(student, teacher, **kwargs)

    run.__name__ = loss.__name__
    return run


forward_kl, adaptive_kl = (
    _of_two_distributions(loss) for loss in (losses.forward_kl, losses.adaptive_kl)
)
# Infinite where the student has probability that the teacher's logits exclude.
NEED_THE_TEACHERS_SUPPORT = [
    adaptive_kl,
    reverse_kl_top_k,
    *(
        _of_two_distributions(loss)
        for loss in (
            losses.reverse_kl,
            losses.symmetric_kl,
            losses.entropy_gated_kl,
            losses.per_class_kl,
            losses.logit_difference,
        )
    ),
]
# They share `per_token`, and differ only in an equation of two log-probabilities.
DIVERGENCES = [
    forward_kl,
    *NEED_THE_TEACHERS_SUPPORT,
    _of_two_distributions(losses.total_variation),
    _of_two_distributions(losses.jensen_shannon),
    _of_two_distributions(losses.skewed_forward_kl),
    _of_two_distributions(losses.skewed_reverse_kl),
    _of_two_distributions(losses.alpha_beta_divergence),
    taid,
]
PAIRED = [*DIVERGENCES, sampled_reverse_kl, dac_kl, dac_kl_fixed, span_correlation]
EVERY = [cross_entropy, *PAIRED]
# One loss for each way that logits are read; adaptive KL is the one with a loop.
EVERY_PATH = [
    cross_entropy,
    forward_kl,
    adaptive_kl,
    reverse_kl_top_k,
    sampled_reverse_kl,
    dac_kl,
    dac_kl_fixed,
    span_correlation,
]
