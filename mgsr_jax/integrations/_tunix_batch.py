"""What Tunix's trainers are fed with: tokens, masks, spans, and what to divide by."""

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
    """A batch: Tunix's own fields, and what MGSR's losses read beside them.

    Attributes:
      input_tokens: prompt, response, padding. int [B, S]
      input_mask: not 0 at tokens to learn: the response, its end included. [B, S]
      images: passed on; for models that see. [B, ...] or None
      teacher_output: logits [B, S, V] or a TopKTeacher; with `peft_loss` it comes with
        the batch, with `MgsrDistillationTrainer` the teacher fills it in.
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
    """A batch's tokens, mask, span ids and counts: what labels are made of.

    The inputs of a model that needs no more. Else add to it, for a trainer's
    `with_gen_model_input_fn`:

        lambda batch: model_inputs(batch) | {"positions": ..., "attention_mask": ...}
    """
    names = ("input_tokens", "input_mask", "span_ids", "counts")
    return {name: getattr(batch, name) for name in names}


def count_accumulated(
    batches: Iterable[TrainingInput], steps: int
) -> Iterator[TrainingInput]:
    """Makes accumulation over `steps` micro-batches exact, whatever their lengths.

    L = 1/steps sum_i (total_i / (N / steps)) = sum_i total_i / N

    Tunix's mean of the micro-batches' means would weigh a short one as much as a long
    one. Here each carries N / steps, N the scored positions of its whole step, shared
    out over its rows: rows of other hosts add theirs.

    Args:
      batches: micro-batches; a step that is not full is not yielded.
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
    """Scored positions, and pairs of neighbours in a span. [2]"""
    labels = next_token_labels(batch.input_tokens, batch.input_mask, batch.span_ids)
    pairs = 0
    if labels.span_ids is not None:
        pairs = np.sum(span_pairs(labels.span_ids, labels.where))
    return np.array([np.sum(labels.where), pairs], np.float64)
