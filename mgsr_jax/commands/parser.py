"""The command line: YAML files and options to settings, errors to one line.

A command is a function of its settings to an exit status (`exit_status`). It imports
what it needs when it runs, so that `mgsr --help` is quick. MGSR_TRACEBACK=1 shows the
traceback of an error.
"""

import argparse
import dataclasses
import inspect
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence

import jsonargparse

from mgsr_jax import __version__
from mgsr_jax.commands.cache_teacher import cache_teacher
from mgsr_jax.commands.chat import chat
from mgsr_jax.commands.compilation_cache import use_compilation_cache
from mgsr_jax.commands.convert import convert
from mgsr_jax.commands.evaluate import evaluate
from mgsr_jax.commands.exit_status import DIVERGED, DONE, MISTAKE
from mgsr_jax.commands.export import export
from mgsr_jax.commands.generate import generate
from mgsr_jax.commands.help import (
    CONFIG_HELP,
    RECIPE_HELP,
    help_page,
    reads_recipes,
)
from mgsr_jax.commands.plan import plan
from mgsr_jax.commands.recipes import recipes
from mgsr_jax.commands.report import report
from mgsr_jax.commands.settings_reference import config_class, settings_of
from mgsr_jax.commands.suggestions import in_words, with_suggestion
from mgsr_jax.commands.train import train
from mgsr_jax.train_step import Diverged
from mgsr_jax.training.recipes import default_recipe, recipe_file

COMMANDS: dict[str, Callable[..., int]] = {
    "train": train,
    "recipes": recipes,
    "plan": plan,
    "cache-teacher": cache_teacher,
    "generate": generate,
    "chat": chat,
    "evaluate": evaluate,
    "export": export,
    "convert": convert,
    "report": report,
}
"""The fields of a parameter named `config`, which is a dataclass, and all other
parameters become options."""

_POSITIONAL = ("convert",)
"""Commands whose required parameters have no option: `mgsr convert SOURCE OUTPUT`."""

