"""MGSR's losses in other trainers: what the adapters share, without any of them.

`mgsr_jax.integrations.tunix` needs google-tunix, `mgsr_jax.integrations.maxtext` needs
MaxText; importing this package needs neither. A trainer without an adapter calls
`mgsr_loss` in its own step.
"""

from mgsr_jax.integrations._terms import (
    Labels,
    Terms,
    cross_entropy_loss,
    mgsr_loss,
    next_token_labels,
)

__all__ = ["Labels", "Terms", "cross_entropy_loss", "mgsr_loss", "next_token_labels"]
