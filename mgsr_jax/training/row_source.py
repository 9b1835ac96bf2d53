"""Rows of every step: from the data, the student's rollouts, or the replay buffer.

The state on the host (position in the data, replay buffer, ratio) is part of a
checkpoint, so a resumed run trains on the rows that an uninterrupted run would.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypedDict, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from mgsr_jax.data.spans import Chunker, chunk, token_offsets
from mgsr_jax.interventions.outcome import InterventionInfo
from mgsr_jax.losses import TopKTeacher
from mgsr_jax.rollout import Rollout, TeacherHidden
from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.rows import NO_SPAN, Rows, narrowest, with_width
from mgsr_jax.sharding import fetch_rows, fetch_whole, host_rows, put_batch
from mgsr_jax.training.replay import (
    AdaptiveRatio,
    ReplayBuffer,
    Source,
    choose_source,
)
from mgsr_jax.typing import Params, PRNGKey, Tokenizer

Lookup = Callable[[Rows], TopKTeacher]

TeacherOutput = TopKTeacher | TeacherHidden | Rows | None
"""Stored teacher output for a micro-batch: its most probable classes, or its hidden
states. None where the step has to run the teacher on the rows, and other rows where it
has to run it on these."""


@runtime_checkable
class HostBatches(Protocol):
    """Host rows batch by batch, with a position to save: grain's iterator."""

    def __next__(self) -> Rows: ...

    def get_state(self) -> dict[str, object]: ...

    def set_state(self, state: dict[str, object]) -> None: ...


class RatioState(TypedDict):
    """Fields of `AdaptiveRatio`."""

    ratio: float
    reference: float | None


class HostState(TypedDict):
    """The JSON part of a checkpoint.

    Attributes:
      data: position in the data.
      ratio: state of the adaptive ratio.
      pushed: rows ever pushed to the replay buffer.
    """

    data: dict[str, object]
    ratio: RatioState
    pushed: int


class StepRows(NamedTuple):
    """The training rows of one step.

    Attributes:
      micro_batches: device rows of one shape; the step sums over them.
      source: where the rows came from.
      teacher_outputs: stored teacher output of each micro-batch.
      interventions: record of each generated micro-batch, which are the last ones.
      horizon: the most tokens of a generated response; None: no such limit.
    """

    micro_batches: tuple[Rows, ...]
    source: Source
    teacher_outputs: tuple[TeacherOutput, ...]
    interventions: tuple[InterventionInfo, ...] = ()
    horizon: int | None = None

    @property
    def generated(self) -> tuple[Rows, ...]:
        """The micro-batches that this step generated."""
        return self.micro_batches[len(self.micro_batches) - len(self.interventions) :]


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """Division of a step's batch into micro-batches and over devices.

    Attributes:
      mesh: device mesh.
      batch_size: rows of a step's batch, over all hosts.
      micro_batches: number of parts of a batch.
      widths: allowed widths of rows, ascending. A step that generates uses the last,
        or one that is wide enough for every prompt and a response of the horizon.
      prompt_limit: no prompt is longer than this; None: no longer than a row.
      routed: whether rows name their teacher, because there are several.
    """

    mesh: Mesh
    batch_size: int
    micro_batches: int
    widths: Sequence[int]
    prompt_limit: int | None = None
    routed: bool = False

    def generated_width(self, horizon: int | None) -> int:
        """Width of rows with a response of at most `horizon` tokens; None: no limit.

        It depends on no batch, so all hosts choose the same one.
        """
        if horizon is None or self.prompt_limit is None:
            return self.widths[-1]
        needed = self.prompt_limit + horizon
        return next((w for w in self.widths if needed <= w), self.widths[-1])

    @property
    def host_share(self) -> np.ndarray:
        """Indices of the rows that this process makes: its part of every micro-batch.

        Micro-batches are cut from the global batch, so the rows of a micro-batch do not
        depend on the number of hosts.
        """
        size = self.batch_size // self.micro_batches
        first = np.arange(self.micro_batches)[:, None] * size
        return (first + host_rows(self.mesh, size)).reshape(-1)

    def split(self, rows: Rows) -> list[Rows]:
        """A host batch as micro-batches."""
        parts = self.micro_batches
        return [
            jax.tree.map(lambda leaf, i=i: np.split(leaf, parts)[i], rows)
            for i in range(parts)
        ]