_LISTS = ("--data", "--metrics", "--evaluate.metrics")
"""Options that take one or several words: `--metrics rouge_l math` is
`--metrics '["rouge_l", "math"]'`."""


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status."""
    arguments = _files_first(_with_flags(_with_lists(arguments)))
    try:
        if (page := _short_help(arguments)) is not None:
            print(page)
            return DONE
        parser, arguments = _parser(), _with_recipe(arguments)
        settings = parser.instantiate(parser.parse_args(arguments))
        return _run(settings.subcommand, settings[settings.subcommand])
    except (
        argparse.ArgumentError,
        Diverged,
        ImportError,
        OSError,
        ValueError,
    ) as error:
        if os.environ.get("MGSR_TRACEBACK"):
            raise
        message = " ".join(str(error).split())
        if isinstance(error, argparse.ArgumentError):
            message = with_suggestion(message, _names(arguments))
            message = in_words(message, _allowed(arguments))
        print(f"mgsr: error: {message}", file=sys.stderr)
        return DIVERGED if isinstance(error, Diverged) else MISTAKE


def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog="mgsr",
        description="Distil large language models in JAX.",
        exit_on_error=False,
        version=__version__,
    )
    subcommands = parser.add_subcommands(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        text = inspect.getdoc(command) or ""
        sub = jsonargparse.ArgumentParser(
            description=text.partition("\n\nArgs:")[0], exit_on_error=False
        )
        sub.add_argument("--config", action="config", help=CONFIG_HELP)
        if reads_recipes(command):
            sub.add_argument("--recipe", type=str | None, help=RECIPE_HELP)
        if (record := config_class(command)) is not None:
            sub.add_class_arguments(record)
        sub.add_function_arguments(
            command, skip={"config"}, as_positional=name in _POSITIONAL
        )
        subcommands.add_subcommand(name, sub, help=text.splitlines()[0])
    return parser


def _with_recipe(arguments: list[str]) -> list[str]:
    """Put the recipe's file first, so that all other files and options override it.

    An option or a file names the recipe; if none does, `default_recipe` may.
    """
    name, rest = "".join(arguments[:1]), arguments[1:]
    if name not in COMMANDS or not reads_recipes(COMMANDS[name]):
        return arguments
    # What is required may be missing here; the second reading of the settings says so.
    required = [s.name for s in settings_of(COMMANDS[name]) if s.default == "required"]
    words = [word for word in rest if not word.startswith("--print_config")]
    words = [name, *(f"--{setting}=missing" for setting in required), *words]
    given = _parser().parse_args(words, defaults=False)[name].as_dict()
    recipe = given.get("recipe") or default_recipe(given)
    if recipe is None:
        return arguments
    return [name, "--config", str(recipe_file(recipe)), *rest]


def _with_lists(arguments: Sequence[str]) -> list[str]:
    """Join the words of an option that takes a list; jsonargparse reads one word."""
    result: list[str] = []
    starts = [i for i, word in enumerate(arguments) if word.startswith("--")]
    for start, end in itertools.pairwise([0, *starts, len(arguments)]):
        option, words = arguments[start:end][:1], list(arguments[start:end][1:])
        is_list = option and option[0] in _LISTS and words and words[0][:1] != "["
        result += [*option, *([json.dumps(words)] if is_list else words)]
    return result


def _with_flags(arguments: Sequence[str]) -> list[str]:
    """Write `--resume` as `--resume true`."""
    values = _allowed(arguments)
    flags = {f"--{name}" for name in values if values[name] == "true or false"}
    result: list[str] = []
    for word, next_word in itertools.pairwise([*arguments, "--"]):
        is_alone = word in flags and next_word.startswith("-")
        result += [word, "true"] if is_alone else [word]
    return result


def _files_first(arguments: Sequence[str]) -> list[str]:
    """Put files before options, which override them; jsonargparse goes by the order."""
    name, files, options = list(arguments[:1]), [], []
    words = iter(arguments[1:])
    for word in words:
        if word == "--config":
            files += [word, *itertools.islice(words, 1)]
        else:
            (files if word.startswith("--config=") else options).append(word)
    return name + files + options


def _short_help(arguments: list[str]) -> str | None:
    """The page for `COMMAND --help [TOPIC]`; None where the parser prints the help."""
    if not arguments or arguments[0] not in COMMANDS:
        return None
    name, *rest = arguments
    flags = [i for i, word in enumerate(rest) if word in ("-h", "--help")]
    if not flags:
        return None
    topic = next(iter(rest[flags[0] + 1 :]), "")
    return help_page(name, COMMANDS[name], "" if topic.startswith("-") else topic)


def _names(arguments: list[str]) -> list[str]:
    """Names of the settings of the command that was given; of commands without one."""
    if not arguments or arguments[0] not in COMMANDS:
        return list(COMMANDS)
    command = COMMANDS[arguments[0]]
    recipe = ["recipe"] if reads_recipes(command) else []
    return ["config", *recipe, *(setting.name for setting in settings_of(command))]


def _allowed(arguments: Sequence[str]) -> dict[str, str]:
    """Allowed values of the given command's settings, in words, by name."""
    if not arguments or arguments[0] not in COMMANDS:
        return {}
    return {s.name: s.allowed for s in settings_of(COMMANDS[arguments[0]])}


def _run(name: str, settings: jsonargparse.Namespace) -> int:
    values = dict(vars(settings))
    for read_already in ("config", "recipe"):
        values.pop(read_already, None)
    if (record := config_class(COMMANDS[name])) is not None:
        fields = [field.name for field in dataclasses.fields(record)]
        values["config"] = record(**{field: values.pop(field) for field in fields})
    if name != "plan":  # its programs are another machine's
        use_compilation_cache()
    return COMMANDS[name](**values)
