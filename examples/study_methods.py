"""Methods that study.py compares: recipes, rollouts with one change, losses."""

import dataclasses

from small_runs import Method

from mgsr_jax.objective import Objective
from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.training.recipes import load_recipe


def recipe(name: str) -> Method:
    """The method of `mgsr train --recipe`."""
    found = load_recipe(name)
    return Method(found.objective, found.rollout)


MGSR = recipe("mgsr")
FORWARD_KL = Objective(sft=0.0, span=0.0, divergence="forward_kl")
ON_POLICY = RolloutConfig(policy="on")


def rollout(**settings: object) -> Method:
    """Forward KL on the student's own rows in every step, with one intervention."""
    return Method(FORWARD_KL, dataclasses.replace(ON_POLICY, **settings))


def mgsr(**settings: object) -> Method:
    """MGSR with other settings of its losses."""
    return Method(dataclasses.replace(MGSR.objective, **settings), MGSR.rollout)


RECIPES = {
    "SFT": recipe("sft"),
    "KD": recipe("kd"),
    "GKD": recipe("gkd"),
    "DistiLLM": recipe("distillm"),
    "ABKD": recipe("abkd"),
    "OPD": recipe("opd"),
    "MGSR": MGSR,
}
INTERVENTIONS = {
    "none": rollout(intervention="none"),
    "SCRG argmax": rollout(),
    "SCRG first": rollout(position="first"),
    "SCRG early": rollout(position="early"),
    "SCRG random": rollout(position="random"),
    "SKD": rollout(intervention="skd"),
    "AdaSwitch": rollout(intervention="adaswitch"),
}
PARTS = {
    "MGSR, forward KL": mgsr(divergence="forward_kl"),
    "MGSR, sharpened KL": mgsr(divergence="forward_kl", teacher_temperature=0.8),
    "MGSR, fixed limits": mgsr(divergence="dac_kl_fixed"),
    "MGSR, fidelity": mgsr(clip_signal="fidelity"),
    "MGSR, unnormalised": mgsr(clip_signal="unnormalised"),
    "MGSR, no span": recipe("mgsr_no_span"),
    "MGSR, no SCRG": recipe("mgsr_no_scrg"),
    "MGSR, no rollouts": recipe("mgsr_no_rollouts"),
}


def truncated(horizon: int) -> Method:
    """Plain rollouts that are cut at `horizon` tokens."""
    return rollout(intervention="none", max_new_tokens=horizon)
