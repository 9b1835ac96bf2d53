"""Names that an objective chooses by, and the settings that each of them reads."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

Divergence = Literal[
    "dac_kl",
    "dac_kl_fixed",
    "forward_kl",
    "reverse_kl",
    "symmetric_kl",
    "total_variation",
    "jensen_shannon",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "adaptive_kl",
    "alpha_beta_divergence",
    "taid",
    "entropy_gated_kl",
    "per_class_kl",
    "logit_difference",
    "reverse_kl_top_k",
    "sampled_reverse_kl",
]
DIVERGENCES = get_args(Divergence)

DIVERGENCE_SETTINGS = {
    "forward_kl": ("teacher_temperature",),
    "jensen_shannon": ("beta",),
    "skewed_forward_kl": ("alpha",),
    "skewed_reverse_kl": ("alpha",),
    "adaptive_kl": ("head_mass",),
    "alpha_beta_divergence": ("alpha", "beta"),
    "taid": ("mix",),
    "entropy_gated_kl": ("threshold",),
    "logit_difference": ("alpha",),
    "reverse_kl_top_k": ("top_k", "support"),
    "sampled_reverse_kl": ("baseline",),
}
"""The fields of `Objective` that a divergence reads in addition to the temperature."""

FROM_SAMPLES = ("sampled_reverse_kl",)
"""Divergences that read the label, and only where the student sampled it."""

FROM_CACHE = ("dac_kl", "dac_kl_fixed", "forward_kl")
"""Divergences that need only the teacher's most probable classes and their mass."""

TokenWeights = Literal[
    "uniform", "student_entropy", "teacher_entropy", "acceptance", "discrepancy"
]

WEIGHTS_FROM_CACHE = ("uniform", "student_entropy")
"""Token weights that need no more of the teacher either."""

TOKEN_WEIGHT_SETTINGS = {
    "student_entropy": ("weight_threshold", "weight_floor"),
    "teacher_entropy": ("weight_threshold", "weight_floor"),
    "acceptance": ("weight_top_k", "weight_floor"),
    "discrepancy": ("weight_gain",),
}
"""The fields of `Objective` that `token_weights` reads, by its value."""

Setting = int | float | str | None
"""Value of a field that a divergence or token weights may read; None: not set."""

_RANGES = {
    "teacher_temperature": (0, math.inf),  # and not 0
    "threshold": (0, math.inf),
    "top_k": (1, math.inf),
    "weight_threshold": (0, math.inf),
    "weight_top_k": (1, math.inf),
    "weight_gain": (0, math.inf),
}
"""Smallest and largest value of a field; 0 and 1 where it is not listed."""


def fields_of(settings: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The fields in a table of settings, each of them once."""
    return tuple(dict.fromkeys(field for own in settings.values() for field in own))


def check_divergence_settings(
    names: Sequence[str], settings: Mapping[str, Setting], *, temperature: float
) -> None:
    """Refuse settings that no divergence reads, or that one cannot work with.

    Args:
      names: the divergences of an objective.
      settings: values of all fields in DIVERGENCE_SETTINGS; None where not set.
      temperature: the objective's temperature.

    Raises:
      ValueError: names the setting, its value and the values that are allowed.
    """
    _check_read("divergence", names, settings, DIVERGENCE_SETTINGS)
    for name in names:
        read = {field: settings[field] for field in DIVERGENCE_SETTINGS.get(name, ())}
        _check_divergence(name, read, temperature)


def _check_divergence(
    name: str, settings: Mapping[str, Setting], temperature: float
) -> None:
    """Refuse values of the settings that one divergence reads."""
    for field, value in settings.items():
        if name == "alpha_beta_divergence" and value == 0:
            raise ValueError(f"objective.{field}=0.0; expected another number than 0")
        if field == "support" and value not in (None, "student", "union"):
            raise ValueError(
                f"objective.support={value!r}; expected 'student' or 'union'"
            )
        if field == "teacher_temperature" and value == 0:
            raise ValueError(
                f"objective.teacher_temperature={value}; expected a number above 0"
            )
        if name != "alpha_beta_divergence":
            _check_range(field, value)
    if name == "taid" and settings["mix"] is None:
        raise ValueError(
            "objective.divergence='taid' needs objective.mix, the teacher's share from "
            "0 to 1"
        )
    if name.startswith("dac_kl") and temperature != 1:
        raise ValueError(
            f"objective.temperature={temperature} is not read by DAC-KL, "
            "which has no temperature; leave it out"
        )


def check_token_weight_settings(name: str, settings: Mapping[str, Setting]) -> None:
    """Refuse settings that these token weights do not read, or cannot work with.

    Args:
      name: the objective's token weights.
      settings: values of all fields in TOKEN_WEIGHT_SETTINGS; None where not set.

    Raises:
      ValueError: names the setting, its value and the values that are allowed.
    """
    _check_read("token_weights", (name,), settings, TOKEN_WEIGHT_SETTINGS)
    for field, value in settings.items():
        _check_range(field, value)


def check_cached_teacher(
    divergence: str,
    token_weights: str,
    *,
    temperature: float,
    teacher_temperature: float | None,
) -> None:
    """Refuse choices that read more than a cached teacher's K classes.

    Raises:
      ValueError: names the setting, its value and the values that are allowed.
    """
    for option, chosen, allowed in (
        ("divergence", divergence, FROM_CACHE),
        ("token_weights", token_weights, WEIGHTS_FROM_CACHE),
    ):
        if chosen not in allowed:
            raise ValueError(
                f"objective.{option}={chosen!r} needs the teacher's whole distribution "
                "and a cached teacher has K classes; use one of "
                f"{allowed}, or run the teacher"
            )
    for option, number in (
        ("temperature", temperature),
        ("teacher_temperature", teacher_temperature),
    ):
        if number not in (None, 1):
            raise ValueError(
                f"objective.{option}={number}, but a cached teacher holds the "
                "distribution at temperature 1; set it to 1, or run the teacher"
            )


def _check_read(
    option: str,
    chosen: Sequence[str],
    settings: Mapping[str, Setting],
    table: Mapping[str, tuple[str, ...]],
) -> None:
    read = {field for name in chosen for field in table.get(name, ())}
    names = " or ".join(map(repr, chosen))
    for field, value in settings.items():
        if value is not None and field not in read:
            raise ValueError(
                f"objective.{field}={value} is not read by "
                f"objective.{option}={names}; leave it out, or choose one of "
                f"{[name for name, own in table.items() if field in own]}"
            )


def _check_range(field: str, value: Setting) -> None:
    smallest, largest = _RANGES.get(field, (0, 1))
    if value is None or isinstance(value, str) or smallest <= value <= largest:
        return
    allowed = f"{smallest} to 1" if largest == 1 else f"at least {smallest}"
    raise ValueError(f"objective.{field}={value}; expected {allowed}")
