"""What a run says while it runs: sums into means, files, a line on the terminal."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mgsr_jax.losses import Sum
from mgsr_jax.objective import DIVERGENCES, LIMITS_START

SHOWN = ("loss", "sft", *DIVERGENCES, "span")
_PEAK = "peak_bytes_in_use"


class Means:
    """Adds up (sum, count) pairs, of steps or batches, until their means are asked for.

    Values that were never counted are left out; an `x_variance`, which is around the
    objective's LIMITS_START of x, comes out as `x_deviation` around the mean of x.

    >>> means = Means()
    >>> means.add({"kl": Sum(3.0, 2.0)})
    >>> means.add({"kl": Sum(1.0, 2.0)})
    >>> means.take()
    {'kl': 1.0}
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, metrics: Mapping[str, Sum]) -> None:
        """Adds one step's or batch's."""
        for name, (total, count) in jax.device_get(dict(metrics)).items():
            old = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (old[0] + float(total), old[1] + float(count))

    def count(self, name: str) -> float:
        """What `name` counted so far."""
        return self._sums.get(name, (0.0, 0.0))[1]

    def take(self) -> dict[str, float]:
        """The means; starts anew."""
        means = {name: total / n for name, (total, n) in self._sums.items() if n}
        self._sums = {}
        for name in [name for name in means if name.endswith("_variance")]:
            base = name.removesuffix("_variance")
            moved = means[base] - LIMITS_START[base.rpartition("/")[-1]]
            variance = max(means.pop(name) - moved**2, 0.0)
            means[f"{base}_deviation"] = math.sqrt(variance)
        return means


def peak_memory() -> dict[str, float]:
    """The most that one of this process's devices has held since it started, in GiB.

    Empty where a backend does not count, as a CPU's does not.
    """
    counted = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stats[_PEAK] for stats in counted if _PEAK in stats]
    return {"device/peak_gib": max(peaks) / 2**30} if peaks else {}


class MetricsLog:
    """metrics.jsonl, one object a line, and TensorBoard files beside it.

    Opened for a run that goes on from `step`, it drops the lines behind it: those steps
    are about to be made again. A last line that a crash cut short goes with them.
    Without a folder nothing is written.

    Raises:
      ValueError: a line that is none of ours, by file and number.
    """

    def __init__(self, folder: Path | None, *, step: int = 0, tensorboard: bool = True):
        self._file = self._writer = None
        if folder is None:
            return
        path = folder / "metrics.jsonl"
        if path.exists():
            _drop_behind(path, step)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            from tensorboardX import SummaryWriter

            # TensorBoard purges from this step on, itself included.
            purge = step + 1 if step else 0
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line; numbers go to TensorBoard too."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if self._writer is not None and isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def _drop_behind(path: Path, step: int) -> None:
    """Keeps the lines up to `step`; none where nothing was done, not even step 0."""
    kept = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            at = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number} is no line of metrics; remove it or the file"
            ) from error
        if step and at <= step:
            kept.append(line)
    # Written beside it first: a crash here must not cost the whole history.
    new = path.with_suffix(".jsonl.new")
    new.write_text("".join(kept), encoding="utf-8")
    new.replace(path)


class StepProgress:
    """The terminal's line: step, losses, tokens a second, peak memory, time left."""

    def __init__(self, console: Console, *, start: int, steps: int, title: str):
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._console, self._title = console, title
        self._task = self._progress.add_task(
            title, total=steps, completed=start, values="compiling"
        )
        self._last_line = time.monotonic()

    def __enter__(self) -> "StepProgress":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        self._progress.update(self._task, completed=step)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """New values; where the output is no terminal, a line now and then."""
        parts = [
            f"{name} {values[f'train/{name}']:.3f}"
            for name in SHOWN
            if f"train/{name}" in values
        ]
        parts.append(f"{values['train/tokens_per_second']:,.0f} tok/s")
        if "device/peak_gib" in values:
            parts.append(f"peak {values['device/peak_gib']:.1f} GiB")
        text = "  ".join(parts)
        self._progress.update(self._task, completed=step, values=text)
        if not self._console.is_terminal and time.monotonic() - self._last_line > 10:
            self._console.print(f"{self._title} {step}: {text}", soft_wrap=True)
            self._last_line = time.monotonic()
