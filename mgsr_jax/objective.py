"""The objective of MGSR on one page: what is revised, and how much each part counts.

  L = sft * L_sft + token * L_token + span * L_span        (paper: plain sum, weights 1)

  L_sft    cross-entropy on the labels, ground-truth rows only (our choice: on the
           student's own samples it would teach the student's errors)
  L_token  DAC-KL at every scored position, or another divergence in its place
  L_span   span correlation at every scored pair of adjacent tokens in one phrase

Each part is a mean over its own count, taken once over the whole step: all hosts,
devices and micro-batches. The counts depend on masks only, so weights come first: each
position gets lambda_i / N_i, the loss of a micro-batch is one weighted sum, and the
gradients of micro-batches add up to the gradient of the step, however it was split.
"""

import dataclasses
from typing import Literal, NamedTuple, TypedDict

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mgsr_jax import losses, settings
from mgsr_jax.divergences import (
    DIVERGENCE_SETTINGS,
    DIVERGENCES,
    Divergence,
    check_divergence_settings,
)
from mgsr_jax.losses import (
    LOWER_START,
    UPPER_START,
    DacKl,
    Sum,
    TopKTeacher,
    at_bound,
    masked_sum,
)
from mgsr_jax.rows import Rows, next_token_view
from mgsr_jax.typing import Leaf, Params

LIMITS_START = {"lower": LOWER_START, "upper": UPPER_START}
"""DAC-KL's limits at the start; their variances are reported around these."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights of the three losses and the settings of the token-level one.

    Attributes:
      sft: weight of the cross-entropy on ground-truth labels.
      token: weight of the token-level divergence.
      span: weight of the span correlation.
      divergence: "dac_kl" (limits from the clip network), "dac_kl_fixed" (the limits
        `lower` and `upper`), or a divergence of whole distributions, by its function's
        name in mgsr_jax.losses.
      num_candidates: DAC-KL chooses among this many most probable teacher classes.
      width: softness of DAC-KL's mask, in quantile levels.
      normalization: "teacher" renormalises the clipped teacher; "none" does not.
      prior_weight: pull of the learned limits towards (0.1, 0.98); 0 is the paper.
      lower: lower quantile limit of "dac_kl_fixed".
      upper: upper quantile limit of "dac_kl_fixed".
      temperature: divides both logits; DAC-KL has no temperature.
      alpha: setting of the skewed KLs and "alpha_beta_divergence"; default: theirs.
      beta: setting of "jensen_shannon" and "alpha_beta_divergence"; default: theirs.
      head_mass: setting of "adaptive_kl"; default: its own.
      mix: the teacher's share in "taid", which requires it; constant over the run.
    """

    sft: float = 1.0
    token: float = 1.0
    span: float = 1.0
    divergence: Divergence = "dac_kl"
    num_candidates: int = 512
    width: float = 0.01
    normalization: Literal["teacher", "none"] = "teacher"
    prior_weight: float = 10.0
    lower: float = 0.1
    upper: float = 0.98
    temperature: float = 1.0
    alpha: float | None = None
    beta: float | None = None
    head_mass: float | None = None
    mix: float | None = None

    def check(self) -> None:
        """Refuse values that do not work, alone or with one another.

        Raises:
          ValueError: names the field, its value and the values that are allowed.
        """
        names, section = ("num_candidates", "width", "temperature"), "objective."
        settings.check_choices(self, section)
        settings.check_positive(self, *names, section=section)
        settings.check_not_negative(self, "prior_weight", section=section)
        weights = (self.sft, self.token, self.span)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(
                "objective.sft, .token and .span must be at least 0 and one of them "
                f"above, got {weights}"
            )
        if not 0 <= self.lower < self.upper <= 1:
            raise ValueError(
                "objective needs 0 <= lower < upper <= 1, got "
                f"lower={self.lower}, upper={self.upper}"
            )
        fields = ("alpha", "beta", "head_mass", "mix")
        own = {field: getattr(self, field) for field in fields}
        check_divergence_settings(self.divergence, own, temperature=self.temperature)

    @property
    def needs_teacher(self) -> bool:
        """True where any part compares with a teacher."""
        return self.token != 0 or self.span != 0

    @property
    def needs_clip_network(self) -> bool:
        """True where DAC-KL's limits are learned."""
        return self.token != 0 and self.divergence == "dac_kl"


