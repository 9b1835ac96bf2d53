"""The objective of MGSR on one page: what is revised, and how much each part counts.

  L = sft * L_sft + token * L_token + span * L_span        (paper: plain sum, weights 1)

  L_sft    cross-entropy on the labels, ground-truth rows only (our choice: on the
           student's own samples it would teach its errors)
  L_token  DAC-KL on every scored position, or another divergence in its place
  L_span   span correlation on every scored pair of neighbours in one phrase

Each is a mean over its own count, taken once over the whole step: over all hosts,
devices and micro-batches. The counts depend on masks alone, so weights come first:
every position gets lambda_i / N_i, a micro-batch's loss is one weighted sum, and the
gradients of micro-batches add up to the gradient of the step, however it was split.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mgsr_jax import losses
from mgsr_jax.losses import Sum, masked_sum
from mgsr_jax.rows import NextTokenView, Rows, next_token_view
from mgsr_jax.typing import Model, Params

Divergence = Literal["dac_kl", "dac_kl_fixed", "forward_kl"]
DIVERGENCES = get_args(Divergence)


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights of the three losses and the settings of the token-level one.

    Attributes:
      sft: weight of the cross-entropy on ground-truth labels.
      token: weight of the token-level divergence.
      span: weight of the span correlation.
      divergence: "dac_kl" (limits from the clip network), "dac_kl_fixed" (limits
        `lower` and `upper`) or "forward_kl" (the whole distribution).
      num_candidates: most probable teacher classes that DAC-KL chooses from.
      width: softness of DAC-KL's mask, in quantiles.
      normalization: "teacher" renormalises what is kept of the teacher; "none".
      prior_weight: pulls the learned limits to (0.1, 0.98); 0 is the paper.
      lower: lower quantile limit of "dac_kl_fixed".
      upper: upper quantile limit of "dac_kl_fixed".
      temperature: of "forward_kl".
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

    @property
    def needs_teacher(self) -> bool:
        """Whether any part compares with a teacher."""
        return self.token != 0 or self.span != 0

    @property
    def needs_clip_network(self) -> bool:
        """Whether DAC-KL's limits are learned."""
        return self.token != 0 and self.divergence == "dac_kl"


class Weights(NamedTuple):
    """lambda_i / max(N_i, 1) at the positions that part i scores, 0 elsewhere."""

    sft: Float[Array, "*A B T"]
    token: Float[Array, "*A B T"]
    span: Float[Array, "*A B T"]


def position_weights(rows: Rows, objective: Objective) -> Weights:
    """The weights of every position of a step's rows, `[A, B, S]` or `[B, S]`."""
    view = next_token_view(rows)

    def spread(weight: float, where: Array) -> Array:
        return where * (weight / jnp.maximum(jnp.sum(where), 1))

    return Weights(
        sft=spread(objective.sft, _labelled(rows, view)),
        token=spread(objective.token, view.where),
        span=spread(objective.span, losses.span_pairs(view.span_ids, view.where)),
    )


def micro_batch_loss(
    params: Params,
    teacher_params: Params | None,
    rows: Rows,
    weights: Weights,
    *,
    student: Model,
    teacher: Model | None,
    objective: Objective,
    vocab_size: int | None,
    dtype: Any = jnp.float32,
    score_teacher: bool = False,
) -> tuple[Float[Array, ""], dict[str, Sum]]:
    """The weighted sum of the three losses over `rows` [B, S], and metrics as sums.

    `params` holds "student" and, where limits are learned, "clip_network"; `dtype` is
    that of the student's computation. `score_teacher` adds the teacher's own
    cross-entropy on the labels to the metrics.

    Raises:
      ValueError: a part compares with a teacher and there is none.
    """
    view = next_token_view(rows)
    cast = jax.tree.map(lambda p: p.astype(dtype), params["student"])
    student_logits = _logits(student, cast, view)
    total, metrics = jnp.zeros(()), {}

    labelled = _labelled(rows, view)

    if objective.sft:
        values = losses.cross_entropy(
            student_logits, view.labels, where=labelled, vocab_size=vocab_size
        )
        total += jnp.sum(weights.sft * values)
        metrics["sft"] = masked_sum(values, labelled)

    if not objective.needs_teacher:
        return total, metrics
    if teacher is None:
        raise ValueError(
            "objective.token and objective.span compare with a teacher, got None; pass "
            "one, or set both weights to 0 for plain fine-tuning"
        )
    teacher_logits = jax.lax.stop_gradient(_logits(teacher, teacher_params, view))
    if score_teacher:
        values = losses.cross_entropy(
            teacher_logits, view.labels, where=labelled, vocab_size=vocab_size
        )
        metrics["teacher_sft"] = masked_sum(values, labelled)

    distilled, found = distillation_loss(
        params.get("clip_network"),
        student_logits,
        teacher_logits,
        view,
        weights,
        objective=objective,
        vocab_size=vocab_size,
    )
    return total + distilled, metrics | found


