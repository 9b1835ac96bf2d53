"""The compiled rollout: the student responds to prompts, the teacher intervenes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mgsr_jax.decoding.decode import DecodeState, Decoding, decode, start
from mgsr_jax.decoding.sampling import STUDENT_STREAM, row_keys, sample_keys
from mgsr_jax.decoding.step_batch import joined, repeated, split
from mgsr_jax.interventions.adaswitch import hand_over
from mgsr_jax.interventions.outcome import InterventionInfo, Outcome, Pair
from mgsr_jax.interventions.skd import write_together
from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.rows import Rows, blank_padding, prompts_only
from mgsr_jax.scrg import revise
from mgsr_jax.typing import Leaf, Model, Params, PRNGKey, RowKeys

TeacherHidden = Float[Array, "B S D"]
"""Hidden states of the teacher on rows; index t predicts token t + 1."""

Rollout = Callable[
    [Params, Any, tuple[Rows, ...], PRNGKey, int | None],
    tuple[
        tuple[Rows, ...],
        tuple[InterventionInfo, ...],
        tuple[TeacherHidden | None, ...],
    ],
]
"""(student params, teacher params, micro-batches of prompts, key, most tokens of a
response) -> micro-batches of samples, what was done to them, and the teacher's hidden
states where the teacher ran."""


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

    The student responds to the prompts of a step and the teacher intervenes, as
    `config.intervention` says; the spans of the responses are not known yet. A prompt
    is prefilled once for all of its samples; the result has the micro-batches of the
    first samples, then of the second, and so on.
    `horizon` is the most tokens of a response, or None; it is traced, so another number
    does not compile the rollout again.

    `config.decode_rows` rows of all micro-batches are decoded at a time. The caches of
    all rows of the step are kept meanwhile, the teacher's too if it intervenes.

    Args:
      student, teacher: the models.
      config: sampling and intervention; where rows come from is decided elsewhere.
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

    def decoding(self, width: int, horizon: Leaf | None) -> Decoding:
        """How rows of this width are extended."""
        return Decoding(
            max_length=width,
            max_new_tokens=horizon,
            eos_ids=self.eos_ids,
            sampling=self.config.sampling,
            vocab_size=self.vocab_size,
            decode_rows=self.config.decode_rows,
        )


def _roll_out(
    spec: _Spec,
    student_params: Params,
    teacher_params: Params,
    micro_batches: tuple[Rows, ...],
    key: PRNGKey,
    horizon: Leaf | None = None,
) -> tuple[
    tuple[Rows, ...], tuple[InterventionInfo, ...], tuple[TeacherHidden | None, ...]
]:
    """Respond to every prompt, `samples` times."""
    student, config = spec.student, spec.config
    params = student.decode_params(student_params, spec.dtype)
    pair = Pair(student, params, spec.teacher, teacher_params)
    rows, width = micro_batches[0].tokens.shape
    decoding = spec.decoding(width, horizon)
    state = _prefilled(spec, student_params, micro_batches)
    shape = (rows, config.samples, len(micro_batches))
    by_sample = sample_keys(key, config.samples)[None, :, None]
    key = jnp.broadcast_to(by_sample, shape).reshape(-1)
    outcome = _respond(spec, pair, state, key, decoding)
    parts = config.samples * len(micro_batches)
    return (
        split(blank_padding(outcome.rows), parts),
        split(outcome.info, parts),
        split(outcome.teacher_hidden, parts),
    )


def _respond(
    spec: _Spec, pair: Pair, state: DecodeState, key: RowKeys, decoding: Decoding
) -> Outcome:
    """Extend prefilled prompts to responses; the teacher intervenes."""
    config = spec.config
    if config.intervention == "skd":
        return write_together(
            pair,
            state,
            key=key,
            decoding=decoding,
            acceptance=config.acceptance,
            prefill_width=spec.prefill_width,
        )
    keys = row_keys(key, state.rows.example, STUDENT_STREAM, 0)
    params = pair.student_params
    sampled = decode(pair.student, params, state, keys=keys, decoding=decoding)
    if config.intervention == "none":
        return Outcome(sampled.rows, _untouched(sampled.rows), None)
    if config.intervention == "adaswitch":
        return hand_over(
            pair, sampled, key=key, decoding=decoding, switch=config.switch
        )
    outcome, _ = revise(
        pair,
        sampled,
        key=key,
        decoding=decoding,
        rounds=config.rounds,
        teacher_sampling=config.teacher_sampling,
        position=config.error_position,
    )
    return outcome


def _untouched(rows: Rows) -> InterventionInfo:
    """The record of samples that no teacher read."""
    return InterventionInfo(
        teacher_wrote=jnp.zeros_like(rows.tokens, dtype=bool),
        kl=jnp.zeros(rows.lengths.shape),
        student_generated=rows.lengths - rows.prompt_lengths,
        teacher_scored=jnp.zeros_like(rows.lengths),
    )


def _prefilled(
    spec: _Spec, params: Params, micro_batches: tuple[Rows, ...]
) -> DecodeState:
    """The prompts of all micro-batches, once for each of their samples."""
    state = start(
        spec.student,
        params,
        prompts_only(joined(micro_batches)),
        dtype=spec.dtype,
        prefill_width=spec.prefill_width,
    )
    return repeated(state, spec.config.samples, len(micro_batches))
