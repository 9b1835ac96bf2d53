"""Reading of records; a bad line costs one record and is named."""

import json

import datasets
import pytest

from mgsr_jax.data.records import (
    Example,
    Message,
    Rejected,
    read_examples,
    read_prompts,
)

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


def test_parquet_files_are_read(tmp_path):
    file = tmp_path / "some.parquet"
    datasets.Dataset.from_list([GOOD, GOOD | {"instruction": ""}]).to_parquet(file)
    assert list(read_examples(file)) == [
        Example(SAY_HI, "", ("Hi!",), True, "some.parquet:1"),
        Rejected("empty", "some.parquet:2: empty 'instruction'"),
    ]


def test_a_data_set_of_the_hub_is_read(monkeypatch):
    def load_dataset(name, config, split, revision):
        return datasets.Dataset.from_list([GOOD])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (example,) = read_examples("some/set", split="validation")
    assert example == Example(SAY_HI, "", ("Hi!",), True, "set:1")


def test_every_prompt_of_a_file_must_be_usable(tmp_path):
    file = tmp_path / "some.jsonl"
    file.write_text('{"prompt": "Say hi."}\n{"prompt": "Say hi."}')
    assert [prompt.messages for prompt in read_prompts(file)] == [SAY_HI] * 2
    file.write_text('{"prompt": "Say hi."}\n{"prompt": 3}')
    with pytest.raises(ValueError, match="some.jsonl:2: 'prompt' is a int.*; correct"):
        list(read_prompts(file))
