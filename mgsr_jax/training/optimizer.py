"""AdamW for the student and Adam for the clip network."""

import dataclasses

import jax
import optax
from jax.tree_util import KeyPath

from mgsr_jax import settings
from mgsr_jax.sharding import path_name
from mgsr_jax.typing import CLIP_NETWORK, STUDENT, Leaf, Params

_DECAYED = ("kernel", "embedding", "a", "b")
"""Names of the matrices. Ranks do not tell them: stacked biases are matrices too."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a cosine schedule for the student, Adam for the clip network.

    Attributes:
      learning_rate: the student's highest learning rate.
      final_learning_rate: learning rate at the end of the cosine.
      warmup_steps: steps of linear warm-up from 0.
      weight_decay: decay of matrices, adapters and embeddings; norms and biases do not
        decay.
      beta1: decay of Adam's mean of the gradient.
      beta2: decay of Adam's mean of the squared gradient.
      clip_norm: the student's gradient is scaled down to this global norm.
      clip_network_learning_rate: constant learning rate of the clip network, which has
        no weight decay.
    """

    learning_rate: float = 5e-4
    final_learning_rate: float = 1e-7
    warmup_steps: int = 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float = 1.0
    clip_network_learning_rate: float = 1e-3

    def check(self) -> None:
        """Refuse values that do not work.

        Raises:
          ValueError: names the field, its value and the values that are allowed.
        """
        section = "optimizer."
        settings.check_positive(self, "learning_rate", "clip_norm", section=section)
        settings.check_not_negative(
            self,
            "final_learning_rate",
            "warmup_steps",
            "weight_decay",
            "clip_network_learning_rate",
            section=section,
        )


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine to `final_learning_rate` at step `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=config.final_learning_rate,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizers of both models, selected by the parameters' top-level keys.

    Raises:
      ValueError: a field of `config` has a value that does not work.
    """
    config.check()
    student = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )
    return optax.partition(
        {
            STUDENT: student,
            CLIP_NETWORK: optax.adam(config.clip_network_learning_rate),
        },
        lambda params: {name: name for name in params},
    )


def decayed(params: Params) -> Params:
    """True for the parameters that decay: matrices, but not norms or biases."""

    def is_matrix(path: KeyPath, leaf: Leaf) -> bool:
        return path_name(path).rpartition("/")[-1] in _DECAYED

    return jax.tree_util.tree_map_with_path(is_matrix, params)
