"""Means over prompts with their confidence intervals, and pass@k."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

NORMAL_95 = 1.959963984540054
"""The normal distribution's quantile 0.975."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95 % interval.

    Attributes:
      mean: mean over the prompts.
      low: lower end of the interval; None for fewer than two prompts.
      high: upper end of the interval; None for fewer than two prompts.
    """

    mean: float
    low: float | None
    high: float | None


def mean_estimate(
    values: Float[np.ndarray, "N"], *, least: float = 0.0, most: float = 100.0
) -> Estimate:
    """Mean of one value per prompt, with its 95 % interval.

      mean +- 1.96 s / sqrt(N),  s^2 = sum_i (x_i - mean)^2 / (N - 1)

    The interval is the central limit theorem's, with the prompts as a random sample
    (Miller 2024, arXiv 2411.00640, section 3.1), cut at the values that a mean can
    have. Several samples of a prompt are one value, their mean: they are not
    independent. For a paired difference the values are the prompts' differences.

    Args:
      values: one per prompt.
      least: smallest possible value.
      most: largest possible value.

    >>> mean_estimate(np.array([0.0, 100.0, 100.0, 100.0]))
    Estimate(mean=75.0, low=26.00090038649865, high=100.0)
    """
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Estimate(mean, None, None)
    half = NORMAL_95 * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Estimate(mean, max(least, mean - half), min(most, mean + half))


def pass_at_k(correct: int, total: int, k: int) -> float:
    """Probability that one of k samples is right, from `correct` of `total` samples.

      1 - C(total - correct, k) / C(total, k)

    It is unbiased for k <= total (Chen et al. 2021, arXiv 2107.03374, equation 1).

    Raises:
      ValueError: k is not in 1..total, or `correct` not in 0..total.

    >>> pass_at_k(1, 4, 2)
    0.5
    """
    if not 1 <= k <= total or not 0 <= correct <= total:
        raise ValueError(
            f"pass_at_k got correct={correct}, total={total}, k={k}; expected "
            "0 <= correct <= total and 1 <= k <= total"
        )
    return 1.0 - math.comb(total - correct, k) / math.comb(total, k)


def pass_at_k_sizes(total: int) -> list[int]:
    """The k that are reported for `total` samples: powers of two, and `total`.

    >>> pass_at_k_sizes(10)
    [1, 2, 4, 8, 10]
    """
    powers = {2**i for i in range(total.bit_length())}
    return sorted(powers | {total})


def mean_pass_at_k(right: Sequence[int], total: int, k: int) -> Estimate:
    """Mean of pass@k over prompts, in percent.

    Args:
      right: number of right samples of each prompt.
      total: number of samples of each prompt.
      k: samples of which one must be right.

    Raises:
      ValueError: see `pass_at_k`.
    """
    return mean_estimate(np.array([100.0 * pass_at_k(c, total, k) for c in right]))
