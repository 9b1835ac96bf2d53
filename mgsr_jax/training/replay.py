"""The source of a step's rows, and the state of the replay policy.

off      the data
on       with probability `probability` generate, else the data
replay   adaptive off-policy, as in DistiLLM (arXiv 2402.03898): with r ~ U(0, 1),
         ratio phi, step s of S,
           r < phi (1 - s/S), or r < phi while the buffer is not full:  generate, push
           else r < phi:                                            sample the buffer
           else:                                                    the data
         after a validation whose loss is at least `reference + epsilon`:
           phi += 0.1 (at most 1), reference = loss
"""

import dataclasses
from typing import Literal

import jax
import numpy as np

from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.rows import NO_SPAN, Rows
from mgsr_jax.typing import PRNGKey

Source = Literal["data", "generate", "replay"]


@dataclasses.dataclass
class ReplayBuffer:
    """The latest `capacity` generated rows, on the host; a new row replaces the oldest.

    Attributes:
      rows: numpy Rows of `capacity` rows.
      pushed: rows ever pushed; the next one goes to index `pushed % capacity`.
    """

    rows: Rows
    pushed: int = 0

    @classmethod
    def empty(
        cls, capacity: int, width: int, *, routed: bool = False
    ) -> "ReplayBuffer":
        """A buffer for rows of the given width; `routed`: they name their teacher."""
        return cls(
            Rows(
                tokens=np.zeros((capacity, width), np.int32),
                prompt_lengths=np.ones(capacity, np.int32),
                lengths=np.ones(capacity, np.int32),
                span_ids=np.full((capacity, width), NO_SPAN, np.int32),
                example=np.zeros(capacity, np.int32),
                ground_truth=np.zeros(capacity, bool),
                earlier_responses=np.zeros((capacity, width), bool),
                teacher=np.zeros(capacity, np.int32) if routed else None,
            )
        )

    @property
    def capacity(self) -> int:
        """Maximum number of rows."""
        return self.rows.lengths.shape[0]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the rows by name: the content of a checkpoint."""
        return {
            name: leaf for name, leaf in vars(self.rows).items() if leaf is not None
        }

    @property
    def full(self) -> bool:
        """Whether the next push replaces a row."""
        return self.pushed >= self.capacity

    def push(self, rows: Rows) -> None:
        """Add a batch of host rows."""
        size = rows.lengths.shape[0]
        index = (self.pushed + np.arange(size)) % self.capacity
        for name, leaf in self.arrays.items():
            leaf[index] = getattr(rows, name)
        self.pushed += size

    def sample(self, key: PRNGKey, size: int) -> Rows:
        """Draw `size` rows, uniformly, with replacement.

        Raises:
          ValueError: the buffer is empty.
        """
        if not self.pushed:
            raise ValueError("the replay buffer is empty; push rows before sampling")
        held = min(self.pushed, self.capacity)
        index = np.asarray(jax.random.randint(key, (size,), 0, held))
        return jax.tree.map(lambda leaf: leaf[index], self.rows)


@dataclasses.dataclass
class AdaptiveRatio:
    """phi of the replay policy, and the validation loss that new ones are compared to.

    Attributes:
      ratio: phi, the share of steps on the student's text.
      reference: the loss to compare to; None until the first validation.
    """

    ratio: float
    reference: float | None = None

    def update(self, loss: float, epsilon: float) -> None:
        """Raise the ratio if the validation loss rose by at least `epsilon`."""
        if self.reference is None:
            self.reference = loss
        elif loss >= self.reference + epsilon:
            self.ratio = min(self.ratio + 0.1, 1.0)
            self.reference = loss


def choose_source(
    config: RolloutConfig,
    key: PRNGKey,
    *,
    step: int,
    steps: int,
    ratio: float = 0.0,
    buffer_full: bool = False,
) -> Source:
    """Draw the source of the rows of `step` out of `steps`; the same on every host.

    >>> choose_source(RolloutConfig("on", 0.0), jax.random.key(0), step=0, steps=9)
    'data'
    """
    if config.policy == "off":
        return "data"
    r = float(jax.random.uniform(key))
    if config.policy == "on":
        return "generate" if r < config.probability else "data"
    if r < ratio * (1 - step / steps) or (r < ratio and not buffer_full):
        return "generate"
    return "replay" if r < ratio else "data"
