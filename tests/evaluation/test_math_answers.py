"""Final answers that are equal, and such that are not."""

import threading

import pytest

from mgsr_jax.evaluation import math_answers
from mgsr_jax.evaluation.math_answers import math_accuracy, reference_answer

GSM8K = "She makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18"
EQUAL = [
    ("18", GSM8K),
    ("16 - 3 - 4 = 9, and 9 * 2 = 18.\n#### 18", GSM8K),
    ("#### 18.0", GSM8K),
    ("#### 18\n\nQuestion: how many eggs?\n#### 7", GSM8K),
    ("#### 1. Count the eggs\nIt is 9.\n#### 2. Multiply\nThe total is 18.", GSM8K),
    ("**Answer: $18 a day**, because 9 eggs cost 2 each", GSM8K),
    ("The final answer is 18, not 17.", GSM8K),
    ("1234", "#### 1,234"),
    ("#### 1,234", "#### 1234"),
    ("He earns $1,234.50 in total.", "1234.5"),
    ("0.5", r"$\frac{1}{2}$"),
    (r"\frac{1}{2}", "0.5"),
    ("It is 1/2.", r"\frac{1}{2}"),
    (r"First \boxed{4}. Then I saw that it is \boxed{\frac{1}{2}}.", "0.5"),
    (r"\sqrt{12}", r"so the side is \(2\sqrt{3}\)"),
    (r"Thus $\boxed{2\sqrt{3}}$.", r"2\sqrt{3}"),
    ("$x = 5$", "5"),
    ("1 + x", r"\boxed{x+1}"),
    ("50%", "50"),
    (r"\text{Evelyn}", "Evelyn"),
]
DIFFERENT = [
    ("#### 81", GSM8K),
    ("#### -18", GSM8K),
    ("18 eggs are left, so it is 9.", GSM8K),
    ("180", GSM8K),
    ("", GSM8K),
    (r"\boxed{}", GSM8K),
    ("I do not know", GSM8K),
    ("3.5", "35"),
    ("2", r"2\sqrt{3}"),
    ("(2, 1)", "(1, 2)"),
    ("Bob", "Evelyn"),
]


@pytest.mark.parametrize(("prediction", "reference"), EQUAL)
def test_equal_answers(prediction, reference):
    assert math_accuracy(prediction, [reference]) == 100.0
    assert math_accuracy(prediction, ["99999", reference]) == 100.0


@pytest.mark.parametrize(("prediction", "reference"), DIFFERENT)
def test_different_answers(prediction, reference):
    assert math_accuracy(prediction, [reference]) == 0.0


def test_an_endless_comparison_is_wrong(monkeypatch):
    monkeypatch.setattr(math_answers, "_SECONDS", 1)
    assert math_accuracy("$9^{9^{9^{9}}}$", ["18"]) == 0.0


def test_a_thread_compares_without_a_limit():
    found = []
    thread = threading.Thread(target=lambda: found.append(math_accuracy("18", [GSM8K])))
    thread.start()
    thread.join()
    assert found == [100.0]


@pytest.mark.parametrize("reference", ["the cat sat near the dog .", "", "#### "])
def test_a_reference_without_an_answer_raises(reference):
    with pytest.raises(ValueError, match="math finds no final answer in the reference"):
        reference_answer(reference)
