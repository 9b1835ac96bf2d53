"""Seconds, and how much of the machine other programs had meanwhile."""

import os
import time


class Clock:
    """Runs from its making."""

    def __init__(self):
        self._start = self._now()

    def read(self) -> dict[str, float]:
        """Seconds so far, and others' share of all cores' time in them.

        A share of more than a few hundredths means that the ratio is not worth much: a
        library whose threads wait for each other in a loop loses more than its share.
        """
        wall, own, all_of_them = (
            now - start for now, start in zip(self._now(), self._start, strict=True)
        )
        available = wall * (os.cpu_count() or 1)
        others = min(1.0, max(0.0, (all_of_them - own) / available))
        return {"seconds": wall, "others": others}

    @staticmethod
    def _now() -> tuple[float, float, float]:
        return time.perf_counter(), sum(os.times()[:4]), _busy()


def _busy() -> float:
    """CPU seconds of all programs since the machine started (Linux)."""
    with open("/proc/stat", encoding="ascii") as lines:
        user, nice, system, _idle, _iowait, *rest = lines.readline().split()[1:9]
    ticks = sum(int(x) for x in (user, nice, system, *rest))
    return ticks / os.sysconf("SC_CLK_TCK")