def distillation_loss(
    clip_params: Params | None,
    student_logits: Float[Array, "B T V"],
    teacher_logits: Float[Array, "B T W"],
    view: NextTokenView,
    weights: Weights,
    *,
    objective: Objective,
    vocab_size: int | None,
) -> tuple[Float[Array, ""], dict[str, Sum]]:
    """The two parts that compare with the teacher: weighted sum and metrics."""
    total, metrics = jnp.zeros(()), {}
    if objective.token:
        values, metrics = token_loss(
            clip_params,
            student_logits,
            teacher_logits,
            view,
            objective=objective,
            vocab_size=vocab_size,
        )
        total += jnp.sum(weights.token * values)
    if objective.span:
        values = losses.span_correlation(
            student_logits,
            teacher_logits,
            view.span_ids,
            where=view.where,
            vocab_size=vocab_size,
        )
        total += jnp.sum(weights.span * values)
        pairs = losses.span_pairs(view.span_ids, view.where)
        metrics["span"] = masked_sum(values, pairs)
    return total, metrics


def token_loss(
    clip_params: Params | None,
    student_logits: Float[Array, "B T V"],
    teacher_logits: Float[Array, "B T W"],
    view: NextTokenView,
    *,
    objective: Objective,
    vocab_size: int | None,
) -> tuple[Float[Array, "B T"], dict[str, Sum]]:
    """The chosen divergence at every scored position, and what DAC-KL kept.

    Raises:
      ValueError: an unknown divergence.
    """
    if objective.divergence not in DIVERGENCES:
        raise ValueError(
            f"objective.divergence={objective.divergence!r}; expected one of "
            f"{DIVERGENCES}"
        )
    logits = (student_logits, teacher_logits)
    where = view.where
    if objective.divergence == "forward_kl":
        values = losses.forward_kl(
            *logits,
            where=where,
            vocab_size=vocab_size,
            temperature=objective.temperature,
        )
        return values, {"forward_kl": masked_sum(values, where)}
    settings = dict(
        where=where,
        vocab_size=vocab_size,
        width=objective.width,
        normalization=objective.normalization,
    )
    if objective.divergence == "dac_kl":
        result = losses.dac_kl(
            clip_params, *logits, prior_weight=objective.prior_weight, **settings
        )
    else:
        result = losses.dac_kl_fixed(
            (objective.lower, objective.upper),
            *logits,
            num_candidates=objective.num_candidates,
            **settings,
        )
    reported = {
        "lower": result.lower,
        "lower_variance": _squared_deviation(result.lower, where),
        "upper": result.upper,
        "upper_variance": _squared_deviation(result.upper, where),
        "at_bound": at_bound(result.lower, result.upper),
        "kept_mass": result.kept_mass,
        "kept_classes": result.kept_classes,
        "candidate_mass": result.candidate_mass,
    }
    metrics = {name: masked_sum(values, where) for name, values in reported.items()}
    return result.loss, {objective.divergence: masked_sum(result.loss, where)} | metrics


def at_bound(
    lower: Float[Array, "*B"], upper: Float[Array, "*B"], margin: float = 0.005
) -> Float[Array, "*B"]:
    """1 where a limit has run to an end of its range, (0, 0.5) and (0.5, 1)."""
    near_low = (lower < margin) | (lower > 0.5 - margin)
    near_high = (upper < 0.5 + margin) | (upper > 1 - margin)
    return (near_low | near_high).astype(jnp.float32)


def _squared_deviation(values: Array, where: Array) -> Array:
    """From the micro-batch's own mean: E[x^2] - E[x]^2 would lose it in float32."""
    return (values - losses.masked_mean(values, where)) ** 2


def _labelled(rows: Rows, view: NextTokenView) -> Array:
    return view.where & rows.ground_truth[..., None]


def _logits(model: Model, params: Any, view: NextTokenView) -> Array:
    hidden, _ = model.forward(params, view.inputs)
    return model.unembed(model.head_params(params), hidden)
