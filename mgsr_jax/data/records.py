"""The records of an instruction data set, read one by one, the bad ones by name."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets.exceptions import DatasetGenerationError

_SURROGATE = re.compile("[\ud800-\udfff]")


class Example(NamedTuple):
    """One record: `references` are the acceptable outputs, the first is trained on."""

    instruction: str
    input: str
    references: tuple[str, ...]
    scored: bool  # False where a record says `"minillm": false`
    source: str  # "file:line"


class Rejected(NamedTuple):
    """A record that cannot be used: `problem` is "malformed" or "empty"."""

    problem: str
    message: str


def read_examples(path: str | Path, *, split: str = "train") -> Iterator[Any]:
    """The records of a file or a hub data set, as `Example` or `Rejected`.

    JSON Lines are read line by line, so that one bad line costs one record. Fields:
    `instruction`, `input` (optional), `output` (a string or a list of references).

    Raises:
      FileNotFoundError: neither a file nor a data set that can be had.
      ValueError: a file of another kind.
    """
    for source, record in _records(path, split):
        yield record if isinstance(record, Rejected) else _check(record, source)


def _records(path: str | Path, split: str) -> Iterator[tuple[str, Any]]:
    file = Path(path)
    if file.suffix in (".json", ".jsonl") and is_local(path):
        yield from _json_records(file)
    else:
        for i, record in enumerate(stored(path, split), 1):
            yield f"{file.name}:{i}", record


def is_local(path: str | Path) -> bool:
    """Whether `path` is a file (True) or stands for a hub data set or a folder."""
    file = Path(path)
    kinds = (".json", ".jsonl", ".parquet")
    if file.is_file() and file.suffix not in kinds:
        raise ValueError(f"data {str(path)!r} is of no known kind; use one of {kinds}")
    if file.suffix in kinds and not file.is_file():
        raise FileNotFoundError(f"data {str(path)!r} is missing; check the path")
    return file.is_file()


def _json_records(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            source = f"{file.name}:{number}"
            if not line.strip():
                continue
            if number == 1 and file.suffix == ".json" and line.lstrip()[:1] == b"[":
                raise ValueError(
                    f"{source}: a JSON array, expected one JSON object a line; "
                    f"convert it: jq -c '.[]' {file.name} > {file.stem}.jsonl"
                )
            try:
                record = json.loads(line.rstrip().decode("utf-8-sig"))
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                yield source, Rejected("malformed", f"{source}: {error}")
            else:
                yield source, record


def stored(path: str | Path, split: str) -> Any:
    """A Parquet file, a folder or a data set of the hub, by `datasets`."""
    local = is_local(path)
    try:
        if local:
            return datasets.Dataset.from_parquet(str(path))
        return datasets.load_dataset(str(path), split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"data {str(path)!r} is neither a file nor a data set that the hub hands "
            f"out; check the name and the network ({type(error).__name__})"
        ) from error
    except (DatasetGenerationError, ValueError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ValueError(f"data {str(path)!r} cannot be read: {reason}") from error


def _check(record: Any, source: str) -> Example | Rejected:
    def malformed(reason: str) -> Rejected:
        return Rejected("malformed", f"{source}: {reason}")

    if not isinstance(record, Mapping):
        return malformed(f"a {type(record).__name__}, expected an object")
    # Dolly's own data set calls them context and response.
    instruction = record.get("instruction")
    output = record.get("output", record.get("response"))
    given = record.get("input", record.get("context"))
    given = "" if given is None else given
    scored = record.get("minillm", True)
    references: tuple[Any, ...] = (
        tuple(output) if isinstance(output, list) else (output,)
    )
    texts = {"instruction": (instruction,), "input": (given,), "output": references}
    for field, values in texts.items():
        for value in values:
            if value is None:
                return malformed(f"no {field!r}")
            if not isinstance(value, str):
                return malformed(
                    f"{field!r} is a {type(value).__name__}, expected text"
                )
            if _SURROGATE.search(value):
                return malformed(f"{field!r} holds half of a surrogate pair")
    if not isinstance(scored, bool):
        return malformed(f"'minillm' is {scored!r}, expected true or false")
    if not str(instruction).strip():
        return Rejected("empty", f"{source}: empty 'instruction'")
    if not references or not all(reference.strip() for reference in references):
        return Rejected("empty", f"{source}: empty 'output'")
    return Example(str(instruction), given, references, scored, source)
