"""Records of an instruction data set, read and checked one by one.

A bad record does not stop the reading: it becomes a `Rejected` that names its line.
"""

import collections
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, cast

import datasets
from datasets.exceptions import DatasetGenerationError

_SURROGATE = re.compile("[\ud800-\udfff]")


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


class Example(NamedTuple):
    """One usable record: a conversation up to a response, and the response.

    Attributes:
      messages: the turns before the response; an instruction is one turn of the user.
      input: further context of the last turn; may be empty.
      references: the acceptable responses; training uses the first.
      scored: whether metrics count the record; false where it has `"minillm": false`.
      source: "file:line".
    """

    messages: tuple[Message, ...]
    input: str
    references: tuple[str, ...]
    scored: bool
    source: str

    @property
    def instruction(self) -> str:
        """The text of the last turn before the response."""
        return self.messages[-1].content


class Rejected(NamedTuple):
    """A record that cannot be used.

    Attributes:
      problem: "malformed" or "empty".
      message: "file:line: reason".
    """

    problem: str
    message: str


@dataclasses.dataclass(frozen=True)
class DataReport:
    """Counts of used and unused records of a data set, and why they were not used.

    Attributes:
      kept: number of examples that are used.
      malformed: number of records left out because they are not JSON, not UTF-8, or
        have missing keys or values of a wrong type.
      empty: number of records left out because instruction or output is empty.
      too_long: number of records left out because of their length, or cut where
        `too_long="truncate"` (those also count in `kept`).
      messages: one line "file:line: reason" for each of them, in the data's order.
    """

    kept: int
    malformed: int
    empty: int
    too_long: int
    messages: tuple[str, ...]


def data_report(
    kept: int, problems: Iterable[str], messages: Iterable[str]
) -> DataReport:
    """Count problems by kind.

    Args:
      kept: number of examples that are used.
      problems: "malformed", "empty", "too_long" or "", one a record.
      messages: reasons; empty strings are left out.
    """
    count = collections.Counter(problems)
    return DataReport(
        kept=kept,
        malformed=count["malformed"],
        empty=count["empty"],
        too_long=count["too_long"],
        messages=tuple(message for message in messages if message),
    )


def check_report(
    path: str | Path, report: DataReport, total: int, max_bad_fraction: float
) -> None:
    """Refuse a data set without a usable record or with too many malformed ones.

    Args:
      path: name of the data set in the error.
      report: counts of its records.
      total: number of all records.
      max_bad_fraction: largest share of malformed records that is accepted.

    Raises:
      ValueError: names the first few bad records.
    """
    first = "; ".join(report.messages[:3])
    if report.malformed > max_bad_fraction * total:
        raise ValueError(
            f"data {str(path)!r}: {report.malformed} of {total} records are malformed; "
            f"expected at most max_bad_fraction={max_bad_fraction}; fix them, first: "
            f"{first}"
        )
    if report.kept == 0:
        raise ValueError(
            f"data {str(path)!r} has no usable record among {total}; "
            + (f"first: {first}" if first else "it is empty")
        )


def read_examples(
    path: str | Path, *, split: str = "train"
) -> Iterator[Example | Rejected]:
    """Read the records of a file or of a data set from the Hugging Face hub.

    JSON Lines are read line by line, so one bad line costs one record. Fields:
    `instruction`, `input` (optional), `output` (a string or a list of references).

    Raises:
      FileNotFoundError: `path` is neither a file nor a data set that can be loaded.
      ValueError: the file has an unknown suffix or cannot be read.
    """
    for source, record in _records(path, split):
        yield record if isinstance(record, Rejected) else _check(record, source)


def _records(path: str | Path, split: str) -> Iterator[tuple[str, object]]:
    file = Path(path)
    if file.suffix in (".json", ".jsonl") and is_local(path):
        yield from _json_records(file)
    else:
        for i, record in enumerate(load_table(path, split), 1):
            yield f"{file.name}:{i}", record


def is_local(path: str | Path) -> bool:
    """Whether `path` is a file, not a folder or the name of a hub data set."""
    file = Path(path)
    suffixes = (".json", ".jsonl", ".parquet")
    if file.is_file() and file.suffix not in suffixes:
        raise ValueError(
            f"data {str(path)!r} has an unknown suffix; expected one of {suffixes}"
        )
    if file.suffix in suffixes and not file.is_file():
        raise FileNotFoundError(f"data {str(path)!r} is missing; check the path")
    return file.is_file()


def _json_records(file: Path) -> Iterator[tuple[str, object]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            source = f"{file.name}:{number}"
            if not line.strip():
                continue
            if number == 1 and file.suffix == ".json" and line.lstrip()[:1] == b"[":
                raise ValueError(
                    f"{source}: got a JSON array, expected one JSON object a line; "
                    f"convert it: jq -c '.[]' {file.name} > {file.stem}.jsonl"
                )
            try:
                record = json.loads(line.rstrip().decode("utf-8-sig"))
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                yield source, Rejected("malformed", f"{source}: {error}")
            else:
                yield source, record


def load_table(path: str | Path, split: str) -> datasets.Dataset:
    """Load a Parquet file, a folder or a hub data set with the package `datasets`."""
    local = is_local(path)
    try:
        if local:
            table = datasets.Dataset.from_parquet(str(path))
        else:
            table = datasets.load_dataset(str(path), split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"data {str(path)!r} is neither a file nor a data set that the hub "
            f"provides; check the name and the network ({type(error).__name__})"
        ) from error
    except (DatasetGenerationError, ValueError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ValueError(f"data {str(path)!r} cannot be read: {reason}") from error
    return cast(datasets.Dataset, table)


def _check(record: object, source: str) -> Example | Rejected:
    def malformed(reason: str) -> Rejected:
        return Rejected("malformed", f"{source}: {reason}")

    if not isinstance(record, Mapping):
        return malformed(f"got a {type(record).__name__}, expected an object")
    # Dolly's published data set names these fields context and response.
    instruction = record.get("instruction")
    output = record.get("output", record.get("response"))
    context = record.get("input", record.get("context"))
    context = "" if context is None else context
    scored = record.get("minillm", True)
    references = tuple(output) if isinstance(output, list) else (output,)
    texts = {"instruction": (instruction,), "input": (context,), "output": references}
    for field, values in texts.items():
        for value in values:
            if reason := _not_a_text(field, value):
                return malformed(reason)
    if not isinstance(scored, bool):
        return malformed(f"'minillm' is {scored!r}, expected true or false")
    if not str(instruction).strip():
        return Rejected("empty", f"{source}: empty 'instruction'")
    if not references or not all(reference.strip() for reference in references):
        return Rejected("empty", f"{source}: empty 'output'")
    turns = (Message("user", str(instruction)),)
    return Example(turns, context, references, scored, source)


def _not_a_text(field: str, value: object) -> str:
    """The reason why a field's value is no text; empty if it is one."""
    if value is None:
        return f"no {field!r}"
    if not isinstance(value, str):
        return f"{field!r} is a {type(value).__name__}, expected text"
    return f"{field!r} has an unpaired surrogate" if _SURROGATE.search(value) else ""
