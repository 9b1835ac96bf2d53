"""The objective of MGSR on one page: what is revised, and how much each part counts.

  L = sft * L_sft + token * L_token + span * L_span        (paper: plain sum, weights 1)

  L_sft    cross-entropy on the labels, ground-truth rows only (our choice: on the
           student's own samples it would teach the student's errors)
  L_token  DAC-KL at every scored position, or another divergence in its place, each
           times the position's token weight (1 unless chosen); rows that the student
           wrote may have a divergence of their own
  L_span   span correlation at every scored pair of adjacent tokens in one phrase

Each part is a mean over its own count, taken once over the whole step: all hosts,
devices and micro-batches. The counts depend on masks only, so weights come first: each
position gets lambda_i / N_i, the loss of a micro-batch is one weighted sum, and the
gradients of micro-batches add up to the gradient of the step, however it was split.
`weighted_sum` computes it.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mgsr_jax import losses, settings
from mgsr_jax.divergences import (
    DIVERGENCE_SETTINGS,
    DIVERGENCES,
    FROM_SAMPLES,
    TOKEN_WEIGHT_SETTINGS,
    Divergence,
    TokenWeights,
    check_divergence_settings,
    check_token_weight_settings,
    fields_of,
)
from mgsr_jax.losses import LOWER_START, UPPER_START
from mgsr_jax.rows import Rows, next_token_view

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
      sample_divergence: divergence of the rows that the student wrote, given likewise;
        a step that generates then also trains on the data's rows of its prompts. none:
        `divergence`.
      num_candidates: DAC-KL chooses among this many most probable teacher classes.
      width: softness of DAC-KL's mask, in quantile levels.
      normalization: "teacher" renormalises the clipped teacher; "none" does not.
      clip_signal: what the network of "dac_kl" minimises. "prior": the loss and a pull
        of the limits towards (0.1, 0.98). "fidelity": KL(p_hat || q) + fidelity_weight
        KL(p_hat || p), p_hat the clipped teacher p, q the student. "unnormalised": sum
        w p log(p / q), w the mask; with `normalization` "none" and so for the student
        too it is the paper's form. docs/method.md compares them.
      prior_weight: the pull of "prior"; 0 trains the network on the loss only.
      fidelity_weight: setting of "fidelity"; a larger one keeps more of the teacher.
      lower: lower quantile limit of "dac_kl_fixed".
      upper: upper quantile limit of "dac_kl_fixed".
      temperature: divides both logits; DAC-KL has no temperature.
      teacher_temperature: setting of "forward_kl": divides the teacher's logits in
        place of `temperature`; below 1 the teacher is sharpened.
      alpha: setting of the skewed KLs, "alpha_beta_divergence" and "logit_difference";
        default: theirs.
      beta: setting of "jensen_shannon" and "alpha_beta_divergence"; default: theirs.
      head_mass: setting of "adaptive_kl"; default: its own.
      mix: the teacher's share in "taid", which requires it; constant over the run.
      threshold: setting of "entropy_gated_kl", in nats; default: its own.
      top_k: setting of "reverse_kl_top_k", a number of classes; default: its own.
      support: setting of "reverse_kl_top_k", "student" or "union"; default: its own.
      baseline: setting of "sampled_reverse_kl"; default: its own.
      token_weights: factor of the divergence at each position. "uniform": 1.
        "student_entropy": 1 where the student is uncertain. "teacher_entropy": 1 where
        the teacher is certain. "acceptance": 1 where the teacher accepts the student's
        most probable token. "discrepancy": falls along a row with the difference of the
        two models on its tokens so far. Functions of these names and "_weights" in
        mgsr_jax.losses have the equations.
      weight_threshold: entropy in nats above which a model is uncertain; default: that
        of the weights.
      weight_floor: weight where it is not 1, from 0 to 1; default: that of the weights.
      weight_top_k: number of most probable teacher classes that "acceptance" accepts;
        default: its own.
      weight_gain: what "discrepancy" adds to the first token's weight; default: its
        own.
    """

    sft: float = 1.0
    token: float = 1.0
    span: float = 1.0
    divergence: Divergence = "dac_kl"
    sample_divergence: Divergence | None = None
    num_candidates: int = 512
    width: float = 0.01
    normalization: Literal["teacher", "none"] = "teacher"
    clip_signal: Literal["prior", "fidelity", "unnormalised"] = "prior"
    prior_weight: float = 10.0
    fidelity_weight: float = 1.0
    lower: float = 0.1
    upper: float = 0.98
    temperature: float = 1.0
    teacher_temperature: float | None = None
    alpha: float | None = None
    beta: float | None = None
    head_mass: float | None = None
    mix: float | None = None
    threshold: float | None = None
    top_k: int | None = None
    support: Literal["student", "union"] | None = None
    baseline: float | None = None
    token_weights: TokenWeights = "uniform"
    weight_threshold: float | None = None
    weight_floor: float | None = None
    weight_top_k: int | None = None
    weight_gain: float | None = None

    def check(self) -> None:
        """Refuse values that do not work, alone or with one another.

        Raises:
          ValueError: names the field, its value and the values that are allowed.
        """
        names, section = ("num_candidates", "width", "temperature"), "objective."
        settings.check_choices(self, section)
        settings.check_positive(self, *names, section=section)
        weights = (self.sft, self.token, self.span)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(
                "objective.sft, .token and .span must be at least 0 and one of them "
                f"above, got {weights}"
            )
        self._check_dac_kl(section)
        if self.sample_divergence not in (None, *DIVERGENCES):
            raise ValueError(
                f"objective.sample_divergence={self.sample_divergence!r}; expected one "
                f"of {DIVERGENCES}"
            )
        if len(self.divergences) > 1 and self.divergence in FROM_SAMPLES:
            raise ValueError(
                f"objective.divergence={self.divergence!r} scores only rows that the "
                "student wrote; set objective.sample_divergence to it, and "
                "objective.divergence to one for the data's rows"
            )
        check_divergence_settings(
            self.divergences,
            {name: getattr(self, name) for name in fields_of(DIVERGENCE_SETTINGS)},
            temperature=self.temperature,
        )
        check_token_weight_settings(
            self.token_weights,
            {name: getattr(self, name) for name in fields_of(TOKEN_WEIGHT_SETTINGS)},
        )

    def _check_dac_kl(self, section: str) -> None:
        both = "prior_weight", "fidelity_weight"
        settings.check_not_negative(self, *both, section=section)
        if self.clip_signal == "fidelity" and self.normalization == "none":
            raise ValueError(
                "objective.clip_signal='fidelity' needs the renormalised teacher, got "
                "objective.normalization='none'; set it to 'teacher'"
            )
        if not 0 <= self.lower < self.upper <= 1:
            raise ValueError(
                "objective needs 0 <= lower < upper <= 1, got "
                f"lower={self.lower}, upper={self.upper}"
            )

    @property
    def divergences(self) -> tuple[str, ...]:
        """Divergence of all rows; or of the data's rows, then of the student's."""
        if self.sample_divergence in (None, self.divergence):
            return (self.divergence,)
        return (self.divergence, self.sample_divergence)

    @property
    def needs_data(self) -> bool:
        """True where a step that generates also trains on its prompts' data rows."""
        return self.sft != 0 or (self.token != 0 and len(self.divergences) > 1)

    @property
    def needs_teacher(self) -> bool:
        """True where any part compares with a teacher."""
        return self.token != 0 or self.span != 0

    @property
    def weighs_by_discrepancy(self) -> bool:
        """True where a token's weight depends on the tokens of its row before it."""
        return self.token != 0 and self.token_weights == "discrepancy"

    @property
    def needs_clip_network(self) -> bool:
        """True where DAC-KL's limits are learned."""
        return self.token != 0 and "dac_kl" in self.divergences


class Weights(NamedTuple):
    """lambda_i / max(N_i, 1) at the positions that part i scores, 0 elsewhere."""

    sft: Float[Array, "*A B T"]
    token: Float[Array, "*A B T"]
    span: Float[Array, "*A B T"]


def position_weights(rows: Rows, objective: Objective) -> Weights:
    """Weights of every position of a step's rows, `[A, B, S]` or `[B, S]`."""
    view = next_token_view(rows)
    scored = scored_positions(rows, objective)

    def spread(weight: float, where: Bool[Array, "*A B T"]) -> Float[Array, "*A B T"]:
        return where * (weight / jnp.maximum(jnp.sum(where), 1))

    return Weights(
        sft=spread(objective.sft, view.where & rows.ground_truth[..., None]),
        token=spread(objective.token, scored),
        span=spread(objective.span, losses.span_pairs(view.span_ids, view.where)),
    )


def scored_positions(rows: Rows, objective: Objective) -> Bool[Array, "*A B T"]:
    """Positions where the divergence counts: all responses, or only the student's."""
    where = next_token_view(rows).where
    if objective.divergence in FROM_SAMPLES:
        where = where & ~rows.ground_truth[..., None]
    return where
