"""Scores of generated text: ROUGE-L and distinct-n."""

import functools
from collections.abc import Hashable, Sequence

from rouge_score.rouge_scorer import RougeScorer


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
def _rouge_scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)


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
