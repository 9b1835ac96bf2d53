"""The progress line of a run on the terminal."""

import time
from collections.abc import Mapping

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

from mgsr_jax.divergences import DIVERGENCES

_SHOWN = ("loss", "sft", *DIVERGENCES, "span")


class StepProgress:
    """Progress line: step, losses, tokens per second, peak memory, time left.

    Where the output is not a terminal, it prints a line at most every 10 seconds.
    """

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
        """Show that `step` steps are done."""
        self._progress.update(self._task, completed=step)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Show the metrics of `step`."""
        parts = [
            f"{name} {values[f'train/{name}']:.3f}"
            for name in _SHOWN
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


def limit_warning(values: Mapping[str, float]) -> str | None:
    """A warning if DAC-KL's learned lower limit is at the end of its range."""
    lower = values.get("train/lower")
    if lower is None or 0.002 <= lower <= 0.45:
        return None
    return (
        f"DAC-KL's lower limit is {lower:.4f}, at the end of its range, so the clip "
        "network no longer selects classes; raise objective.prior_weight or choose "
        "another objective.clip_signal"
    )
