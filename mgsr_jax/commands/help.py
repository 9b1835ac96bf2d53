"""`--help` of commands that have many settings: the common ones on one screen.

`--help SECTION` explains the settings of a section, `--help all` explains all.
"""

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence

from mgsr_jax.commands.evaluate import EvaluateConfig
from mgsr_jax.commands.generate import GenerateConfig
from mgsr_jax.commands.settings_reference import (
    Setting,
    config_class,
    own_settings,
    settings_of,
)
from mgsr_jax.training.config import TrainConfig

COMMON: dict[type, tuple[str, ...]] = {
    TrainConfig: (
        "student",
        "teacher",
        "output",
        "data.train",
        "data.valid",
        "data.max_length",
        "steps",
        "epochs",
        "batch_size",
        "micro_batches",
        "optimizer.learning_rate",
        "rollout.policy",
        "lora.rank",
        "mesh.fsdp",
        "validate_every",
        "evaluate_every",
        "save_every",
        "resume",
    ),
    EvaluateConfig: (
        "model",
        "data",
        "metrics",
        "seeds",
        "samples",
        "temperature",
        "limit",
        "max_length",
        "batch_size",
        "mesh.data",
        "output",
        "against",
    ),
    GenerateConfig: (
        "model",
        "prompt",
        "file",
        "columns",
        "template",
        "system",
        "max_length",
        "temperature",
        "top_k",
        "top_p",
        "seed",
        "batch_size",
        "mesh.data",
    ),
}
"""Settings that most people give, of records with many settings."""

CONFIG_HELP = "YAML file; may be given several times, the last one wins key by key"
RECIPE_HELP = "method by name (see mgsr recipes); files and options override it"

_WIDTH, _INDENT = 80, 28


def reads_recipes(command: Callable[..., int]) -> bool:
    """Whether a command has the settings of train, which a recipe may set."""
    return issubclass(config_class(command) or object, TrainConfig)


def help_page(name: str, command: Callable[..., int], topic: str) -> str | None:
    """The text of `mgsr NAME --help TOPIC`; None where the parser's own help is short.

    Args:
      name: of the command.
      command: its function.
      topic: a section, "all", or "" for the common settings.

    Raises:
      ValueError: no section has this name.
    """
    record = config_class(command)
    common = [COMMON[part] for part in getattr(record, "__mro__", ()) if part in COMMON]
    if topic == "all" or not common:
        return None
    settings = settings_of(command)
    if not topic:
        own = [setting.name for setting in own_settings(command)]
        return _common_page(name, command, [*own, *common[0]])
    if topic not in (sections := _sections(settings)):
        raise ValueError(
            f"--help {topic}: no such section; expected all or one of "
            f"{', '.join(sections)}"
        )
    return "\n".join(_explained(s) for s in settings if s.section == topic)


def _common_page(name: str, command: Callable[..., int], common: Sequence[str]) -> str:
    """A line for each of the `common` settings of a command."""
    by_name = {setting.name: setting for setting in settings_of(command)}
    sections = ", ".join(_sections(by_name.values()))
    more = (
        f"--help SECTION explains the settings of one of {sections}; "
        f"--help all explains all {len(by_name)} settings."
    )
    recipe = ("",)
    if reads_recipes(command):
        recipe = "[--recipe NAME] ", _line("--recipe", "method; see mgsr recipes")
    lines = [
        f"usage: mgsr {name} {recipe[0]}[--config FILE ...] [--SETTING VALUE]",
        "",
        (command.__doc__ or "").partition("\n")[0],
        "",
        *recipe[1:],
        _line("--config", "YAML files; later ones override, options always"),
        *(_line(f"--{option}", _shortened(by_name[option])) for option in common),
        "",
        textwrap.fill(more, _WIDTH),
    ]
    return "\n".join(lines)


def _sections(settings: Iterable[Setting]) -> list[str]:
    return list(dict.fromkeys(s.section for s in settings if s.section))


def _shortened(setting: Setting) -> str:
    """The words that are allowed, or how the explanation begins, and the default."""
    first = re.split(r"[,;:.] | \(", setting.text)[0].rstrip(".")
    if ", " in setting.allowed and "record of" not in setting.allowed:
        first = setting.allowed
    default = f" [{setting.default}]"
    if setting.default in ("none", "false"):
        default = ""
    room = _WIDTH - _INDENT - len(default)
    return textwrap.shorten(first, room, placeholder=" ...") + default


def _line(option: str, text: str) -> str:
    return f"  {option}".ljust(_INDENT) + text


def _explained(setting: Setting) -> str:
    """The option, what it takes, and the whole explanation."""
    head = f"--{setting.name} ({setting.allowed}; default: {setting.default})"
    if setting.default == "required":
        head = f"--{setting.name} ({setting.allowed}; required)"
    indent = " " * 4
    text = textwrap.fill(
        setting.text, _WIDTH, initial_indent=indent, subsequent_indent=indent
    )
    return f"{head}\n{text}"
