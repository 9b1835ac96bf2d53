"""DAC-KL: a KL divergence on the part of the teacher's distribution worth learning.

`find_candidates` reads the vocabulary, once. Everything here works on the K candidates
of each position, whether the vocabulary is split over devices or not.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from mgsr_jax.losses._candidates import Candidates, find_candidates
from mgsr_jax.losses._clip_network import (
    LOWER_START,
    UPPER_START,
    network_candidates,
    predict_limits,
)
from mgsr_jax.losses._logits import zero_where_masked
from mgsr_jax.losses._mesh_axes import Axis
from mgsr_jax.losses._teacher import TopKTeacher
from mgsr_jax.typing import Leaf, Params

Normalization = Literal["teacher", "none"]


class DacKl(NamedTuple):
    """The loss and its diagnostics; every field [...], float32, 0 where masked.

    Attributes:
      loss: the divergence; `dac_kl` adds the prior on the limits.
      lower: quantile level below which classes are clipped.
      upper: quantile level above which classes are clipped.
      kept_mass: teacher probability that the mask keeps, sum_k w_k p_k.
      kept_classes: number of classes that the mask keeps, sum_k w_k.
      candidate_mass: teacher probability of all candidates; the rest, up to 1, belongs
        to classes that are not candidates.
    """

    loss: Leaf
    lower: Leaf
    upper: Leaf
    kept_mass: Leaf
    kept_classes: Leaf
    candidate_mass: Leaf


@jax.jit(static_argnames=("vocab_size", "vocab_axis", "normalization"))
def dac_kl(
    clip_params: Params,
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"] | TopKTeacher,
    *,
    where: Bool[Array, "*B"] | None = None,
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
    width: ScalarLike = 0.01,
    normalization: Normalization = "teacher",
    prior_weight: ScalarLike = 10.0,
) -> DacKl:
    """Dynamic adaptive clipping KL, in nats; a small network predicts the limits.

    Over the teacher's K most probable classes, p_1 >= p_2 >= ...:

    c_k   = 1 - (sum_{j=2..k} p_j - p_k / 2) / (1 - p_1)       (quantile level, k >= 2)
    w_k   = sigmoid((c_k - lower) / width) * sigmoid((upper - c_k) / width),  w_1 = 1
    p_hat = w p / sum_j w_j p_j
    DAC-KL_t = sum_k p_hat_k (log p_hat_k - log q_k)
               + prior_weight ((lower - 0.1)^2 + (upper - 0.98)^2)

    q is the student's full softmax. So the divergence is at least 0, and it is 0 only
    where the student equals the clipped teacher: at a student that equals the whole
    teacher it is positive. (lower, upper) = f_sub([p ; q]): the gradient reaches
    `clip_params` through the mask; no gradient flows to the network's inputs.

    MGSR, arXiv 2407.10068, token-level loss. From the paper: the network, the mask, the
    target that is always kept. Our choices: sorted candidates, levels within the
    non-target mass, bounded limits, the renormalised teacher, the prior (with
    prior_weight 0 there is none, as in the paper).

    Args:
      clip_params: from `init_clip_network`.
      student_logits: any float dtype. [..., Vs]
      teacher_logits: any float dtype, [..., Vt]; or a `TopKTeacher`, and then only its
        classes can be candidates. No gradient flows to the teacher.
      where: the positions to score; None means all of them. [...]
      vocab_size: columns at or beyond it are padding, with probability 0 on both
        sides. Required where Vs and Vt differ.
      vocab_axis: mesh axis that V is split over; read from the type on Explicit axes.
      width: softness of the mask, in quantile levels.
      normalization: "teacher" is the equation above; "none" is
        sum_k w_k p_k (log p_k - log q_k), which has no lower bound.
      prior_weight: strength of the pull on the limits towards their start values.

    Returns:
      A `DacKl`.

    Raises:
      ValueError: Vs and Vt differ and `vocab_size` is None; `vocab_size` is larger
        than Vs or Vt; leading axes differ; `normalization` is unknown.

    >>> from mgsr_jax.losses import init_clip_network
    >>> clip_params = init_clip_network(jax.random.key(0), num_candidates=4)
    >>> teacher = jnp.array([[4.0, 2.0, 1.0, 0.0, -1.0]])
    >>> out = dac_kl(clip_params, jnp.zeros((1, 5)), teacher)
    >>> print(f"{out.loss[0]:.3f} {out.lower[0]:.3f} {out.upper[0]:.3f}")
    1.076 0.100 0.980
    """
    candidates = find_candidates(
        student_logits,
        teacher_logits,
        network_candidates(clip_params),
        where,
        vocab_size,
        vocab_axis,
    )
    lower, upper = predict_limits(clip_params, candidates.teacher, candidates.student)
    out = _clipped_kl(candidates, lower, upper, width, normalization)
    prior = jnp.square(lower - LOWER_START) + jnp.square(upper - UPPER_START)
    out = out._replace(loss=out.loss + prior_weight * prior)
    return DacKl(*(zero_where_masked(field, where) for field in out))


@jax.jit(
    static_argnames=("num_candidates", "vocab_size", "vocab_axis", "normalization")
)
def dac_kl_fixed(
    limits: tuple[Float[Array, "..."] | ScalarLike, Float[Array, "..."] | ScalarLike],
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"] | TopKTeacher,
    *,
    num_candidates: int = 512,
    where: Bool[Array, "*B"] | None = None,
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
    width: ScalarLike = 0.01,
    normalization: Normalization = "teacher",
) -> DacKl:
    """DAC-KL with limits from the caller, in nats: no network and no prior.

    DAC-KL_t = sum_k p_hat_k (log p_hat_k - log q_k),  p_hat and q as in `dac_kl`

    MGSR, arXiv 2407.10068, appendix (fixed clipping).

    Args:
      limits: (lower, upper), quantile levels within the teacher's non-target mass.
        Each is a number or an array. [...]
      student_logits: any float dtype. [..., Vs]
      teacher_logits: any float dtype, [..., Vt], or a `TopKTeacher`.
      num_candidates: K, the number of the teacher's classes that are candidates.
      where, vocab_size, vocab_axis, width, normalization: as in `dac_kl`.

    Returns:
      A `DacKl`.

    Raises:
      ValueError: as in `dac_kl`; `num_candidates` is below 1.

    >>> teacher = jnp.array([[4.0, 2.0, 1.0, 0.0, -1.0]])
    >>> out = dac_kl_fixed((0.05, 1.0), jnp.zeros((1, 5)), teacher)
    >>> print(f"{out.loss[0]:.3f} {out.kept_mass[0]:.3f}")
    1.017 0.994
    """
    if num_candidates < 1:
        raise ValueError(f"num_candidates={num_candidates}; expected at least 1")
    candidates = find_candidates(
        student_logits, teacher_logits, num_candidates, where, vocab_size, vocab_axis
    )
    positions = candidates.teacher_rest.shape
    lower, upper = (
        jnp.broadcast_to(jnp.asarray(limit, jnp.float32), positions) for limit in limits
    )
    out = _clipped_kl(candidates, lower, upper, width, normalization)
    return DacKl(*(zero_where_masked(field, where) for field in out))


def _clipped_kl(
    candidates: Candidates,
    lower: Float[Array, "*B"],
    upper: Float[Array, "*B"],
    width: ScalarLike,
    normalization: Normalization,
) -> DacKl:
    """The divergence over the candidates at every position, and its diagnostics."""
    log_p, log_q = candidates.teacher, candidates.student
    log_w = _log_mask(candidates, lower, upper, width)
    log_wp = log_w + log_p
    if normalization == "teacher":
        log_weights = log_target = jax.nn.log_softmax(log_wp, axis=-1)
    elif normalization == "none":
        log_weights, log_target = log_wp, log_p
    else:
        raise ValueError(
            f"normalization={normalization!r}; expected 'teacher' (a true KL to the "
            "clipped teacher) or 'none'"
        )
    weights = jnp.exp(log_weights)
    # Selected before the product: the gradient of 0 * inf would be nan.
    ratio = jnp.where(weights > 0, log_target - log_q, 0.0)
    return DacKl(
        loss=jnp.sum(weights * ratio, axis=-1),
        lower=lower,
        upper=upper,
        kept_mass=jnp.sum(jnp.exp(log_wp), axis=-1),
        kept_classes=jnp.sum(jnp.exp(log_w), axis=-1),
        candidate_mass=jnp.sum(jnp.exp(log_p), axis=-1),
    )


def _log_mask(
    candidates: Candidates,
    lower: Float[Array, "*B"],
    upper: Float[Array, "*B"],
    width: ScalarLike,
) -> Float[Array, "*B K"]:
    """log w: 0 for the target, -inf for classes that cannot occur."""
    log_p, log_rest = candidates.teacher, candidates.teacher_rest[..., None]
    # From log_p, not from an iota: on an Explicit mesh both need the same sharding.
    target, others = jnp.ones_like(log_p[..., :1]), jnp.zeros_like(log_p[..., 1:])
    is_target = jnp.concatenate([target, others], axis=-1) > 0
    can_occur = log_p > -jnp.inf
    clippable = can_occur & ~is_target
    share = jnp.where(clippable, jnp.exp(log_p - log_rest), 0.0)
    level = 1.0 - (jnp.cumsum(share, axis=-1) - share / 2)
    log_w = jax.nn.log_sigmoid((level - lower[..., None]) / width)
    log_w += jax.nn.log_sigmoid((upper[..., None] - level) / width)
    return jnp.where(is_target, 0.0, jnp.where(clippable, log_w, -jnp.inf))
