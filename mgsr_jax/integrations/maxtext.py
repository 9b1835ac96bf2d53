"""MGSR in MaxText (the protocol of maxtext 0.2.5): a distillation strategy.

MaxText's `build_training_components` creates its own strategy, so construct the trainer
with this one. Attach the clip network to the student first:

    attach_clip_network(student_model, jax.random.key(0))
    strategy = MgsrStrategy(student_forward, teacher_forward, config.vocab_size)
    trainer = MaxTextDistillationTrainer(
        model=ModelBundle(teacher_model, student_model),
        strategy=strategy,
        optimizer=clip_network_optimizer(optimizer),
        ...
    )

`detach_clip_network(student_model)` detaches it again, for export.

Behaviour of MaxText, and the consequences:
- Targets are shifted already, so nothing is shifted here.
- `targets_segmentation` marks the scored targets (not prompts, padding, packing). Token
  ids are not compared: an end-of-sequence token with the padding id counts wherever its
  segmentation is not 0. (MaxText's own padding of unpacked rows does compare ids: set a
  padding id that is not the end of sequence.)
- `student_freeze_param_filter` must not match `mgsr_clip_network`.
- MaxText passes no span ids, so `objective.span` stays 0.
- With accumulated gradients the step counts micro-batches, not updates, and each
  micro-batch has its own mean.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, ScalarLike

from mgsr_jax.integrations._batch_loss import (
    DEFAULTS,
    Labels,
    cross_entropy_loss,
    mgsr_loss,
)
from mgsr_jax.integrations._clip_network import (
    attach_clip_network,
    clip_network_optimizer,
    detach_clip_network,
    with_clip_network,
)
from mgsr_jax.integrations._peer import peer
from mgsr_jax.losses import Sum, TopKTeacher
from mgsr_jax.objective import Objective

__all__ = [
    "MgsrStrategy",
    "attach_clip_network",
    "clip_network_optimizer",
    "detach_clip_network",
]

_maxtext = peer(
    "maxtext.trainers.post_train.distillation.distillation_utils",
    install="maxtext needs Python 3.12 or newer: pip install maxtext",
)

Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""(sum, count) by name; MaxText's trainer adds them up and divides once."""


class MgsrStrategy(_maxtext.DistillationStrategy):
    """DAC-KL and cross-entropy, as `mgsr_loss` adds them up.

    Args:
      student_forward_fn: MaxText's `create_forward_fn(student_config)`.
      teacher_forward_fn: the same for the teacher; runs on saved top-k logits never
        call it.
      vocab_size: tokens of the tokenizer; padded columns at or beyond it have
        probability 0.
      pad_id: MaxText's padding id; not used.
      objective: weights of the losses, and their settings.
      schedule: step -> factors on the weights by name, such as `{"sft": 0.5}`; the step
        is a traced int32 scalar.
    """

    def __init__(
        self,
        student_forward_fn: Callable[..., Any],
        teacher_forward_fn: Callable[..., Any],
        vocab_size: int,
        pad_id: int = 0,
        *,
        objective: Objective = DEFAULTS,
        schedule: Callable[[Any], Mapping[str, ScalarLike]] | None = None,
    ):
        # MaxText passes only the student's output to a loss, so the output includes the
        # network.
        student_forward_fn = with_clip_network(student_forward_fn)
        super().__init__(student_forward_fn, teacher_forward_fn, vocab_size, pad_id)
        self.objective, self.schedule = objective, schedule
        self._vocab_size = vocab_size

    def create_labels(
        self,
        targets: Int[Array, "B T"],
        targets_segmentation: Int[Array, "B T"] | None = None,
        **kwargs: Any,
    ) -> Labels:
        """Integer labels and the mask; no one-hots.

        Raises:
          ValueError: there is no segmentation.
        """
        del kwargs
        if targets_segmentation is None:
            raise ValueError(
                "targets_segmentation is None; expected one id per target, 0 where it "
                "is not scored: let the input mapping pass it on. Token ids do not "
                "identify padding: the end of a sequence may have the same id"
            )
        return Labels(targets, targets_segmentation != 0)

    def compute_loss(
        self,
        student_output: Any,
        teacher_output: Any,
        labels: Labels,
        step: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """The scalar to minimise, a mixture-of-experts' own loss included, and metrics.

        Saved top-k logits hold no normaliser: the K classes then have all the mass.

        Raises:
          ValueError: there is a schedule but no step; the errors of `mgsr_loss`.
        """
        student, clip_params = student_output
        if self.schedule is not None and step is None:
            raise ValueError("a schedule needs the step, got None; pass step=...")
        scale = None if self.schedule is None else self.schedule(step)
        teacher = _teacher(teacher_output)
        loss, sums = mgsr_loss(
            clip_params,
            student.logits,
            teacher,
            labels,
            self.objective,
            vocab_size=self._vocab_size,
            scale=scale,
        )
        others = {}
        if student.moe_lb_loss is not None:
            loss += student.moe_lb_loss
            others["moe_lb_loss"] = student.moe_lb_loss
        return loss, _named("distill", sums, total_loss=loss, **others)

    def compute_eval_loss(
        self, student_output: Any, labels: Labels
    ) -> tuple[Float[Array, ""], Metrics]:
        """The mean cross-entropy on the labels: evaluation runs no teacher."""
        student, _ = student_output
        loss, sums = cross_entropy_loss(
            student.logits, labels, vocab_size=self._vocab_size
        )
        return loss, _named("eval", sums)


def _teacher(output: Any) -> Any:
    indices = getattr(output, "top_k_indices", None)
    if indices is None:
        return output.logits
    logits = output.logits.astype(jnp.float32)
    return TopKTeacher(logits, indices, jax.nn.logsumexp(logits, axis=-1))


def _named(prefix: str, sums: dict[str, Sum], **values: jax.Array) -> Metrics:
    # MaxText's console and plots know the cross-entropy by this name.
    names = {"sft": "hard_loss"}
    metrics = {
        f"{prefix}/{names.get(k, k)}": (v.total, v.count) for k, v in sums.items()
    }
    return metrics | {f"{prefix}/{k}": (v, jnp.ones(())) for k, v in values.items()}
