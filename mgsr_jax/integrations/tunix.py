"""MGSR in Tunix (google-tunix 0.1.7): a distillation strategy and a PEFT loss.

Distillation, the teacher run by the trainer:

    strategy = MgsrStrategy(student_forward, teacher_forward, key=jax.random.key(0))
    trainer = MgsrDistillationTrainer(
        student, teacher, strategy, clip_network_optimizer(optax.adamw(1e-5)), config
    )
    trainer.train(batches)  # of TrainingInput

A forward function is called as `forward(model, **inputs)` with what `model_inputs`
(or the trainer's `with_gen_model_input_fn`) makes of a batch, and returns logits
[B, S, V] of all positions, not shifted. Fine-tuning of all weights and LoRA both
train the clip network.

Behaviour of 0.1.7, and the consequences:
- It passes unshifted tokens; `input_mask` marks the tokens to learn. The only shift is
  in `next_token_labels`; your own `labels_fn` returns `Labels` aligned with logits.
- Its DistillationTrainer drops all fields of a batch except tokens and mask, and drops
  a strategy's metrics. `MgsrDistillationTrainer` keeps both.
- It averages the gradients of micro-batches with equal weights, whatever their number
  of tokens. `count_accumulated` makes the average exact.
- Evaluation runs no teacher: it reports the cross-entropy on the labels.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mgsr_jax.integrations._batch_loss import (
    DEFAULTS,
    Labels,
    cross_entropy_loss,
    mgsr_loss,
    next_token_labels,
)
from mgsr_jax.integrations._clip_network import (
    attach_clip_network,
    clip_network_optimizer,
    detach_clip_network,
    with_clip_network,
)
from mgsr_jax.integrations._peer import peer
from mgsr_jax.integrations._tunix_batch import (
    INSTALL,
    TrainingInput,
    count_accumulated,
    model_inputs,
)
from mgsr_jax.loss_targets import VocabArguments
from mgsr_jax.losses import Sum
from mgsr_jax.objective import Objective
from mgsr_jax.typing import PRNGKey

__all__ = [
    "MgsrDistillationTrainer",
    "MgsrPeftTrainer",
    "MgsrStrategy",
    "TrainingInput",
    "attach_clip_network",
    "clip_network_optimizer",
    "count_accumulated",
    "detach_clip_network",
    "model_inputs",
    "peft_loss",
]

_distillation = peer("tunix.distillation", install=INSTALL)
_strategies = peer("tunix.distillation.strategies", install=INSTALL)
_peft = peer("tunix.sft.peft_trainer", install=INSTALL)


class MgsrStrategy(_strategies.BaseStrategy):
    """DAC-KL, cross-entropy and span correlation, as `mgsr_loss` adds them up.

    The trainer's constructor attaches the clip network to the student. Its `close`, at
    the end of `train`, detaches the network again and stores it in `clip_params`.

    Args:
      student_forward_fn: (model, **inputs) -> logits [B, S, Vs], gradients flow.
      teacher_forward_fn: (model, **inputs) -> logits [B, S, Vt], or a TopKTeacher.
      key: random key for the clip network's initial parameters.
      objective: weights of the losses, and their settings.
      vocab_size: columns of logits at or beyond it are padding.
      vocab_axis: mesh axis that the logits' columns are sharded over.
      labels_fn: (**inputs) -> `Labels`, aligned with the logits.

    Raises:
      ValueError: in the first step, the errors of `mgsr_loss`.
    """

    def __init__(
        self,
        student_forward_fn: Callable[..., Any],
        teacher_forward_fn: Callable[..., Any],
        *,
        key: PRNGKey,
        objective: Objective = DEFAULTS,
        vocab_size: int | None = None,
        vocab_axis: str | None = None,
        labels_fn: Callable[..., Labels] = next_token_labels,
    ):
        # Tunix passes only the student's output to a loss, so the output includes the
        # network.
        student_forward_fn = with_clip_network(student_forward_fn)
        super().__init__(student_forward_fn, teacher_forward_fn, labels_fn)
        self.objective, self.clip_params, self._key = objective, None, key
        self._columns = VocabArguments(vocab_size=vocab_size, vocab_axis=vocab_axis)

    def pre_process_models(self, student_model: Any, teacher_model: Any) -> Any:
        attach_clip_network(
            student_model, self._key, num_candidates=self.objective.num_candidates
        )
        self.clip_params = None
        return student_model, teacher_model

    def compute_loss(
        self, student_output: Any, teacher_output: Any, labels: Labels
    ) -> tuple[jax.Array, dict[str, Sum]]:
        logits, clip_params = student_output
        return mgsr_loss(
            clip_params,
            logits,
            teacher_output,
            labels,
            self.objective,
            **self._columns,
        )

    def compute_eval_loss(
        self, student_output: Any, labels: Labels
    ) -> tuple[jax.Array, dict[str, Sum]]:
        logits, _ = student_output
        return cross_entropy_loss(logits, labels, **self._columns)

    def post_process_models(self, student_model: Any, teacher_model: Any) -> Any:
        if self.clip_params is None:  # a second close changes nothing
            self.clip_params = detach_clip_network(student_model)
        return student_model, teacher_model


def peft_loss(
    student_forward_fn: Callable[..., Any],
    *,
    objective: Objective = DEFAULTS,
    vocab_size: int | None = None,
    vocab_axis: str | None = None,
    labels_fn: Callable[..., Labels] = next_token_labels,
) -> Callable[..., Any]:
    """The same loss for a PeftTrainer whose batches contain the teacher's output.

        attach_clip_network(student, key)  # before the trainer
        trainer = MgsrPeftTrainer(student, optimizer, config)
        trainer.with_gen_model_input_fn(
            lambda batch: {
                "inputs": model_inputs(batch), "teacher_output": batch.teacher_output
            }
        ).with_loss_fn(peft_loss(student_forward), has_aux=True)

    Evaluation uses the same loss; its batches contain the teacher's output too.
    """
    forward = with_clip_network(student_forward_fn)

    def loss_fn(model: Any, inputs: dict[str, Any], teacher_output: Any) -> Any:
        logits, clip_params = forward(model, **inputs)
        labels = labels_fn(**inputs)
        return mgsr_loss(
            clip_params,
            logits,
            teacher_output,
            labels,
            objective,
            vocab_size=vocab_size,
            vocab_axis=vocab_axis,
        )

    return loss_fn


class _LogsMetrics:
    """Logs the metrics that a loss returns with its scalar; Tunix drops them."""

    _buffered_train_metrics: Any
    _buffered_eval_metrics: Any

    def _post_process_train_step(self, aux: dict[str, Sum]) -> None:
        _buffer(self._buffered_train_metrics, aux)

    def _post_process_eval_step(self, aux: dict[str, Sum]) -> None:
        _buffer(self._buffered_eval_metrics, aux)


def _buffer(buffer: Any, sums: dict[str, Sum]) -> None:
    for name, value in sums.items():
        values, _ = buffer.additional_metrics.setdefault(name, ([], _mean))
        values.append(value)


def _mean(sums: list[Sum]) -> np.float32:
    """The mean over all micro-batches of a step, divided once."""
    total, count = np.sum(np.asarray(sums, np.float32), axis=0)
    return total / max(count, np.float32(1))


class MgsrDistillationTrainer(_LogsMetrics, _distillation.DistillationTrainer):
    """Tunix's DistillationTrainer, with metrics logged and all fields of batches kept.

    It takes the arguments of Tunix's own. Its batches are `TrainingInput`s.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.with_gen_model_input_fn(model_inputs)

    def _prepare_inputs(self, input_data: TrainingInput) -> TrainingInput:
        teacher_output = super()._prepare_inputs(input_data).teacher_output
        return dataclasses.replace(input_data, teacher_output=teacher_output)


class MgsrPeftTrainer(_LogsMetrics, _peft.PeftTrainer):
    """Tunix's PeftTrainer; the metrics of `peft_loss` are logged."""
