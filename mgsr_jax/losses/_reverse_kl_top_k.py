"""Reverse KL over the most probable classes and one class for all others."""

import functools
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, ScalarLike

from mgsr_jax.losses._divergences import kl
from mgsr_jax.losses._mesh_axes import Axis
from mgsr_jax.losses._per_token import Divergence, per_token
from mgsr_jax.losses._vocabulary import Vocabulary

Support = Literal["student", "union"]


def reverse_kl_top_k(
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    *,
    where: Bool[Array, "*B"] | None = None,
    temperature: ScalarLike = 1.0,
    top_k: int = 32,
    support: Support = "student",
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
) -> Float[Array, "*B"]:
    """KL(student || teacher) over the student's K classes and the tail, in nats.

    RKL_t = sum_{v in S} q_v (log q_v - log p_v) + q_tail (log q_tail - log p_tail)
    q_tail = sum_{v not in S} q_v,  p_tail = sum_{v not in S} p_v

    with p and q as in `forward_kl`. S holds the K most probable classes of the student,
    or also those of the teacher ("union"). It is at least 0 and at most `reverse_kl`,
    and equal to it where K is the whole vocabulary. How teacher and student divide the
    tail's mass among its classes does not matter; how much mass it has does.

    Our choice, as in `forward_kl_top_k`. TRL's experimental distillation trainer has
    both supports and such a tail (`loss_top_k`, `loss_add_tail`). Classes that are as
    probable as the last of the K belong to S too, so that the order of the vocabulary
    does not matter.

    Args:
      student_logits, teacher_logits, where, temperature, vocab_size, vocab_axis: as in
        `forward_kl`.
      top_k: K, the number of classes that are compared one by one.
      support: "student", or "union" for the K classes of both models.

    Returns:
      float32, exactly 0 and without gradient at masked positions. Infinite where a
      class of S, or the whole tail, is excluded by the teacher only. [...]

    Raises:
      ValueError: as in `forward_kl`; `top_k` is below 1; an unknown `support`.

    >>> student, teacher = jnp.array([2.0, 1.0, 0.0]), jnp.array([0.0, 0.0, 1.0])
    >>> [f"{reverse_kl_top_k(student, teacher, top_k=k):.4f}" for k in (1, 2, 3)]
    ['0.4743', '0.6290', '0.6290']
    """
    if top_k < 1:
        raise ValueError(f"top_k={top_k}; expected at least 1")
    if support not in ("student", "union"):
        raise ValueError(f"support={support!r}; expected 'student' or 'union'")
    return per_token(
        _on_top_k(top_k, support),
        student_logits,
        teacher_logits,
        where,
        temperature,
        vocab_size,
        vocab_axis,
    )


@functools.cache
def _on_top_k(top_k: int, support: Support) -> Divergence:
    """The divergence for these sizes; cached, since each new function compiles."""

    def divergence(
        vocabulary: Vocabulary, log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]
    ) -> Float[Array, "*B"]:
        listed = _most_probable(vocabulary, log_q, top_k)
        if support == "union":
            listed |= _most_probable(vocabulary, log_p, top_k)
        tail_p, tail_q = (
            vocabulary.logsumexp(jnp.where(listed, -jnp.inf, x))[..., None]
            for x in (log_p, log_q)
        )
        in_list = kl(vocabulary, jnp.where(listed, log_q, -jnp.inf), log_p)
        return in_list + kl(Vocabulary(), tail_q, tail_p)

    return divergence


def _most_probable(
    vocabulary: Vocabulary, log_probs: Float[Array, "*B V"], k: int
) -> Bool[Array, "*B V"]:
    """Mask of the `k` most probable classes, and of those that equal the last."""
    # XLA must not compute it twice: classes at the threshold might change sides.
    order = lax.optimization_barrier(lax.stop_gradient(log_probs))
    largest, _ = vocabulary.top_k(order, min(k, vocabulary.width(order)))
    return (order >= largest[..., -1:]) & (order > -jnp.inf)
