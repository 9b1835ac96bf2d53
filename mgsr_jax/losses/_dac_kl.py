"""DAC-KL: a KL divergence on the part of the teacher's distribution worth learning.

Two halves. `_candidates` reads the vocabulary: the teacher's K most probable classes,
what the student gives them, the teacher's mass beside its first choice. Everything
after it works on the K candidates alone and never sees V, whole or split.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from mgsr_jax.losses._gelu import gelu
from mgsr_jax.losses._logits import clean, clean_pair, zero_where_masked
from mgsr_jax.losses._teacher import TopKTeacher, check_positions, top_k_log_probs
from mgsr_jax.losses._vocabulary import Axis, Vocabulary, over_vocabulary
from mgsr_jax.typing import Leaf, Params, PRNGKey

# The limits before training, and how far a network can move them.
LOWER_START, UPPER_START = 0.1, 0.98
LOWER_MAX, UPPER_MIN = 0.5, 0.5

Normalization = Literal["teacher", "none"]


class DacKl(NamedTuple):
    """The loss and what to watch beside it; every field [...], float32, 0 where masked.

    Attributes:
      loss: the divergence; with `dac_kl` the prior on the limits is included.
      lower: quantile level below which classes are clipped.
      upper: quantile level above which classes are clipped.
      kept_mass: teacher probability that the mask keeps, sum_k w_k p_k.
      kept_classes: sum_k w_k.
      candidate_mass: teacher probability of all candidates; what is missing to 1
        was never looked at.
    """

    loss: Leaf
    lower: Leaf
    upper: Leaf
    kept_mass: Leaf
    kept_classes: Leaf
    candidate_mass: Leaf


class _Candidates(NamedTuple):
    """The teacher's K most probable classes, descending; the first is the target.

    Attributes:
      teacher: their log-probabilities; -inf for a class that cannot occur. [..., K]
      student: the student's, normalised over the whole vocabulary. [..., K]
      teacher_rest: log of the teacher's mass beside the target, 1 - p_1. [...]
    """

    teacher: Leaf
    student: Leaf
    teacher_rest: Leaf


def init_clip_network(
    key: PRNGKey, *, num_candidates: int = 512, hidden: int = 128
) -> Params:
    """Parameters of the network that predicts DAC-KL's limits.

    An MLP `2 num_candidates -> hidden -> 2` with GELU. Its last layer starts at zero
    weights and at biases for which the limits are (0.1, 0.98) at every position.

    MGSR, arXiv 2407.10068, token-level loss (there f_sub). Train it with its own
    settings: learning rate 1e-3, no weight decay.

    Args:
      key: a typed key (`jax.random.key`).
      num_candidates: K, how many of the teacher's classes are looked at.
      hidden: width of the hidden layer.

    Returns:
      A dict of float32 arrays; everything else reads K from their shapes.

    Raises:
      ValueError: a size below 1.

    >>> params = init_clip_network(jax.random.key(0), num_candidates=8, hidden=4)
    >>> jax.tree.map(jnp.shape, params)["hidden"]
    {'bias': (4,), 'kernel': (16, 4)}
    """
    if num_candidates < 1 or hidden < 1:
        raise ValueError(
            f"clip network with num_candidates={num_candidates}, hidden={hidden}; "
            "expected sizes of at least 1"
        )
    start = jnp.array([LOWER_START / LOWER_MAX, (1 - UPPER_START) / (1 - UPPER_MIN)])
    kernel = jax.nn.initializers.lecun_normal()(key, (2 * num_candidates, hidden))
    return {
        "hidden": {"kernel": kernel, "bias": jnp.zeros(hidden)},
        "output": {
            "kernel": jnp.zeros((hidden, 2)),
            "bias": jnp.log(start) - jnp.log1p(-start),
        },
    }


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
    """Dynamic adaptive clipping KL, with limits that a small network predicts.

    Over the teacher's K most probable classes, p_1 >= p_2 >= ..., in nats:

    c_k   = 1 - (sum_{j=2..k} p_j - p_k / 2) / (1 - p_1)       (quantile level, k >= 2)
    w_k   = sigmoid((c_k - lower) / width) * sigmoid((upper - c_k) / width),  w_1 = 1
    p_hat = w p / sum_j w_j p_j
    DAC-KL_t = sum_k p_hat_k (log p_hat_k - log q_k)
               + prior_weight ((lower - 0.1)^2 + (upper - 0.98)^2)

    q is the student's full softmax, so the divergence is at least 0, and 0 exactly
    when the student equals the clipped teacher; where it equals the whole teacher it
    is positive. (lower, upper) = f_sub([p ; q]): the gradient of the loss reaches
    `clip_params` through the mask, and nothing through what the network reads.

    MGSR, arXiv 2407.10068, token-level loss. The paper's: network, mask, kept target.
    Our choices: sorted candidates, levels within the non-target mass, bounded limits,
    the renormalised teacher, the prior (0 is the paper).

    Args:
      clip_params: from `init_clip_network`.
      student_logits: any float dtype. [..., Vs]
      teacher_logits: any float dtype, [..., Vt], or a `TopKTeacher`, whose K classes
        are then the most that can be candidates. They get no gradient.
      where: the positions to score; None for all of them. [...]
      vocab_size: columns at or beyond it are padding, with probability 0 on both
        sides. Needed where Vs and Vt differ.
      vocab_axis: mesh axis that V is split over; read from the type on Explicit axes.
      width: softness of the mask, in quantile levels.
      normalization: "teacher" as above; "none" gives sum_k w_k p_k (log p_k - log q_k)
        in its place, which has no lower bound.
      prior_weight: pull of the limits towards where they start.

    Returns:
      A `DacKl`.

    Raises:
      ValueError: Vs and Vt differ and there is no `vocab_size`, or it is larger than
        one of them; leading axes differ; an unknown `normalization`.

    >>> clip_params = init_clip_network(jax.random.key(0), num_candidates=4)
    >>> teacher = jnp.array([[4.0, 2.0, 1.0, 0.0, -1.0]])
    >>> out = dac_kl(clip_params, jnp.zeros((1, 5)), teacher)
    >>> print(f"{out.loss[0]:.3f} {out.lower[0]:.3f} {out.upper[0]:.3f}")
    1.076 0.100 0.980
    """
    num_candidates = clip_params["hidden"]["kernel"].shape[0] // 2
    candidates = _candidates(
        student_logits, teacher_logits, num_candidates, where, vocab_size, vocab_axis
    )
    lower, upper = _predict_limits(clip_params, candidates)
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
    """`dac_kl` with limits that are given: no network, no prior.

    DAC-KL_t = sum_k p_hat_k (log p_hat_k - log q_k)

    MGSR, arXiv 2407.10068, appendix (fixed clipping).

    Args:
      limits: (lower, upper), quantile levels within the teacher's non-target mass;
        numbers, or an array each. [...]
      student_logits: any float dtype. [..., Vs]
      teacher_logits: any float dtype, [..., Vt], or a `TopKTeacher`.
      num_candidates: K, how many of the teacher's classes are looked at.
      where, vocab_size, vocab_axis, width, normalization: as in `dac_kl`.

    Returns:
      A `DacKl`.

    Raises:
      ValueError: as `dac_kl`; `num_candidates` below 1.

    >>> teacher = jnp.array([[4.0, 2.0, 1.0, 0.0, -1.0]])
    >>> out = dac_kl_fixed((0.05, 1.0), jnp.zeros((1, 5)), teacher)
    >>> print(f"{out.loss[0]:.3f} {out.kept_mass[0]:.3f}")
    1.017 0.994
    """
    if num_candidates < 1:
        raise ValueError(f"num_candidates={num_candidates}; expected at least 1")
    candidates = _candidates(
        student_logits, teacher_logits, num_candidates, where, vocab_size, vocab_axis
    )
    positions = candidates.teacher_rest.shape
    lower, upper = (
        jnp.broadcast_to(jnp.asarray(limit, jnp.float32), positions) for limit in limits
    )
    out = _clipped_kl(candidates, lower, upper, width, normalization)
    return DacKl(*(zero_where_masked(field, where) for field in out))


def at_bound(
    lower: Float[Array, "*B"], upper: Float[Array, "*B"], margin: float = 0.005
) -> Float[Array, "*B"]:
    """1 where a limit has run to an end of its range, (0, 0.5) and (0.5, 1)."""
    near_low = (lower < margin) | (lower > 0.5 - margin)
    near_high = (upper < 0.5 + margin) | (upper > 1 - margin)
    return (near_low | near_high).astype(jnp.float32)


def _candidates(
    student_logits: Float[Array, "*B Vs"],
    teacher: Float[Array, "*B Vt"] | TopKTeacher,
    num_candidates: int,
    where: Bool[Array, "*B"] | None,
    vocab_size: int | None,
    vocab_axis: Axis,
) -> _Candidates:
    """The only part that reads the vocabulary.

    K is `num_candidates`, or the number of tokens where that is smaller.
    """
    if isinstance(teacher, TopKTeacher):
        return _candidates_of_top_k(
            student_logits, teacher, num_candidates, where, vocab_size, vocab_axis
        )

    def local(
        vocabulary: Vocabulary, student: Array, teacher: Array, where: Array | None
    ) -> _Candidates:
        student, teacher = clean_pair(vocabulary, student, teacher, where, vocab_size)
        tokens = vocab_size or vocabulary.width(teacher)
        top, indices = vocabulary.top_k(teacher, min(num_candidates, tokens))
        largest = top[..., :1]
        is_target = vocabulary.columns(teacher) == indices[..., :1]
        # 1 - p_1 as a sum over the others: a subtraction would leave only rounding.
        rest = vocabulary.logsumexp(jnp.where(is_target, -jnp.inf, teacher - largest))
        total = jnp.logaddexp(0.0, rest)
        return _Candidates(
            teacher=top - largest - total[..., None],
            student=_log_probs_at(vocabulary, student, indices),
            teacher_rest=rest - total,
        )

    return over_vocabulary(local, vocab_axis, (student_logits, teacher), where)


def _candidates_of_top_k(
    student_logits: Float[Array, "*B V"],
    teacher: TopKTeacher,
    num_candidates: int,
    where: Bool[Array, "*B"] | None,
    vocab_size: int | None,
    vocab_axis: Axis,
) -> _Candidates:
    """The same of a teacher that is its K most probable classes and a tail."""
    check_positions(student_logits, teacher)
    log_p, log_tail, indices = top_k_log_probs(teacher, where)
    log_p, order = lax.top_k(log_p, log_p.shape[-1])
    others = jnp.concatenate([log_p[..., 1:], log_tail[..., None]], axis=-1)
    indices = jnp.take_along_axis(indices, order, axis=-1)[..., :num_candidates]

    def local(
        vocabulary: Vocabulary, student: Array, where: Array | None, indices: Array
    ) -> Array:
        student = clean(vocabulary, student, where, vocab_size)
        return _log_probs_at(vocabulary, student, indices)

    return _Candidates(
        teacher=log_p[..., :num_candidates],
        student=over_vocabulary(local, vocab_axis, (student_logits,), where, indices),
        teacher_rest=Vocabulary().logsumexp(others),
    )


def _log_probs_at(
    vocabulary: Vocabulary, logits: Float[Array, "*B V"], indices: Int[Array, "*B K"]
) -> Float[Array, "*B K"]:
    """Log-probabilities of some classes, normalised over all of them."""
    # Shifted before anything is added up, so that large logits cost no precision.
    largest = vocabulary.max(logits)[..., None]
    total = vocabulary.sum(jnp.exp(logits - largest))[..., None]
    return vocabulary.take(logits, indices) - largest - jnp.log(total)


def _predict_limits(
    clip_params: Params, candidates: _Candidates
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """f_sub: lower in (0, 0.5) and upper in (0.5, 1) from both distributions."""
    kernel = clip_params["hidden"]["kernel"].astype(jnp.float32)
    p_and_q = jnp.stack([jnp.exp(candidates.teacher), jnp.exp(candidates.student)], -2)
    mean_square = jnp.mean(jnp.square(p_and_q), axis=(-2, -1), keepdims=True)
    z = lax.stop_gradient(p_and_q * lax.rsqrt(mean_square))
    missing = kernel.shape[0] // 2 - z.shape[-1]
    z = jnp.pad(z, [(0, 0)] * (z.ndim - 1) + [(0, missing)])
    z = z.reshape(*z.shape[:-2], kernel.shape[0])
    z = gelu(_dense(clip_params["hidden"], z))
    a, b = jnp.moveaxis(jax.nn.sigmoid(_dense(clip_params["output"], z)), -1, 0)
    return LOWER_MAX * a, 1.0 - (1.0 - UPPER_MIN) * b


def _dense(layer: Params, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
    kernel, bias = (layer[name].astype(jnp.float32) for name in ("kernel", "bias"))
    out = jnp.matmul(x, kernel, precision=lax.Precision.HIGHEST)
    return out + jnp.broadcast_to(bias, out.shape)


def _clipped_kl(
    candidates: _Candidates,
    lower: Float[Array, "*B"],
    upper: Float[Array, "*B"],
    width: ScalarLike,
    normalization: Normalization,
) -> DacKl:
    """The divergence over the candidates, at every position."""
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
    # Selected before the product too: 0 * inf would be nan backwards.
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
    candidates: _Candidates,
    lower: Float[Array, "*B"],
    upper: Float[Array, "*B"],
    width: ScalarLike,
) -> Float[Array, "*B K"]:
    """log w: 0 for the target, -inf for classes that cannot occur."""
    log_p, log_rest = candidates.teacher, candidates.teacher_rest[..., None]
    # Made from log_p and not from an iota: on an Explicit mesh it must be split alike.
    target, others = jnp.ones_like(log_p[..., :1]), jnp.zeros_like(log_p[..., 1:])
    is_target = jnp.concatenate([target, others], axis=-1) > 0
    can_occur = log_p > -jnp.inf
    clippable = can_occur & ~is_target
    share = jnp.where(clippable, jnp.exp(log_p - log_rest), 0.0)
    level = 1.0 - (jnp.cumsum(share, axis=-1) - share / 2)
    log_w = jax.nn.log_sigmoid((level - lower[..., None]) / width)
    log_w += jax.nn.log_sigmoid((upper[..., None] - level) / width)
    return jnp.where(is_target, 0.0, jnp.where(clippable, log_w, -jnp.inf))
