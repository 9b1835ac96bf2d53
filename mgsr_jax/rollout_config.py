"""Settings of a rollout: which steps generate, and what may happen to a response.

rollout.policy decides which steps generate (training/replay.py draws the choice):

  off      none: every step trains on the data
  on       each with probability `probability`
  replay   adaptive off-policy, as in DistiLLM (arXiv 2402.03898)

rollout.intervention decides what the teacher may do to the student's responses:

  none       nothing
  scrg       correct one token a round, the student writes the rest again (scrg.py)
  skd        replace each token that it ranks low (interventions/skd.py)
  adaswitch  write the rest, once the models diverge (interventions/adaswitch.py)
"""

import dataclasses
from typing import Literal

from mgsr_jax import settings
from mgsr_jax.decoding.sampling import ANCESTRAL, GREEDY, Sampling
from mgsr_jax.interventions.adaswitch import Switch
from mgsr_jax.interventions.positions import Position, Rule
from mgsr_jax.interventions.skd import Acceptance

_READ_WITH = {
    "rounds": {"intervention": ("scrg",)},
    "position": {"intervention": ("scrg",)},
    "position_quantile": {"intervention": ("scrg",), "position": ("first",)},
    "position_discount": {"intervention": ("scrg",), "position": ("early",)},
    "teacher_token": {"intervention": ("scrg", "skd", "adaswitch")},
    "accept_top_k": {"intervention": ("skd",)},
    "draft_tokens": {"intervention": ("skd",)},
    "switch_ratio": {"intervention": ("adaswitch",)},
    "switch_window": {"intervention": ("adaswitch",)},
}
"""Settings that are read only together with these values of others."""


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Settings of a rollout: when a step generates its rows, and how.

    Attributes:
      policy: "off", "on" or "replay"; quoted in YAML, where a bare on means true.
      probability: with "on", the probability that a step generates.
      initial_ratio: with "replay", phi at the start.
      epsilon: with "replay", the rise of the validation loss that raises phi.
      capacity: with "replay", the sequences that the buffer holds.
      intervention: what the teacher may do to a response. "none": it trains on the
        samples unchanged. "scrg": it corrects one token a round, and the student writes
        the rest again. "skd": it replaces each token that is not among its most
        probable ones. "adaswitch": it writes the rest, once the models diverge.
      rounds: with "scrg", rounds of corrections.
      position: with "scrg", the corrected token, among those where student and teacher
        disagree. "argmax" (the paper): the largest KL(teacher || student). "first": the
        first whose KL is at least the `position_quantile` of the row's. "early": the
        largest KL times `position_discount` to the power of its index in the response.
        "random": any, with equal probability; a control.
      position_quantile: with "first", from 0 (the first disagreement) to 1.
      position_discount: with "early", above 0 and at most 1.
      teacher_token: how the teacher draws the tokens that it writes: "sample" (the
        papers), at temperature 1, or "argmax".
      accept_top_k: with "skd", a token of the student is kept if it is among so many of
        the teacher's most probable ones.
      draft_tokens: with "skd", tokens that the student drafts before the teacher reads;
        it changes only time and memory.
      switch_ratio: with "adaswitch", the teacher takes over at the first token whose
        KL(teacher || student) exceeds so many times its moving average.
      switch_window: with "adaswitch", tokens of the moving average; the first
        `switch_window` tokens of a response are always the student's.
      temperature: temperature of the student's sampling.
      top_k: keep the k most probable tokens; 0 keeps all.
      top_p: keep the fewest most probable tokens that hold this mass.
      samples: responses to each prompt of a step. batch_size counts prompts: a step has
        `samples` times as many generated rows, in as many more micro-batches.
      decode_rows: rows that are decoded at a time, over all devices and all
        micro-batches; a row that ends makes room for one that waits. A multiple of
        mesh.data x mesh.fsdp. none: all generated rows of a step, which reads the
        weights least often. Fewer rows take less memory and give the same samples.
      split_weights: split the weights that decode over mesh.fsdp and mesh.tensor, so
        that a device reads only its own part for each token; devices exchange sums of
        activations, two a layer. false: mesh.fsdp replicates them, for devices whose
        network is slow. Evaluations during training decode in the same way.
      max_new_tokens: tokens at which a response is cut; it then has no end-of-sequence.
        A list such as [[0, 64], [0.3, 256]] sets them by the share of training that is
        done: 64 at first, 256 from 30 % on. none: up to data.max_length.
    """

    policy: Literal["off", "on", "replay"] = "off"
    probability: float = 1.0
    initial_ratio: float = 0.0
    epsilon: float = 0.1
    capacity: int = 1000
    intervention: Literal["none", "scrg", "skd", "adaswitch"] = "scrg"
    rounds: int = 1
    position: Rule = "argmax"
    position_quantile: float = 0.9
    position_discount: float = 0.99
    teacher_token: Literal["sample", "argmax"] = "sample"
    accept_top_k: int = 25
    draft_tokens: int = 8
    switch_ratio: float = 3.0
    switch_window: int = 10
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    samples: int = 1
    decode_rows: int | None = None
    split_weights: bool = True
    max_new_tokens: int | tuple[tuple[float, int], ...] | None = None

    def check(self) -> None:
        """Refuse values that do not work.

        Raises:
          ValueError: names the field, its value and the values that are allowed.
        """
        settings.check_choices(self, "rollout.")
        positive = "capacity", "samples", "accept_top_k", "draft_tokens"
        positive += "switch_ratio", "switch_window", "decode_rows"
        settings.check_positive(self, *positive, section="rollout.")
        settings.check_not_negative(self, "top_k", "temperature", section="rollout.")
        for name in ("probability", "initial_ratio", "position_quantile"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"rollout.{name} must be in [0, 1], got {getattr(self, name)}"
                )
        for name in ("top_p", "position_discount"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"rollout.{name} must be in (0, 1], got {getattr(self, name)}"
                )
        if self.rounds < 1:
            raise ValueError(
                f"rollout.rounds={self.rounds}; expected 1 or more, or "
                "rollout.intervention: none, which trains on the samples unchanged"
            )
        self._check_unread()
        self._check_horizons()

    def _check_unread(self) -> None:
        """Refuse a setting of another intervention than the chosen one."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, readers in _READ_WITH.items():
            value = getattr(self, name)
            if value == defaults[name]:
                continue
            for other, values in readers.items():
                if getattr(self, other) not in values:
                    raise ValueError(
                        f"rollout.{name}={value!r} is read only with rollout.{other} "
                        f"{' or '.join(values)}, got {getattr(self, other)}; set "
                        f"rollout.{other}, or leave rollout.{name} out"
                    )

    def _check_horizons(self) -> None:
        shares = [share for share, _ in self._horizons]
        rise = shares[:1] == [0] and sorted(set(shares)) == shares and shares[-1] < 1
        if self.max_new_tokens is None:
            return
        if not rise or min(tokens for _, tokens in self._horizons) < 1:
            raise ValueError(
                f"rollout.max_new_tokens={self.max_new_tokens}; expected a number "
                "above 0, or a list of [share of training, number] whose shares "
                "rise from 0 to below 1, such as [[0, 64], [0.3, 256]]"
            )

    @property
    def _horizons(self) -> tuple[tuple[float, int], ...]:
        """`max_new_tokens` as a schedule; empty for None."""
        if isinstance(self.max_new_tokens, int):
            return ((0.0, self.max_new_tokens),)
        return self.max_new_tokens or ()

    def horizon(self, step: int, steps: int) -> int | None:
        """The most tokens of a response at `step`, counted from 0, out of `steps`.

        A step function: the last entry whose share of training has been reached.

        >>> config = RolloutConfig("on", max_new_tokens=((0.0, 64), (0.3, 256)))
        >>> [config.horizon(step, 10) for step in (0, 2, 3, 9)]
        [64, 64, 256, 256]
        """
        tokens = [tokens for share, tokens in self._horizons if share <= step / steps]
        return tokens[-1] if tokens else None

    def check_samples(self, *, temperature: float) -> None:
        """Refuse settings with which a token is no sample of the current student.

        Args:
          temperature: of the distributions that a divergence compares.

        Raises:
          ValueError: names the field, its value and the one that is needed.
        """
        needed = {"policy": "on", "probability": 1.0, "intervention": "none"}
        needed |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
        for name, value in needed.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"rollout.{name}={getattr(self, name)!r}, but "
                    "the divergence sampled_reverse_kl needs tokens that the "
                    f"student sampled, at the objective's temperature; set it to "
                    f"{value!r}, or use reverse_kl"
                )

    @property
    def always_generates(self) -> bool:
        """True where every step trains on generated rows."""
        return self.policy == "on" and self.probability == 1

    @property
    def sampling(self) -> Sampling:
        """How the student draws a token."""
        return Sampling(self.temperature, self.top_k, self.top_p)

    @property
    def teacher_sampling(self) -> Sampling:
        """How the teacher draws the tokens that it writes."""
        return ANCESTRAL if self.teacher_token == "sample" else GREEDY

    @property
    def error_position(self) -> Position:
        """The rule for the token that SCRG corrects."""
        quantile, discount = self.position_quantile, self.position_discount
        return Position(self.position, quantile, discount)

    @property
    def acceptance(self) -> Acceptance:
        """Settings of SKD."""
        return Acceptance(self.accept_top_k, self.draft_tokens, self.teacher_sampling)

    @property
    def switch(self) -> Switch:
        """Settings of AdaSwitch."""
        return Switch(self.switch_ratio, self.switch_window, self.teacher_sampling)
