"""Files of a run folder: the settings that a run was started with, and their check."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import yaml

from mgsr_jax.checkpoint.hub import portable_name
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.training.data_config import DataConfig

CONFIG_FILE = "config.yaml"
REJECTED_FILE = "rejected.txt"
RESPONSE_FORMAT_FILE = "response_format.json"
CHECKPOINTS = "checkpoints"
STUDENT_FOLDER = "student"

_MODELS = ("student", "teacher")
_MAY_CHANGE = (
    "resume",
    "output",
    "mesh",
    "distributed",
    "micro_batches",
    "rollout.decode_rows",
    "rollout.split_weights",
    "chunk_size",
    "attention",
    "remat",
    "log_every",
    "evaluate_every",
    "evaluate",
    "save_every",
    "keep_checkpoints",
    "tensorboard",
    "profile",
)
"""Settings that do not change what a resumed run computes."""


def read_run_config(run: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings of the run in a folder, as plain values.

    Raises:
      FileNotFoundError: the folder has no settings file.
      ValueError: the file cannot be read.
    """
    file = Path(run) / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{run} has no {CONFIG_FILE}, so it is not a run folder; give the output "
            "folder of mgsr train"
        )
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML ({error}); restore it") from error
    if not isinstance(settings, dict) or "student" not in settings:
        raise ValueError(
            f"{file} is truncated or not the settings of a run; restore it, or start "
            "a new run"
        )
    return settings


def check_output(output: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
    """Refuse an output folder that is neither new nor the same run to be resumed.

    Raises:
      FileExistsError: a file, or a folder with content and no `resume`.
      FileNotFoundError, ValueError: not a run folder, or a run with other settings.
    """
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output {output} is a file; give a folder's name")
    if not output.exists() or not os.listdir(output):
        return
    if not resume:
        raise FileExistsError(
            f"output folder {output} is not empty; give another one, or continue the "
            "run in it with resume: true"
        )
    changed = _changes(read_run_config(output), _portable(settings))
    if changed:
        raise ValueError(
            f"resume: settings changed since {output} was started: "
            f"{'; '.join(changed)}; a resumed run must have the same settings"
        )


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line for each setting of a run that differs and must not.

    A setting that the run was started without, by an earlier version, had its default.
    """
    defaults = TrainConfig(student="", output="", data=DataConfig(train=""))
    known = _flat(dataclasses.asdict(defaults))
    before, now = known | _flat(old), _flat(new)
    return [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in {**now, **before}
        if not {name, name.partition(".")[0]} & set(_MAY_CHANGE)
        and before.get(name) != now.get(name)
    ]


def _flat(settings: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Settings by their whole names, such as "rollout.policy", as YAML has them."""
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            values |= _flat(value, f"{section}{name}.")
        else:
            values[f"{section}{name}"] = json.loads(json.dumps(value))
    return values


def write_run_config(output: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings file, complete or not at all: a resumed run needs it."""
    text = yaml.safe_dump(_portable(settings), sort_keys=False)
    unfinished = output / f".{CONFIG_FILE}"
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(output / CONFIG_FILE)


def _portable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with a model of the hub given by its name and commit."""
    models = {name: settings[name] for name in _MODELS}
    return {**settings, **jax.tree.map(portable_name, models)}


def write_rejected(output: Path, messages: Sequence[str]) -> Path:
    """Write one line for each record that was not used unchanged; returns the file."""
    path = output / REJECTED_FILE
    path.write_text("\n".join(messages) + "\n", encoding="utf-8")
    return path
