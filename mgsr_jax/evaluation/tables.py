"""Tables of scores: Markdown, a terminal table, and the files of `mgsr evaluate`."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from mgsr_jax.evaluation.evaluate import EvaluationResult


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
    """The table that `mgsr evaluate` prints, one row a set."""
    table = Table("set", "examples")
    columns = ["ROUGE-L", "greedy ROUGE-L", "distinct-2", "length", "loss"]
    has_bias = any(result.exposure_bias is not None for result in results.values())
    for column in columns + ["ExAccErr %"] * has_bias:
        table.add_column(column, justify="right")
    for path, result in results.items():
        scores = result.sampled or result.greedy
        sampled = "" if result.sampled is None else f"{result.sampled.rouge_l:.2f}"
        spread = "" if result.rouge_l_std is None else f" ± {result.rouge_l_std:.2f}"
        bias = result.exposure_bias
        table.add_row(
            Path(path).name,
            str(result.examples),
            sampled + spread,
            f"{result.greedy.rouge_l:.2f}",
            f"{scores.distinct_2:.3f}",
            f"{scores.length:.1f}",
            f"{result.loss:.4f}",
            *([] if bias is None else [f"{bias:.1f}"]),
        )
    return table


def write_scores(folder: Path | None, results: Mapping[str, EvaluationResult]) -> None:
    """Write the responses of every set to JSONL files and the scores to scores.json.

    Files of an earlier call with fewer sets are overwritten.

    Args:
      folder: created if it is missing; None writes nothing.
      results: path of a set -> its result.
    """
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    scores = {}
    for number, (path, result) in enumerate(results.items(), 1):
        values = dataclasses.asdict(result)
        responses = values.pop("responses")
        scores[path] = values
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in responses]
        name = f"{number}-{Path(path).stem}.jsonl"
        (folder / name).write_text("".join(lines), encoding="utf-8")
    (folder / "scores.json").write_text(json.dumps(scores, indent=2), encoding="utf-8")
