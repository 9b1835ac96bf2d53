"""Several teachers in the settings: their names, their folders, and the checks."""

import os
import re

from mgsr_jax.checkpoint.folder import check_folder
from mgsr_jax.data.teacher_names import TeacherNames
from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.training.data_config import DataConfig, DataSource

TeacherFolders = dict[str, str] | str | None
"""Folder of each teacher by its name, the folder of a single teacher, or None."""

_NAME = re.compile(r"[\w.-]+")


def different_folders(teacher: TeacherFolders) -> tuple[list[str], tuple[int, ...]]:
    """The different folders, and the index among them of each teacher's own.

    >>> different_folders({"math": "a", "code": "b", "law": "./a"})
    (['a', 'b'], (0, 1, 0))
    """
    given = [teacher] if isinstance(teacher, str) else [*(teacher or {}).values()]
    paths = [os.path.realpath(folder) for folder in given]
    different = list(dict.fromkeys(paths))
    folders = [given[paths.index(path)] for path in different]
    return folders, tuple(different.index(path) for path in paths)


def names_for(
    teacher: TeacherFolders, data: DataConfig, source: DataSource
) -> TeacherNames | None:
    """How a source's records name their teacher; None where there are not several."""
    if not isinstance(teacher, dict):
        return None
    return TeacherNames(tuple(teacher), source.teacher, data.default_teacher)


def check_teachers(
    teacher: TeacherFolders,
    data: DataConfig,
    rollout: RolloutConfig,
    teacher_cache: str | None,
) -> None:
    """Refuse names and settings that several teachers do not work with.

    Raises:
      ValueError: names the setting, its value and what is expected.
    """
    if not isinstance(teacher, dict):
        check_folder("teacher", teacher)
        _check_named((), data)
        return
    for name, folder in teacher.items():
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"teacher has the name {name!r}; expected letters, digits and _ . - "
                "as names are parts of metrics"
            )
        check_folder(f"teacher.{name}", folder)
    if not teacher:
        raise ValueError("teacher={} names no teacher; expected {NAME: FOLDER, ...}")
    _check_named(tuple(teacher), data)
    if rollout.policy != "off" and rollout.intervention != "none":
        raise ValueError(
            f"rollout.intervention={rollout.intervention!r}, but one teacher "
            f"intervenes and there are several ({', '.join(teacher)}); set it to 'none'"
        )
    if teacher_cache is not None:
        raise ValueError(
            f"teacher_cache={teacher_cache!r} holds the output of one teacher, and "
            f"there are several ({', '.join(teacher)}); leave teacher_cache out"
        )


def _check_named(names: tuple[str, ...], data: DataConfig) -> None:
    """Refuse a name in the settings of the data that is no teacher's."""
    sources = (*data.train_sources, *data.valid_sources)
    given = {"data.default_teacher": data.default_teacher} | {
        f"teacher of the source {source.path!r}": source.teacher for source in sources
    }
    for setting, name in given.items():
        if name is None or name in names:
            continue
        if names:
            raise ValueError(
                f"{setting} is {name!r}; expected one of {', '.join(names)}"
            )
        raise ValueError(
            f"{setting} is {name!r}, but there are not several teachers; give teacher "
            "as {NAME: FOLDER, ...}, or leave it out"
        )
