"""Equality of final answers: numbers and LaTeX, by the package math-verify."""

import functools
import re
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_SECONDS = 5  # of reading or comparing one answer, such as 9^(9^9)
_GSM8K_LINE = re.compile(r"^####[ \t]*(\$?-?[\d,]*\.?\d+%?)\.?[ \t]*$", re.MULTILINE)
_IN_A_TEXT = re.compile(r"\$|\\\(|\\\[|\\boxed|(?:^|\s)[A-Za-z]{2,}\s")
"""Delimiters of a formula, or a word before another one: not only an answer."""


def math_accuracy(prediction: str, references: Sequence[str]) -> float:
    r"""100 if the prediction's final answer equals that of a reference, otherwise 0.

    math-verify reads and compares the answers: 1/2, 0.5 and $\frac{1}{2}$ are equal.
    The final answer is

    - of a reference, the text behind "####" (GSM8K),
    - of a prediction, the first line that is only "#### " and a number,
    - otherwise the whole text, if it is only a number or LaTeX without delimiters,
    - otherwise what math-verify finds: the \boxed expression, or the formula or
      number behind "the answer is", or the last one.

    An answer that takes more than 5 seconds to read or to compare is wrong. The limit
    is a signal, so it exists only in the main thread.

    Raises:
      ValueError: `references` is empty, or math-verify finds no answer in one of them.
      ImportError: see `load_math_verify`.
    """
    if not references:
        raise ValueError("math got no references; give at least one")
    verify = load_math_verify().verify
    line = _GSM8K_LINE.search(prediction)
    answer = _parse(line[1] if line else prediction)
    return 100.0 * any(
        verify(reference_answer(reference), answer, timeout_seconds=_limit())
        for reference in references
    )


@functools.lru_cache(maxsize=10_000)
def reference_answer(reference: str) -> list[Any]:
    """The final answer of a reference, as math-verify compares it.

    Raises:
      ValueError: math-verify finds none.
      ImportError: see `load_math_verify`.
    """
    answer = _parse(reference.rpartition("####")[2])
    if not answer:
        raise ValueError(
            f"math finds no final answer in the reference {reference[-80:]!r}; "
            "expected a number or LaTeX, as in '#### 18', '$x^2$' or '\\boxed{18}'"
        )
    return answer


def load_math_verify() -> ModuleType:
    """The package math-verify, which only the metric `math` needs.

    Raises:
      ImportError: it is not installed; names the extra.
    """
    try:
        import math_verify
    except ImportError as error:
        raise ImportError(
            "the metric math needs the package math-verify; pip install "
            "'mgsr_jax[math]'"
        ) from error
    return math_verify


def _parse(text: str) -> list[Any]:
    """The answer of a text; empty if there is none."""
    # Between its delimiters LaTeX is read as a whole, not as the numbers in it.
    formula = text if _IN_A_TEXT.search(text) else rf"\boxed{{{text.strip()}}}"
    return load_math_verify().parse(formula, parsing_timeout=_limit())


def _limit() -> int | None:
    is_main = threading.current_thread() is threading.main_thread()
    return _SECONDS if is_main else None
