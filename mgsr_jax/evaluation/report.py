"""What a run did, to look at: curves of its metrics and a Markdown table."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from mgsr_jax.evaluation.evaluate import EvaluationResult

Series = dict[str, tuple[list[float], list[float]]]
"""Metric name -> (steps, values)."""


class Panel(NamedTuple):
    """One axes of the figure.

    Attributes:
      title: what it shows.
      unit: label of its vertical axis.
      names: the metrics it draws, and the word for each where there are several.
      from_zero: whether the axis begins at 0.
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
    Panel("Validation ROUGE-L", "F1 x 100", {"valid/rouge_l": ""}),
    Panel(
        "DAC-KL limits",
        "quantile level",
        {"train/lower": "lower", "train/upper": "upper"},
    ),
    Panel("Teacher mass kept by DAC-KL", "probability", {"train/kept_mass": ""}),
    Panel(
        "SCRG: corrected token", "position in the row", {"rollout/error_position": ""}
    ),
    Panel("SCRG: corrected samples", "share", {"rollout/corrected": ""}),
    Panel("Steps on the student's text", "share", {"rollout/student_share": ""}),
    Panel("Speed", "tokens per second", {"train/tokens_per_second": ""}, True),
    Panel("Peak memory of a device", "GiB", {"device/peak_gib": ""}, True),
)

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
COLUMNS = 3
SMOOTH_FROM = 40


def read_metrics(path: str | Path) -> Series:
    """The series of a metrics.jsonl: one object a line with `step` and flat names.

    A last line without its newline is still being written and is left out.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is no JSON object with a step; names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no metrics at {path}: expected a run folder's metrics.jsonl"
        )
    text = path.read_text(encoding="utf-8")
    series: Series = {}
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        record = _record(line, where=f"{path}:{number}")
        step = record.pop("step")
        for name, value in record.items():
            if isinstance(value, int | float):
                steps, values = series.setdefault(name, ([], []))
                steps.append(float(step))
                values.append(float(value))
    return series


def _record(line: str, *, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}): remove the line") from error
    if not isinstance(record, dict) or not isinstance(record.get("step"), int | float):
        raise ValueError(f"{where}: expected an object with a number `step`: {line}")
    return record


def curves(runs: Mapping[str, str | Path], out_png: str | Path) -> Path:
    """Draws the metrics of one or several runs over their steps, a panel a quantity.

    Args:
      runs: name in the legend -> metrics.jsonl.
      out_png: file to write.

    Raises:
      FileNotFoundError, ValueError: as `read_metrics`; or there is nothing to draw.
    """
    series = {name: read_metrics(path) for name, path in runs.items()}
    present = {metric for of_run in series.values() for metric in of_run}
    panels = [panel for panel in PANELS if present & panel.names.keys()]
    if not panels:
        known = ", ".join(name for panel in PANELS for name in panel.names)
        raise ValueError(
            f"nothing to draw: got {sorted(present)}, expected some of: {known}"
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # A figure of its own, not pyplot's: no global state, no display needed.
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
        handles=[_legend_line(i, name) for i, name in enumerate(series)],
        loc="outside upper center",
        ncols=min(len(series), 6),
        frameon=False,
    )
    figure.savefig(out_png, dpi=130)
    return Path(out_png)


def _legend_line(index: int, name: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=COLOURS[index % len(COLOURS)], lw=2, label=name)


def _draw(axes: Any, panel: Panel, series: Mapping[str, Series]) -> None:
    for index, of_run in enumerate(series.values()):
        colour = COLOURS[index % len(COLOURS)]
        for style, metric in zip(STYLES, panel.names, strict=False):
            if metric in of_run:
                _draw_line(axes, *of_run[metric], color=colour, linestyle=style)
    if len(panel.names) > 1:
        from matplotlib.lines import Line2D

        axes.legend(
            handles=[
                Line2D([], [], color="0.3", linestyle=style, label=word)
                for style, word in zip(STYLES, panel.names.values(), strict=False)
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


def _draw_line(axes: Any, steps: list[float], values: list[float], **look: Any) -> None:
    """A line; a long and noisy one in a light tone under its running mean."""
    if len(values) < SMOOTH_FROM:
        marker = "o" if len(values) <= 12 else None
        axes.plot(steps, values, marker=marker, markersize=3.5, lw=1.6, **look)
    else:
        axes.plot(steps, values, lw=0.7, alpha=0.25, **look)
        axes.plot(steps, running_mean(values, len(values) // 20), lw=1.6, **look)


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Mean of each value and its neighbours up to `reach` away on both sides.

    Towards an end the window narrows with the distance to it, so that the line is not
    pulled inwards. Values that are not finite count for nothing; of none, nan.

    >>> running_mean([1.0, 2.0, 6.0], 1)
    [1.0, 3.0, 6.0]
    """
    means = []
    for i in range(len(values)):
        inside = min(reach, i, len(values) - 1 - i)
        window = values[i - inside : i + inside + 1]
        near = [value for value in window if math.isfinite(value)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, readable as text: columns of numbers are aligned right.

    Args:
      columns: the heads.
      rows: cells, one for each column; str() makes their text.

    Raises:
      ValueError: a row has more or fewer cells than there are columns.

    >>> print(markdown_table(["method", "loss"], [["SFT", "1.27"], ["MGSR", "1.2"]]))
    | method | loss |
    |:-------|-----:|
    | SFT    | 1.27 |
    | MGSR   |  1.2 |
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(
                f"table row {list(row)} has {len(row)} cells, expected "
                f"{len(columns)}, one for each of {list(columns)}"
            )
    # A bar in a cell would start the next one.
    cells = [
        [str(cell).replace("|", "\\|").replace("\n", " ") for cell in row]
        for row in rows
    ]
    heads = [str(column).replace("|", "\\|") for column in columns]
    widths = [
        max(3, *(len(row[i]) for row in [heads, *cells])) for i in range(len(heads))
    ]
    right = [
        bool(cells) and all(_is_number(row[i]) for row in cells)
        for i in range(len(heads))
    ]
    lines = [_table_line(heads, widths, right)]
    rule = [
        "-" * (width + 1) + ":" if to_right else ":" + "-" * (width + 1)
        for width, to_right in zip(widths, right, strict=True)
    ]
    lines.append("|" + "|".join(rule) + "|")
    lines += [_table_line(row, widths, right) for row in cells]
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    """Whether a cell shows a number, perhaps with its deviation, or none at all."""
    if cell in ("", "-"):
        return True
    try:
        for part in cell.split("±"):
            float(part)
    except ValueError:
        return False
    return True


def _table_line(
    cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]
) -> str:
    padded = [
        cell.rjust(width) if to_right else cell.ljust(width)
        for cell, width, to_right in zip(cells, widths, right, strict=True)
    ]
    return "| " + " | ".join(padded) + " |"


