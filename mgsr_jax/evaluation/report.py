"""The report of a run: curves of its metrics and a Markdown table."""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from mgsr_jax.evaluation.tables import markdown_table

Series = dict[str, tuple[list[float], list[float]]]
"""Metric name -> (steps, values)."""


class Panel(NamedTuple):
    """One plot of the figure.

    Attributes:
      title: the quantity.
      unit: label of the vertical axis.
      names: metric name -> label in the panel's legend, empty where there is only one.
      from_zero: whether the vertical axis begins at 0.
    """

    title: str
    unit: str
    names: Mapping[str, str]
    from_zero: bool = False


PANELS = (
    Panel("Training loss", "weighted sum [nats]", {"train/loss": ""}),
    Panel("Cross-entropy on ground truth", "nats per token", {"train/sft": ""}),
    Panel("DAC-KL", "nats per token", {"train/dac_kl": ""}),
    Panel("Forward KL", "nats per token", {"train/forward_kl": ""}),
    Panel("Span correlation", "L2 distance per pair", {"train/span": ""}),
    Panel("Validation loss", "nats per token", {"valid/loss": ""}),
    Panel("ROUGE-L of greedy responses", "F1 x 100", {"eval/rouge_l": ""}),
    Panel(
        "DAC-KL limits",
        "quantile level",
        {"train/lower": "lower", "train/upper": "upper"},
    ),
    Panel("Teacher mass kept by DAC-KL", "probability", {"train/kept_mass": ""}),
    Panel(
        "Tokens of the teacher in samples",
        "position as a share of the response",
        {"rollout/teacher_position": ""},
    ),
    Panel("Samples with tokens of the teacher", "share", {"rollout/changed": ""}),
    Panel("Steps on the student's text", "share", {"rollout/student_share": ""}),
    Panel("Speed", "tokens per second", {"train/tokens_per_second": ""}, True),
    Panel("Peak memory of a device", "GiB", {"device/peak_gib": ""}, True),
)

# Okabe and Ito's palette: colour-blind readers can distinguish its colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
COLUMNS = 3
SMOOTH_FROM = 40


def read_metrics(path: str | Path) -> Series:
    """Read a metrics.jsonl: one JSON object a line, with `step` and flat metric names.

    A last line without its newline is still being written and is left out.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is no JSON object with a step; the error names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no metrics at {path}; expected a run folder's metrics.jsonl: check the "
            "path"
        )
    text = path.read_text(encoding="utf-8")
    series: Series = {}
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        step, record = _record(line, where=f"{path}:{number}")
        for name, value in record.items():
            if isinstance(value, int | float):
                steps, values = series.setdefault(name, ([], []))
                steps.append(step)
                values.append(float(value))
    return series


def _record(line: str, *, where: str) -> tuple[float, dict[str, object]]:
    """The step of a line, and its other fields."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}); remove the line") from error
    if isinstance(record, dict) and isinstance(record.get("step"), int | float):
        return float(record.pop("step")), record
    raise ValueError(
        f"{where}: got {line}, expected a JSON object with a number `step`; remove the "
        "line"
    )


def curves(runs: Mapping[str, str | Path], out_png: str | Path) -> Path:
    """Draw the metrics of one or several runs over their steps, one panel a quantity.

    Args:
      runs: name in the legend -> metrics.jsonl.
      out_png: file to write.

    Raises:
      FileNotFoundError: see `read_metrics`.
      ValueError: see `read_metrics`; or no run has a metric of `PANELS`.
    """
    series = {name: read_metrics(path) for name, path in runs.items()}
    present = {metric for of_run in series.values() for metric in of_run}
    panels = [panel for panel in PANELS if present & panel.names.keys()]
    if not panels:
        known = ", ".join(name for panel in PANELS for name in panel.names)
        raise ValueError(
            f"nothing to draw: got {sorted(present)}, expected some of: {known}"
        )
    # Not pyplot's figure: this one needs no display and changes no global state.
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.08)
    figure = Figure(figsize=(4.4 * columns, 2.9 * rows + 0.5), layout=layout)
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, panel in zip(grid, panels, strict=False):
        _draw(axes, panel, series)
    for axes in list(grid)[len(panels) :]:
        axes.set_axis_off()
    figure.legend(
        handles=[
            Line2D([], [], color=_colour(i), lw=2, label=name)
            for i, name in enumerate(series)
        ],
        loc="outside upper center",
        ncols=min(len(series), 6),
        frameon=False,
    )
    figure.savefig(out_png, dpi=130)
    return Path(out_png)


def _colour(run: int) -> str:
    return COLOURS[run % len(COLOURS)]


def _draw(axes: Axes, panel: Panel, series: Mapping[str, Series]) -> None:
    for run, of_run in enumerate(series.values()):
        for style, metric in zip(STYLES, panel.names, strict=False):
            if metric in of_run:
                _draw_line(axes, *of_run[metric], color=_colour(run), linestyle=style)
    if len(panel.names) > 1:
        axes.legend(
            handles=[
                Line2D([], [], color="0.3", linestyle=style, label=label)
                for style, label in zip(STYLES, panel.names.values(), strict=False)
            ],
            frameon=False,
            fontsize=8,
        )
    axes.set_title(panel.title, fontsize=10, loc="left", fontweight="bold")
    axes.set_ylabel(panel.unit, fontsize=9)
    axes.set_xlabel("optimizer step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    if panel.from_zero:
        axes.set_ylim(bottom=0)


def _draw_line(
    axes: Axes, steps: list[float], values: list[float], *, color: str, linestyle: str
) -> None:
    """Draw a line; a long one in a light tone, with its running mean on top."""
    plot = functools.partial(axes.plot, steps, color=color, linestyle=linestyle)
    if len(values) < SMOOTH_FROM:
        marker = "o" if len(values) <= 12 else None
        plot(values, marker=marker, markersize=3.5, lw=1.6)
    else:
        plot(values, lw=0.7, alpha=0.25)
        plot(running_mean(values, len(values) // 20), lw=1.6)


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Mean of each value and its neighbours up to `reach` away on both sides.

    Near an end the window narrows to stay symmetric, so that the line does not bend
    inwards. Values that are not finite are left out; a window without any gives nan.

    >>> running_mean([1.0, 2.0, 6.0], 1)
    [1.0, 3.0, 6.0]
    """
    means = []
    for i in range(len(values)):
        inside = min(reach, i, len(values) - 1 - i)
        window = values[i - inside : i + inside + 1]
        finite = [value for value in window if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


def report(run_folder: str | Path) -> Path:
    """Write report.md and curves.png into a run folder, from its metrics.jsonl.

    Returns:
      The path of report.md.

    Raises:
      FileNotFoundError, ValueError: see `curves`.
    """
    folder = Path(run_folder)
    series = read_metrics(folder / "metrics.jsonl")
    curves({folder.name: folder / "metrics.jsonl"}, folder / "curves.png")
    rows = [
        [name, f"{steps[-1]:g}", *(f"{v:.4g}" for v in (values[0], values[-1])),
         f"{min(values):.4g}", f"{max(values):.4g}"]
        for name, (steps, values) in sorted(series.items())
    ]  # fmt: skip
    table = markdown_table(
        ["metric", "last step", "first", "last", "least", "greatest"], rows
    )
    text = f"# {folder.name}\n\n![curves](curves.png)\n\n{table}\n"
    path = folder / "report.md"
    path.write_text(text, encoding="utf-8")
    return path
