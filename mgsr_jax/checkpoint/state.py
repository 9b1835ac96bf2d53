"""Checkpoints from which a run resumes, written by orbax.

A checkpoint has three items: `state` (parameters, optimizer, step, key), `host` (JSON:
position in the data, replay ratio, ...) and `replay` (the buffer). Orbax commits all
three or none.
"""

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    LatestN,
    PreservationPolicy,
)

from mgsr_jax.checkpoint.folder import PathLike
from mgsr_jax.sharding import path_name
from mgsr_jax.typing import Leaf

Host = dict[str, Any]
"""JSON: what the processes of a run remember besides arrays."""

Tree = TypeVar("Tree")
Replay = TypeVar("Replay")


def open_manager(
    folder: PathLike, *, keep: int = 2, best_metric: str | None = None
) -> ocp.CheckpointManager:
    """Open the checkpoints of a run for writing.

    Args:
      folder: the run's folder of checkpoints.
      keep: number of latest checkpoints to keep.
      best_metric: name of a metric; its best checkpoint is kept too.
    """
    policies: list[PreservationPolicy] = [LatestN(keep)]
    if best_metric is not None:
        best = BestN(
            get_metric_fn=operator.itemgetter(best_metric),
            reverse=_best_mode(best_metric) == "min",
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        policies.append(best)
    return ocp.CheckpointManager(
        Path(folder).absolute(),
        item_names=("state", "host", "replay"),
        options=ocp.CheckpointManagerOptions(
            # Orbax writes and reads the metric of a checkpoint only with a `best_fn`.
            best_fn=None if best_metric is None else operator.itemgetter(best_metric),
            preservation_policy=AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
        ),
    )


def _best_mode(metric: str) -> Literal["min", "max"]:
    """The lowest validation metric or loss is the best, and the highest of others."""
    is_loss = metric.startswith("valid/") or metric.endswith("loss")
    return "min" if is_loss else "max"


def best_step(folder: PathLike, metric: str) -> int:
    """The step of the checkpoint with the best value of a metric.

    Raises:
      FileNotFoundError: no checkpoint has a value of it.
    """
    options = ocp.CheckpointManagerOptions(
        read_only=True,
        create=False,
        best_fn=operator.itemgetter(metric),
        best_mode=_best_mode(metric),
    )
    with ocp.CheckpointManager(Path(folder).absolute(), options=options) as manager:
        step = manager.best_step()
    if step is None:
        raise FileNotFoundError(
            f"no checkpoint in {folder} has a value of {metric}; export the latest, or "
            "a step of your choice"
        )
    return step


def save(
    manager: ocp.CheckpointManager,
    step: int,
    *,
    state: PyTree,
    host: Host,
    replay: PyTree,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Write the checkpoint of one step and wait until it is committed.

    Args:
      manager: the run's checkpoints.
      step: the step; later than those of earlier checkpoints.
      state, host, replay: the content.
      metrics: the metric that the manager keeps the best checkpoint of, by name; None
        where it was not measured at this step.

    Raises:
      ValueError: a checkpoint of this step exists; it is not changed.
      OSError, ValueError: the disk or orbax failed; earlier checkpoints stay valid.
    """
    written = manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            host=ocp.args.JsonSave(host),
            replay=ocp.args.StandardSave(replay),
        ),
        metrics=metrics,
    )
    manager.wait_until_finished()
    if not written:
        raise ValueError(
            f"checkpoint {step} in {manager.directory} exists and was not changed; "
            "choose another folder"
        )


def restore(
    manager: ocp.CheckpointManager, step: int, *, state: Tree, replay: Replay
) -> tuple[Tree, Host, Replay]:
    """The state, host and replay of a checkpoint.

    Args:
      manager: the run's checkpoints.
      step: the step to read.
      state: shapes and shardings of the state.
      replay: arrays, or shapes and shardings, of the replay buffer.

    Raises:
      ValueError: the checkpoint holds other arrays, or cannot be read.
    """
    try:
        for item, expected in (("state", state), ("replay", replay)):
            _check_stored(manager.directory / str(step) / item, expected)
        items = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(state),
                host=ocp.args.JsonRestore(),
                replay=ocp.args.StandardRestore(replay),
            ),
        )
    except (KeyError, ValueError, FileNotFoundError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"checkpoint {step} in {manager.directory} does not fit this run or is "
            f"damaged: {reason}; resume with the version of mgsr_jax that wrote it, "
            f"remove the folder {step} to resume from an earlier checkpoint, or start "
            "a new run"
        ) from error
    return items["state"], items["host"], items["replay"]


def restore_params(folder: PathLike, step: int | None, params: Tree) -> Tree:
    """Only the parameters of a checkpoint.

    Nothing in the folder is changed: a run may be writing to it.

    Args:
      folder: the run's folder of checkpoints.
      step: the step to read; None: the latest.
      params: shapes and shardings of the parameters.

    Raises:
      FileNotFoundError: no such checkpoint.
      ValueError: the checkpoint holds other parameters.
    """
    with _opened(folder, step) as (manager, chosen):
        tree = {"params": params}
        try:
            _check_stored(manager.directory / str(chosen) / "state", tree)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"checkpoint {chosen} in {folder}: {error}") from error
        items = manager.restore(
            chosen,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    tree,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
                    partial_restore=True,
                )
            ),
        )
    return items["state"]["params"]


def params_shapes(folder: PathLike, step: int | None) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters in a checkpoint, by '/'-joined name.

    Args:
      folder: the run's folder of checkpoints.
      step: the step to read; None: the latest.

    Raises:
      FileNotFoundError: no such checkpoint, or its metadata is missing.
    """
    with _opened(folder, step) as (manager, chosen):
        stored = _stored(manager.directory / str(chosen) / "state")
    return {
        name.removeprefix("params/"): tuple(leaf.shape)
        for name, leaf in stored.items()
        if name.startswith("params/")
    }


@contextmanager
def _opened(
    folder: PathLike, step: int | None
) -> Iterator[tuple[ocp.CheckpointManager, int]]:
    """Open a run's checkpoints read-only, and choose `step` or the latest."""
    options = ocp.CheckpointManagerOptions(read_only=True, create=False)
    with ocp.CheckpointManager(
        Path(folder).absolute(), item_names=("state",), options=options
    ) as manager:
        steps = sorted(manager.all_steps())
        chosen = steps[-1] if steps and step is None else step
        if chosen is None or chosen not in steps:
            name = "" if step is None else f" {step}"
            raise FileNotFoundError(
                f"no checkpoint{name} in {folder}; it holds {steps or 'none'}"
            )
        yield manager, chosen


def _check_stored(item: PathLike, expected: PyTree) -> None:
    """Check that an item has the expected arrays, by name, shape and dtype.

    Without the check, orbax silently casts another dtype, returns numpy arrays of
    another shape, and leaves the parts that it does not find unchanged.
    """
    stored = _stored(item)
    for name, leaf in _by_name(expected).items():
        if name not in stored:
            raise ValueError(f"{name} is not in it")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        got = stored[name]
        if (leaf.shape, leaf.dtype) != (tuple(got.shape), got.dtype):
            raise ValueError(
                f"{name} is {got.dtype}{list(got.shape)}, "
                f"expected {leaf.dtype}{list(leaf.shape)}"
            )


def _stored(item: PathLike) -> dict[str, Leaf]:
    """Metadata of the arrays in an item, by '/'-joined name."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        metadata = reader.metadata(item).item_metadata
    if metadata is None:
        raise FileNotFoundError(
            f"{item} or its metadata is missing; choose another checkpoint"
        )
    return _by_name(metadata.tree)


def _by_name(tree: PyTree) -> dict[str, Leaf]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}
