"""One side of a pair: a process that waits for an action, does it once and answers."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from _clock import Clock

Action = Callable[[], dict[str, Any] | None]


class Driver:
    """The process that asks; what libraries print goes to standard error."""

    def __init__(self):
        self._answers = os.fdopen(os.dup(1), "w")
        self._clock: Clock | None = None
        os.dup2(2, 1)

    def wait(self) -> str:
        """The next action, which begins now; ends the process where there is none."""
        action = sys.stdin.readline().strip()
        if not action:
            # Wherever this is called from: a trainer's loop goes no further.
            os._exit(0)
        _reset_peak()
        self._clock = Clock()
        return action

    def answer(self, **values: Any) -> None:
        """What the action came to, which ends now; at first, that the side is ready."""
        if self._clock is not None:
            values |= self._clock.read()
        values |= {"peak_mib": _memory("VmHWM"), "resident_mib": _memory("VmRSS")}
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()


def serve(actions: Mapping[str, Action], **ready: Any) -> None:
    """Does what it is asked for; `ready` is its first answer.

    What an action computes must be there when it returns.
    """
    driver = Driver()
    driver.answer(**ready)
    while True:
        driver.answer(**(actions[driver.wait()]() or {}))


def _reset_peak() -> None:
    """Begins a new peak at the memory that is held now (Linux)."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def _memory(name: str) -> float:
    """MiB of this process, by its name in Linux's status."""
    with open("/proc/self/status", encoding="ascii") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return int(fields[name].split()[0]) / 1024
