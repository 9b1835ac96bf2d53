"""ROUGE-L, exact match and distinct-n against values computed by hand."""

import pytest

from mgsr_jax.evaluation.text_metrics import (
    METRICS,
    check_metrics,
    distinct_n,
    exact_match,
    rouge_l,
)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("the dog sat", ["the dog sat"], 100.0),
        # lcs "the dog down" = 3 of 4 and 3 of 5 words
        ("the dog lay down", ["the old dog sat down"], 200 * (3 / 4 * 3 / 5) / 1.35),
        # subsequence, not substring; order counts: lcs = "a c" or "b c"
        ("b a c", ["a b c"], 200 / 3),
        ("Running DOGS!", ["the dog runs"], 200 * (1 / 2 * 1 / 3) / (1 / 2 + 1 / 3)),
        ("nothing alike", ["the dog", "a cat sat"], 0.0),
        ("the dog", ["a cat", "the dog ran", "dog"], 80.0),  # the best: P 1, R 2/3
        ("", ["the dog"], 0.0),
    ],
)
def test_rouge_l_equals_the_value_by_hand(prediction, references, expected):
    assert rouge_l(prediction, references) == pytest.approx(expected, abs=1e-9)


def test_rouge_l_stems_words_of_more_than_three_letters():
    assert rouge_l("jumping happily", ["jumped happy"]) == pytest.approx(50.0)
    assert rouge_l("connections", ["connected"]) == 100.0


def test_rouge_l_does_not_depend_on_the_order_of_references():
    references = ["a cat", "the dog ran", "dog"]
    assert rouge_l("the dog", references[::-1]) == rouge_l("the dog", references)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_without_a_reference_raises(name):
    with pytest.raises(ValueError, match=f"{name} got no references; give at least"):
        METRICS[name]("a", [])


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("Paris", ["paris"], 100.0),
        ("  The\n Eiffel   Tower! ", ["eiffel tower"], 100.0),
        ("an apple a day", ["apple day"], 100.0),
        ("theatre", ["atre"], 0.0),  # an article is a whole word
        ("Paris, France", ["London", "Paris France"], 100.0),
        ("in Paris", ["Paris"], 0.0),
        ("", ["Paris"], 0.0),
        ("3.5", ["35"], 100.0),  # SQuAD's normalisation, not a comparison of numbers
    ],
)
def test_exact_match_compares_normalised_texts(prediction, references, expected):
    assert exact_match(prediction, references) == expected


@pytest.mark.parametrize("names", [[], ["rouge_l", "rouge_l"], ["bleu"]])
def test_unknown_metrics_raise(names):
    with pytest.raises(ValueError, match="expected one or several of .*'math'"):
        check_metrics(names)


def test_a_missing_package_names_its_extra(monkeypatch):
    import sys

    check_metrics(["rouge_l", "math"])
    monkeypatch.setitem(sys.modules, "math_verify", None)
    check_metrics(["rouge_l"])
    with pytest.raises(ImportError, match=r"pip install 'mgsr_jax\[math\]'"):
        check_metrics(["rouge_l", "math"])


def test_distinct_n_equals_the_value_by_hand():
    texts = [[1, 2, 1, 2], [1, 2], [3]]
    assert distinct_n(texts, 1) == 3 / 7
    assert distinct_n(texts, 2) == 2 / 4  # 12 21 12 | 12
    assert distinct_n(texts, 4) == 1.0
    assert distinct_n(texts, 5) == 0.0
    assert distinct_n(["a b a", "b a"], 2) == 2 / 3
