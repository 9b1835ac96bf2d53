"""A trace of a few steps of a run, for TensorBoard's profiler and xprof."""

import dataclasses
from pathlib import Path

import jax
from jaxtyping import PyTree

from mgsr_jax import settings

PROFILE_FOLDER = "profile"


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Steps that are traced into OUTPUT/profile (`xprof OUTPUT/profile` shows them).

    Attributes:
      steps: number of steps; 0: no trace.
      start: the first of them; the steps before it compile.
    """

    steps: int = 0
    start: int = 10

    def check(self) -> None:
        """Refuse values that do not work.

        Raises:
          ValueError: names the field, its value and the values that are allowed.
        """
        settings.check_positive(self, "start", section="profile.")
        settings.check_not_negative(self, "steps", section="profile.")

    def check_start(self, steps: int) -> None:
        """Refuse a trace that a run of `steps` steps does not reach.

        Raises:
          ValueError: names the setting and the run's length.
        """
        if self.steps and self.start > steps:
            raise ValueError(
                f"profile.start={self.start}, but the run ends with step {steps}; give "
                "an earlier step, or leave profile.steps at 0 for no trace"
            )


class StepTrace:
    """Traces the steps of a `ProfileConfig`; every process writes its own file.

    Args:
      config: which steps.
      output: the run folder.
    """

    def __init__(self, config: ProfileConfig, output: Path):
        self.config, self.folder = config, output / PROFILE_FOLDER
        self.is_open = False

    def before(self, step: int) -> None:
        """Start the trace if `step` is its first."""
        if self.config.steps and step == self.config.start:
            jax.profiler.start_trace(self.folder)
            self.is_open = True

    def after(self, step: int, results: PyTree, *, last: bool = False) -> bool:
        """End the trace if `step` is its last, or the run's; True if it ended.

        Args:
          step: number of the step that was started.
          results: arrays of that step; the trace ends when the device has made them.
          last: whether the run ends with this step.
        """
        end = self.config.start + self.config.steps - 1
        if not self.is_open or (step < end and not last):
            return False
        jax.block_until_ready(results)
        jax.profiler.stop_trace()
        self.is_open = False
        return True
