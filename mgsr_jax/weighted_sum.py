"""The three losses of logits as one weighted sum, and their metrics.

  L = sum_t  w_sft[t] CE_t + w_token[t] r_t D_t + w_span[t] span_t

The weights w come from `position_weights`, r_t D_t from `token_loss`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from mgsr_jax import losses
from mgsr_jax.loss_targets import Targets, VocabArguments, by_teacher
from mgsr_jax.losses import Sum, TopKTeacher, masked_sum
from mgsr_jax.objective import Objective
from mgsr_jax.token_loss import token_loss
from mgsr_jax.typing import Params


def weighted_sum(
    clip_params: Params | None,
    student_logits: Float[Array, "*B T V"],
    teacher_logits: Float[Array, "*B T W"] | TopKTeacher | None,
    targets: Targets,
    objective: Objective,
    *,
    vocab_size: int | None = None,
    vocab_axis: str | None = None,
    score_teacher: bool = False,
    teachers: tuple[str, ...] = (),
) -> tuple[Float[Array, ""], dict[str, Sum]]:
    """The three losses as one weighted sum, and their metrics as sums and counts.

      L = sum_t  w_sft[t] CE_t + w_token[t] r_t D_t + w_span[t] span_t

    A part of weight 0 in `objective` is not computed; without a teacher only the
    cross-entropy is. `score_teacher` adds the teacher's own cross-entropy. `teachers`
    are the names of several teachers, by which the divergence is reported too.
    """
    columns = VocabArguments(vocab_size=vocab_size, vocab_axis=vocab_axis)
    weights, total, metrics = targets.weights, jnp.zeros(()), {}
    if objective.sft:
        values, metrics["sft"] = _cross_entropy(student_logits, targets, columns)
        total += jnp.sum(weights.sft * values)
    if teacher_logits is None:
        return total, metrics
    if score_teacher and not isinstance(teacher_logits, TopKTeacher):
        metrics |= _teacher_sft(teacher_logits, targets, columns, teachers)
    if objective.token:
        models = student_logits, teacher_logits
        values, token_metrics = token_loss(
            clip_params, *models, targets, objective, teachers=teachers, **columns
        )
        metrics |= token_metrics
        total += jnp.sum(weights.token * values)
    if objective.span:
        values = losses.span_correlation(
            student_logits,
            teacher_logits,
            targets.span_ids,
            where=targets.where,
            **columns,
        )
        total += jnp.sum(jnp.where(targets.pairs, weights.span * values, 0.0))
        metrics["span"] = masked_sum(values, targets.pairs)
    return total, metrics


def _teacher_sft(
    logits: Float[Array, "*B T V"],
    targets: Targets,
    columns: VocabArguments,
    teachers: tuple[str, ...],
) -> dict[str, Sum]:
    name, where = "teacher_sft", targets.labelled
    values, total = _cross_entropy(logits, targets, columns)
    return {name: total} | by_teacher(name, values, where, targets, teachers)


def _cross_entropy(
    logits: Float[Array, "*B T V"], targets: Targets, columns: VocabArguments
) -> tuple[Float[Array, "*B T"], Sum]:
    where = targets.labelled
    values = losses.cross_entropy(logits, targets.labels, where=where, **columns)
    return values, masked_sum(values, where)
