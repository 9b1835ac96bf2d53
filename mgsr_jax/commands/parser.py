"""The command line: YAML and overrides into functions, errors into one line.

Exit status: 0 done; 2 a mistake in settings or input; 42 stopped by a signal, saved,
can be resumed; 65 diverged. MGSR_TRACEBACK=1 shows where an error arose.
"""

import argparse
import dataclasses
import inspect
import os
import sys
from collections.abc import Sequence

import jsonargparse

from mgsr_jax import __version__
from mgsr_jax.commands.generate import COMMANDS, DIVERGED, MISTAKE
from mgsr_jax.train_step import Diverged
from mgsr_jax.training.config import TrainConfig


def main(arguments: Sequence[str]) -> int:
    """Runs one command and returns the exit status."""
    arguments = list(arguments)
    if arguments[:1] == ["plan"]:  # it reads no data and writes nothing
        arguments[1:1] = _UNUSED
    try:
        parser = _parser()
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
        print(f"mgsr: error: {' '.join(str(error).split())}", file=sys.stderr)
        return DIVERGED if isinstance(error, Diverged) else MISTAKE


_OF_A_RUN = ("train", "cache-teacher", "plan")  # its settings, and perhaps more
_UNUSED = ["--output=unused", "--data.train=unused", "--data.valid=unused too"]


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
        sub.add_argument("--config", action="config", help="YAML file")
        if name in _OF_A_RUN:
            sub.add_class_arguments(TrainConfig)
        sub.add_function_arguments(command, skip={"config"})
        subcommands.add_subcommand(name, sub, help=text.splitlines()[0])
    return parser


def _run(name: str, settings: jsonargparse.Namespace) -> int:
    values = dict(vars(settings))
    values.pop("config", None)
    if name in _OF_A_RUN:
        fields = [field.name for field in dataclasses.fields(TrainConfig)]
        values["config"] = TrainConfig(**{field: values.pop(field) for field in fields})
    return COMMANDS[name](**values)
