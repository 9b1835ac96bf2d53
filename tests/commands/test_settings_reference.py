"""Settings of a command, as types and docstrings describe them."""

import dataclasses
import re
from typing import Literal

import pytest

from mgsr_jax.commands.parser import COMMANDS, main
from mgsr_jax.commands.settings_reference import own_settings, settings_of


@dataclasses.dataclass(frozen=True)
class Oven:
    """An oven.

    Attributes:
      degrees: its heat,
        in Celsius.
      mode: "grill" or "fan".
    """

    degrees: float | None = None
    mode: Literal["grill", "fan"] = "fan"


@dataclasses.dataclass(frozen=True)
class Cake:
    """A cake.

    Attributes:
      oven: the oven.
      name: its name.
      layers: names of layers.
    """

    name: str
    oven: Oven = dataclasses.field(default_factory=lambda: Oven(180.0))
    layers: tuple[str, ...] = ("cream", "jam")


@dataclasses.dataclass(frozen=True)
class Tart(Cake):
    """A cake that has a name."""

    name: str = ""


def bake(config: Tart, *, minutes: int = 30, watch: bool = False) -> int:
    """Bake.

    Args:
      minutes: how long.
      watch: whether to look at it.
    """
    return 0


def test_a_setting_has_its_values_its_default_and_its_explanation():
    found = {s.name: (s.allowed, s.default, s.text) for s in settings_of(bake)}
    assert found == {
        "minutes": ("whole number", "30", "how long."),
        "watch": ("true or false", "false", "whether to look at it."),
        "name": ("text", '""', "its name."),
        "layers": ("list of text", "['cream', 'jam']", "names of layers."),
        "oven.degrees": ("number", "180", "its heat, in Celsius."),
        "oven.mode": ("grill, fan", "fan", '"grill" or "fan".'),
    }
    assert [s.name for s in own_settings(bake)] == ["minutes", "watch"]
    assert {s.section for s in settings_of(bake)} == {"", "oven"}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_settings_are_the_options_of_the_parser(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help", "all"])
    text = capsys.readouterr().out.partition("options:")[2]
    # Not the options that jsonargparse adds, such as --data.train.help.
    found = re.findall(r"^  --([\w.]+)(?: |$)", text, re.MULTILINE)
    options = {name for name in found if not name.endswith(".help")}
    names = {setting.name for setting in settings_of(COMMANDS[command])}
    sections = {setting.section for setting in settings_of(COMMANDS[command])}
    positional = {"source", "output"} if command == "convert" else set()
    assert options - {"config", "print_config"} - sections == names - positional
