"""The scalar that a foreign trainer differentiates: three masked means, added up."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, ScalarLike, Shaped

from mgsr_jax import losses
from mgsr_jax.losses import Sum, TopKTeacher, masked_sum
from mgsr_jax.typing import Leaf, Params


@dataclasses.dataclass(frozen=True)
class Terms:
    """The weights of the three means and the settings of the losses.

    Attributes:
      dac_kl: weight of DAC-KL.
      cross_entropy: weight of the cross-entropy on the labels; 0 where a model wrote
        them, or the student learns its own errors.
      span: weight of the span correlation; 1 is MGSR's, and needs span ids.
      vocab_size: columns at or beyond it are padding.
      vocab_axis: mesh axis that the logits' columns are split over.
      width: softness of DAC-KL's mask, in quantile levels.
      prior_weight: pull of DAC-KL's limits to where they start; 0 is the paper.
    """

    dac_kl: float = 1.0
    cross_entropy: float = 1.0
    span: float = 0.0
    vocab_size: int | None = None
    vocab_axis: str | None = None
    width: float = 0.01
    prior_weight: float = 10.0


DEFAULTS = Terms()


class Labels(NamedTuple):
    """What a loss reads beside logits: index t is about predicting tokens[t].

    Attributes:
      tokens: the labels. int [B, T]
      where: the positions to score. bool [B, T]
      span_ids: the phrase of each label, negative for none; None without spans. [B, T]
      counts: what the sums are divided by, in place of this batch's own counts: the
        sum over b of [positions, pairs of neighbours in a span]. float [B, 2] or None
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
    """Labels of unshifted tokens: what logits at t predict stands at t + 1.

    tokens[t] = input_tokens[t + 1],  where[t] = input_mask[t + 1],  t = 0 .. S - 1

    T = S, so that logits need no slice; the last position is masked. A token is scored
    if its own mask is not 0, whatever its id: a closing end-of-sequence token that is
    also the padding id counts where the mask says so.

    Args:
      input_tokens: what the model reads. [B, S]
      input_mask: not 0 at tokens to learn; prompts may be 0. [B, S]
      span_ids: the phrase of each token, negative for none. [B, S]
      counts: as in `Labels`.
      unused: whatever else the model reads (positions, attention mask).

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
    teacher_logits: Any,
    labels: Labels,
    terms: Terms = DEFAULTS,
    *,
    scale: Mapping[str, ScalarLike] | None = None,
) -> tuple[Float[Array, ""], dict[str, Sum]]:
    """MGSR's loss of one batch, and what to log.

    L = dac_kl * mean_t DAC-KL_t + cross_entropy * mean_t CE_t + span * mean_t span_t

    Each mean is over its own scored positions, or over `labels.counts`. The gradient
    reaches the student's logits and `clip_params`. MGSR, arXiv 2407.10068.

    Args:
      clip_params: from `mgsr_jax.losses.init_clip_network`.
      student_logits: at t, about labels.tokens[t]; any float dtype. [B, T, Vs]
      teacher_logits: [B, T, Vt], or a `mgsr_jax.losses.TopKTeacher` (without spans).
      labels: aligned with the logits; nothing is shifted here.
      terms: weights and settings; a term of weight 0 is not computed.
      scale: factors on the weights by name, numbers or traced scalars (schedules).

    Returns:
      The scalar to minimise; sums with their counts by name, to be divided last.

    Raises:
      ValueError: `terms.span` is not 0 and there are no span ids, or the teacher is a
        `TopKTeacher`; an unknown name in `scale`; what the losses raise.

    >>> import jax
    >>> clip_params = losses.init_clip_network(jax.random.key(0), num_candidates=4)
    >>> labels = Labels(jnp.array([[1, 2]]), jnp.array([[True, False]]))
    >>> teacher = jnp.array([[[4.0, 2.0, 1.0], [0.0, 0.0, 9.0]]])
    >>> loss, sums = mgsr_loss(clip_params, jnp.zeros((1, 2, 3)), teacher, labels)
    >>> print(f"{loss:.4f}", sums["cross_entropy"].count)
    1.6764 1.0
    """
    where, scale = labels.where, dict(scale or {})
    settings = dict(
        where=where, vocab_size=terms.vocab_size, vocab_axis=terms.vocab_axis
    )
    parts, watched = {}, {}
    if terms.dac_kl:
        out = losses.dac_kl(
            clip_params,
            student_logits,
            teacher_logits,
            width=terms.width,
            prior_weight=terms.prior_weight,
            **settings,
        )
        fields = out._asdict()
        parts["dac_kl"] = masked_sum(fields.pop("loss"), where)
        watched = {name: masked_sum(x, where) for name, x in fields.items()}
    if terms.cross_entropy:
        values = losses.cross_entropy(student_logits, labels.tokens, **settings)
        parts["cross_entropy"] = masked_sum(values, where)
    if terms.span:
        if labels.span_ids is None:
            raise ValueError(
                f"terms.span={terms.span} and the labels have no span_ids; expected "
                "one id a token, -1 for none: add them to the inputs, or set span to 0"
            )
        if isinstance(teacher_logits, TopKTeacher):
            raise ValueError(
                f"terms.span={terms.span} and a TopKTeacher; expected dense logits, "
                "for spans compare whole distributions: run the teacher, or set span "
                "to 0"
            )
        values = losses.span_correlation(
            student_logits, teacher_logits, labels.span_ids, **settings
        )
        parts["span"] = masked_sum(values, losses.span_pairs(labels.span_ids, where))
    loss = jnp.zeros(())
    for name, (total, count) in parts.items():
        if labels.counts is not None:
            count = jnp.sum(labels.counts[:, 1 if name == "span" else 0])
        weight = getattr(terms, name) * scale.pop(name, 1.0)
        loss += weight * total / jnp.where(count > 0, count, 1.0)
    if scale:
        raise ValueError(f"scale for {sorted(scale)}; expected names of {list(parts)}")
    return loss, parts | watched


def cross_entropy_loss(
    student_logits: Float[Array, "B T V"],
    labels: Labels,
    terms: Terms = DEFAULTS,
) -> tuple[Float[Array, ""], dict[str, Sum]]:
    """Mean cross-entropy on the labels: evaluation, where there is no teacher.

    >>> labels = Labels(jnp.array([[1, 0]]), jnp.array([[True, False]]))
    >>> loss, _ = cross_entropy_loss(jnp.zeros((1, 2, 4)), labels)
    >>> print(f"{loss:.4f}")
    1.3863
    """
    values = losses.cross_entropy(
        student_logits,
        labels.tokens,
        where=labels.where,
        vocab_size=terms.vocab_size,
        vocab_axis=terms.vocab_axis,
    )
    total, count = masked_sum(values, labels.where)
    return total / jnp.maximum(count, 1.0), {"cross_entropy": Sum(total, count)}
