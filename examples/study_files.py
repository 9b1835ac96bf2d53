"""Files that processes of the study share: locks, and results written at once."""

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from pathlib import Path


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
