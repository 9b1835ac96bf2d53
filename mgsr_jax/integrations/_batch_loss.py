"""MGSR's objective as the scalar of one batch that a foreign trainer differentiates."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, ScalarLike, Shaped

from mgsr_jax import losses
from mgsr_jax.loss_targets import Targets, VocabArguments
from mgsr_jax.losses import Sum, TopKTeacher, masked_sum
from mgsr_jax.objective import Objective, Weights
from mgsr_jax.token_loss import label_discrepancy, with_discrepancy_weights
from mgsr_jax.typing import Leaf, Params
from mgsr_jax.weighted_sum import weighted_sum

DEFAULTS = Objective(span=0.0)
"""Cross-entropy and DAC-KL: the parts that need no span ids."""

PARTS = ("sft", "token", "span")


class Labels(NamedTuple):
    """All that a loss reads in addition to logits: index t is about tokens[t].

    Attributes:
      tokens: the labels. int [B, T]
      where: the positions to score. bool [B, T]
      span_ids: the phrase of each label, negative for none; None without spans. [B, T]
      counts: divisors in place of this batch's own counts: the sum over b of
        [positions, pairs of adjacent tokens in a span]. float [B, 2] or None
    """

    tokens: Leaf
    where: Leaf
    span_ids: Leaf = None
    counts: Leaf = None


def next_token_labels(
    input_tokens: Int[ArrayLike, "B S"],
    input_mask: Shaped[ArrayLike, "B S"],
    span_ids: Int[ArrayLike, "B S"] | None = None,
    counts: Float[ArrayLike, "B 2"] | None = None,
    **unused: Any,
) -> Labels:
    """Labels for unshifted tokens: logits at t predict the token at t + 1.

      tokens[t] = input_tokens[t + 1],  where[t] = input_mask[t + 1],  t = 0 .. S - 1

    T = S, so that logits need no slice; the last position is masked. A token is scored
    where its own mask is not 0, whatever its id: a closing end-of-sequence token that
    is also the padding id counts where the mask includes it.

    Args:
      input_tokens: tokens that the model reads. [B, S]
      input_mask: not 0 at tokens to learn; prompts may be 0. [B, S]
      span_ids: the phrase of each token, negative for none. [B, S]
      counts: as in `Labels`.
      unused: further inputs of the model (positions, attention mask).

    >>> labels = next_token_labels(jnp.array([[5, 7, 2]]), jnp.array([[0, 1, 1]]))
    >>> print(labels.tokens, labels.where)
    [[7 2 0]] [[ True  True False]]
    """

    def shift(x: Any, last: int) -> Array:
        return jnp.pad(jnp.asarray(x)[:, 1:], ((0, 0), (0, 1)), constant_values=last)

    spans = None if span_ids is None else shift(span_ids, -1)
    where = shift(jnp.asarray(input_mask) != 0, False)
    return Labels(shift(input_tokens, 0), where, spans, counts)


def mgsr_loss(
    clip_params: Params,
    student_logits: Float[Array, "B T Vs"],
    teacher_logits: Float[Array, "B T Vt"] | TopKTeacher,
    labels: Labels,
    objective: Objective = DEFAULTS,
    *,
    vocab_size: int | None = None,
    vocab_axis: str | None = None,
    scale: Mapping[str, ScalarLike] | None = None,
) -> tuple[Float[Array, ""], dict[str, Sum]]:
    """MGSR's loss of one batch, and its metrics.

      L = sft * mean_t CE_t + token * mean_t D_t + span * mean_t span_t

    Each mean is over its own scored positions, or over `labels.counts`. It is the sum
    that `mgsr train` minimises (`mgsr_jax.objective`), with every scored label taken as
    ground truth: set `objective.sft` to 0 where a model wrote the labels, and choose
    "sampled_reverse_kl" only where the student sampled them. The gradient reaches the
    student's logits and `clip_params`. MGSR, arXiv 2407.10068.

    Args:
      clip_params: from `mgsr_jax.losses.init_clip_network`.
      student_logits: at t, about labels.tokens[t]; any float dtype. [B, T, Vs]
      teacher_logits: [B, T, Vt], or a `mgsr_jax.losses.TopKTeacher` (without spans).
      labels: aligned with the logits; nothing is shifted here.
      objective: weights and settings; a part of weight 0 is not computed.
      vocab_size: columns of logits at or beyond it are padding.
      vocab_axis: mesh axis that the columns are sharded over.
      scale: factors on the weights "sft", "token", "span": numbers or traced scalars
        (schedules).

    Returns:
      The scalar to minimise; sums with their counts by name, to be divided last.

    Raises:
      ValueError: `objective.span` is not 0 and there are no span ids, or the teacher is
        a `TopKTeacher`; `objective.sample_divergence` is set; an unknown name in
        `scale`; errors of the losses.

    >>> import jax
    >>> clip_params = losses.init_clip_network(jax.random.key(0), num_candidates=4)
    >>> labels = Labels(jnp.array([[1, 2]]), jnp.array([[True, False]]))
    >>> teacher = jnp.array([[[4.0, 2.0, 1.0], [0.0, 0.0, 9.0]]])
    >>> loss, sums = mgsr_loss(clip_params, jnp.zeros((1, 2, 3)), teacher, labels)
    >>> print(f"{loss:.4f}", sums["sft"].count)
    1.6764 1.0
    """
    _check(objective, labels, teacher_logits, scale)
    columns = VocabArguments(vocab_size=vocab_size, vocab_axis=vocab_axis)
    targets = _targets(labels, objective, scale or {})
    models = student_logits, teacher_logits
    # `weighted_sum` refuses a teacher of K classes with these weights.
    if objective.weighs_by_discrepancy and not isinstance(teacher_logits, TopKTeacher):
        gaps = label_discrepancy(student_logits, teacher_logits, targets, **columns)
        targets = with_discrepancy_weights(targets, gaps, objective)
    return weighted_sum(clip_params, *models, targets, objective, **columns)


def _check(
    objective: Objective,
    labels: Labels,
    teacher_logits: Any,
    scale: Mapping[str, ScalarLike] | None,
) -> None:
    if objective.span and labels.span_ids is None:
        raise ValueError(
            f"objective.span={objective.span} and the labels have no span_ids; "
            "expected one id per token, -1 for none: add them to the inputs, or set "
            "span to 0"
        )
    if objective.span and isinstance(teacher_logits, TopKTeacher):
        raise ValueError(
            f"objective.span={objective.span} and a TopKTeacher; expected dense "
            "logits, since spans compare whole distributions: run the teacher, or set "
            "span to 0"
        )
    if objective.sample_divergence is not None:
        raise ValueError(
            f"objective.sample_divergence={objective.sample_divergence!r}, but every "
            "label of a batch counts as ground truth here; set objective.divergence "
            "for the batch, and sample_divergence to None"
        )
    used = [part for part in PARTS if getattr(objective, part)]
    if unknown := sorted(set(scale or {}) - set(used)):
        raise ValueError(f"scale for {unknown}; expected names of {used}")


def _targets(
    labels: Labels, objective: Objective, scale: Mapping[str, ScalarLike]
) -> Targets:
    """Every scored label counts as ground truth."""
    where, span_ids = labels.where, labels.span_ids
    if span_ids is None:
        span_ids = jnp.full(where.shape, -1, jnp.int32)
    pairs = losses.span_pairs(span_ids, where)

    def spread(name: str, where: Bool[Array, "B T"], column: int) -> Array:
        counts = labels.counts
        own = jnp.sum(where) if counts is None else jnp.sum(counts[:, column])
        weight = getattr(objective, name) * scale.get(name, 1.0)
        return where * (weight / jnp.where(own > 0, own, 1.0))

    weights = Weights(
        sft=spread("sft", where, 0),
        token=spread("token", where, 0),
        span=spread("span", pairs, 1),
    )
    return Targets(labels.tokens, where, span_ids, where, where, pairs, weights)


def cross_entropy_loss(
    student_logits: Float[Array, "B T V"],
    labels: Labels,
    *,
    vocab_size: int | None = None,
    vocab_axis: str | None = None,
) -> tuple[Float[Array, ""], dict[str, Sum]]:
    """Mean cross-entropy on the labels: for evaluation, which runs no teacher.

    >>> labels = Labels(jnp.array([[1, 0]]), jnp.array([[True, False]]))
    >>> loss, _ = cross_entropy_loss(jnp.zeros((1, 2, 4)), labels)
    >>> print(f"{loss:.4f}")
    1.3863
    """
    values = losses.cross_entropy(
        student_logits,
        labels.tokens,
        where=labels.where,
        vocab_size=vocab_size,
        vocab_axis=vocab_axis,
    )
    total, count = masked_sum(values, labels.where)
    return total / jnp.maximum(count, 1.0), {"sft": Sum(total, count)}
