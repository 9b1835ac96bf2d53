"""Everything that a resumed run needs, in one orbax step.

A step holds three items: `state` (parameters, optimizer, step, key), `host` (JSON: the
data's position, the replay ratio, ...) and `replay` (the buffer). It is committed as a
whole, or not there.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
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
        for item, like in (("state", state), ("replay", replay)):
            _check_stored(manager.directory / str(step) / item, like)
        found = manager.restore(
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
            f"damaged: {reason}"
        ) from error
    return found["state"], found["host"], found["replay"]


def restore_params(
    folder: str | os.PathLike[str], step: int | None, params: Any
) -> Any:
    """The parameters alone, of `step` or the latest, placed as the tree of shapes says.

    Nothing in the folder is touched: the run may be at work in it.

    Raises:
      FileNotFoundError: no such step.
      ValueError: the step holds other parameters than asked for.
    """
    with _opened(folder, step) as (manager, wanted):
        tree = {"params": params}
        try:
            _check_stored(manager.directory / str(wanted) / "state", tree)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"checkpoint {wanted} in {folder}: {error}") from error
        found = manager.restore(
            wanted,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    tree,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
                    partial_restore=True,
                )
            ),
        )
    return found["state"]["params"]


def params_shapes(
    folder: str | os.PathLike[str], step: int | None
) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of `step` or the latest, by '/'-joined name.

    Raises:
      FileNotFoundError: no such step, or it has lost its metadata.
    """
    with _opened(folder, step) as (manager, wanted):
        stored = _stored(manager.directory / str(wanted) / "state")
    return {
        name.removeprefix("params/"): tuple(leaf.shape)
        for name, leaf in stored.items()
        if name.startswith("params/")
    }


@contextmanager
def _opened(
    folder: str | os.PathLike[str], step: int | None
) -> Iterator[tuple[ocp.CheckpointManager, int]]:
    """A run's checkpoints, to be read alone, and the step that is asked for."""
    options = ocp.CheckpointManagerOptions(read_only=True, create=False)
    with ocp.CheckpointManager(
        Path(folder).absolute(), item_names=("state",), options=options
    ) as manager:
        steps = sorted(manager.all_steps())
        wanted = steps[-1] if steps and step is None else step
        if wanted is None or wanted not in steps:
            name = "" if step is None else f" {step}"
            raise FileNotFoundError(
                f"no checkpoint{name} in {folder}; it holds {steps or 'none'}"
            )
        yield manager, wanted


def _check_stored(item: Any, want: Any) -> None:
    """What is asked for is there, by name, shape and dtype.

    orbax casts a wrong dtype, returns numpy arrays of any shape, and where a part is
    read leaves what it does not find as it was; all of it silently.
    """
    stored = _stored(item)
    for name, leaf in _by_name(want).items():
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


def _stored(item: Any) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        metadata = reader.metadata(item).item_metadata
    if metadata is None:
        raise FileNotFoundError(f"{item} is missing or has lost its metadata")
    return _by_name(metadata.tree)


def _by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }
