"""The compiled rollout: the student responds to a step's prompts, SCRG revises.

rollout.policy decides which steps generate (training/replay.py draws the choice):

  off      none: every step trains on the data
  on       each with probability `probability`
  replay   adaptive off-policy, as in DistiLLM (arXiv 2402.03898)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mgsr_jax import settings
from mgsr_jax.decoding.decode import Decoding, decode, start
from mgsr_jax.decoding.sampling import STUDENT_STREAM, Sampling, row_keys
from mgsr_jax.rows import Rows, blank_padding, prompts_only
from mgsr_jax.scrg import ScrgInfo, revise
from mgsr_jax.typing import Model, Params, PRNGKey

T = TypeVar("T")

TeacherHidden = Float[Array, "B S D"]
"""Hidden states of the teacher on rows; index t predicts token t + 1."""

Rollout = Callable[
    [Params, Any, tuple[Rows, ...], PRNGKey],
    tuple[tuple[Rows, ...], tuple[ScrgInfo, ...], tuple[TeacherHidden | None, ...]],
]
"""(student params, teacher params, micro-batches of prompts, key) -> micro-batches of
samples, the corrections, and the teacher's hidden states where the teacher ran."""


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Where a step's rows come from.

    Attributes:
      policy: "off", "on" or "replay"; quoted in YAML, where a bare on means true.
      probability: with "on", the probability that a step generates.
      initial_ratio: with "replay", phi at the start.
      epsilon: with "replay", the rise of the validation loss that raises phi.
      capacity: with "replay", the sequences that the buffer holds.
      rounds: rounds of SCRG; 0 trains on the samples unchanged.
      teacher_token: "sample" (the paper) or "argmax".
      temperature: temperature of the student's sampling.
      top_k: keep the k most probable tokens; 0 keeps all.
      top_p: keep the fewest most probable tokens that hold this mass.
    """

    policy: Literal["off", "on", "replay"] = "off"
    probability: float = 1.0
    initial_ratio: float = 0.0
    epsilon: float = 0.1
    capacity: int = 1000
    rounds: int = 1
    teacher_token: Literal["sample", "argmax"] = "sample"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self) -> None:
        """Refuse values that do not work.

        Raises:
          ValueError: names the field, its value and the values that are allowed.
        """
        settings.check_choices(self, "rollout.")
        settings.check_positive(self, "capacity", section="rollout.")
        settings.check_not_negative(self, "top_k", section="rollout.")
        for name in ("probability", "initial_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"rollout.{name} must be in [0, 1], got {getattr(self, name)}"
                )
        if self.rounds < 0 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "rollout needs rounds >= 0, temperature >= 0 and 0 < top_p <= 1, got "
                f"rounds={self.rounds}, temperature={self.temperature}, "
                f"top_p={self.top_p}"
            )

    def check_samples(self, *, temperature: float) -> None:
        """Refuse settings with which a token is no sample of the current student.

        Args:
          temperature: of the distributions that a divergence compares.

        Raises:
          ValueError: names the field, its value and the one that is needed.
        """
        needed = {"policy": "on", "probability": 1.0, "rounds": 0}
        needed |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
        for name, value in needed.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"rollout.{name}={getattr(self, name)!r}, but "
                    "objective.divergence=sampled_reverse_kl needs tokens that the "
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


def make_rollout(
    student: Model,
    teacher: Model,
    config: RolloutConfig,
    *,
    eos_ids: tuple[int, ...],
    vocab_size: int | None = None,
    prefill_width: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Rollout:
    """A jitted `rollout(student_params, teacher_params, micro_batches, key)`.

    The student responds to the prompts of a step and SCRG revises the responses; their
    spans are not known yet. As many rows as a micro-batch has are decoded at a time.
    The caches of all rows of the step are kept meanwhile, with SCRG the teacher's too.

    Args:
      student, teacher: the models.
      config: sampling and SCRG; where rows come from is decided elsewhere.
      eos_ids: tokens that end a response.
      vocab_size: columns of logits at or beyond it are padding.
      prefill_width: no prompt is longer than this.
      dtype: of the decoder's weights and cache.

    Raises:
      ValueError: a field of `config` has a value that does not work.
    """
    config.check()
    spec = _Spec(student, teacher, config, eos_ids, vocab_size, prefill_width, dtype)
    return jax.jit(functools.partial(_roll_out, spec))


@dataclasses.dataclass(frozen=True)
class _Spec:
    """The arguments of `make_rollout`."""

    student: Model
    teacher: Model
    config: RolloutConfig
    eos_ids: tuple[int, ...]
    vocab_size: int | None
    prefill_width: int | None
    dtype: DTypeLike

    def decoding(self, decode_rows: int, width: int) -> Decoding:
        """How rows of this width are extended."""
        return Decoding(
            max_length=width,
            eos_ids=self.eos_ids,
            sampling=self.config.sampling,
            vocab_size=self.vocab_size,
            decode_rows=decode_rows,
        )


def _roll_out(
    spec: _Spec,
    student_params: Params,
    teacher_params: Params,
    micro_batches: tuple[Rows, ...],
    key: PRNGKey,
) -> tuple[tuple[Rows, ...], tuple[ScrgInfo, ...], tuple[TeacherHidden | None, ...]]:
    """Sample a response to every prompt, then correct and re-generate it."""
    student, config = spec.student, spec.config
    params = student.decode_params(student_params, spec.dtype)
    rows, parts = _joined(micro_batches), len(micro_batches)
    decoding = spec.decoding(*micro_batches[0].tokens.shape)
    state = start(
        student,
        student_params,
        prompts_only(rows),
        dtype=spec.dtype,
        prefill_width=spec.prefill_width,
    )
    keys = row_keys(key, rows.example, STUDENT_STREAM, 0)
    state = decode(student, params, state, keys=keys, decoding=decoding)
    state, info, teacher_hidden = revise(
        student,
        params,
        spec.teacher,
        teacher_params,
        state,
        key=key,
        decoding=decoding,
        rounds=config.rounds,
        teacher_token=config.teacher_token,
    )
    return (
        _split(blank_padding(state.rows), parts),
        _split(info, parts, axis=1),
        _split(teacher_hidden if config.rounds else None, parts),
    )


def _joined(micro_batches: tuple[Rows, ...]) -> Rows:
    """All rows as one batch, in which every device keeps the rows that it has."""

    def join(*parts: Array) -> Array:
        return jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])

    return jax.tree.map(join, *micro_batches)


def _split(tree: T, parts: int, axis: int = 0) -> tuple[T, ...]:
    """The inverse of `_joined`, for leaves whose rows are along `axis`."""

    def part(i: int) -> T:
        def take(x: Array) -> Array:
            size = x.shape[axis] // parts
            by_part = x.reshape(*x.shape[:axis], size, parts, *x.shape[axis + 1 :])
            return jax.lax.index_in_dim(by_part, i, axis + 1, keepdims=False)

        return jax.tree.map(take, tree)

    return tuple(part(i) for i in range(parts))
