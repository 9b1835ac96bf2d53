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
from mgsr_jax.decoding.decode import DecodeState, Decoding, decode, start
from mgsr_jax.decoding.sampling import STUDENT_STREAM, Sampling, row_keys, sample_keys
from mgsr_jax.rows import Rows, blank_padding, prompts_only
from mgsr_jax.scrg import ScrgInfo, revise
from mgsr_jax.typing import Leaf, Model, Params, PRNGKey

T = TypeVar("T")

TeacherHidden = Float[Array, "B S D"]
"""Hidden states of the teacher on rows; index t predicts token t + 1."""

Rollout = Callable[
    [Params, Any, tuple[Rows, ...], PRNGKey, int | None],
    tuple[tuple[Rows, ...], tuple[ScrgInfo, ...], tuple[TeacherHidden | None, ...]],
]
"""(student params, teacher params, micro-batches of prompts, key, most tokens of a
response) -> micro-batches of samples, the corrections, and the teacher's hidden states
where the teacher ran."""


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Settings of a rollout: when a step generates its rows, and how.

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
      samples: responses to each prompt of a step. batch_size counts prompts: a step has
        `samples` times as many generated rows, in as many more micro-batches.
      max_new_tokens: tokens at which a response is cut; it then has no end-of-sequence.
        A list such as [[0, 64], [0.3, 256]] sets them by the share of training that is
        done: 64 at first, 256 from 30 % on. none: up to data.max_length.
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
    samples: int = 1
    max_new_tokens: int | tuple[tuple[float, int], ...] | None = None

    def check(self) -> None:
        """Refuse values that do not work.

        Raises:
          ValueError: names the field, its value and the values that are allowed.
        """
        settings.check_choices(self, "rollout.")
        settings.check_positive(self, "capacity", "samples", section="rollout.")
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
        self._check_horizons()

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
        needed = {"policy": "on", "probability": 1.0, "rounds": 0}
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
    """A jitted `rollout(student_params, teacher_params, micro_batches, key, horizon)`.

    The student responds to the prompts of a step and SCRG revises the responses; their
    spans are not known yet. A prompt is prefilled once for all of its samples; the
    result has the micro-batches of the first samples, then of the second, and so on.
    `horizon` is the most tokens of a response, or None; it is traced, so another number
    does not compile the rollout again.

    As many rows as a micro-batch has are decoded at a time. The caches of all rows of
    the step are kept meanwhile, with SCRG the teacher's too.

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

    def decoding(self, decode_rows: int, width: int, horizon: Leaf | None) -> Decoding:
        """How rows of this width are extended."""
        return Decoding(
            max_length=width,
            max_new_tokens=horizon,
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
    horizon: Leaf | None = None,
) -> tuple[tuple[Rows, ...], tuple[ScrgInfo, ...], tuple[TeacherHidden | None, ...]]:
    """Sample responses to every prompt, then correct and re-generate them."""
    student, config = spec.student, spec.config
    params = student.decode_params(student_params, spec.dtype)
    decode_rows, width = micro_batches[0].tokens.shape
    decoding = spec.decoding(decode_rows, width, horizon)
    state = _prefilled(spec, student_params, micro_batches)
    shape = (decode_rows, config.samples, len(micro_batches))
    by_sample = sample_keys(key, config.samples)[None, :, None]
    key = jnp.broadcast_to(by_sample, shape).reshape(-1)
    keys = row_keys(key, state.rows.example, STUDENT_STREAM, 0)
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
    parts = config.samples * len(micro_batches)
    return (
        _split(blank_padding(state.rows), parts),
        _split(info, parts, axis=1),
        _split(teacher_hidden if config.rounds else None, parts),
    )


def _prefilled(
    spec: _Spec, params: Params, micro_batches: tuple[Rows, ...]
) -> DecodeState:
    """The prompts of all micro-batches, once for each of their samples."""
    prompts = prompts_only(_joined(micro_batches))
    state = start(
        spec.student,
        params,
        prompts,
        dtype=spec.dtype,
        prefill_width=spec.prefill_width,
    )
    return _repeated(state, spec.config.samples, len(micro_batches))


def _joined(micro_batches: tuple[Rows, ...]) -> Rows:
    """All rows as one batch, in which every device keeps the rows that it has."""

    def join(*parts: Array) -> Array:
        return jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])

    return jax.tree.map(join, *micro_batches)


def _repeated(tree: T, samples: int, parts: int) -> T:
    """Joined rows `samples` times: all parts of the first sample, then of the second.

    Every device keeps the rows that it has.
    """

    def repeat(x: Array) -> Array:
        by_part = x.reshape(-1, 1, parts, *x.shape[1:])
        shape = (by_part.shape[0], samples, *by_part.shape[2:])
        return jnp.broadcast_to(by_part, shape).reshape(-1, *x.shape[1:])

    return jax.tree.map(repeat, tree)


def _split(tree: T, parts: int, axis: int = 0) -> tuple[T, ...]:
    """The inverse of `_joined`, for leaves whose rows are along `axis`."""

    def part(i: int) -> T:
        def take(x: Array) -> Array:
            size = x.shape[axis] // parts
            by_part = x.reshape(*x.shape[:axis], size, parts, *x.shape[axis + 1 :])
            return jax.lax.index_in_dim(by_part, i, axis + 1, keepdims=False)

        return jax.tree.map(take, tree)

    return tuple(part(i) for i in range(parts))
