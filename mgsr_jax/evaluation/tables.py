"""Tables of scores: Markdown, a terminal table, and the files of `mgsr evaluate`."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from mgsr_jax.evaluation.comparison import SCORES_FILE
from mgsr_jax.evaluation.estimates import Estimate
from mgsr_jax.evaluation.scores import Difference, EvaluationResult


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table that is readable as text; columns of numbers align right.

    Args:
      columns: heads of the columns.
      rows: cells, one for each column; `str()` converts them to text.

    Raises:
      ValueError: the number of cells of a row differs from the number of columns.

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
    # An unescaped bar in a cell would start the next cell.
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
    rule = [
        "-" * (width + 1) + ":" if to_right else ":" + "-" * (width + 1)
        for width, to_right in zip(widths, right, strict=True)
    ]
    lines = [_table_line(heads, widths, right), "|" + "|".join(rule) + "|"]
    lines += [_table_line(row, widths, right) for row in cells]
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    """Whether a cell is a number, a number with its deviation, or empty."""
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


def score_table(results: Mapping[str, EvaluationResult]) -> Table:
    """The table of metrics that `mgsr evaluate` prints, one row a set and metric."""
    first = next(iter(results.values()))
    samples = len(first.responses) // first.examples - 1
    passes = sorted({k for ks in first.pass_at_k.values() for k in ks} - {1})
    heads = [f"avg@{samples}"] if first.sampled else []
    heads += ["std of seeds"] if first.seed_std else []
    heads += ["greedy", *(f"pass@{k}" for k in passes)]
    caption = "mean [95 % interval over the prompts]; 0 to 100"
    table = _table(["set", "metric"], heads, caption=caption)
    for path, result in results.items():
        for name in result.greedy.metrics:
            cells = _metric_cells(result, name, passes)
            table.add_row(Path(path).name, name, *cells)
    return table


def _metric_cells(
    result: EvaluationResult, name: str, passes: Sequence[int]
) -> list[str]:
    """The cells of one metric under the heads of `score_table`."""
    cells = []
    if result.sampled is not None:
        cells.append(_estimate(result.sampled.metrics[name]))
    if result.seed_std is not None:
        cells.append(f"{result.seed_std[name]:.2f}")
    cells.append(_estimate(result.greedy.metrics[name]))
    accuracy = result.pass_at_k.get(name)
    cells += ["" if accuracy is None else f"{accuracy[k].mean:.2f}" for k in passes]
    return cells


def difference_table(differences: Mapping[str, Difference]) -> Table:
    """The table of differences to another evaluation, one row a set and metric.

    Args:
      differences: path of a set -> its difference.
    """
    first = next(iter(differences.values()))
    heads = ["sampled"] if first.sampled else []
    caption = f"difference to {first.against}, paired by prompt"
    table = _table(["set", "metric"], [*heads, "greedy"], caption=caption)
    for path, difference in differences.items():
        for name, greedy in difference.greedy.items():
            sampled = [difference.sampled[name]] if difference.sampled else []
            cells = [_estimate(value, sign="+") for value in (*sampled, greedy)]
            table.add_row(Path(path).name, name, *cells)
    return table


def _table(left: Sequence[str], right: Sequence[str], caption: str = "") -> Table:
    """An empty table; a narrow terminal breaks its cells and hides nothing."""
    table = Table(caption=caption, caption_justify="left")
    for head in left:
        table.add_column(head, overflow="fold")
    for head in right:
        table.add_column(head, overflow="fold", justify="right")
    return table


def _estimate(estimate: Estimate, *, sign: str = "") -> str:
    """Mean and interval as text, with one place where a narrow table breaks it."""
    mean = f"{estimate.mean:{sign}.2f}"
    if estimate.low is None:
        return mean
    return f"{mean} [{estimate.low:{sign}.1f},{estimate.high:{sign}.1f}]"


def text_table(results: Mapping[str, EvaluationResult]) -> Table:
    """The table that `mgsr evaluate` prints below the metrics, one row a set."""
    heads = ["examples", "distinct-2", "length", "ended %", "loss"]
    has_bias = any(result.exposure_bias is not None for result in results.values())
    table = _table(["set"], heads + ["ExAccErr %"] * has_bias)
    for path, result in results.items():
        scores, bias = result.sampled or result.greedy, result.exposure_bias
        table.add_row(
            Path(path).name,
            str(result.examples),
            f"{scores.distinct_2:.3f}",
            f"{scores.length:.1f}",
            f"{100 * scores.stopped:.1f}",
            f"{result.loss:.4f}",
            *([] if bias is None else [f"{bias:.1f}"]),
        )
    return table


def write_scores(folder: Path, results: Mapping[str, EvaluationResult]) -> None:
    """Write the responses of every set to JSONL files and the scores to scores.json.

    Files of an earlier call with fewer sets are overwritten.

    Args:
      folder: created if it is missing.
      results: path of a set -> its result.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scores = {}
    for number, (path, result) in enumerate(results.items(), 1):
        stem = re.sub(r"[^\w.-]+", "_", Path(path).stem)  # of a glob, of a hub name
        name = f"{number}-{stem}.jsonl"
        values = dataclasses.asdict(result)
        responses = values.pop("responses")
        scores[path] = {"responses": name, **values}
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in responses]
        (folder / name).write_text("".join(lines), encoding="utf-8")
    text = json.dumps(scores, indent=2, ensure_ascii=False)
    (folder / SCORES_FILE).write_text(text, encoding="utf-8")