class Weights(NamedTuple):
    """lambda_i / max(N_i, 1) at the positions that part i scores, 0 elsewhere."""

    sft: Float[Array, "*A B T"]
    token: Float[Array, "*A B T"]
    span: Float[Array, "*A B T"]


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


def position_weights(rows: Rows, objective: Objective) -> Weights:
    """Weights of every position of a step's rows, `[A, B, S]` or `[B, S]`."""
    view = next_token_view(rows)

    def spread(weight: float, where: Bool[Array, "*A B T"]) -> Float[Array, "*A B T"]:
        return where * (weight / jnp.maximum(jnp.sum(where), 1))

    return Weights(
        sft=spread(objective.sft, view.where & rows.ground_truth[..., None]),
        token=spread(objective.token, view.where),
        span=spread(objective.span, losses.span_pairs(view.span_ids, view.where)),
    )


def make_targets(rows: Rows, weights: Weights) -> Targets:
    """The targets of `rows`, whose positions have these weights."""
    view = next_token_view(rows)
    return Targets(
        labels=view.labels,
        where=view.where,
        span_ids=view.span_ids,
        scored=view.where,
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

      L = sum_t  w_sft[t] CE_t + w_token[t] D_t + w_span[t] span_t

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
            clip_params, *models, targets.scored, objective, **columns
        )
        total += jnp.sum(weights.token * values)
        metrics |= token_metrics
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
    where: Bool[Array, "*B"],
    objective: Objective,
    *,
    vocab_size: int | None = None,
    vocab_axis: str | None = None,
) -> tuple[Float[Array, "*B"], dict[str, Sum]]:
    """The chosen divergence at every scored position, and its metrics.

    Raises:
      ValueError: an unknown divergence, or one that needs more than a cached teacher.
    """
    name = objective.divergence
    if name not in DIVERGENCES:
        raise ValueError(
            f"objective.divergence={name!r}; expected one of {DIVERGENCES}"
        )
    columns = VocabArguments(vocab_size=vocab_size, vocab_axis=vocab_axis)
    models = student_logits, teacher_logits
    if name.startswith("dac_kl"):
        result = _dac_kl(clip_params, *models, where, objective, columns)
        metrics = {name: result.loss} | _dac_kl_metrics(result)
        return result.loss, {k: masked_sum(v, where) for k, v in metrics.items()}
    values = _whole_divergence(*models, where, objective, columns)
    return values, {name: masked_sum(values, where)}


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
    where: Bool[Array, "*B"],
    objective: Objective,
    columns: VocabArguments,
) -> Float[Array, "*B"]:
    """A divergence of all classes; of a cached teacher, of its K classes and a tail."""
    name = objective.divergence
    if isinstance(teacher_logits, TopKTeacher):
        if name != "forward_kl":
            raise ValueError(
                f"objective.divergence={name!r} needs the teacher's whole distribution "
                "and a cached teacher has K classes; use forward_kl or a DAC-KL"
            )
        if objective.temperature != 1:
            raise ValueError(
                f"objective.temperature={objective.temperature}; a cached teacher "
                "requires temperature 1"
            )
        return losses.forward_kl_top_k(
            student_logits, teacher_logits, where=where, **columns
        )
    fields = DIVERGENCE_SETTINGS.get(name, ())
    chosen = {field: getattr(objective, field) for field in fields}
    given = {field: value for field, value in chosen.items() if value is not None}
    return getattr(losses, name)(
        student_logits,
        teacher_logits,
        where=where,
        temperature=objective.temperature,
        **columns,
        **given,
    )
