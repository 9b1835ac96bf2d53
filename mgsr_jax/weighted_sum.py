"""The three losses of logits as one weighted sum, and their metrics.

  L = sum_t  w_sft[t] CE_t + w_token[t] r_t D_t + w_span[t] span_t

The weights w come from `position_weights`. The token weight r is formed here with the
logits where it reads only its own position. "discrepancy" reads the row's earlier
positions too: `with_discrepancy_weights` makes it a factor of w_token, before a row is
divided into chunks.
"""

from typing import Any, NamedTuple, TypedDict

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mgsr_jax import losses
from mgsr_jax.divergences import (
    DIVERGENCE_SETTINGS,
    DIVERGENCES,
    FROM_SAMPLES,
    TOKEN_WEIGHT_SETTINGS,
    check_cached_teacher,
)
from mgsr_jax.losses import DacKl, Sum, TopKTeacher, at_bound, masked_sum
from mgsr_jax.objective import (
    LIMITS_START,
    Objective,
    Weights,
    scored_positions,
)
from mgsr_jax.rows import Rows, next_token_view
from mgsr_jax.typing import Leaf, Params


class Targets(NamedTuple):
    """All that the losses read in addition to logits; index t is about labels[t].

    Attributes:
      labels: the tokens to predict. [..., T]
      where: positions of a response. [..., T]
      span_ids: the phrase of each label, negative for none. [..., T]
      scored: positions where the divergence counts. [..., T]
      labelled: positions where the label counts: it is the data's own. [..., T]
      pairs: positions whose pair with the next position counts. [..., T]
      weights: of the three losses. [..., T] each
    """

    labels: Leaf
    where: Leaf
    span_ids: Leaf
    scored: Leaf
    labelled: Leaf
    pairs: Leaf
    weights: Leaf


class VocabArguments(TypedDict, total=False):
    """Arguments that every loss takes about the columns of logits."""

    vocab_size: int | None
    vocab_axis: str | None


