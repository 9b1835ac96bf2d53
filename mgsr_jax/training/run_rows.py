"""Rows of a run from its inputs: for training, for validation, and its first batch."""

from collections.abc import Callable, Iterator

import datasets

from mgsr_jax import sharding
from mgsr_jax.data.batches import eval_batches, train_batches
from mgsr_jax.data.teacher_prompts import TeacherPrompts
from mgsr_jax.rollout import Rollout
from mgsr_jax.rows import Rows
from mgsr_jax.training.inputs import RunInputs
from mgsr_jax.training.row_source import (
    BatchLayout,
    HostBatches,
    RowSource,
    with_spans,
)


def make_row_source(inputs: RunInputs, rollout: Rollout | None) -> RowSource:
    """The rows of every step of a run; `rollout` is None if it never generates."""
    config = inputs.config

    def add_spans(rows: Rows) -> Rows:
        if not config.objective.span:
            return rows
        return with_spans(
            rows, inputs.tokenizer, inputs.chunker, spacy_model=config.data.spacy_model
        )

    return RowSource(
        _batches(inputs),
        config.rollout,
        rollout,
        add_spans,
        layout=_layout(inputs),
        steps=inputs.steps,
        keep_ground_truth=config.objective.needs_data,
        lookup=inputs.teacher_cache.lookup if inputs.teacher_cache else None,
        teacher_rows=_teacher_rows(inputs, inputs.train),
    )


def _teacher_rows(
    inputs: RunInputs, data: datasets.Dataset
) -> Callable[[Rows], Rows] | None:
    """`TeacherPrompts.rows` of a data set; None: the teacher reads the student's."""
    encoding = inputs.config.data.encoding
    if encoding.teacher_prompt is None:
        return None
    return TeacherPrompts(data, encoding.teacher_limit).rows


def first_micro_batches(inputs: RunInputs) -> Iterator[Rows]:
    """Device rows of the data that step 1 reads; no row source moves on."""
    for rows in _layout(inputs).split(next(_batches(inputs))):
        yield sharding.put_batch(inputs.mesh, rows)


def validation_batches(inputs: RunInputs) -> Iterator[tuple[Rows, Rows | None]]:
    """Device rows of the whole validation data; none without validation data.

    Each batch comes with the rows that the teacher reads, or None: the same rows.
    """
    if inputs.valid is None:
        return
    teacher_rows = _teacher_rows(inputs, inputs.valid)
    size = inputs.config.micro_batch_size
    for rows in eval_batches(
        inputs.valid,
        size,
        widths=inputs.config.data.widths,
        share=sharding.host_rows(inputs.mesh, size),
    ):
        own = None
        if teacher_rows is not None:
            own = sharding.put_batch(inputs.mesh, teacher_rows(rows))
        yield sharding.put_batch(inputs.mesh, rows), own


def _layout(inputs: RunInputs) -> BatchLayout:
    config = inputs.config
    return BatchLayout(
        inputs.mesh,
        config.batch_size,
        config.micro_batches,
        config.data.widths,
        prompt_limit=config.data.encoding.prompt_limit,
        routed=isinstance(config.teacher, dict),
    )


def _batches(inputs: RunInputs) -> HostBatches:
    config = inputs.config
    return train_batches(
        inputs.train,
        config.batch_size,
        widths=config.data.widths,
        seed=config.seed,
        share=_layout(inputs).host_share,
    )
