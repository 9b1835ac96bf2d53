"""Intervals and pass@k against direct computations."""

import itertools
import math
import statistics

import numpy as np
import pytest

from mgsr_jax.evaluation.estimates import (
    NORMAL_95,
    mean_estimate,
    mean_pass_at_k,
    pass_at_k,
    pass_at_k_sizes,
)


def test_the_interval_is_1_96_standard_errors():
    values = np.array([43.0, 50.0, 30.0, 100.0, 12.5])
    found = mean_estimate(values)
    error = statistics.stdev(values) / math.sqrt(5)
    quantile = statistics.NormalDist().inv_cdf(0.975)
    assert quantile == pytest.approx(NORMAL_95, rel=1e-12)
    assert found.mean == pytest.approx(47.1)
    assert found.low == pytest.approx(47.1 - quantile * error)
    assert found.high == pytest.approx(47.1 + quantile * error)


def test_the_interval_covers_the_mean_in_95_of_100_samples():
    rng = np.random.default_rng(0)
    right = 100.0 * (rng.random((2000, 200)) < 0.3)
    found = [mean_estimate(values) for values in right]
    covered = [estimate.low <= 30.0 <= estimate.high for estimate in found]
    assert 0.93 < statistics.fmean(covered) < 0.96


def test_the_interval_is_cut_at_possible_values():
    found = mean_estimate(np.array([0.0] * 11 + [100.0]))
    assert (found.low, found.high) == (0.0, pytest.approx(100 / 12 + 16.333, abs=1e-3))
    assert mean_estimate(np.array([100.0, 0.0, 100.0])).high == 100.0
    difference = mean_estimate(np.array([0.0] * 11 + [-100.0]), least=-100.0)
    assert (difference.low, difference.high) == pytest.approx(
        (-found.high, 8.0), abs=1e-2
    )


def test_one_prompt_has_no_interval():
    found = mean_estimate(np.array([7.0]))
    assert (found.mean, found.low, found.high) == (7.0, None, None)


@pytest.mark.parametrize("total", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(total):
    for correct in range(total + 1):
        right = [i < correct for i in range(total)]
        for k in range(1, total + 1):
            subsets = list(itertools.combinations(right, k))
            want = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(correct, total, k) == pytest.approx(want, abs=1e-15)


def test_pass_at_1_is_the_mean_and_many_samples_are_exact():
    assert pass_at_k(3, 10, 1) == pytest.approx(0.3)
    assert pass_at_k(1, 4000, 2000) == pytest.approx(0.5)
    found = mean_pass_at_k([0, 2, 1], 2, 2)
    assert found.mean == pytest.approx(200 / 3)


@pytest.mark.parametrize(("correct", "total", "k"), [(1, 2, 3), (3, 2, 1), (0, 2, 0)])
def test_impossible_counts_raise(correct, total, k):
    with pytest.raises(ValueError, match=f"correct={correct}, total={total}, k={k}"):
        pass_at_k(correct, total, k)


def test_sizes_are_powers_of_two_and_all_samples():
    assert [pass_at_k_sizes(n) for n in (1, 2, 5, 8)] == [
        [1], [1, 2], [1, 2, 4, 5], [1, 2, 4, 8],
    ]  # fmt: skip
