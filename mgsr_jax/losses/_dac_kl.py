"""DAC-KL: a KL divergence on the part of the teacher's distribution worth learning.

`find_candidates` reads the vocabulary, once. Everything here works on the K candidates
of each position, whether the vocabulary is split over devices or not.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from mgsr_jax.losses._candidates import Candidates, find_candidates
from mgsr_jax.losses._clip_network import network_candidates, predict_limits
from mgsr_jax.losses._clip_signal import (
    ClipPrior,
    ClipSignal,
    Normalization,
    divergence,
    with_signal,
)
from mgsr_jax.losses._logits import zero_where_masked
from mgsr_jax.losses._mesh_axes import Axis
from mgsr_jax.losses._teacher import TopKTeacher
from mgsr_jax.typing import Leaf, Params

LOG_SMALLEST = -126 * math.log(2.0)
"""Logarithm of the smallest normal float32: a probability below it counts as 0."""


class DacKl(NamedTuple):
    """The loss and its diagnostics; every field [...], float32, 0 where masked.

    Attributes:
      loss: the divergence; `dac_kl` adds its signal's term for the limits.
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
    signal: ClipSignal = ClipPrior(),  # noqa: B008
) -> DacKl:
    """Dynamic adaptive clipping KL, in nats; a small network predicts the limits.

    Over the teacher's K most probable classes, p_1 >= p_2 >= ...:

    c_k   = (sum_{p_j < p_k} p_j + 1/2 sum_{p_j = p_k} p_j) / sum_{p_j < p_1} p_j
    w_k   = sigmoid((c_k - lower) / width) * sigmoid((upper - c_k) / width)
    w_k   = 1  where p_k = p_1
    p_hat = w p / sum_j w_j p_j
    DAC-KL_t = sum_k p_hat_k (log p_hat_k - log q_k)

    c_k is the quantile level of class k within the mass outside the target; its sums
    are over the whole vocabulary. q is the student's full softmax. So the divergence is
    at least 0, and it is 0 only where the student equals the clipped teacher: at a
    student that equals the whole teacher it is positive. (lower, upper) = f_sub([p ;
    q]): the gradient reaches `clip_params` through the mask; no gradient flows to the
    network's inputs. `signal` is what the network minimises: by default the loss and a
    prior, 10 ((lower - 0.1)^2 + (upper - 0.98)^2).

    The order of the vocabulary changes nothing, also where logits of 16 bits are equal:
    the network reads the mean of q over equally probable classes, and where only some
    of them are among the K, the loss is the mean over all choices. A `TopKTeacher`
    holds the classes that were chosen when it was made: among equals the first.

    MGSR, arXiv 2407.10068, token-level loss. From the paper: the network, the mask, the
    target that is always kept. Our choices: sorted candidates, levels within the
    non-target mass, bounded limits, the renormalised teacher, the prior.

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
      signal: `ClipPrior`, `ClipFidelity` or `ClipUnnormalised`.

    Returns:
      A `DacKl`.

    Raises:
      ValueError: Vs and Vt differ and `vocab_size` is None; `vocab_size` is larger
        than Vs or Vt; leading axes differ; `normalization` is unknown, or "none" with
        `ClipFidelity`.

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
    limits = predict_limits(
        clip_params, jnp.exp(candidates.teacher), candidates.student_mean
    )
    log_w = _log_mask(candidates, *limits, width)
    log_p, log_q = candidates.teacher, candidates.student
    loss = with_signal(signal, limits, log_w + log_p, log_p, log_q, normalization)
    return _result(loss, limits, candidates, log_w, where)


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
    positions = candidates.teacher.shape[:-1]
    lower, upper = (
        jnp.broadcast_to(jnp.asarray(limit, jnp.float32), positions) for limit in limits
    )
    log_w = _log_mask(candidates, lower, upper, width)
    log_p, log_q = candidates.teacher, candidates.student
    loss = divergence(log_w + log_p, log_p, log_q, normalization)
    return _result(loss, (lower, upper), candidates, log_w, where)


def _result(
    loss: Float[Array, "*B"],
    limits: tuple[Float[Array, "*B"], Float[Array, "*B"]],
    candidates: Candidates,
    log_w: Float[Array, "*B K"],
    where: Bool[Array, "*B"] | None,
) -> DacKl:
    """The loss and its diagnostics; 0 at masked positions."""
    lower, upper = limits
    log_p = candidates.teacher
    out = DacKl(
        loss=loss,
        lower=lower,
        upper=upper,
        kept_mass=jnp.sum(jnp.exp(log_w + log_p), axis=-1),
        kept_classes=jnp.sum(jnp.exp(log_w), axis=-1),
        candidate_mass=jnp.sum(jnp.exp(log_p), axis=-1),
    )
    return DacKl(*(zero_where_masked(field, where) for field in out))


def _log_mask(
    candidates: Candidates,
    lower: Float[Array, "*B"],
    upper: Float[Array, "*B"],
    width: ScalarLike,
) -> Float[Array, "*B K"]:
    """log w: 0 for the target, -inf for classes that cannot occur."""
    level = candidates.level
    log_w = jax.nn.log_sigmoid((level - lower[..., None]) / width)
    log_w += jax.nn.log_sigmoid((upper[..., None] - level) / width)
    occurs = candidates.teacher > LOG_SMALLEST
    return jnp.where(candidates.is_target, 0.0, jnp.where(occurs, log_w, -jnp.inf))
