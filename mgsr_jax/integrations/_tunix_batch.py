"""Batches for Tunix's trainers: tokens, masks, spans, and the counts to divide by."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from mgsr_jax.integrations._batch_loss import next_token_labels
from mgsr_jax.integrations._peer import peer
from mgsr_jax.losses import span_pairs
from mgsr_jax.typing import Leaf

INSTALL = "pip install 'mgsr_jax[tunix]'"
_distillation = peer("tunix.distillation", install=INSTALL)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainingInput(_distillation.TrainingInput):
    """A batch: Tunix's own fields, and those that MGSR's losses read in addition.

    Attributes:
      input_tokens: prompt, response, padding. int [B, S]
      input_mask: not 0 at tokens to learn: the response, its end included. [B, S]
      images: passed on, for multimodal models. [B, ...] or None
      teacher_output: logits [B, S, V] or a TopKTeacher. For `peft_loss` the batch
        contains it; `MgsrDistillationTrainer` fills it in.
      span_ids: the phrase of each token, -1 for none. int [B, S] or None
      counts: set by `count_accumulated`. float [B, 2] or None
    """

    input_tokens: Leaf
    input_mask: Leaf
    images: Leaf = None
    teacher_output: Leaf = None
    span_ids: Leaf = None
    counts: Leaf = None


def model_inputs(batch: TrainingInput) -> dict[str, Any]:
    """Tokens, mask, span ids and counts of a batch: all that labels are made from.

    A model that needs more inputs gets them in a trainer's `with_gen_model_input_fn`:

        lambda batch: model_inputs(batch) | {"positions": ..., "attention_mask": ...}
    """
    names = ("input_tokens", "input_mask", "span_ids", "counts")
    return {name: getattr(batch, name) for name in names}


def count_accumulated(
    batches: Iterable[TrainingInput], steps: int
) -> Iterator[TrainingInput]:
    """Make accumulation over `steps` micro-batches exact, whatever their lengths.

    L = 1/steps sum_i (total_i / (N / steps)) = sum_i total_i / N

    Tunix averages the means of micro-batches, so a short one counts as much as a long
    one. Here each micro-batch carries N / steps, where N is the number of scored
    positions of its whole step, spread over its rows: rows of other hosts add theirs.

    Args:
      batches: micro-batches; an incomplete step at the end is dropped.
      steps: the training config's `gradient_accumulation_steps`.
    """
    batches = iter(batches)
    while len(step := list(itertools.islice(batches, steps))) == steps:
        share = sum(_scored(batch) for batch in step) / steps
        for batch in step:
            rows = len(batch.input_tokens)
            counts = np.tile(np.float32(share / rows), (rows, 1))
            yield dataclasses.replace(batch, counts=counts)


def _scored(batch: TrainingInput) -> np.ndarray:
    """Scored positions, and pairs of adjacent tokens in a span. [2]"""
    labels = next_token_labels(batch.input_tokens, batch.input_mask, batch.span_ids)
    pairs = 0
    if labels.span_ids is not None:
        pairs = np.sum(span_pairs(labels.span_ids, labels.where))
    return np.array([np.sum(labels.where), pairs], np.float64)
