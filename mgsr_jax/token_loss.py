"""The token-level loss of logits: a divergence times a token weight.

  r_t D_t

D is the objective's divergence; rows that the student wrote may have another one. The
token weight r is formed here with the logits where it reads only its own position.
"discrepancy" reads the row's earlier positions too: `with_discrepancy_weights` makes it
a factor of the position's weight, before a row is divided into chunks.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mgsr_jax import losses
from mgsr_jax.divergences import (
    DIVERGENCE_SETTINGS,
    DIVERGENCES,
    FROM_CACHE,
    FROM_SAMPLES,
    TOKEN_WEIGHT_SETTINGS,
    check_cached_teacher,
)
from mgsr_jax.loss_targets import Targets, VocabArguments, by_teacher
from mgsr_jax.losses import DacKl, Sum, TopKTeacher, at_bound, masked_sum
from mgsr_jax.objective import LIMITS_START, Objective
from mgsr_jax.typing import Params


def token_loss(
    clip_params: Params | None,
    student_logits: Float[Array, "*B V"],
    teacher_logits: Float[Array, "*B W"] | TopKTeacher,
    targets: Targets,
    objective: Objective,
    *,
    vocab_size: int | None = None,
    vocab_axis: str | None = None,
    teachers: tuple[str, ...] = (),
) -> tuple[Float[Array, "*B"], dict[str, Sum]]:
    """The chosen divergence times the token weight, and metrics of each.

    `teachers` are the names of several teachers, by which the divergence is reported.

    Raises:
      ValueError: an unknown divergence, or a setting that needs more than a cached
        teacher.
    """
    check_teacher(teacher_logits, objective)
    columns = VocabArguments(vocab_size=vocab_size, vocab_axis=vocab_axis)
    models = student_logits, teacher_logits
    terms, metrics = [], {}
    for name, own in _by_divergence(targets, objective).items():
        found = _divergence(name, clip_params, *models, own, objective, columns)
        terms.append(found[name])
        metrics |= {k: masked_sum(v, own.scored) for k, v in found.items()}
        metrics |= by_teacher(name, found[name], own.scored, own, teachers)
    values = functools.reduce(jnp.add, terms)
    factor = _token_weights(*models, targets.scored, objective, columns)
    if factor is not None:
        metrics["token_weight"] = masked_sum(factor, targets.scored)
        # A position of weight 0 does not count, even if its divergence is infinite.
        values = jnp.where(factor > 0, factor * values, 0.0)
    return values, metrics


def _by_divergence(targets: Targets, objective: Objective) -> dict[str, Targets]:
    """The targets of each divergence: those of the data's rows, and the student's."""
    names = objective.divergences
    if len(names) == 1:
        return {names[0]: targets}
    scored, labelled = targets.scored, targets.labelled
    parts = scored & labelled, scored & ~labelled
    return {
        name: targets._replace(scored=part)
        for name, part in zip(names, parts, strict=True)
    }


def _divergence(
    name: str,
    clip_params: Params | None,
    student_logits: Float[Array, "*B V"],
    teacher_logits: Float[Array, "*B W"] | TopKTeacher,
    targets: Targets,
    objective: Objective,
    columns: VocabArguments,
) -> dict[str, Float[Array, "*B"]]:
    """The divergence `name` at each position, and its metrics.

    Raises:
      ValueError: there is no divergence of this name.
    """
    models = student_logits, teacher_logits
    if name not in DIVERGENCES:
        raise ValueError(
            f"objective.divergence={name!r}; expected one of {DIVERGENCES}"
        )
    if isinstance(teacher_logits, TopKTeacher) and name not in FROM_CACHE:
        # A divergence of the student's rows: a cached teacher has read none of them.
        return {name: jnp.zeros(targets.scored.shape)}
    if not name.startswith("dac_kl"):
        return {name: _whole_divergence(name, *models, targets, objective, columns)}
    result = _dac_kl(name, clip_params, *models, targets.scored, objective, columns)
    return {name: result.loss} | _dac_kl_metrics(result)


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
            teacher_temperature=objective.teacher_temperature,
        )


def _dac_kl(
    name: str,
    clip_params: Params | None,
    student_logits: Float[Array, "*B V"],
    teacher_logits: Float[Array, "*B W"] | TopKTeacher,
    where: Bool[Array, "*B"],
    objective: Objective,
    columns: VocabArguments,
) -> DacKl:
    """DAC-KL with learned limits, or with those of the objective."""
    models = student_logits, teacher_logits
    if name == "dac_kl":
        return losses.dac_kl(
            clip_params,
            *models,
            where=where,
            width=objective.width,
            normalization=objective.normalization,
            signal=_clip_signal(objective),
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


def _clip_signal(objective: Objective) -> losses.ClipSignal:
    if objective.clip_signal == "prior":
        return losses.ClipPrior(objective.prior_weight)
    if objective.clip_signal == "fidelity":
        return losses.ClipFidelity(objective.fidelity_weight)
    return losses.ClipUnnormalised()


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
    name: str,
    student_logits: Float[Array, "*B V"],
    teacher_logits: Float[Array, "*B W"] | TopKTeacher,
    targets: Targets,
    objective: Objective,
    columns: VocabArguments,
) -> Float[Array, "*B"]:
    """A divergence of all classes; of a cached teacher, of its K classes and a tail."""
    where = targets.scored
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
