"""Everything that a resumed run needs, in one orbax step.

A step holds three items: `state` (parameters, optimizer, step, key), `host` (JSON: the
data's position, the replay ratio, ...) and `replay` (the buffer). It is committed as a
whole, or not there.
"""

import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


def open_manager(
    folder: str | os.PathLike[str], *, keep: int = 2
) -> ocp.CheckpointManager:
    """The run's checkpoints; the latest `keep` stay."""
    return ocp.CheckpointManager(
        Path(folder).absolute(),
        item_names=("state", "host", "replay"),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
        ),
    )


def save(
    manager: ocp.CheckpointManager, step: int, *, state: Any, host: Any, replay: Any
) -> None:
    """Writes one step and waits until it is whole.

    Raises:
      ValueError: the step exists (it is left as it is).
      OSError, ValueError: the disk's or orbax's own; earlier steps stay good.
    """
    written = manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            host=ocp.args.JsonSave(host),
            replay=ocp.args.StandardSave(replay),
        ),
    )
    manager.wait_until_finished()
    if not written:
        raise ValueError(
            f"checkpoint {step} in {manager.directory} exists; it was left as it is"
        )


def restore(
    manager: ocp.CheckpointManager, step: int, *, state: Any, replay: Any
) -> tuple[Any, Any, Any]:
    """(state, host, replay) of a step, placed as the given trees of shapes say.

    Raises:
      ValueError: the step holds other arrays than asked for, or cannot be read.
    """
    try:
        found = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(state),
                host=ocp.args.JsonRestore(),
                replay=ocp.args.StandardRestore(replay),
            ),
        )
    except (KeyError, ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"checkpoint {step} in {manager.directory} does not fit this run or is "
            f"damaged: {str(error).splitlines()[0]}"
        ) from error
    _check_like(manager.directory, step, state, found["state"])
    return found["state"], found["host"], found["replay"]


def restore_params(
    folder: str | os.PathLike[str], step: int | None, params: Any
) -> Any:
    """The parameters alone, of `step` or the latest, placed as the tree of shapes says.

    Raises:
      FileNotFoundError: no such step.
    """
    with open_manager(folder) as manager:
        steps = sorted(manager.all_steps())
        step = steps[-1] if steps and step is None else step
        if step not in steps:
            raise FileNotFoundError(
                f"no checkpoint {'' if step is None else step} in {folder}; "
                f"it holds {steps or 'none'}"
            )
        tree = {"params": params}
        found = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    tree,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
                    partial_restore=True,
                )
            ),
        )
    return found.state["params"]


def _check_like(folder: Any, step: int, want: Any, got: Any) -> None:
    """orbax lets a wrong dtype, or without a sharding a wrong shape, pass silently."""

    def check(path: Any, want: Any, got: Any) -> None:
        if (want.shape, want.dtype) != (got.shape, got.dtype):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"checkpoint {step} in {folder}: {name} is {got.dtype}{got.shape}, "
                f"expected {want.dtype}{want.shape}"
            )

    jax.tree_util.tree_map_with_path(check, want, got)
