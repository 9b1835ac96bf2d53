"""Where a training batch comes from: the data, the student's revised samples, a replay.

off      ground truth only
on       with probability `probability` the student generates, SCRG revises
replay   adaptive off-policy, as in DistiLLM (arXiv 2402.03898): with r ~ U(0, 1),
         ratio phi, step s of S,
           r < phi (1 - s/S), or r < phi while the buffer is not full:  generate, push
           else r < phi:                                            sample the buffer
           else:                                                    the data's batch
         after a validation whose loss is at least `reference + epsilon`:
           phi += 0.1 (at most 1), reference = loss
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mgsr_jax.decoding.decode import STUDENT, decode, row_keys, start
from mgsr_jax.rows import Rows, blank_padding, prompts_only
from mgsr_jax.scrg import ScrgInfo, revise
from mgsr_jax.typing import Model, Params, PRNGKey

Heard = Float[Array, "B S D"]
"""The teacher's hidden states on rows; index t predicts token t + 1."""

Rollout = Callable[
    [Params, Any, tuple[Rows, ...], PRNGKey],
    tuple[tuple[Rows, ...], tuple[ScrgInfo, ...], tuple[Heard | None, ...]],
]
"""Micro-batches of prompts to micro-batches of samples, what was corrected, and what
the teacher, where it has read them, says of them."""


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Where a step's rows come from.

    Attributes:
      policy: "off", "on" or "replay"; in YAML in quotes, since a bare on is true.
      probability: of generating, for "on".
      initial_ratio: phi at the start, for "replay".
      epsilon: how much worse a validation must be to raise phi.
      capacity: sequences that the replay buffer holds.
      rounds: rounds of SCRG; 0 trains on the samples as they are.
      teacher_token: "sample" (the paper) or "argmax".
      temperature: of the student's sampling.
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

    @property
    def always_generates(self) -> bool:
        """Whether no step's rows are the data's."""
        return self.policy == "on" and self.probability == 1


def make_rollout(
    student: Model,
    teacher: Model,
    config: RolloutConfig,
    *,
    eos_ids: tuple[int, ...],
    vocab_size: int | None = None,
    prefill_width: int | None = None,
    dtype: Any = jnp.float32,
) -> Rollout:
    """A jitted `rollout(student_params, teacher_params, micro_batches, key)`.

    The student answers the prompts of a step, SCRG revises; spans are not known yet.
    As many rows as a micro-batch has are decoded at a time: they are the slots that
    all rows of the step share; the caches of all are kept meanwhile, with SCRG the
    teacher's too. `dtype` is that of the decoder's weights and cache.
    """
    sampling: dict[str, Any] = dict(
        eos_ids=eos_ids,
        vocab_size=vocab_size,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
    )

    @jax.jit
    def rollout(
        student_params: Params,
        teacher_params: Params,
        micro_batches: tuple[Rows, ...],
        key: PRNGKey,
    ) -> tuple[tuple[Rows, ...], tuple[ScrgInfo, ...], tuple[Heard | None, ...]]:
        params = student.decode_params(student_params, dtype)
        rows = _joined(micro_batches)
        slots, max_length = micro_batches[0].tokens.shape
        prompts = prompts_only(rows)
        prefill: dict[str, Any] = dict(dtype=dtype, prefill_width=prefill_width)
        state = decode(
            student,
            params,
            start(student, student_params, prompts, **prefill),
            keys=row_keys(key, rows.example, STUDENT, 0),
            max_length=max_length,
            slots=slots,
            **sampling,
        )
        state, info, heard = revise(
            student,
            params,
            teacher,
            teacher_params,
            state,
            key=key,
            rounds=config.rounds,
            teacher_token=config.teacher_token,
            max_length=max_length,
            slots=slots,
            **sampling,
        )
        parts = len(micro_batches)
        return (
            _parted(blank_padding(state.rows), parts),
            _parted(info, parts, axis=1),
            _parted(heard if config.rounds else None, parts),
        )

    return rollout


def _joined(micro_batches: tuple[Rows, ...]) -> Rows:
    """One batch of all rows, in which every device keeps those that it has."""

    def join(*parts: Array) -> Array:
        return jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])

    return jax.tree.map(join, *micro_batches)


def _parted(tree: Any, parts: int, axis: int = 0) -> tuple[Any, ...]:
    """The micro-batches again; rows are counted along `axis`."""

    def part(i: int) -> Any:
        def of(x: Array) -> Array:
            size = x.shape[axis] // parts
            by_part = x.reshape(*x.shape[:axis], size, parts, *x.shape[axis + 1 :])
            return jax.lax.index_in_dim(by_part, i, axis + 1, keepdims=False)

        return jax.tree.map(of, tree)

    return tuple(part(i) for i in range(parts))
