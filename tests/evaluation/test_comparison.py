"""Paired differences to another model's scores."""

import numpy as np
import pytest

from mgsr_jax.evaluation.comparison import read_baseline
from mgsr_jax.evaluation.scores import Draw, ScoredResponse, set_result
from mgsr_jax.evaluation.tables import write_scores

PATH = "sets/dolly.jsonl"


def draw(seed, sample, values):
    responses = [
        ScoredResponse(
            seed=seed,
            sample=sample,
            source=f"dolly.jsonl:{i}",
            prompt=f"Name {i}\u2028rivers.",  # a line's end only for str.splitlines
            response="Seine",
            references=("Rhine", "Seine"),
            scores={"math": float(value)},
            length=1,
            finish_reason="stop",
        )
        for i, value in enumerate(values, 1)
    ]
    return Draw(responses, [[1]] * len(responses))


def result(*sampled, greedy):
    draws = {1: [draw(1, j, values) for j, values in enumerate(sampled)]}
    return set_result(draws if sampled else {}, draw(None, 0, greedy), 1.0)


OURS = result((0, 100, 100), (100, 100, 0), greedy=(100, 100, 0))
THEIRS = result((0, 0, 100), greedy=(0, 100, 0))
ASKED = [(r.prompt, r.references) for r in THEIRS.responses[-3:]]


@pytest.fixture
def folder(tmp_path):
    write_scores(tmp_path / "sft", {PATH: THEIRS})
    return tmp_path / "sft"


def test_the_difference_is_paired_by_prompt(folder):
    baseline = read_baseline(folder, PATH)
    baseline.check(ASKED)
    baseline.check_metrics(["math"])
    difference = baseline.difference(OURS)
    assert difference.against == str(folder)
    for found, by_prompt in (
        (difference.sampled["math"], [50 - 0, 100 - 0, 50 - 100]),
        (difference.greedy["math"], [100 - 0, 0, 0]),
    ):
        error = np.std(by_prompt, ddof=1) / 3**0.5
        assert found.mean == pytest.approx(np.mean(by_prompt))
        assert found.mean - found.low == pytest.approx(1.959964 * error)
        assert found.high == pytest.approx(min(100, 2 * found.mean - found.low))
    # Narrower than the interval of independent samples.
    same = read_baseline(folder, PATH).difference(THEIRS)
    assert same.greedy["math"].low == same.greedy["math"].high == 0.0


def test_without_samples_of_both_only_greedy_responses_are_compared(folder):
    difference = read_baseline(folder, PATH).difference(result(greedy=(0, 0, 0)))
    assert difference.sampled is None and difference.greedy["math"].mean < 0


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (ASKED[:2], "it has 3 prompts, got 2"),
        ([*ASKED[:2], ("Name 4 rivers.", ASKED[2][1])], "dolly.jsonl:3 differ"),
        ([(ASKED[0][0], ("Rhine",)), *ASKED[1:]], "dolly.jsonl:1 differ"),
    ],
)
def test_other_prompts_are_refused(folder, asked, message):
    with pytest.raises(ValueError, match=message):
        read_baseline(folder, PATH).check(asked)


def test_other_metrics_and_sets_are_refused(folder):
    with pytest.raises(ValueError, match=r"no scores of \['rouge_l'\], only of"):
        read_baseline(folder, PATH).check_metrics(["math", "rouge_l"])
    with pytest.raises(ValueError, match=r"no scores of sni.jsonl, only of \['sets"):
        read_baseline(folder, "sni.jsonl")


def test_a_folder_that_evaluate_did_not_write_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="output folder of mgsr evaluate"):
        read_baseline(tmp_path, PATH)
    file = folder / "1-dolly.jsonl"
    file.write_text(file.read_text().replace('"sample"', '"number"'))
    with pytest.raises(ValueError, match="not those of this version"):
        read_baseline(folder, PATH)


def test_responses_are_read_as_they_were_written(folder):
    baseline = read_baseline(folder, PATH)
    assert baseline.sampled + baseline.greedy == THEIRS.responses