class RowSource:
    """Makes the rows of one step after the other.

    Args:
      batches: host rows of this process's `layout.host_share`, from `train_batches`.
      config: the policy.
      rollout: result of `make_rollout`; None if the policy is "off".
      add_spans: marks the phrases of generated host rows.
      layout: division of a batch.
      steps: steps of the whole run.
      keep_ground_truth: whether a generated step also has its prompts' data rows.
      lookup: `TeacherCache.lookup`, for the data's own rows; None runs the teacher.
      teacher_rows: `TeacherPrompts.rows`, for all rows; None: the teacher reads the
        student's. A rollout must then have no intervention: its teacher reads these.

    Raises:
      ValueError: a policy that generates, without a rollout.
    """

    def __init__(
        self,
        batches: HostBatches,
        config: RolloutConfig,
        rollout: Rollout | None,
        add_spans: Callable[[Rows], Rows],
        *,
        layout: BatchLayout,
        steps: int,
        keep_ground_truth: bool,
        lookup: Lookup | None = None,
        teacher_rows: Callable[[Rows], Rows] | None = None,
    ):
        if rollout is None and config.policy != "off":
            raise ValueError(
                f"rollout.policy={config.policy!r} generates, but rollout is None; "
                "pass one from make_rollout, or set the policy to off"
            )
        self._batches, self._config, self._rollout = batches, config, rollout
        self._add_spans, self._layout, self._steps = add_spans, layout, steps
        self._host_share = layout.host_share
        self._keep_ground_truth = keep_ground_truth
        self._lookup, self._teacher_rows = lookup, teacher_rows
        replays = config.policy == "replay"
        self._buffer = ReplayBuffer.empty(
            config.capacity if replays else 1,
            layout.widths[-1],
            routed=layout.routed,
        )
        self._ratio = AdaptiveRatio(config.initial_ratio)

    def next(
        self, step: int, key: PRNGKey, params: Params, teacher_params: PyTree
    ) -> StepRows:
        """The rows of `step`; `key` is the step's key, the same on every host."""
        policy_key, rollout_key, replay_key = jax.random.split(key, 3)
        source = choose_source(
            self._config,
            policy_key,
            step=step,
            steps=self._steps,
            ratio=self._ratio.ratio,
            buffer_full=self._buffer.full,
        )
        if source == "replay":
            return self._replay(replay_key)
        rows = next(self._batches)
        if source == "data" or self._rollout is None:  # the second: policy "off"
            host = self._layout.split(rows)
            return StepRows(self._put(host), source, self._look_up(host))
        horizon = self._config.horizon(step, self._steps)
        host = self._layout.split(self._to_generate(rows, horizon))
        ground_truth = self._put(host)
        samples, interventions, teacher_hidden = self._rollout(
            params, teacher_params, ground_truth, rollout_key, horizon
        )
        kept, outputs = (), ()
        if self._keep_ground_truth:
            kept, outputs = ground_truth, self._look_up(host)
        finished = [self._finish(rows) for rows in samples]
        if self._teacher_rows is not None:
            teacher_hidden = self._look_up([fetch_rows(rows) for rows in finished])
        return StepRows(
            micro_batches=(*kept, *finished),
            source=source,
            teacher_outputs=outputs + teacher_hidden,
            interventions=interventions,
            horizon=horizon,
        )

    def validated(self, loss: float) -> None:
        """Report a validation loss to the replay policy."""
        self._ratio.update(loss, self._config.epsilon)

    @property
    def ratio(self) -> float:
        """phi of the replay policy."""
        return self._ratio.ratio

    def host_state(self) -> HostState:
        """The part of the state that a checkpoint stores as JSON."""
        return {
            "data": self._batches.get_state(),
            "ratio": {
                "ratio": self._ratio.ratio,
                "reference": self._ratio.reference,
            },
            "pushed": self._buffer.pushed,
        }

    @property
    def replay_rows(self) -> dict[str, np.ndarray]:
        """The part of the state that a checkpoint stores as arrays."""
        return self._buffer.arrays

    def restore(self, host: HostState, replay: Mapping[str, np.ndarray]) -> None:
        """Continue from saved `host_state` and `replay_rows`."""
        self._batches.set_state(host["data"])
        self._ratio = AdaptiveRatio(**host["ratio"])
        rows = Rows(**{name: np.array(leaf) for name, leaf in replay.items()})
        self._buffer = ReplayBuffer(rows, host["pushed"])

    def _replay(self, key: PRNGKey) -> StepRows:
        rows = self._buffer.sample(key, self._layout.batch_size)
        if rows.teacher is not None:  # as `train_batches` orders the data's rows
            rows = _taken(rows, np.argsort(rows.teacher, kind="stable"))
        rows = with_width(rows, narrowest(self._layout.widths, rows.lengths))
        host = self._layout.split(_taken(rows, self._host_share))
        outputs = self._no_outputs
        if self._teacher_rows is not None:
            outputs = self._look_up(host)
        return StepRows(self._put(host), "replay", outputs)

    def _to_generate(self, rows: Rows, horizon: int | None) -> Rows:
        """Host rows, as wide as responses of `horizon` tokens to their prompts need.

        They keep their own responses only where the step trains on these.
        """
        width = self._layout.generated_width(horizon)
        if not self._keep_ground_truth:
            prompts = dataclasses.replace(rows, lengths=rows.prompt_lengths)
            return with_width(prompts, width)
        return with_width(rows, max(width, rows.tokens.shape[1]))

    def _put(self, parts: list[Rows]) -> tuple[Rows, ...]:
        return tuple(put_batch(self._layout.mesh, part) for part in parts)

    def _look_up(self, parts: list[Rows]) -> tuple[TeacherOutput, ...]:
        """The teacher cache's output for data rows, or the teacher's own rows."""
        look_up = self._teacher_rows or self._lookup
        if look_up is None:
            return self._no_outputs
        mesh = self._layout.mesh
        return tuple(put_batch(mesh, look_up(part)) for part in parts)

    @property
    def _no_outputs(self) -> tuple[None, ...]:
        return (None,) * self._layout.micro_batches

    def _finish(self, rows: Rows) -> Rows:
        """Add spans, which each host finds in its own rows; push to the buffer."""
        rows = put_batch(self._layout.mesh, self._add_spans(fetch_rows(rows)))
        if self._config.policy == "replay":  # the buffer is the same on every host
            self._buffer.push(with_width(fetch_whole(rows), self._layout.widths[-1]))
        return rows


def _taken(rows: Rows, index: np.ndarray) -> Rows:
    return jax.tree.map(lambda leaf: leaf[index], rows)


def with_spans(
    rows: Rows,
    tokenizer: Tokenizer,
    chunker: Chunker,
    *,
    spacy_model: str,
) -> Rows:
    """Host rows with the phrases of their responses marked."""
    responses = [
        tokens[start:end].tolist()
        for tokens, start, end in zip(
            rows.tokens, rows.prompt_lengths, rows.lengths, strict=True
        )
    ]
    decoded = [token_offsets(tokenizer, ids) for ids in responses]
    texts, offsets = zip(*decoded, strict=True)
    span_ids = np.full_like(rows.tokens, NO_SPAN)
    phrases = chunk(texts, offsets, chunker, spacy_model=spacy_model)
    for b, ids in enumerate(phrases):
        start = rows.prompt_lengths[b]
        span_ids[b, start : start + len(ids)] = ids
    return dataclasses.replace(rows, span_ids=span_ids)
