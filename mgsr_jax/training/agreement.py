"""What the processes of a run must have in common, and that a failure is told to all.

A process that fails alone leaves the others waiting for it; one that was given other
settings or data trains on something else, and nothing says so. A process on its own
agrees with itself.
"""

import json
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from mgsr_jax.training.distributed import is_lead

T = TypeVar("T")


def together(call: Callable[[], T]) -> T:
    """What `call` returns, once it has returned in every process.

    `call` itself must not wait for other processes.

    Raises:
      ValueError: it failed in another process; says which, and why.
      Exception: whatever it raises here.
    """
    try:
        result = call()
    except Exception as error:
        _gathered(str(error) or type(error).__name__)
        raise
    for number, reason in enumerate(_gathered("")):
        if reason:
            raise ValueError(f"process {number} of this run failed: {reason}")
    return result


def check_equal(parts: Mapping[str, str]) -> None:
    """Every process has the same `parts`, by name.

    Raises:
      ValueError: names those that differ, and in which process.
    """
    lead, *others = map(json.loads, _gathered(json.dumps(dict(parts))))
    for number, other in enumerate(others, 1):
        differ = [name for name in lead | other if lead.get(name) != other.get(name)]
        if differ:
            raise ValueError(
                f"processes 0 and {number} of this run differ in {', '.join(differ)}; "
                "start them with the same command and the same data"
            )


def check_shared(folder: Path, *, patience: float = 60.0) -> None:
    """Every process sees the same `folder`: the lead leaves a mark in it for a moment.

    Args:
      patience: seconds to look for it; network file systems remember for a while that
        a file was not there.

    Raises:
      ValueError: a process does not see it.
    """
    if jax.process_count() == 1:
        return
    mark = folder / f".seen-{_gathered(uuid.uuid4().hex)[0]}"
    try:
        together(lambda: _leave(mark) if is_lead() else None)
        deadline = time.monotonic() + patience
        while not (seen := mark.exists()) and time.monotonic() < deadline:
            time.sleep(0.1)
        answers = _gathered("" if seen else "not seen")
    finally:
        if is_lead():
            mark.unlink(missing_ok=True)
    if blind := [number for number, answer in enumerate(answers) if answer]:
        raise ValueError(
            f"output: processes {blind} of this run do not see what process 0 writes "
            f"in {folder}; give a folder on storage that all hosts share, by a path "
            "that is the same on all of them"
        )


def _leave(mark: Path) -> None:
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


def _gathered(text: str) -> list[str]:
    """What each process says, in their order; all of them call this together."""
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(own.size))
    padded = np.zeros(max(1, sizes.max()), np.uint8)
    padded[: own.size] = own
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:n]).decode() for row, n in zip(rows, sizes, strict=True)]
