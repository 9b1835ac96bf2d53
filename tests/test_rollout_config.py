"""Settings of a rollout that do not work are refused."""

import pytest

from mgsr_jax.rollout_config import RolloutConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(probability=-0.1), "rollout.probability must be in"),
        (dict(probability=float("nan")), "rollout.probability must be in"),
        (dict(initial_ratio=2.0), r"rollout.initial_ratio must be in .*2.0"),
        (dict(max_new_tokens=0), "max_new_tokens=0; expected a number above"),
        (dict(max_new_tokens=()), r"max_new_tokens=\(\); expected"),
        (dict(max_new_tokens=((0.1, 8),)), "shares rise from 0 to below 1"),
        (dict(max_new_tokens=((0.0, 8), (0.0, 9))), "shares rise from 0"),
        (dict(max_new_tokens=((0.0, 8), (1.0, 9))), "to below 1"),
        (dict(max_new_tokens=((0.0, 8), (0.5, 0))), "a number above 0"),
        (dict(rounds=0), "rounds=0; expected 1 or .*intervention: none"),
        (dict(temperature=-1.0), "temperature must be at least 0, got -1.0"),
        (dict(top_p=0.0), r"top_p must be in \(0, 1\], got 0.0"),
        (dict(top_p=1.5), r"top_p must be in \(0, 1\], got 1.5"),
        (dict(position_quantile=1.5), r"quantile must be in \[0, 1\]"),
        (dict(position_discount=0.0), r"discount must be in \(0, 1\]"),
        (
            dict(intervention="none", rounds=2),
            "rounds=2 is read only with rollout.intervention scrg, got none",
        ),
        (dict(accept_top_k=0), "accept_top_k must be above 0, got 0"),
        (dict(decode_rows=0), "decode_rows must be above 0, got 0"),
        (dict(draft_tokens=0), "draft_tokens must be above 0, got 0"),
        (dict(switch_ratio=0.0), "switch_ratio must be above 0, got 0.0"),
        (dict(switch_window=0), "switch_window must be above 0, got 0"),
        (
            dict(accept_top_k=5),
            "top_k=5 is read only with rollout.intervention skd, got scrg",
        ),
        (
            dict(intervention="skd", switch_window=5),
            "window=5 is read only with rollout.intervention adaswitch, got skd",
        ),
        (
            dict(intervention="none", teacher_token="argmax"),
            "rollout.intervention scrg or skd or adaswitch, got none",
        ),
        (
            dict(position="early", position_quantile=0.5),
            "quantile=0.5 is read only with rollout.position first, got early",
        ),
    ],
    ids=str,
)
def test_a_setting_that_does_not_work_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RolloutConfig("on", **settings).check()


def test_settings_of_the_chosen_intervention_are_accepted():
    RolloutConfig("on", intervention="none").check()
    RolloutConfig("on", rounds=3, teacher_token="argmax").check()
    RolloutConfig("on", position="first", position_quantile=0.5).check()
    RolloutConfig("on", position="early", position_discount=0.5).check()
    skd = dict(accept_top_k=5, draft_tokens=4, teacher_token="argmax")
    RolloutConfig("on", intervention="skd", **skd).check()
    switch = dict(switch_ratio=2.0, switch_window=4)
    RolloutConfig("on", intervention="adaswitch", **switch).check()
