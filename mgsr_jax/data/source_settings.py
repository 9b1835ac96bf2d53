"""Settings that name sources of data and their columns; no file is opened here.

The command line imports this, so it imports neither `datasets` nor `pyarrow`.
"""

import dataclasses
import glob
from collections.abc import Mapping, Sequence
from pathlib import Path

SUFFIXES = (".jsonl", ".json", ".parquet")
COMPRESSED = (".gz", ".xz", ".zst")

Columns = Mapping[str, str]
"""Our name of a column -> the data's name."""

COLUMNS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction": ("instruction",),
    # Dolly's published data set has the second names.
    "input": ("input", "context"),
    "output": ("output", "response"),
    "prompt": ("prompt",),
    "completion": ("completion",),
    "question": ("question",),
    "answer": ("answer",),
    "system": ("system",),
    "history": ("history",),
    "minillm": ("minillm",),
    "teacher": ("teacher",),
}
"""Our name of a column -> the names that are accepted in the data."""


@dataclasses.dataclass(frozen=True)
class DataSource:
    """One of several sources of training or validation data.

    Attributes:
      path: file, pattern of files, folder, or hub data set, as in `data.train`.
      weight: share of the examples, relative to the other sources' weights; give every
        source one, or none of them.
      split: split of a folder or hub data set; none: that of `data`.
      columns: names of columns for this source, instead of `data.columns`.
      teacher: name of the teacher of all its records, where there are several; their
        column is then not read.
    """

    path: str
    weight: float | None = None
    split: str | None = None
    columns: dict[str, str] | None = None
    teacher: str | None = None


def as_sources(data: str | Sequence[str | DataSource]) -> tuple[DataSource, ...]:
    """The sources of `data.train` or `data.valid`, given as one or as a list.

    >>> as_sources("a.jsonl") == as_sources([DataSource("a.jsonl")])
    True
    """
    items = [data] if isinstance(data, str) else data
    return tuple(DataSource(i) if isinstance(i, str) else i for i in items)


def is_data_file(name: str) -> bool:
    """Whether a file of this name can be read.

    >>> [is_data_file(f"some.{end}") for end in ("jsonl.gz", "parquet.gz", "csv")]
    [True, False, False]
    """
    file = Path(name)
    if file.suffix in COMPRESSED:
        return Path(file.stem).suffix in (".jsonl", ".json")
    return file.suffix in SUFFIXES


def is_files(path: str) -> bool:
    """Whether a source is a file or a pattern of files, which have no splits."""
    return is_data_file(path) or (glob.has_magic(path) and not Path(path).is_dir())


def check_columns(columns: Columns) -> None:
    """Refuse a name that is not one of ours.

    Raises:
      ValueError: lists the names that can be given.
    """
    for name in columns:
        if name not in COLUMNS:
            raise ValueError(
                f"columns has the name {name!r}; expected {', '.join(COLUMNS)}, "
                "each followed by the data's own name"
            )
