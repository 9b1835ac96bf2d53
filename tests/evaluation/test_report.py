"""The report of a run: metrics are read, curves and a table are written."""

import json
import math

import pytest

from mgsr_jax.evaluation.report import (
    curves,
    read_metrics,
    report,
    running_mean,
)


def write_metrics(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "mgsr"
    folder.mkdir()
    records = [{"step": s, "train/loss": 3 / s, "note": "text"} for s in range(1, 60)]
    records.append({"step": 60, "valid/loss": 0.5, "eval/rouge_l": 41.0})
    write_metrics(folder / "metrics.jsonl", records)
    return folder


def test_read_metrics_keeps_each_metric_with_its_own_steps(tmp_path):
    path = write_metrics(
        tmp_path / "metrics.jsonl",
        [
            {"step": 1, "train/loss": 2.0},
            {"step": 2, "train/loss": 1, "valid/loss": 4.0, "phase": "warm"},
        ],
    )
    assert read_metrics(path) == {
        "train/loss": ([1.0, 2.0], [2.0, 1.0]),
        "valid/loss": ([2.0], [4.0]),
    }


def test_read_metrics_leaves_out_a_line_still_being_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "tr')
    assert read_metrics(path) == {"train/loss": ([1.0], [2.0])}


@pytest.mark.parametrize("line", ["{oops", "[1, 2]", '{"train/loss": 1.0}'])
def test_read_metrics_names_file_and_line_of_a_bad_record(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "train/loss": 2.0}}\n{line}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        read_metrics(path)


def test_read_metrics_of_a_missing_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="no metrics at"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_running_mean_leaves_out_values_that_are_not_finite():
    assert running_mean([1.0, math.nan, 4.0, 5.0], 1) == [1.0, 2.5, 4.5, 5.0]
    assert math.isnan(running_mean([math.inf], 3)[0])


def png_size(path):
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def test_the_figure_has_more_rows_for_more_metrics(run_folder, tmp_path):
    other = write_metrics(
        tmp_path / "sft.jsonl",
        [{"step": s, "train/lower": 0.1, "train/upper": 0.9} for s in range(3)],
    )
    three_panels = curves({"mgsr": run_folder / "metrics.jsonl"}, tmp_path / "3.png")
    four_panels = curves(
        {"mgsr": run_folder / "metrics.jsonl", "sft": other}, tmp_path / "4.png"
    )
    # Three panels fill a row. The limits, which only the second run has, start another.
    assert png_size(four_panels)[0] == png_size(three_panels)[0]
    assert png_size(four_panels)[1] > png_size(three_panels)[1]


def test_curves_of_only_unknown_metrics_raise(tmp_path):
    path = write_metrics(tmp_path / "metrics.jsonl", [{"step": 1, "train/lr": 0.1}])
    with pytest.raises(ValueError, match="nothing to draw.*train/lr"):
        curves({"run": path}, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_the_report_has_the_last_values_and_the_curves(run_folder):
    path = report(run_folder)
    text = path.read_text()
    assert path == run_folder / "report.md"
    assert text.startswith("# mgsr\n\n![curves](curves.png)\n")
    assert "| eval/rouge_l |        60 |    41 |" in text
    assert png_size(run_folder / "curves.png") > (0, 0)
