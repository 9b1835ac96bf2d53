"""Names of the token-level divergences, and the settings that each reads."""

import inspect

import pytest

from mgsr_jax import losses
from mgsr_jax.divergences import (
    DIVERGENCE_SETTINGS,
    DIVERGENCES,
    check_divergence_settings,
)


def test_every_divergence_of_the_library_can_be_chosen():
    own = {"dac_kl", "dac_kl_fixed"}
    assert set(DIVERGENCE_SETTINGS) < set(DIVERGENCES) - own
    for name in DIVERGENCES:
        read = set(inspect.signature(getattr(losses, name)).parameters)
        shared = {"student_logits", "teacher_logits", "where", "vocab_size"}
        given = {*DIVERGENCE_SETTINGS.get(name, ()), "temperature"}
        assert name in own or read == shared | given | {"vocab_axis"}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_accepts_only_the_settings_that_it_reads(name):
    needed = {"mix": 0.5} if name == "taid" else {}
    unset = dict.fromkeys(("alpha", "beta", "head_mass", "mix")) | needed
    check_divergence_settings(name, unset, temperature=1.0)
    for field in unset:
        given = unset | {field: 0.3}
        if field in DIVERGENCE_SETTINGS.get(name, ()):
            check_divergence_settings(name, given, temperature=1.0)
            continue
        with pytest.raises(ValueError, match=f"objective.{field}=0.3 is not read by"):
            check_divergence_settings(name, given, temperature=1.0)
