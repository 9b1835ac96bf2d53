"""MGSR in MaxText (the protocol of maxtext 0.2.5): a distillation strategy.

MaxText's `build_training_components` names its own strategy, so construct the trainer
with this one. The clip network goes into the student before:

    attach_clip_network(student_model, jax.random.key(0))
    strategy = MgsrStrategy(student_forward, teacher_forward, config.vocab_size)
    trainer = MaxTextDistillationTrainer(
        model=ModelBundle(teacher_model, student_model),
        strategy=strategy,
        optimizer=clip_network_optimizer(optimizer),
        ...
    )

`detach_clip_network(student_model)` takes it out again, for export.

What MaxText does, and what follows from it:
- Targets are shifted already, so nothing is shifted here.
- `targets_segmentation` says what is scored (prompts, padding, packing). Token ids are
  not looked at: an end-of-sequence token that is also the padding id counts wherever
  its segmentation is not 0. (MaxText's own padding of unpacked rows does compare ids:
  give it a padding id that is not the end of sequence.)
- `student_freeze_param_filter` must leave `mgsr_clip_network` free.
- It hands over no span ids, so `objective.span` stays 0.
- The step counts micro-batches, not updates, where gradients are accumulated; each
  micro-batch is a mean of its own.
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
"""(sum, count) by name: MaxText's trainer adds them up and divides once."""


class MgsrStrategy(_maxtext.DistillationStrategy):
    """DAC-KL and cross-entropy: what `mgsr_loss` minimises.

    Args:
      student_forward_fn: MaxText's `create_forward_fn(student_config)`.
      teacher_forward_fn: likewise; offline runs (saved top-k logits) never call it.
      vocab_size: the tokenizer's, if the models' is padded; columns at or beyond it
        have probability 0.
      pad_id: MaxText's; not used.
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
        # MaxText shows a loss the student's output alone, so the network goes with it.
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
                "targets_segmentation is None; expected an id a target, 0 where it is "
                "not scored: let the input mapping hand it on. Padding is not told "
                "from token ids, which may be those of the end of a sequence"
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
          ValueError: there is a schedule and no step; what `mgsr_loss` raises.
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
