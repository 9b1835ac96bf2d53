"""One side of a comparison: a process that runs actions on request and answers."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from _clock import Clock

Action = Callable[[], Mapping[str, Any] | None]


class Driver:
    """The connection to the parent process; prints of libraries go to stderr."""

    def __init__(self):
        self._answers = os.fdopen(os.dup(1), "w")
        self._clock: Clock | None = None
        os.dup2(2, 1)

    def wait(self) -> str:
        """Wait for the next action and start its clock; end the process without one."""
        action = sys.stdin.readline().strip()
        if not action:
            # Not sys.exit: this may be called from inside a trainer's loop.
            os._exit(0)
        _reset_peak()
        self._clock = Clock()
        return action

    def answer(self, **values: object) -> None:
        """Send the result of the action that ends now; the first call means ready."""
        if self._clock is not None:
            values |= self._clock.read()
        values |= {"peak_mib": _memory("VmHWM"), "resident_mib": _memory("VmRSS")}
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()


def serve(actions: Mapping[str, Action], **ready: object) -> None:
    """Run requested actions by name; `ready` is the first answer.

    An action must return only when its result has been computed.
    """
    driver = Driver()
    driver.answer(**ready)
    while True:
        driver.answer(**(actions[driver.wait()]() or {}))


def _reset_peak() -> None:
    """Reset the process's memory peak to what it holds now (Linux)."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def _memory(name: str) -> float:
    """MiB of this process, by the name in /proc/self/status."""
    with open("/proc/self/status", encoding="ascii") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return int(fields[name].split()[0]) / 1024
