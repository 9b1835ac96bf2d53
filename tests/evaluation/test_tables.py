"""Tables of scores and the files of `mgsr evaluate`."""

import dataclasses
import json

import pytest
from rich.console import Console

from mgsr_jax.evaluation.estimates import Estimate
from mgsr_jax.evaluation.scores import (
    Difference,
    EvaluationResult,
    ScoredResponse,
    TextScores,
)
from mgsr_jax.evaluation.tables import (
    difference_table,
    markdown_table,
    score_table,
    text_table,
    write_scores,
)


def test_markdown_table_aligns_numbers_right_and_escapes_bars():
    table = markdown_table(
        ["method", "ROUGE-L"], [["a|b", "7.0"], ["MGSR", "41.2 ± 0.3"], ["none", "-"]]
    )
    assert table.splitlines() == [
        "| method |    ROUGE-L |",
        "|:-------|-----------:|",
        "| a\\|b   |        7.0 |",
        "| MGSR   | 41.2 ± 0.3 |",
        "| none   |          - |",
    ]


def test_markdown_table_with_a_missing_cell_raises():
    with pytest.raises(ValueError, match="has 1 cells, expected 2"):
        markdown_table(["a", "b"], [["1"]])


@pytest.fixture
def result():
    metrics = {
        "rouge_l": Estimate(12.345, 10.0, 14.69),
        "math": Estimate(50.0, 1.0, 99.0),
    }
    scores = TextScores(metrics, 0.5, 0.6789, 1.0, 7.25, 0.5)
    greedy = {"rouge_l": Estimate(20.0, 15.0, 25.0), "math": Estimate(0.0, 0.0, 0.0)}
    texts = {"prompt": "Größe?", "response": "Größe", "references": ("size",)}
    response = ScoredResponse(
        seed=10,
        sample=0,
        source="a.jsonl:1",
        scores={"rouge_l": 12.5, "math": 0.0},
        length=4,
        finish_reason="stop",
        **texts,
    )
    return EvaluationResult(
        examples=1,
        sampled=scores,
        seed_std={"rouge_l": 0.5, "math": 1.5},
        by_seed={10: scores},
        pass_at_k={
            "math": {1: Estimate(50.0, 1.0, 99.0), 2: Estimate(75.0, 51.0, 99.0)}
        },
        greedy=TextScores(greedy, 0.4, 0.5, 0.9, 6.0, 1.0),
        loss=2.34567,
        responses=(response,) * 3,
    )


def cells(table):
    """The rows of a table as it is printed, heads first."""
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    lines = [line for line in capture.get().splitlines() if line[:1] in "┃│"]
    return [[cell.strip() for cell in line[1:-1].split(line[0])] for line in lines]


def test_score_table_has_one_row_a_set_and_metric(result):
    results = {"folder/dolly.jsonl": result, "sni.jsonl": result}
    assert cells(score_table(results)) == [
        ["set", "metric", "avg@2", "std of seeds", "greedy", "pass@2"],
        *(
            row
            for name in ("dolly.jsonl", "sni.jsonl")
            for row in [
                [name, "rouge_l", "12.35 [10.0,14.7]", "0.50"]
                + ["20.00 [15.0,25.0]", ""],
                [name, "math", "50.00 [1.0,99.0]", "1.50"]
                + ["0.00 [0.0,0.0]", "75.00"],
            ]
        ),
    ]


def test_difference_table_has_signs(result):
    single = Estimate(5.0, None, None)
    greedy = {"rouge_l": single, "math": single}
    difference = Difference("runs/sft", None, greedy)
    assert cells(difference_table({"a/dolly.jsonl": difference})) == [
        ["set", "metric", "greedy"],
        ["dolly.jsonl", "rouge_l", "+5.00"],
        ["dolly.jsonl", "math", "+5.00"],
    ]
    both = dataclasses.replace(difference, sampled=result.sampled.metrics)
    heads, row, _ = cells(difference_table({"a/dolly.jsonl": both}))
    assert heads == ["set", "metric", "sampled", "greedy"]
    assert row[2:] == ["+12.35 [+10.0,+14.7]", "+5.00"]


def test_a_narrow_terminal_hides_no_digit(result):
    console = Console(width=40)
    with console.capture() as capture:
        console.print(score_table({"dolly.jsonl": result}))
    assert "…" not in capture.get()


def test_score_table_of_greedy_responses(result):
    only = dataclasses.replace(
        result, sampled=None, seed_std=None, by_seed={}, pass_at_k={}
    )
    rows = cells(score_table({"dolly.jsonl": only}))
    assert rows[0] == ["set", "metric", "greedy"]
    assert rows[1] == ["dolly.jsonl", "rouge_l", "20.00 [15.0,25.0]"]


def test_text_table_has_one_row_a_set(result):
    biased = dataclasses.replace(result, exposure_bias=12.34)
    assert cells(text_table({"a/dolly.jsonl": biased})) == [
        ["set", "examples", "distinct-2", "length", "ended %", "loss", "ExAccErr %"],
        ["dolly.jsonl", "1", "0.679", "7.2", "50.0", "2.3457", "12.3"],
    ]


def test_write_scores_writes_responses_and_scores(tmp_path, result):
    folder = tmp_path / "scores"
    write_scores(folder, {"sets/*.jsonl": result, "sni.jsonl": result})
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["1-_.jsonl", "2-sni.jsonl", "scores.json"]
    line, *_ = (folder / "1-_.jsonl").read_text(encoding="utf-8").splitlines()
    assert "Größe" in line
    assert json.loads(line) == {
        "seed": 10,
        "sample": 0,
        "source": "a.jsonl:1",
        "prompt": "Größe?",
        "response": "Größe",
        "references": ["size"],
        "scores": {"rouge_l": 12.5, "math": 0.0},
        "length": 4,
        "finish_reason": "stop",
    }
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    assert list(scores) == ["sets/*.jsonl", "sni.jsonl"]
    assert sorted(scores["sni.jsonl"]) == [
        "by_seed", "difference", "examples", "exposure_bias", "greedy", "loss",
        "pass_at_k", "responses", "sampled", "seed_std",
    ]  # fmt: skip
    by_seed = scores["sni.jsonl"]["by_seed"]["10"]
    assert by_seed["metrics"]["rouge_l"] == {"mean": 12.345, "low": 10.0, "high": 14.69}