def report(run_folder: str | Path) -> Path:
    """Writes report.md and curves.png into a run folder, from its metrics.jsonl.

    Returns:
      The path of report.md.

    Raises:
      FileNotFoundError, ValueError: as `curves`.
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


def score_table(results: Mapping[str, EvaluationResult]) -> Table:
    """A row a set: what `mgsr evaluate` prints."""
    table = Table("set", "examples")
    for column in ("ROUGE-L", "greedy ROUGE-L", "distinct-2", "length", "loss"):
        table.add_column(column, justify="right")
    for path, result in results.items():
        scores = result.sampled or result.greedy
        sampled = "" if result.sampled is None else f"{result.sampled.rouge_l:.2f}"
        spread = "" if result.rouge_l_std is None else f" ± {result.rouge_l_std:.2f}"
        table.add_row(
            Path(path).name,
            str(result.examples),
            sampled + spread,
            f"{result.greedy.rouge_l:.2f}",
            f"{scores.distinct_2:.3f}",
            f"{scores.length:.1f}",
            f"{result.loss:.4f}",
        )
    return table


def write_scores(folder: Path | None, results: Mapping[str, EvaluationResult]) -> None:
    """Every answer of every set, and the scores; again after each set."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    scores = {}
    for number, (path, result) in enumerate(results.items(), 1):
        values = dataclasses.asdict(result)
        answers = values.pop("answers")
        scores[path] = values
        lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers]
        name = f"{number}-{Path(path).stem}.jsonl"
        (folder / name).write_text("".join(lines), encoding="utf-8")
    (folder / "scores.json").write_text(json.dumps(scores, indent=2), encoding="utf-8")
