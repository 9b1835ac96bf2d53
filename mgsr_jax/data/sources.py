"""Sources of data by name: files, patterns, folders and hub data sets.

Records are read one at a time, and nothing here depends on their columns.
"""

import contextlib
import glob
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import datasets
from datasets.exceptions import DatasetGenerationError

from mgsr_jax.data.files import Record, read_file
from mgsr_jax.data.source_settings import SUFFIXES, is_data_file

_HUB_NAME = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w.+-]+))?(?:@([\w./-]+))?")
"""org/name, then perhaps :config, then perhaps @revision."""


_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> words for it in names of files; `datasets` has the same."""


class OpenSource(NamedTuple):
    """A source that was found: its files, or its table of the package `datasets`.

    Attributes:
      name: the source as it was given, for errors.
      content: files in their order, or a table.
    """

    name: str
    content: list[Path] | datasets.Dataset

    def records(self) -> Iterator[Record]:
        """All records in order; see `files.read_file` for errors."""
        if isinstance(self.content, list):
            for file in self.content:
                yield from read_file(file)
            return
        name = re.sub("[:@].*", "", self.name).rpartition("/")[2]
        for number, record in enumerate(self.content, 1):
            yield f"{name}:{number}", record

    def digest(self) -> str:
        """Digest of all records and of the names that `records` gives them."""
        if not isinstance(self.content, list):
            return f"{self.name} {self.content._fingerprint}"
        digest = hashlib.blake2b(digest_size=16)
        for path in self.content:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


def open_source(path: str | Path, split: str = "train") -> OpenSource:
    """Find the files or the table that `path` names; no record is read yet.

    Args:
      path: a data file (.jsonl, .json or .parquet; the first two also with .gz, .xz or
        .zst), a pattern such as `parts/*.jsonl`, a folder of data files or of
        `datasets.save_to_disk`, or a hub data set: `org/name`, `org/name:config` or
        `org/name:config@revision`. A name that exists is never taken as a pattern.
      split: split of a folder or of a hub data set; files have none.

    Raises:
      FileNotFoundError: there is no such file, folder or hub data set.
      ValueError: a file has an unknown suffix, or there is no such split.
    """
    name, file = str(path), Path(path)
    if file.is_dir():
        return OpenSource(name, _in_folder(file, split))
    if not file.exists() and glob.has_magic(name):
        return OpenSource(name, _matching(name))
    if file.exists() or is_data_file(file.name):
        return OpenSource(name, [_checked(file)])
    if file.suffix and file.parent.is_dir() and not re.search("[:@]", name):
        _checked(file)  # raises: the name of a file, such as some.csv
    if (hub := _HUB_NAME.fullmatch(name)) is None:
        raise FileNotFoundError(
            f"data {name!r} is missing; expected a file, a pattern of files, a folder, "
            "or a hub data set as org/name or org/name:config"
        )
    hub_name, config, revision = hub.groups()
    with _one_line(name):
        table = datasets.load_dataset(hub_name, config, split=split, revision=revision)
    return OpenSource(name, cast(datasets.Dataset, table))


def _checked(file: Path) -> Path:
    if not file.exists():
        raise FileNotFoundError(f"data {str(file)!r} is missing; check the path")
    if not is_data_file(file.name):
        raise ValueError(
            f"data {str(file)!r} has an unknown suffix; expected one of {SUFFIXES}, "
            "the first two also with .gz, .xz or .zst"
        )
    return file


def _matching(pattern: str) -> list[Path]:
    paths = [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
    files = [_checked(path) for path in paths if path.is_file()]
    if not files:
        raise FileNotFoundError(
            f"data {pattern!r} matches no file; check the pattern, and the folder it "
            "starts from"
        )
    return files


def _in_folder(folder: Path, split: str) -> list[Path] | datasets.Dataset:
    """The table of a folder of `save_to_disk`, or the data files of another folder."""
    saved = [folder / name for name in ("state.json", "dataset_dict.json")]
    if not any(file.is_file() for file in saved):
        return _files_of_split(folder, split)
    with _one_line(str(folder)):
        table = datasets.load_from_disk(str(folder))
    if isinstance(table, datasets.Dataset):
        return table
    if split not in table:
        raise ValueError(
            f"data {str(folder)!r} has no split {split!r}; choose one of: "
            f"{', '.join(map(str, table))}"
        )
    return table[split]


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """The data files of a split in a folder; the names of all splits are optional."""
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*"))]
    names = [n for n in names if is_data_file(n.name) and not str(n).startswith(".")]
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if len(configs := re.findall(r"^ *- config_name: *(.+)$", text, re.MULTILINE)) > 1:
        raise ValueError(
            f"data {str(folder)!r} holds several data sets ({', '.join(configs)}); "
            "give a pattern of the files of one"
        )
    if not names:
        raise FileNotFoundError(
            f"data {str(folder)!r} is a folder without data files; expected names that "
            f"end in one of {SUFFIXES}"
        )
    chosen = [name for name in names if _is_of(split, name)]
    if not any(_is_of(known, name) for known in _SPLITS for name in names):
        chosen = names if split == "train" else chosen
    if not chosen:
        raise ValueError(
            f"data {str(folder)!r} has no file of the split {split!r}, only "
            f"{', '.join(map(str, names[:5]))}; name another split, or the file"
        )
    return [folder / name for name in chosen]


def _is_of(split: str, name: Path) -> bool:
    """Whether a file's name, or a folder's that it is in, contains a split's name."""
    words = "|".join(map(re.escape, _SPLITS.get(split, (split,))))
    return re.search(f"(?<![a-z])({words})(?![a-z])", str(name).lower()) is not None


@contextlib.contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Errors of the package `datasets` as one line that names the source."""
    try:
        yield
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"data {name!r} is neither a file nor a data set that the hub provides; "
            f"check the name and the network ({type(error).__name__})"
        ) from error
    except (DatasetGenerationError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).splitlines()[:2])
        fix = f" (as {name}:CONFIG)" if "Config name is missing" in reason else ""
        raise ValueError(f"data {name!r} cannot be read: {reason}{fix}") from error
