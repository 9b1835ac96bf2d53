"""The rows of every step: from the data, the student's rollouts, or the replay buffer.

What this holds on the host (position in the data, buffer, ratio) is part of a
checkpoint, so that a resumed run sees the rows that it would have seen.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mgsr_jax.data.spans import Chunker, chunk, token_offsets
from mgsr_jax.losses import TopKTeacher
from mgsr_jax.rollout import Rollout, RolloutConfig, TeacherHidden
from mgsr_jax.rows import NO_SPAN, Rows, narrowest, with_width
from mgsr_jax.scrg import ScrgInfo
from mgsr_jax.sharding import fetch_rows, fetch_whole, host_rows, put_batch
from mgsr_jax.training.replay import (
    AdaptiveRatio,
    ReplayBuffer,
    Source,
    choose_source,
)
from mgsr_jax.typing import Params, PRNGKey

Lookup = Callable[[Rows], TopKTeacher]


class StepRows(NamedTuple):
    """What one step trains on.

    Attributes:
      micro_batches: device rows of one shape, to be summed over.
      source: where they came from.
      cached: what the teacher says of each micro-batch: its most probable classes or
        its hidden states; None where it is to be run.
      corrections: of SCRG, one record a generated micro-batch.
    """

    micro_batches: tuple[Rows, ...]
    source: Source
    cached: tuple[TopKTeacher | TeacherHidden | None, ...]
    corrections: tuple[ScrgInfo, ...] = ()


def host_share(mesh: Mesh, batch_size: int, micro_batches: int) -> np.ndarray:
    """Which rows of a step's batch this process makes: its rows of every micro-batch.

    Micro-batches are cut from the global batch, so that which rows they hold does not
    depend on the number of hosts.
    """
    size = batch_size // micro_batches
    first = np.arange(micro_batches)[:, None] * size
    return (first + host_rows(mesh, size)).reshape(-1)


class RowSource:
    """Makes the rows of one step after the other.

    Args:
      batches: iterator of host rows, as `train_batches` gives them for `host_share`.
      config: the policy.
      rollout: from `rollout.make_rollout`; None where the policy is "off".
      add_spans: marks the phrases of generated host rows.
      widths: that rows may have, ascending; a step that generates needs the last.
      lookup: `TeacherCache.lookup`, for the data's own rows; None runs the teacher.
      micro_batches: parts that a batch is split into.
      steps: of the whole run.
      keep_ground_truth: whether a generated step also carries its prompts' data rows.

    Raises:
      ValueError: a policy that generates, and no rollout.
    """

    def __init__(
        self,
        batches: Any,
        config: RolloutConfig,
        rollout: Rollout | None,
        add_spans: Callable[[Rows], Rows],
        *,
        mesh: Mesh,
        batch_size: int,
        widths: Sequence[int],
        micro_batches: int,
        steps: int,
        keep_ground_truth: bool,
        lookup: Lookup | None = None,
    ):
        if rollout is None and config.policy != "off":
            raise ValueError(
                f"rollout.policy={config.policy!r} generates, but rollout is None; "
                "pass one from make_rollout, or set the policy to off"
            )
        self._batches, self._config, self._rollout = batches, config, rollout
        self._add_spans, self._mesh = add_spans, mesh
        self._size, self._parts, self._steps = batch_size, micro_batches, steps
        self._share = host_share(mesh, batch_size, micro_batches)
        self._keep_ground_truth, self._lookup = keep_ground_truth, lookup
        self._widths = widths
        replays = config.policy == "replay"
        self._buffer = ReplayBuffer.empty(config.capacity if replays else 1, widths[-1])
        self._ratio = AdaptiveRatio(config.initial_ratio)

    def next(
        self, step: int, key: PRNGKey, params: Params, teacher_params: Params | None
    ) -> StepRows:
        """The rows of `step`; `key` is the step's own, the same on every host."""
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
            rows = self._buffer.sample(replay_key, self._size)
            rows = with_width(rows, narrowest(self._widths, rows.lengths))
            rows = self._split(jax.tree.map(lambda leaf: leaf[self._share], rows))
            return StepRows(self._put(rows), source, self._not_cached)
        rows = next(self._batches)
        if source == "data" or self._rollout is None:  # the second: policy "off"
            host = self._split(rows)
            return StepRows(self._put(host), source, self._look_up(host))
        host = self._split(with_width(rows, self._widths[-1]))
        ground_truth = self._put(host)
        samples, corrections, heard = self._rollout(
            params, teacher_params, ground_truth, rollout_key
        )
        rows, cached = (), ()
        if self._keep_ground_truth:
            rows, cached = ground_truth, self._look_up(host)
        return StepRows(
            micro_batches=rows + tuple(self._finish(rows) for rows in samples),
            source=source,
            cached=cached + heard,
            corrections=corrections,
        )

    def validated(self, loss: float) -> None:
        """Tells the replay policy how validation went."""
        self._ratio.update(loss, self._config.epsilon)

    @property
    def ratio(self) -> float:
        """phi of the replay policy."""
        return self._ratio.ratio

    def host_state(self) -> dict[str, Any]:
        """What a checkpoint keeps as JSON."""
        return {
            "data": self._batches.get_state(),
            "ratio": dataclasses.asdict(self._ratio),
            "pushed": self._buffer.pushed,
        }

    @property
    def replay_rows(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps as arrays."""
        return vars(self._buffer.rows)

    def restore(self, host: dict[str, Any], replay: dict[str, np.ndarray]) -> None:
        """Goes on from what `host_state` and `replay_rows` gave."""
        self._batches.set_state(host["data"])
        self._ratio = AdaptiveRatio(**host["ratio"])
        rows = Rows(**{name: np.array(leaf) for name, leaf in replay.items()})
        self._buffer = ReplayBuffer(rows, host["pushed"])

    def _split(self, rows: Rows) -> list[Rows]:
        """A host batch as micro-batches."""
        return [
            jax.tree.map(lambda leaf, i=i: np.split(leaf, self._parts)[i], rows)
            for i in range(self._parts)
        ]

    def _put(self, parts: list[Rows]) -> tuple[Rows, ...]:
        return tuple(put_batch(self._mesh, part) for part in parts)

    def _look_up(self, parts: list[Rows]) -> tuple[TopKTeacher | None, ...]:
        """What the teacher cache, where there is one, says of the data's own rows."""
        if self._lookup is None:
            return self._not_cached
        return tuple(put_batch(self._mesh, self._lookup(part)) for part in parts)

    @property
    def _not_cached(self) -> tuple[None, ...]:
        return (None,) * self._parts

    def _finish(self, rows: Rows) -> Rows:
        """With spans, which each host finds in its own rows."""
        rows = put_batch(self._mesh, self._add_spans(fetch_rows(rows)))
        if self._config.policy == "replay":  # the same buffer on every host
            self._buffer.push(fetch_whole(rows))
        return rows


def with_spans(
    rows: Rows, tokenizer: Any, chunker: Chunker, *, spacy_model: str
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
