"""Signals that end a run early but cleanly."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils


@contextmanager
def stop_signals() -> Iterator[Callable[[int], bool]]:
    """Yield `stop_requested(step)`, True once the run must end after `step`.

    SIGTERM and the first Ctrl-C request the end; a second Ctrl-C interrupts at once.
    With several processes, one SIGTERM to any of them ends all after the same step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    try:
        old = {s: signal.signal(s, remember) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # only the main thread may install handlers
        old = {}
    try:
        yield lambda step: bool(received)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
