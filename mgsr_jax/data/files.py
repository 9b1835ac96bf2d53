"""Raw records of one file, read one at a time in bounded memory.

A line that is not JSON costs one record. A file that holds something other than records
is refused by one line that says what it holds.
"""

import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

_MAGIC = {
    ".gz": b"\x1f\x8b",
    ".xz": b"\xfd7zXZ\0",
    ".zst": b"\x28\xb5\x2f\xfd",
    ".parquet": b"PAR1",
}
"""Suffix of a binary file -> its first bytes."""

_BOM = b"\xef\xbb\xbf"
_UTF_16 = ("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 IN > OUT")
_FOREIGN = {
    b"version https://git-lfs": ("a git-lfs pointer", "fetch the file: git lfs pull"),
    b"<": ("an HTML or XML page", "download the file itself, not the page about it"),
    b"PK\3\4": ("a zip archive", "unpack it"),
    **{start: _UTF_16 for start in (b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{", b"\0[")},
    **{
        magic: (f"{suffix[1:]} data", f"let its name end in {suffix}")
        for suffix, magic in _MAGIC.items()
    },
}
"""First bytes of a file that is not what its name says -> what it is, and the fix."""

_BLOCK = 1 << 20  # characters of an array that are read at a time
_ROWS = 256  # rows of a Parquet file that are converted at a time
_BETWEEN_ITEMS = re.compile(r"\s*,?\s*")
_LONGEST_WORD = 16  # an error this close to the text's end may be a word that is cut
_decode = json.JSONDecoder().raw_decode


class Unreadable(NamedTuple):
    """Takes the place of a record that is not JSON."""

    reason: str


Record = tuple[str, object]
"""("file:line", record); in an array or a Parquet file the record's number for line."""


def read_file(file: Path) -> Iterator[Record]:
    """Read JSON Lines, one JSON array, or Parquet; JSON may be compressed.

    Raises:
      ValueError: the file is damaged, or holds something other than records.
    """
    try:
        with file.open("rb") as raw:
            _refuse_foreign(_first_bytes(raw), expected=file.suffix)
        if file.suffix == ".parquet":
            yield from _parquet(file)
        else:
            yield from _json(file)
    except (
        EOFError,
        OSError,
        RecursionError,
        ValueError,
        lzma.LZMAError,
        pa.ArrowException,
        zlib.error,
    ) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"data {str(file)!r} cannot be read: {reason}") from error


def _refuse_foreign(first: bytes, expected: str) -> None:
    for start, (what, fix) in _FOREIGN.items():
        if first.startswith(start) and start != _MAGIC.get(expected):
            raise ValueError(f"it is {what}; {fix}")


def _first_bytes(stream: io.BufferedReader) -> bytes:
    """The first bytes that are neither blank nor a byte order mark."""
    while block := stream.read(512):
        if first := block.removeprefix(_BOM).lstrip():
            return first
    return b""


def _parquet(file: Path) -> Iterator[Record]:
    number = 0
    with pq.ParquetFile(file) as table:
        for batch in table.iter_batches(_ROWS):
            for record in batch.to_pylist():
                number += 1
                yield f"{file.name}:{number}", record


def _json(file: Path) -> Iterator[Record]:
    with _open(file) as stream:
        first = _first_bytes(stream)
    _refuse_foreign(first, expected=".jsonl")
    if re.match(rb"\{\s*\n", first):
        raise ValueError(
            "its first object takes several lines; expected one object a line, or one "
            "array of objects; jq -c . IN > OUT writes one object a line"
        )
    return _array(file) if first.startswith(b"[") else _lines(file)


def _open(file: Path) -> io.BufferedReader:
    """The file's bytes, decompressed."""
    if file.suffix == ".gz":
        raw = gzip.GzipFile(file)
    elif file.suffix == ".xz":
        raw = lzma.LZMAFile(file)
    elif file.suffix == ".zst":
        raw = pa.input_stream(str(file), compression="zstd")
    else:
        return file.open("rb")
    return io.BufferedReader(cast(io.RawIOBase, raw), _BLOCK)


def _lines(file: Path) -> Iterator[Record]:
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file.name}:{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line.rstrip().decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                record = Unreadable(str(error))
            yield where, record


def _array(file: Path) -> Iterator[Record]:
    """Items of one JSON array; only the text of one block and one item is held."""
    with _open(file) as binary, io.TextIOWrapper(binary, "utf-8-sig") as stream:
        text, number = stream.read(_BLOCK), 0
        at = text.index("[") + 1
        while True:
            at = cast(re.Match[str], _BETWEEN_ITEMS.match(text, at)).end()
            if text.startswith("]", at):
                break
            if (found := _item(text, at, number + 1)) is None:
                more = stream.read(max(_BLOCK, len(text) - at))
                if not more:
                    raise ValueError(f"it is cut off in item {number + 1} of its array")
                text, at = text[at:] + more, 0
                continue
            item, at = found
            number += 1
            yield f"{file.name}:{number}", item
        if (text[at + 1 :] + stream.read(_BLOCK)).strip():
            raise ValueError(f"text follows the end of its array of {number} items")


def _item(text: str, at: int, number: int) -> tuple[object, int] | None:
    """The item at a position and where it ends; None if the text ends within it."""
    try:
        item, end = _decode(text, at)
    except json.JSONDecodeError as error:
        cut = error.msg.startswith("Unterminated")
        if cut or error.pos > len(text) - _LONGEST_WORD:
            return None
        raise ValueError(f"item {number} of its array: {error.msg}") from None
    return (item, end) if end < len(text) else None
