"""Counts of the records of a data set, and why some of them are not used."""

import collections
import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mgsr_jax.data.forms import Form

MAX_MESSAGES = 10_000
"""Reasons that a report holds, so that a large and bad data set needs little memory."""

_QUANTILES = (0.5, 0.9, 0.99, 1.0)
_MANY = 0.1  # share of records left out as too long that is worth a warning


@dataclasses.dataclass(frozen=True)
class DataReport:
    """Counts of used and unused records of a data set, and why they were not used.

    Attributes:
      form: how the records are read.
      kept: number of examples that are used.
      malformed: number of records left out because they are not JSON, not UTF-8, or
        have missing keys or values of a wrong type.
      empty: number of records left out because a prompt or a response is empty.
      too_long: number of records left out because of their length, or cut where
        `too_long="truncate"` (those also count in `kept`).
      messages: one line "file:line: reason" for each of them, in the data's order; at
        most `MAX_MESSAGES`.
      prompt_lengths: 50 %, 90 %, 99 % and 100 % quantile of the prompts' tokens, before
        any is left out or cut; empty without a prompt.
      lengths: the same of prompt and response together.
    """

    form: Form
    kept: int
    malformed: int
    empty: int
    too_long: int
    messages: tuple[str, ...]
    prompt_lengths: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()

    @property
    def unlisted(self) -> int:
        """Number of unused or cut records beyond those in `messages`."""
        return self.malformed + self.empty + self.too_long - len(self.messages)

    @property
    def many_too_long(self) -> bool:
        """Whether so many records are left out as too long that it is worth a warning.

        The share is taken of the well-formed records.
        """
        return self.too_long > _MANY * (self.kept + self.too_long)


def data_report(
    form: Form,
    kept: int,
    problems: Iterable[str],
    messages: Iterable[str],
    *,
    prompt_lengths: Iterable[int] = (),
    lengths: Iterable[int] = (),
) -> DataReport:
    """Count problems by kind.

    Args:
      form: how the records are read.
      kept: number of examples that are used.
      problems: "malformed", "empty", "too_long" or "", one a record.
      messages: reasons; empty strings are left out.
      prompt_lengths: tokens of each prompt.
      lengths: tokens of each prompt with its response.
    """
    count = collections.Counter(problems)
    return DataReport(
        form=form,
        kept=kept,
        malformed=count["malformed"],
        empty=count["empty"],
        too_long=count["too_long"],
        messages=tuple(itertools.islice(filter(None, messages), MAX_MESSAGES)),
        prompt_lengths=_quantiles(prompt_lengths),
        lengths=_quantiles(lengths),
    )


def _quantiles(lengths: Iterable[int]) -> tuple[int, ...]:
    values = np.fromiter(lengths, np.int32)
    if not values.size:
        return ()
    return tuple(np.quantile(values, _QUANTILES, method="higher").astype(int).tolist())


def check_report(
    path: str | Path, report: DataReport, total: int, max_bad_fraction: float
) -> None:
    """Refuse a data set without a usable record or with too many malformed ones.

    Args:
      path: name of the data set in the error.
      report: counts of its records.
      total: number of all records.
      max_bad_fraction: largest share of malformed records that is accepted.

    Raises:
      ValueError: names the first few bad records.
    """
    first = "; ".join(report.messages[:3])
    if report.malformed > max_bad_fraction * total:
        raise ValueError(
            f"data {str(path)!r}: {report.malformed} of {total} records are malformed; "
            f"expected at most max_bad_fraction={max_bad_fraction}; fix them, first: "
            f"{first}"
        )
    if report.kept == 0:
        fix = "raise max_length or max_prompt_length, " if report.too_long else ""
        raise ValueError(
            f"data {str(path)!r} has no usable record among {total}; {fix}first: "
            f"{first}"
        )
