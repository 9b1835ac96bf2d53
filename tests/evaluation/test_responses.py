"""Selection and checks of the prompts to respond to."""

import dataclasses

import pytest

from mgsr_jax.data.prompts import Prompt
from mgsr_jax.evaluation.responses import EvaluationConfig, scored_prompts


def make_prompts(count):
    return [
        Prompt((2,) * (i + 1), (3, 1), ("w3",), i, True, f"f:{i}") for i in range(count)
    ]


def test_only_scored_prompts_are_selected():
    prompts = make_prompts(3)
    prompts[1] = dataclasses.replace(prompts[1], scored=False)
    selected = scored_prompts(prompts, EvaluationConfig())
    assert [prompt.example for prompt in selected] == [0, 2]


@pytest.mark.parametrize(
    ("prompts", "settings", "reason"),
    [
        ([], {}, "none of the 0 prompts is scored"),
        (
            make_prompts(4),
            {"max_prompt_length": 3},
            "f:3: the prompt has 4 tokens, expected at most 3",
        ),
        (make_prompts(2) + make_prompts(2), {}, "an example index occurs twice"),
        (make_prompts(2), {"seeds": (1, 1)}, "a seed occurs twice"),
        (make_prompts(2), {"samples": 0}, "samples must be above 0, got 0"),
        (
            [dataclasses.replace(make_prompts(1)[0], references=())],
            {},
            "f:0: the prompt has no reference",
        ),
    ],
)
def test_invalid_prompts_and_seeds_raise(prompts, settings, reason):
    with pytest.raises(ValueError, match=reason):
        scored_prompts(prompts, EvaluationConfig(**settings))
