"""Write docs/settings.md from the docstrings of the settings.

Run `python docs/make_settings.py` after a change of a docstring. A test fails if the
page is not what this program writes.
"""

import inspect
import itertools
import pathlib
import typing
from collections.abc import Callable, Iterable

from mgsr_jax.commands.parser import COMMANDS
from mgsr_jax.commands.settings_reference import (
    Setting,
    config_class,
    own_settings,
    settings_of,
)
from mgsr_jax.training.config import TrainConfig

PAGE = pathlib.Path(__file__).parent / "settings.md"
HEAD = """# What does every setting mean?

`mgsr COMMAND --help` prints the same explanations. A setting is given as an option,
`--rollout.policy on`, or in a YAML file, where a section is a level:
`rollout: {policy: "on"}`. Files and recipes are given with `--config` and `--recipe`:
[training.md](training.md#where-the-settings-come-from) explains how they and the
settings of a training run work together.

This page is written by `python docs/make_settings.py` from the docstrings; a change
belongs there.
"""


def page() -> str:
    """The text of the page."""
    parts = [HEAD, *itertools.starmap(_command, COMMANDS.items())]
    return "\n".join(parts)


def _command(name: str, command: Callable[..., int]) -> str:
    """A heading and a table for a command, and for each section of its settings."""
    record, own = config_class(command), own_settings(command)
    head = [f"## mgsr {name}\n", _first_line(command) + "\n"]
    if name != "train" and record is not None and issubclass(record, TrainConfig):
        head.append("The settings of train, and:\n")
        return "\n".join([*head, _table(own)])
    by_section = itertools.groupby(settings_of(command), lambda s: s.section)
    for section, settings in by_section:
        if section:
            hint = typing.get_type_hints(record)[section]
            head.append(f"### {name}: {section}\n\n{_first_line(hint)}\n")
        head.append(_table(settings))
    return "\n".join(head)


def _first_line(source: object) -> str:
    return (inspect.getdoc(source) or "").partition("\n")[0]


def _table(settings: Iterable[Setting]) -> str:
    lines = ["| setting | value | default | meaning |", "| --- | --- | --- | --- |"]
    for setting in settings:
        cells = (f"`{setting.name}`", setting.allowed, setting.default, setting.text)
        escaped = (cell.replace("|", r"\|") for cell in cells)
        lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
