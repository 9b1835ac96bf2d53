"""Tables of scores and the files of `mgsr evaluate`."""

import json

import pytest
from rich.console import Console

from mgsr_jax.evaluation.evaluate import EvaluationResult, ScoredResponse, TextScores
from mgsr_jax.evaluation.tables import markdown_table, score_table, write_scores


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
    scores = TextScores(12.345, 0.5, 0.6789, 1.0, 7.25)
    return EvaluationResult(
        examples=3,
        sampled=scores,
        rouge_l_std=0.5,
        by_seed={10: scores},
        greedy=TextScores(20.0, 0.4, 0.5, 0.9, 6.0),
        loss=2.34567,
        responses=(ScoredResponse(10, "a.jsonl:1", "Größe", ("size",), 12.5, 4),),
    )


def test_score_table_has_one_row_a_set(result):
    console = Console(width=100)
    with console.capture() as capture:
        console.print(score_table({"folder/dolly.jsonl": result}))
    row = next(line for line in capture.get().splitlines() if "dolly.jsonl" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == [
        "dolly.jsonl", "3", "12.35 ± 0.50", "20.00", "0.679", "7.2", "2.3457"
    ]  # fmt: skip


def test_write_scores_writes_responses_and_scores(tmp_path, result):
    folder = tmp_path / "scores"
    write_scores(folder, {"sets/dolly.jsonl": result, "sni.jsonl": result})
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["1-dolly.jsonl", "2-sni.jsonl", "scores.json"]
    (line,) = (folder / "1-dolly.jsonl").read_text(encoding="utf-8").splitlines()
    assert "Größe" in line
    assert json.loads(line) == {
        "seed": 10,
        "source": "a.jsonl:1",
        "response": "Größe",
        "references": ["size"],
        "rouge_l": 12.5,
        "length": 4,
    }
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    assert list(scores) == ["sets/dolly.jsonl", "sni.jsonl"]
    assert sorted(scores["sni.jsonl"]) == [
        "by_seed", "examples", "exposure_bias", "greedy", "loss", "rouge_l_std",
        "sampled",
    ]  # fmt: skip
    assert scores["sni.jsonl"]["by_seed"]["10"]["rouge_l"] == 12.345


def test_write_scores_without_a_folder_writes_nothing(tmp_path, monkeypatch, result):
    monkeypatch.chdir(tmp_path)
    write_scores(None, {"dolly.jsonl": result})
    assert not list(tmp_path.iterdir())
