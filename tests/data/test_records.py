"""Reading of records; a bad line costs one record and is named."""

import json

import datasets
import pytest

from mgsr_jax.data.records import Example, Message, Rejected, read_examples

GOOD = {"instruction": "Say hi.", "output": "Hi!"}
SAY_HI = (Message("user", "Say hi."),)


def read(tmp_path, *lines, name="some.jsonl"):
    file = tmp_path / name
    file.write_bytes(b"\n".join(lines))
    return list(read_examples(file))


def as_line(**fields):
    return json.dumps(GOOD | fields).encode()


def test_fields_of_good_records(tmp_path):
    assert read(
        tmp_path,
        as_line(),
        b"",
        as_line(input="now", output=["a", "b"], minillm=False, other=1),
        as_line(input=None),
    ) == [
        Example(SAY_HI, "", ("Hi!",), True, "some.jsonl:1"),
        Example(SAY_HI, "now", ("a", "b"), False, "some.jsonl:3"),
        Example(SAY_HI, "", ("Hi!",), True, "some.jsonl:4"),
    ]


@pytest.mark.parametrize(
    ("line", "problem", "reason"),
    [
        (b'{"instruction": "Say', "malformed", "Unterminated string"),
        (b'{"instruction": "\xff", "output": "a"}', "malformed", "can't decode byte"),
        (b"[" * 100_000, "malformed", "recursion"),
        (b"[1, 2]", "malformed", "a list, expected an object"),
        (b'{"output": "a"}', "malformed", "no 'instruction'"),
        (b'{"instruction": "a"}', "malformed", "no 'output'"),
        (as_line(instruction=3), "malformed", "'instruction' is a int, expected text"),
        (as_line(input=["a"]), "malformed", "'input' is a list, expected text"),
        (as_line(output=["a", 1]), "malformed", "'output' is a int, expected text"),
        (as_line(output="\ud800"), "malformed", "unpaired surrogate"),
        (as_line(minillm="no"), "malformed", "'minillm' is 'no'"),
        (as_line(instruction=" \n"), "empty", "empty 'instruction'"),
        (as_line(output=""), "empty", "empty 'output'"),
        (as_line(output=[]), "empty", "empty 'output'"),
        (as_line(output=["a", " "]), "empty", "empty 'output'"),
    ],
)
def test_a_bad_line_is_named_and_the_rest_is_read(tmp_path, line, problem, reason):
    before, bad, after = read(tmp_path, as_line(), line, as_line())
    assert isinstance(before, Example) and isinstance(after, Example)
    assert isinstance(bad, Rejected) and bad.problem == problem
    assert bad.message.startswith("some.jsonl:2: ") and reason in bad.message
    assert "\n" not in bad.message


def test_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path):
    (example,) = read(tmp_path, b"\xef\xbb\xbf" + as_line() + b"\r", name="some.json")
    assert example == Example(SAY_HI, "", ("Hi!",), True, "some.json:1")


def test_the_error_for_a_json_array_gives_the_command_to_convert_it(tmp_path):
    with pytest.raises(ValueError, match=r"some.json:1: got a JSON array.*jq -c"):
        read(tmp_path, b"[", as_line(), b"]", name="some.json")


def test_parquet_files_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "some.parquet"
    datasets.Dataset.from_list([GOOD, GOOD | {"instruction": ""}]).to_parquet(file)
    assert list(read_examples(file)) == [
        Example(SAY_HI, "", ("Hi!",), True, "some.parquet:1"),
        Rejected("empty", "some.parquet:2: empty 'instruction'"),
    ]


def test_the_error_for_a_broken_parquet_file_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "some.parquet").write_bytes(b"PAR1 this is not")
    with pytest.raises(ValueError, match="some.parquet' cannot be read") as caught:
        list(read_examples(tmp_path / "some.parquet"))
    assert "\n" not in str(caught.value)


def test_missing_and_unknown_files_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.jsonl' is missing"):
        list(read_examples(tmp_path / "no.jsonl"))
    (tmp_path / "some.csv").write_text("a,b")
    with pytest.raises(ValueError, match="some.csv' has an unknown suffix"):
        list(read_examples(tmp_path / "some.csv"))


def test_a_hub_data_set_is_loaded_by_the_package_datasets(monkeypatch):
    calls = []

    def load_dataset(name, split):
        calls.append((name, split))
        return datasets.Dataset.from_list([GOOD])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (example,) = read_examples("some/set", split="validation")
    assert calls == [("some/set", "validation")]
    assert example == Example(SAY_HI, "", ("Hi!",), True, "set:1")


@pytest.mark.parametrize(
    "error", [datasets.exceptions.DatasetNotFoundError("x"), ConnectionError("y")]
)
def test_the_error_for_an_unavailable_hub_data_set_is_one_line(monkeypatch, error):
    def load_dataset(name, split):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    match = "'some/set' is neither a file nor a data set that the hub provides"
    with pytest.raises(FileNotFoundError, match=match) as caught:
        list(read_examples("some/set"))
    assert "\n" not in str(caught.value)
