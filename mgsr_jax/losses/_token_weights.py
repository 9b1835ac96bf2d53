"""Weights of tokens, to multiply a loss per token with before its one reduction.

A weight has no gradient and is not normalised: sums are still divided by the number of
scored tokens, which depends on masks only, so that micro-batches and hosts add up.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, ScalarLike

from mgsr_jax.losses._kl_mixes import entropy_of
from mgsr_jax.losses._logits import clean, clean_pair, same_columns, zero_where_masked
from mgsr_jax.losses._mesh_axes import Axis
from mgsr_jax.losses._over_vocabulary import over_vocabulary
from mgsr_jax.losses._per_token import check_fraction
from mgsr_jax.losses._vocabulary import Vocabulary


@jax.jit(static_argnames=("vocab_size", "vocab_axis"))
def entropy(
    logits: Float[Array, "*B V"],
    *,
    where: Bool[Array, "*B"] | None = None,
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
) -> Float[Array, "*B"]:
    """Entropy of each distribution, in nats; without gradient.

    H_t = -sum_v p_v log p_v,  p = softmax(logits_t)

    Args:
      logits: any float dtype. [..., V]
      where: the positions to compute; None means all of them. [...]
      vocab_size: columns at or beyond it are padding, with probability 0.
      vocab_axis: mesh axis that V is split over; read from the type on Explicit axes.

    Returns:
      float32, 0 where masked. [...]

    Raises:
      ValueError: `vocab_size` is not in 1..V; V does not divide over `vocab_axis`.

    >>> print(f"{entropy(jnp.zeros(4)):.4f}")
    1.3863
    """

    def local(vocabulary: Vocabulary, logits: Array, where: Array | None) -> Array:
        logits = clean(vocabulary, logits, where, vocab_size)
        return entropy_of(vocabulary, vocabulary.log_softmax(logits))

    values = over_vocabulary(local, vocab_axis, (lax.stop_gradient(logits),), where)
    return zero_where_masked(values, where)


def student_entropy_weights(
    student_logits: Float[Array, "*B V"],
    *,
    where: Bool[Array, "*B"] | None = None,
    threshold: ScalarLike = 0.8,
    floor: ScalarLike = 0.0,
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
) -> Float[Array, "*B"]:
    """1 where the student is uncertain, `floor` elsewhere.

    w_t = 1 where H(q_t) > threshold, else floor;  H as in `entropy`

    SE-KD, arXiv 2602.01395, selects positions by the student's entropy; we read only
    summaries of it. Our choice: a threshold in nats in place of a share of the batch,
    so that a weight depends on its own position only.

    Args:
      student_logits, where, vocab_size, vocab_axis: as in `entropy`.
      threshold: entropy in nats; a number or a traced scalar.
      floor: weight of the other positions, from 0 to 1; a number or a traced scalar.

    Returns:
      float32 without gradient, 0 where masked. [...]

    Raises:
      ValueError: as in `entropy`; `floor` is a number outside 0..1.

    >>> print(student_entropy_weights(jnp.array([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0]])))
    [1. 0.]
    """
    check_fraction("floor", floor)
    columns = {"vocab_size": vocab_size, "vocab_axis": vocab_axis}
    uncertain = entropy(student_logits, where=where, **columns) > threshold
    return _gate(uncertain, floor, where)


def teacher_entropy_weights(
    teacher_logits: Float[Array, "*B V"],
    *,
    where: Bool[Array, "*B"] | None = None,
    threshold: ScalarLike = 0.8,
    floor: ScalarLike = 0.0,
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
) -> Float[Array, "*B"]:
    """1 where the teacher is certain, `floor` elsewhere.

    w_t = 1 where H(p_t) <= threshold, else floor;  H as in `entropy`

    Our choice. It leaves out what a teacher is unsure about; `entropy_gated_kl` keeps
    it and changes the divergence there.

    Args:
      teacher_logits, where, vocab_size, vocab_axis: as in `entropy`.
      threshold, floor: as in `student_entropy_weights`.

    Returns:
      float32 without gradient, 0 where masked. [...]

    Raises:
      ValueError: as in `student_entropy_weights`.

    >>> print(teacher_entropy_weights(jnp.array([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0]])))
    [0. 1.]
    """
    check_fraction("floor", floor)
    columns = {"vocab_size": vocab_size, "vocab_axis": vocab_axis}
    certain = entropy(teacher_logits, where=where, **columns) <= threshold
    return _gate(certain, floor, where)


def acceptance_weights(
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    *,
    where: Bool[Array, "*B"] | None = None,
    top_k: ScalarLike = 5,
    floor: ScalarLike = 0.01,
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
) -> Float[Array, "*B"]:
    """1 where the teacher accepts the student's most probable token, `floor` elsewhere.

    w_t = 1 where fewer than K classes are more probable than argmax q_t under p_t

    with p and q as in `forward_kl`, at temperature 1.

    SpecKD, arXiv 2510.24021 (later SelecTKD), of which we read the abstract and public
    notes: its greedy form, whose K and floor are our defaults. Our choice: of several
    classes that are most probable under q, one that is accepted is enough.

    Args:
      student_logits, teacher_logits, where, vocab_size, vocab_axis: as in `forward_kl`.
      top_k: K; a number or a traced scalar.
      floor: weight of the other positions, from 0 to 1; a number or a traced scalar.

    Returns:
      float32 without gradient, 0 where masked. [...]

    Raises:
      ValueError: as in `forward_kl`; `floor` is a number outside 0..1.

    >>> student = jnp.array([[3.0, 0.0, 1.0], [0.0, 0.0, 4.0]])
    >>> teacher = jnp.array([[9.0, 8.0, 0.0], [9.0, 8.0, 0.0]])
    >>> print(acceptance_weights(student, teacher, top_k=2))
    [1.   0.01]
    """
    check_fraction("floor", floor)
    accepted = _accepted(
        student_logits,
        teacher_logits,
        where,
        top_k,
        vocab_size=vocab_size,
        vocab_axis=vocab_axis,
    )
    return _gate(accepted, floor, where)


@jax.jit
def discrepancy_weights(
    discrepancy: Float[Array, "*B T"],
    *,
    where: Bool[Array, "*B T"] | None = None,
    gain: ScalarLike = 0.5,
) -> Float[Array, "*B T"]:
    """Weights that fall with the discrepancy of the models on the tokens before.

    w_t = 1 + gain (1 - sum_{k<t} d_k / sum_k d_k),  sums over scored positions

    The first token of a row has 1 + gain, and the weights fall to nearly 1. Where the
    models do not differ at all every weight is 1 + gain.

    IW-OPD, arXiv 2606.22600, of which we read the abstract and the published launch
    script, whose comments give this equation with gain 0.5 and
    d_t = |log p_t[y_t] - log q_t[y_t]| at the sampled tokens y.

    Args:
      discrepancy: d, at least 0; inf where a model excludes the token. [..., T]
      where: the positions that are scored; None means all of them. [..., T]
      gain: what the first weight has above the last; a number or a traced scalar.

    Returns:
      float32 without gradient, 0 where masked. [..., T]

    >>> print(discrepancy_weights(jnp.array([1.0, 0.0, 3.0])))
    [1.5   1.375 1.375]
    """
    gaps = zero_where_masked(lax.stop_gradient(discrepancy).astype(jnp.float32), where)
    sums = jnp.cumsum(gaps, axis=-1)
    total = sums[..., -1:]
    before = jnp.concatenate([jnp.zeros_like(total), sums[..., :-1]], axis=-1)
    # Where a gap is infinite, all tokens behind it have the whole discrepancy.
    share = before / jnp.where(total > 0, total, 1.0)
    share = jnp.where(before == jnp.inf, 1.0, share)
    return zero_where_masked(1 + jnp.asarray(gain, jnp.float32) * (1 - share), where)


@jax.jit(static_argnames=("vocab_size", "vocab_axis"))
def _accepted(
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    where: Bool[Array, "*B"] | None,
    top_k: ScalarLike,
    *,
    vocab_size: int | None,
    vocab_axis: Axis,
) -> Bool[Array, "*B"]:
    """True where argmax q is one of the teacher's `top_k` most probable classes."""

    def local(
        vocabulary: Vocabulary,
        student: Array,
        teacher: Array,
        where: Array | None,
    ) -> Array:
        # Logits have the order of the probabilities, and no rounding to recompute.
        both = clean_pair(vocabulary, student, teacher, where, vocab_size)
        student, teacher = same_columns(vocabulary, *both)
        proposed = student == vocabulary.max(student)[..., None]
        of_proposed = vocabulary.max(jnp.where(proposed, teacher, -jnp.inf))
        above = teacher > of_proposed[..., None]
        return vocabulary.sum(above.astype(jnp.float32))

    logits = (lax.stop_gradient(student_logits), teacher_logits)
    return over_vocabulary(local, vocab_axis, logits, where) < top_k


def _gate(
    full: Bool[Array, "*B"], floor: ScalarLike, where: Bool[Array, "*B"] | None
) -> Float[Array, "*B"]:
    """1 where `full`, `floor` elsewhere, 0 where masked."""
    return zero_where_masked(jnp.where(full, jnp.float32(1), floor), where)
