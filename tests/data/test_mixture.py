"""Mixtures of several data sets."""

import collections

import datasets
import pytest

from mgsr_jax.data.mixture import mixed


def table(name, count):
    return datasets.Dataset.from_list([{"id": f"{name}{i}"} for i in range(count)])


def test_without_weights_every_example_is_there_once():
    one, two = table("a", 3), table("b", 2)
    assert mixed([one]) is one
    assert mixed([one, two])["id"] == ["a0", "a1", "a2", "b0", "b1"]


@pytest.mark.parametrize("weights", [(3.0, 1.0), (6.0, 2.0)])
def test_with_weights_examples_are_drawn_in_proportion(weights):
    mixture = mixed([table("a", 400), table("b", 400)], weights)
    count = collections.Counter(mixture["id"])
    drawn = collections.Counter(name[0] for name in mixture["id"])
    assert drawn["a"] / len(mixture) == pytest.approx(0.75, abs=0.03)
    # It ends with the last of b, which takes longest; a has been repeated evenly.
    assert [count[f"b{i}"] for i in range(400)] == [1] * 400
    assert {count[f"a{i}"] for i in range(400)} <= {2, 3, 4}


def test_a_mixture_is_the_same_every_time():
    def draw():
        return mixed([table("a", 20), table("b", 20)], (1.0, 3.0))["id"]

    assert list(draw()) == list(draw())
