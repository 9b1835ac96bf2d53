"""Files of the study: locks of its processes, results, and runs that go on."""

import contextlib
import dataclasses
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import small_runs
from rich.console import Console

from mgsr_jax.training.config import TrainConfig
from mgsr_jax.training.trainer import TrainResult


@contextlib.contextmanager
def locked(file: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process holds `file`; the system releases it if the process dies.

    Args:
      file: an empty file.
      wait: until no other process holds it; otherwise the result may be False.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def write_json(file: Path, record: Mapping[str, object]) -> None:
    """Write a file in one step, so that a stop leaves none that is half written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    new.write_text(json.dumps(record) + "\n", encoding="utf-8")
    new.replace(file)


def train_or_go_on(config: TrainConfig, console: Console) -> TrainResult:
    """Train to the end; a run that was stopped goes on from its last checkpoint."""
    output = Path(config.output)
    resume = any((output / "checkpoints").glob("[0-9]*"))
    if not resume:  # stopped before its first checkpoint
        shutil.rmtree(output, ignore_errors=True)
    config = dataclasses.replace(config, resume=resume)
    return small_runs.train_to_the_end(config, console)
