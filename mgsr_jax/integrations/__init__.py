"""MGSR's objective in other trainers: the loss of one batch, without any trainer.

`mgsr_jax.integrations.tunix` needs google-tunix, `mgsr_jax.integrations.maxtext` needs
MaxText; importing this package needs neither. A trainer without an adapter calls
`mgsr_loss` in its own step.
"""

from mgsr_jax.integrations._batch_loss import (
    Labels,
    cross_entropy_loss,
    mgsr_loss,
    next_token_labels,
)
from mgsr_jax.objective import Objective

__all__ = [
    "Labels",
    "Objective",
    "cross_entropy_loss",
    "mgsr_loss",
    "next_token_labels",
]
