"""Scores of generated text: ROUGE-L, exact match, final answers, distinct-n."""

import functools
import re
import string
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from mgsr_jax.evaluation.math_answers import load_math_verify, math_accuracy

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

Metric = Callable[[str, Sequence[str]], float]
"""Score of a response against its references, in [0, 100]; higher is better."""

MetricName = Literal["rouge_l", "exact_match", "math"]


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 with stemming, in percent, against the best of the references.

    F1 = 2 P R / (P + R), P = lcs / words of the prediction, R = lcs / words of the
    reference (Lin 2004, computed by the package rouge-score; a word is a run of a-z
    and 0-9).

    Raises:
      ValueError: `references` is empty.

    >>> round(rouge_l("the dogs sat", ["the dog sat down", "no"]), 2)  # P 1, R 3/4
    85.71
    """
    if not references:
        raise ValueError("rouge_l got no references; give at least one")
    score = _rouge_scorer().score
    return 100.0 * max(
        score(reference, prediction)["rougeL"].fmeasure for reference in references
    )


@functools.cache
def _rouge_scorer() -> "RougeScorer":
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """100 if the prediction equals one of the references, otherwise 0.

    Both are normalised as in SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250): lower
    case, without ASCII punctuation, without the words a, an and the, with single
    spaces. A number loses its sign and its point: use `math` for numbers.

    Raises:
      ValueError: `references` is empty.

    >>> exact_match("The Seine.", ["Rhine", "Seine"])
    100.0
    """
    if not references:
        raise ValueError("exact_match got no references; give at least one")
    return 100.0 * (_normalised(prediction) in map(_normalised, references))


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _normalised(text: str) -> str:
    without = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", without).split())


METRICS: Mapping[MetricName, Metric] = {
    "rouge_l": rouge_l,
    "exact_match": exact_match,
    "math": math_accuracy,
}

ACCURACIES: tuple[MetricName, ...] = ("exact_match", "math")
"""Metrics that are 0 or 100, so that pass@k is defined."""


def check_metrics(names: Sequence[str]) -> None:
    """Refuse names that are not in `METRICS`, and metrics whose package is missing.

    Raises:
      ValueError: a name is unknown or occurs twice, or there is none.
      ImportError: the package of a metric is missing; names the extra.
    """
    if not names or len(set(names)) < len(names) or not METRICS.keys() >= set(names):
        raise ValueError(
            f"metrics={list(names)}; expected one or several of {list(METRICS)}, each "
            "once"
        )
    if "math" in names:
        load_math_verify()


def distinct_n(texts: Sequence[Sequence[Hashable]], n: int) -> float:
    """Number of different n-grams divided by the number of all n-grams of the texts.

    Li et al. 2016 (arXiv 1510.03055). A text is a list of tokens, or a string, which is
    split into words. A text shorter than n has no n-grams. 0 where no text has any.

    >>> round(distinct_n(["a b a b", "a"], 2), 3)
    0.667
    """
    units = [text.split() if isinstance(text, str) else text for text in texts]
    grams = [tuple(u[i : i + n]) for u in units for i in range(len(u) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
