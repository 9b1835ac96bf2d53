"""Elapsed seconds, and the share of the machine that other programs used."""

import os
import time


class Clock:
    """A clock that runs from its construction."""

    def __init__(self):
        self._start = self._now()

    def read(self) -> dict[str, float]:
        """Seconds so far, and the share of all cores' time that others used.

        If that share is more than a few hundredths, a ratio means little: a library
        whose threads wait for one another in a loop loses more than the share.
        """
        wall, own, busy = (
            now - start for now, start in zip(self._now(), self._start, strict=True)
        )
        available = wall * (os.cpu_count() or 1)
        others = min(1.0, max(0.0, (busy - own) / available))
        return {"seconds": wall, "others": others}

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Wall time, CPU time of this process and its children, of all programs."""
        return time.perf_counter(), sum(os.times()[:4]), _busy()


def _busy() -> float:
    """CPU seconds of all programs since the machine started (Linux)."""
    with open("/proc/stat", encoding="ascii") as lines:
        user, nice, system, _idle, _iowait, *rest = lines.readline().split()[1:9]
    ticks = sum(int(x) for x in (user, nice, system, *rest))
    return ticks / os.sysconf("SC_CLK_TCK")
