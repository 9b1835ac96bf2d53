"""Checkpoints of a run: trained state, row source, and digests of the inputs."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import jax
import orbax.checkpoint as ocp

from mgsr_jax.checkpoint import state as checkpoint_state
from mgsr_jax.train_step import TrainState
from mgsr_jax.training.row_source import HostState, RowSource


@dataclasses.dataclass(frozen=True)
class CheckpointInputs:
    """Inputs that a resumed run must find unchanged.

    Attributes:
      data: paths or names of the training data, for errors.
      data_fingerprint: digest of the training rows, in their order.
      student: folder of the student, for errors.
      student_digest: digest of that folder, if adapters are trained on it.
    """

    data: str
    data_fingerprint: str
    student: str
    student_digest: str | None


class RunCheckpoints:
    """Saves and restores a run's state.

    Args:
      manager: the open checkpoints.
      run: the run folder, for errors.
      inputs: the run's inputs; their digests are stored and compared.
      best_metric: the metric that the best checkpoint is kept of, or None.
    """

    def __init__(
        self,
        manager: ocp.CheckpointManager,
        run: Path,
        inputs: CheckpointInputs,
        *,
        best_metric: str | None = None,
    ):
        self._manager, self._run, self._inputs = manager, run, inputs
        self._best_metric = best_metric

    @property
    def latest_step(self) -> int | None:
        """Step of the latest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(
        self,
        state: TrainState,
        source: RowSource,
        measured: Mapping[str, float],
    ) -> None:
        """Write a checkpoint of the state's step.

        Args:
          state: the trained state.
          source: the row source after that step.
          measured: metrics of validation and evaluation at that step, by name.
        """
        names = [name for name in measured if name == self._best_metric]
        checkpoint_state.save(
            self._manager,
            int(state.step),
            state=state.checkpointed,
            host={
                **source.host_state(),
                "data_fingerprint": self._inputs.data_fingerprint,
                "student_digest": self._inputs.student_digest,
            },
            replay=source.replay_rows,
            metrics={name: measured[name] for name in names} or None,
        )

    def restore(self, step: int, state: TrainState, source: RowSource) -> TrainState:
        """The state of `step`, placed as `state` is; `source` is restored in place.

        Raises:
          ValueError: the checkpoint does not fit, or was made from other inputs.
        """
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=leaf.sharding
            ),
            state.checkpointed,
        )
        restored, host, replay = checkpoint_state.restore(
            self._manager, step, state=like, replay=source.replay_rows
        )
        run, inputs = self._run, self._inputs
        if host.get("data_fingerprint") != inputs.data_fingerprint:
            raise ValueError(
                f"resume: the rows of {inputs.data} are not those that "
                f"checkpoint {step} of {run} was made from; restore the data"
            )
        if host.get("student_digest") != inputs.student_digest:
            raise ValueError(
                f"resume: the student at {inputs.student} is not the one that the "
                f"adapters of checkpoint {step} of {run} were trained on; "
                "restore it"
            )
        source.restore(cast(HostState, host), replay)
        return dataclasses.replace(state, **restored)


@contextmanager
def open_checkpoints(
    folder: Path,
    *,
    keep: int,
    inputs: CheckpointInputs,
    best_metric: str | None = None,
) -> Iterator[RunCheckpoints]:
    """The checkpoints in a folder of the run folder, closed at the end.

    Args:
      folder: the checkpoints' own folder.
      keep: number of latest checkpoints to keep.
      inputs: stored with every checkpoint, and compared when one is restored.
      best_metric: metric whose best checkpoint is kept too.
    """
    with checkpoint_state.open_manager(
        folder, keep=keep, best_metric=best_metric
    ) as manager:
        run = folder.parent
        yield RunCheckpoints(manager, run, inputs, best_metric=best_metric)
