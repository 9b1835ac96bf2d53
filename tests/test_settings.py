"""Checks that records of settings share."""

import dataclasses
from typing import Literal

import pytest

from mgsr_jax import settings


@dataclasses.dataclass
class Example:
    word: Literal["one", "two"] = "one"
    size: float | None = 1.0


def test_a_word_is_one_of_its_literal():
    settings.check_choices(Example("two"))
    with pytest.raises(ValueError, match=r"a.word='three'; expected one of \('one', "):
        settings.check_choices(Example("three"), "a.")


@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_a_positive_number_is_above_0(value):
    settings.check_positive(Example(), "size")
    settings.check_positive(Example(size=None), "size")
    with pytest.raises(ValueError, match=f"a.size must be above 0, got {value}"):
        settings.check_positive(Example(size=value), "size", section="a.")


@pytest.mark.parametrize("value", [-1, float("nan")])
def test_a_number_that_is_not_negative_may_be_0(value):
    settings.check_not_negative(Example(size=0), "size")
    with pytest.raises(ValueError, match=f"a.size must be at least 0, got {value}"):
        settings.check_not_negative(Example(size=value), "size", section="a.")
