"""Names of the token-level divergences, and the settings that each reads."""

import inspect
from typing import get_args

import pytest

from mgsr_jax import losses
from mgsr_jax.divergences import (
    DIVERGENCE_SETTINGS,
    DIVERGENCES,
    FROM_SAMPLES,
    TOKEN_WEIGHT_SETTINGS,
    TokenWeights,
    check_divergence_settings,
    check_token_weight_settings,
    fields_of,
)


def test_every_divergence_of_the_library_can_be_chosen():
    own = {"dac_kl", "dac_kl_fixed"}
    assert set(DIVERGENCE_SETTINGS) < set(DIVERGENCES) - own
    for name in DIVERGENCES:
        read = set(inspect.signature(getattr(losses, name)).parameters)
        shared = {"student_logits", "teacher_logits", "where", "vocab_size"}
        given = {*DIVERGENCE_SETTINGS.get(name, ()), "temperature"}
        given |= {"tokens"} if name in FROM_SAMPLES else set()
        assert name in own or read == shared | given | {"vocab_axis"}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_accepts_only_the_settings_that_it_reads(name):
    needed = {"mix": 0.5} if name == "taid" else {}
    unset = dict.fromkeys(fields_of(DIVERGENCE_SETTINGS)) | needed
    check_divergence_settings([name], unset, temperature=1.0)
    for field in unset:
        value = {"support": "union", "top_k": 3}.get(field, 0.3)
        given = unset | {field: value}
        if field in DIVERGENCE_SETTINGS.get(name, ()):
            check_divergence_settings([name], given, temperature=1.0)
            continue
        with pytest.raises(ValueError, match=f"objective.{field}={value} is not read"):
            check_divergence_settings([name], given, temperature=1.0)


@pytest.mark.parametrize("name", get_args(TokenWeights))
def test_token_weights_accept_only_the_settings_that_they_read(name):
    own = TOKEN_WEIGHT_SETTINGS.get(name, ())
    if name != "uniform":
        read = inspect.signature(getattr(losses, f"{name}_weights")).parameters
        assert {field.removeprefix("weight_") for field in own} < set(read)
    unset = dict.fromkeys(fields_of(TOKEN_WEIGHT_SETTINGS))
    check_token_weight_settings(name, unset)
    for field in unset:
        if field in own:
            check_token_weight_settings(name, unset | {field: 1})
            continue
        with pytest.raises(ValueError, match=f"objective.{field}=1 is not read by"):
            check_token_weight_settings(name, unset | {field: 1})
