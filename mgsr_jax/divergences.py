"""The token-level divergences by name, and the settings that each of them reads."""

from collections.abc import Mapping
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
]
DIVERGENCES = get_args(Divergence)

DIVERGENCE_SETTINGS = {
    "jensen_shannon": ("beta",),
    "skewed_forward_kl": ("alpha",),
    "skewed_reverse_kl": ("alpha",),
    "adaptive_kl": ("head_mass",),
    "alpha_beta_divergence": ("alpha", "beta"),
    "taid": ("mix",),
}
"""The fields of `Objective` that a divergence reads in addition to the temperature."""


def check_divergence_settings(
    name: str, settings: Mapping[str, float | None], *, temperature: float
) -> None:
    """Refuse settings that the divergence does not read, or that it cannot work with.

    Args:
      name: the divergence.
      settings: values of alpha, beta, head_mass and mix; None where not set.
      temperature: the objective's temperature.

    Raises:
      ValueError: names the setting, its value and the values that are allowed.
    """
    read = DIVERGENCE_SETTINGS.get(name, ())
    for field, value in settings.items():
        if value is not None and field not in read:
            raise ValueError(
                f"objective.{field}={value} is not read by "
                f"objective.divergence={name!r}; leave it out, or choose one of "
                f"{[d for d, own in DIVERGENCE_SETTINGS.items() if field in own]}"
            )
        if name == "alpha_beta_divergence" and value == 0:
            raise ValueError(f"objective.{field}=0.0; expected another number than 0")
        is_fraction = value is None or 0 <= value <= 1
        if name != "alpha_beta_divergence" and not is_fraction:
            raise ValueError(f"objective.{field}={value}; expected 0 to 1")
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
