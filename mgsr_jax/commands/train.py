"""`mgsr train`: distil a student, or fine-tune it."""

import os

from mgsr_jax.commands.exit_status import DONE, STOPPED
from mgsr_jax.training.config import TrainConfig


def train(config: TrainConfig) -> int:
    """Distil a student, or fine-tune it where no teacher is set."""
    from mgsr_jax.training import distributed, trainer

    reserve_gpu_memory()
    distributed.start(config.distributed)
    return DONE if trainer.train(config).finished else STOPPED


def reserve_gpu_memory() -> None:
    """Let JAX reserve 95 % of a GPU's memory, unless the environment sets a share.

    JAX's default is 75 %, but a run that `mgsr plan` accepts may need 92 %.
    """
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")
