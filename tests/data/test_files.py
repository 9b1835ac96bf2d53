"""Reading of one file: lines, arrays, tables, all of them compressed or not."""

import gzip
import json
import lzma
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mgsr_jax.data import files
from mgsr_jax.data.files import Unreadable, read_file

RECORDS = [{"instruction": f"Say {i}.", "output": "b"} for i in range(30)]
LINES = "\n".join(map(json.dumps, RECORDS)).encode()
ARRAY = json.dumps(RECORDS, indent=1).encode()
BOM = b"\xef\xbb\xbf"


def zstandard(content):
    buffer = pa.BufferOutputStream()
    with pa.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(content)
    return buffer.getvalue().to_pybytes()


def read(folder, name, content):
    (folder / name).write_bytes(content)
    return list(read_file(folder / name))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("some.jsonl", LINES),
        ("some.json", LINES),
        ("some.jsonl", BOM + LINES),
        ("some.json", ARRAY),
        ("some.json", BOM + ARRAY),
        ("some.json", b"\n \n" + ARRAY),
        ("some.jsonl", ARRAY),
        ("some.json", json.dumps(RECORDS).encode() + b"\n"),
        ("some.jsonl.gz", gzip.compress(LINES)),
        ("some.json.gz", gzip.compress(ARRAY)),
        ("some.jsonl.xz", lzma.compress(LINES)),
        ("some.json.xz", lzma.compress(ARRAY)),
        ("some.jsonl.zst", zstandard(LINES)),
        ("some.json.zst", zstandard(ARRAY[:50]) + zstandard(ARRAY[50:])),
    ],
)
def test_lines_and_arrays_are_read_compressed_or_not(tmp_path, name, content):
    records = read(tmp_path, name, content)
    assert [record for _, record in records] == RECORDS
    assert [where for where, _ in records] == [f"{name}:{i}" for i in range(1, 31)]


def test_parquet_is_read(tmp_path):
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "some.parquet")
    records = list(read_file(tmp_path / "some.parquet"))
    assert records[-1] == ("some.parquet:30", RECORDS[-1])
    assert [record for _, record in records] == RECORDS


def test_a_bad_line_costs_one_record(tmp_path):
    content = b'{"a": 1}\n\n{"a": \n{"a": "\xff"}\n' + b"[" * 100_000 + b'\n{"a": 2}'
    first, cut, not_utf8, deep, last = read(tmp_path, "some.jsonl", content)
    assert (first, last) == (("some.jsonl:1", {"a": 1}), ("some.jsonl:6", {"a": 2}))
    for (where, record), number, reason in (
        (cut, 3, "Expecting value"),
        (not_utf8, 4, "can't decode byte"),
        (deep, 5, "recursion"),
    ):
        assert where == f"some.jsonl:{number}"
        assert isinstance(record, Unreadable) and reason in record.reason


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.json", ARRAY[:-20], "it is cut off in item 30 of its array"),
        ("a.json", ARRAY.replace(b'"Say 3.",', b'"Say 3."'), "item 4 .* Expecting ','"),
        ("a.json", ARRAY + b"{}", "text follows the end of its array of 30 items"),
        ("a.json", json.dumps(RECORDS[0], indent=1).encode(), "takes several lines"),
        ("a.jsonl", LINES.decode().encode("utf-16"), "it is UTF-16 text; convert it"),
        ("a.jsonl", LINES.decode().encode("utf-16-le"), "it is UTF-16 text"),
        ("a.json", ARRAY.decode().encode("utf-16-be"), "it is UTF-16 text"),
        ("a.jsonl", b"\n <!DOCTYPE html><html>", "it is an HTML or XML page; download"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs"),
        ("a.jsonl", gzip.compress(LINES), "it is gz data; let its name end in .gz"),
        ("a.jsonl", b"PAR1 and more", "it is parquet data; let its name end in"),
        ("a.parquet", b"PAR1 and more", "magic bytes not found"),
        ("a.jsonl.gz", LINES, "Not a gzipped file"),
        ("a.jsonl.xz", LINES, "Input format not supported"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-9], "ended before"),
        ("a.jsonl.xz", lzma.compress(LINES)[:-9], "ended before"),
        ("a.jsonl.zst", zstandard(LINES)[:-9], "Truncated"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_named_in_one_line(
    tmp_path, name, content, what
):
    with pytest.raises(ValueError, match=f"{name}' cannot be read: .*{what}") as error:
        read(tmp_path, name, content)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("indent", [None, 3])
def test_an_array_is_read_whatever_a_block_cuts(tmp_path, monkeypatch, block, indent):
    items = [
        {"text": 'quote " backslash \\ ] [ { } , 😀 \u2028', "none": None},
        {},
        [[], [1, True, False]],
        "",
        12,
    ]
    monkeypatch.setattr(files, "_BLOCK", block)
    for ascii_only in (False, True):
        text = json.dumps(items, indent=indent, ensure_ascii=ascii_only)
        records = read(tmp_path, "some.json", text.encode())
        assert [record for _, record in records] == items


@pytest.mark.parametrize("join", ["\n", ","])
def test_a_large_file_needs_little_memory(tmp_path, monkeypatch, join):
    monkeypatch.setattr(files, "_BLOCK", 1 << 14)
    text = join.join([json.dumps({"text": "x" * 1000})] * 4000)
    file = tmp_path / "some.json"
    file.write_text(text if join == "\n" else f"[{text}]")
    tracemalloc.start()
    assert sum(1 for _ in read_file(file)) == 4000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < file.stat().st_size / 10