def make_targets(rows: Rows, weights: Weights, objective: Objective) -> Targets:
    """The targets of `rows`, whose positions have these weights."""
    view = next_token_view(rows)
    return Targets(
        labels=view.labels,
        where=view.where,
        span_ids=view.span_ids,
        scored=scored_positions(rows, objective),
        labelled=view.where & rows.ground_truth[..., None],
        pairs=losses.span_pairs(view.span_ids, view.where),
        weights=weights,
    )


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
) -> tuple[Float[Array, ""], dict[str, Sum]]:
    """The three losses as one weighted sum, and their metrics as sums and counts.

      L = sum_t  w_sft[t] CE_t + w_token[t] r_t D_t + w_span[t] span_t

    A part of weight 0 in `objective` is not computed; without a teacher only the
    cross-entropy is. `score_teacher` adds the teacher's own cross-entropy.
    """
    columns = VocabArguments(vocab_size=vocab_size, vocab_axis=vocab_axis)
    weights, total, metrics = targets.weights, jnp.zeros(()), {}
    if objective.sft:
        values, metrics["sft"] = _cross_entropy(student_logits, targets, columns)
        total += jnp.sum(weights.sft * values)
    if teacher_logits is None:
        return total, metrics
    if score_teacher and not isinstance(teacher_logits, TopKTeacher):
        _, metrics["teacher_sft"] = _cross_entropy(teacher_logits, targets, columns)
    if objective.token:
        models = student_logits, teacher_logits
        values, token_metrics = token_loss(
            clip_params, *models, targets, objective, **columns
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


def _cross_entropy(
    logits: Float[Array, "*B T V"], targets: Targets, columns: VocabArguments
) -> tuple[Float[Array, "*B T"], Sum]:
    where = targets.labelled
    values = losses.cross_entropy(logits, targets.labels, where=where, **columns)
    return values, masked_sum(values, where)


def token_loss(
    clip_params: Params | None,
    student_logits: Float[Array, "*B V"],
    teacher_logits: Float[Array, "*B W"] | TopKTeacher,
    targets: Targets,
    objective: Objective,
    *,
    vocab_size: int | None = None,
    vocab_axis: str | None = None,
) -> tuple[Float[Array, "*B"], dict[str, Sum]]:
    """The chosen divergence times the token weight, and metrics of each.

    Raises:
      ValueError: an unknown divergence, or a setting that needs more than a cached
        teacher.
    """
    name, where = objective.divergence, targets.scored
    if name not in DIVERGENCES:
        raise ValueError(
            f"objective.divergence={name!r}; expected one of {DIVERGENCES}"
        )
    check_teacher(teacher_logits, objective)
    columns = VocabArguments(vocab_size=vocab_size, vocab_axis=vocab_axis)
    models = student_logits, teacher_logits
    if name.startswith("dac_kl"):
        result = _dac_kl(clip_params, *models, where, objective, columns)
        values, metrics = result.loss, {name: result.loss} | _dac_kl_metrics(result)
    else:
        values = _whole_divergence(*models, targets, objective, columns)
        metrics = {name: values}
    factor = _token_weights(*models, where, objective, columns)
    if factor is not None:
        metrics["token_weight"] = factor
        # A position of weight 0 does not count, even if its divergence is infinite.
        values = jnp.where(factor > 0, factor * values, 0.0)
    return values, {k: masked_sum(v, where) for k, v in metrics.items()}


def check_teacher(
    teacher: Float[Array, "..."] | TopKTeacher, objective: Objective
) -> None:
    """Refuse a teacher of K classes where the objective reads all of them.

    Raises:
      ValueError: names the setting, its value and the values that are allowed.
    """
    if isinstance(teacher, TopKTeacher):
        check_cached_teacher(
            objective.divergence,
            objective.token_weights,
            temperature=objective.temperature,
        )


def _dac_kl(
    clip_params: Params | None,
    student_logits: Float[Array, "*B V"],
    teacher_logits: Float[Array, "*B W"] | TopKTeacher,
    where: Bool[Array, "*B"],
    objective: Objective,
    columns: VocabArguments,
) -> DacKl:
    """DAC-KL with learned limits, or with those of the objective."""
    models = student_logits, teacher_logits
    if objective.divergence == "dac_kl":
        return losses.dac_kl(
            clip_params,
            *models,
            where=where,
            width=objective.width,
            normalization=objective.normalization,
            prior_weight=objective.prior_weight,
            **columns,
        )
    return losses.dac_kl_fixed(
        (objective.lower, objective.upper),
        *models,
        where=where,
        num_candidates=objective.num_candidates,
        width=objective.width,
        normalization=objective.normalization,
        **columns,
    )


def _dac_kl_metrics(result: DacKl) -> dict[str, Float[Array, "*B"]]:
    """The limits, and how much of the teacher they keep."""
    return {
        "lower": result.lower,
        "lower_variance": jnp.square(result.lower - LIMITS_START["lower"]),
        "upper": result.upper,
        "upper_variance": jnp.square(result.upper - LIMITS_START["upper"]),
        "at_bound": at_bound(result.lower, result.upper),
        "kept_mass": result.kept_mass,
        "kept_classes": result.kept_classes,
        "candidate_mass": result.candidate_mass,
    }


def _whole_divergence(
    student_logits: Float[Array, "*B V"],
    teacher_logits: Float[Array, "*B W"] | TopKTeacher,
    targets: Targets,
    objective: Objective,
    columns: VocabArguments,
) -> Float[Array, "*B"]:
    """A divergence of all classes; of a cached teacher, of its K classes and a tail."""
    where, name = targets.scored, objective.divergence
    if isinstance(teacher_logits, TopKTeacher):
        return losses.forward_kl_top_k(
            student_logits, teacher_logits, where=where, **columns
        )
    labels = (targets.labels,) if name in FROM_SAMPLES else ()
    return getattr(losses, name)(
        student_logits,
        teacher_logits,
        *labels,
        where=where,
        temperature=objective.temperature,
        **columns,
        **_given(objective, DIVERGENCE_SETTINGS.get(name, ())),
    )


def _token_weights(
    student_logits: Float[Array, "*B V"],
    teacher_logits: Float[Array, "*B W"] | TopKTeacher,
    where: Bool[Array, "*B"],
    objective: Objective,
    columns: VocabArguments,
) -> Float[Array, "*B"] | None:
    """Token weights that read only their own position; None where there are none."""
    models = {
        "student_entropy": (student_logits,),
        "teacher_entropy": (teacher_logits,),
        "acceptance": (student_logits, teacher_logits),
    }
    name = objective.token_weights
    if name not in models:
        return None
    given = _given(objective, TOKEN_WEIGHT_SETTINGS[name], prefix="weight_")
    weights = getattr(losses, f"{name}_weights")
    return weights(*models[name], where=where, **columns, **given)


def label_discrepancy(
    student_logits: Float[Array, "*B V"],
    teacher_logits: Float[Array, "*B W"],
    targets: Targets,
    *,
    vocab_size: int | None = None,
    vocab_axis: str | None = None,
) -> Float[Array, "*B"]:
    """|log p_t[label] - log q_t[label]| in responses, 0 elsewhere."""
    p, q = (
        losses.cross_entropy(
            logits,
            targets.labels,
            where=targets.where,
            vocab_size=vocab_size,
            vocab_axis=vocab_axis,
        )
        for logits in (teacher_logits, student_logits)
    )
    # Selected before the difference: inf - inf would be nan.
    return jnp.where(p == q, 0.0, jnp.abs(jnp.where(p == q, 0.0, p) - q))


def with_discrepancy_weights(
    targets: Targets, discrepancy: Float[Array, "*B T"], objective: Objective
) -> Targets:
    """`targets` whose token weights fall along each row with its discrepancy."""
    given = _given(objective, TOKEN_WEIGHT_SETTINGS["discrepancy"], prefix="weight_")
    factor = losses.discrepancy_weights(discrepancy, where=targets.where, **given)
    weights = targets.weights._replace(token=targets.weights.token * factor)
    return targets._replace(weights=weights)


def _given(
    objective: Objective, fields: tuple[str, ...], prefix: str = ""
) -> dict[str, Any]:
    """The fields that are set, by the names of a function's parameters."""
    values = {field: getattr(objective, field) for field in fields}
    return {k.removeprefix(prefix): v for k, v in values.items() if v is not None}
