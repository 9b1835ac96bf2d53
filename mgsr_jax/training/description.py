"""Description of a run, printed before its first step."""

import dataclasses
import itertools

from mgsr_jax.divergences import DIVERGENCE_SETTINGS, TOKEN_WEIGHT_SETTINGS
from mgsr_jax.objective import Objective
from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.training.recipes import closest_recipe

_MOST_DIFFERENCES = 3
"""A run that differs from every recipe in more settings has a method of its own."""


def describe_run(config: TrainConfig, *, steps: int) -> list[str]:
    """Recipe, losses, source of the rows and sizes of a run of `steps` steps."""
    widths = ", ".join(map(str, config.data.widths))
    return [
        f"recipe: {_recipe(config)}",
        f"losses: {_losses(config.objective)}",
        f"rollouts: {_rollouts(config.rollout)}",
        f"rows: {steps} steps of {config.batch_size} in {config.micro_batches} "
        f"micro-batches; prompts of up to {config.data.encoding.prompt_limit} tokens, "
        f"rows of {widths}",
    ]


def _recipe(config: TrainConfig) -> str:
    """The recipe's name, and where the settings differ from it."""
    name, differences = closest_recipe(dataclasses.asdict(config))
    if len(differences) > _MOST_DIFFERENCES:
        return "none, the settings are a method of their own"
    if not differences:
        return name
    changed = ", ".join(f"{key}={value}" for key, value in differences.items())
    return f"{name}, except {changed}"


def _losses(objective: Objective) -> str:
    """The weights that are not 0.

    >>> _losses(Objective(span=0.0, divergence="jensen_shannon", beta=0.5))
    '1 x cross-entropy (sft) + 1 x jensen_shannon (token; beta=0.5)'
    """
    divergences = " on the data, ".join(objective.divergences)
    if len(objective.divergences) > 1:
        divergences += " on samples"
    token = f"{divergences} ({'; '.join(['token', *_token(objective)])})"
    names = {"sft": "cross-entropy (sft)", "token": token, "span": "span correlation"}
    weights = {part: getattr(objective, part) for part in names}
    return " + ".join(f"{w:g} x {names[part]}" for part, w in weights.items() if w)


def _token(objective: Objective) -> list[str]:
    """The settings of the divergences and of token weights that are given."""
    read = (DIVERGENCE_SETTINGS.get(name, ()) for name in objective.divergences)
    fields = list(itertools.chain(*read))
    if "dac_kl" in objective.divergences and objective.clip_signal != "prior":
        fields.append("clip_signal")
        if objective.clip_signal == "fidelity":
            fields.append("fidelity_weight")
    if objective.temperature != 1:
        fields.append("temperature")
    if objective.token_weights != "uniform":
        fields += ["token_weights", *TOKEN_WEIGHT_SETTINGS[objective.token_weights]]
    values = {field: getattr(objective, field) for field in fields}
    return [f"{field}={value}" for field, value in values.items() if value is not None]


def _rollouts(rollout: RolloutConfig) -> str:
    """Which steps train on the student's text, and how it is made.

    >>> _rollouts(RolloutConfig("on", probability=0.5))
    'with probability 0.5 a step generates; temperature 1; SCRG, 1 round, argmax'
    """
    if rollout.policy == "off":
        return "none, every step trains on the data"
    when = f"with probability {rollout.probability:g} a step generates"
    if rollout.policy == "replay":
        when = (
            f"adaptive, from ratio {rollout.initial_ratio:g}, with a replay buffer of "
            f"{rollout.capacity} rows"
        )
    elif rollout.always_generates:
        when = "every step generates"
    parts = [when, f"temperature {rollout.temperature:g}"]
    if rollout.samples > 1:
        parts.append(f"samples of a prompt: {rollout.samples}")
    if rollout.max_new_tokens is not None:
        parts.append(f"max_new_tokens {rollout.max_new_tokens}")
    if rollout.top_k:
        parts.append(f"top_k {rollout.top_k}")
    if rollout.top_p < 1:
        parts.append(f"top_p {rollout.top_p:g}")
    return "; ".join([*parts, _intervention(rollout)])


def _intervention(rollout: RolloutConfig) -> str:
    """The teacher's changes to a response, in words.

    >>> _intervention(RolloutConfig(rounds=3, position="early", position_discount=0.9))
    'SCRG, 3 rounds, early (position_discount=0.9)'
    """
    if rollout.intervention == "none":
        return "no intervention"
    if rollout.intervention == "skd":
        parts = ["SKD", f"accept_top_k {rollout.accept_top_k}"]
    elif rollout.intervention == "adaswitch":
        ratio, window = f"{rollout.switch_ratio:g}", rollout.switch_window
        parts = ["AdaSwitch", f"switch_ratio {ratio}", f"switch_window {window}"]
    else:
        rounds = "1 round" if rollout.rounds == 1 else f"{rollout.rounds} rounds"
        parts = ["SCRG", rounds, _position(rollout)]
    if rollout.teacher_token != "sample":
        parts.append(f"teacher_token {rollout.teacher_token}")
    return ", ".join(parts)


def _position(rollout: RolloutConfig) -> str:
    settings = {"first": "position_quantile", "early": "position_discount"}
    name = settings.get(rollout.position)
    value = f" ({name}={getattr(rollout, name)})" if name else ""
    return rollout.position + value
