"""Tokenised data sets: rows, report and cache."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from instruction_data import (
    BOS,
    BOS_ID,
    EOS,
    EOS_ID,
    LONG,
    LONG_PROMPT,
    MIXED,
    TOKENIZER,
    make_tokenizer,
    write,
)

from mgsr_jax.data import dataset, spans
from mgsr_jax.data.batches import train_batches
from mgsr_jax.data.encoding import (
    Encoding,
    encode_prompt,
    encode_response,
)
from mgsr_jax.data.forms import Form
from mgsr_jax.data.plain_text import alpaca_prompt
from mgsr_jax.data.report import MAX_MESSAGES, data_report
from mgsr_jax.rows import next_token_view


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    records = [
        {"instruction": f"Count to {i}.", "output": f"The old dog {'is ' * (i % 4)}"}
        for i in range(22)
    ]
    file = write(folder, records)
    return dataset.load(file, TOKENIZER, LONG, cache_dir=folder)[0]


def test_a_record_becomes_prompt_response_and_span_ids(tmp_path):
    record = {"instruction": "Say.", "output": "The old dog is on the mat 😀."}
    table, report = dataset.load(
        write(tmp_path, [record]), TOKENIZER, LONG, cache_dir=tmp_path
    )
    assert (report.kept, report.messages) == (1, ())
    (row,) = table
    assert TOKENIZER.decode(row["prompt"]) == alpaca_prompt("Say.")
    assert TOKENIZER.decode(row["response"]) == record["output"] + EOS
    text, offsets = spans.token_offsets(TOKENIZER, row["response"])
    (expected,) = spans.chunk([text], [offsets])
    assert row["span_ids"] == expected.tolist()
    assert expected.max() >= 2 and expected[-1] == -1


def test_end_of_sequence_is_scored_though_padding_has_the_same_id(examples):
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id
    rows = next(train_batches(examples, 4, widths=[300], seed=0))
    view = next_token_view(jax.tree.map(jnp.asarray, rows))
    for b in range(4):
        scored = view.labels[b][view.where[b]].tolist()
        assert scored == examples[int(rows.example[b])]["response"]
        assert scored[-1] == EOS_ID and scored.count(EOS_ID) == 1


FORM = Form("chat", "messages", None, {}, ("messages",), ())
LONG_ROW = len(encode_prompt(TOKENIZER, MIXED[4]["instruction"])) + 900 + 1
MESSAGES = (
    "some.jsonl:2: Unterminated string starting at: line 1 column 17 (char 16)",
    "some.jsonl:3: empty 'instruction'",
    f"some.jsonl:4: {LONG_PROMPT} tokens of prompt, at most 200; {LONG_PROMPT + 3} "
    "tokens of prompt and response, at most 300",
    f"some.jsonl:5: {LONG_ROW} tokens of prompt and response, at most 300",
)


def test_the_report_names_every_record_and_is_cached(tmp_path, monkeypatch):
    file = write(tmp_path, MIXED)
    load = {"cache_dir": tmp_path / "cache", "max_bad_fraction": 0.5}
    computed, report = dataset.load(file, TOKENIZER, LONG, **load)
    assert (report.kept, report.too_long) == (2, 2)
    assert (report.malformed, report.empty) == (1, 1)
    assert (report.messages, report.unlisted) == (MESSAGES, 0)
    assert report.prompt_lengths[-1] == LONG_PROMPT
    assert report.lengths[-1] == max(LONG_ROW, LONG_PROMPT + 3)
    assert report.many_too_long
    assert [TOKENIZER.decode(r) for r in computed["response"]] == ["Hi" + EOS] * 2

    def fail(*args, **options):
        raise AssertionError("the file was read again")

    monkeypatch.setattr(dataset, "examples_of", fail)
    cached, again = dataset.load(file, make_tokenizer(), LONG, **load)
    assert again == report and cached.to_dict() == computed.to_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"file": [{"instruction": "Say hi.", "output": "Ho"}]},
        {"tokenizer": make_tokenizer(f"{BOS} $A")},
        {"encoding": Encoding(max_prompt_length=200, max_length=301)},
        {"columns": {"system": "note"}},
        {"chunker": None},
        {"chunker": lambda text: [(0, 1)]},
    ],
)
def test_the_cache_key_changes_with_each_input(tmp_path, monkeypatch, change):
    reads = []
    read = dataset.examples_of
    monkeypatch.setattr(
        dataset,
        "examples_of",
        lambda *a, **k: reads.append(a) or read(*a, **k),
    )

    def load(file=MIXED[:1], tokenizer=TOKENIZER, encoding=LONG, **options):
        path = write(tmp_path, file)
        dataset.load(path, tokenizer, encoding, cache_dir=tmp_path, **options)

    load()
    load()
    assert len(reads) == 1
    load(**change)
    assert len(reads) == 2


def test_the_cache_key_covers_every_module_that_dataset_imports():
    folder, unread, imported = Path(dataset.__file__).parent, ["dataset"], set()
    while unread:
        module = unread.pop()
        imported.add(module)
        tree = ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                for name in (node.module, *names):
                    own = name.removeprefix("mgsr_jax.data.")
                    if (folder / f"{own}.py").is_file() and own not in imported:
                        unread.append(own)
    assert set(dataset._KEYED_MODULES) == imported


def test_truncation_keeps_the_end_of_the_prompt_and_adds_no_eos(tmp_path):
    tokenizer = make_tokenizer(f"{BOS} $A")
    encoding = Encoding(max_prompt_length=60, max_length=80, too_long="truncate")
    file = write(tmp_path, [MIXED[3], MIXED[4]])
    table, report = dataset.load(file, tokenizer, encoding, cache_dir=tmp_path)
    assert (report.kept, report.too_long, len(report.messages)) == (2, 2, 2)
    first, second = table
    uncut = encode_prompt(tokenizer, MIXED[3]["instruction"])
    assert first["prompt"] == [BOS_ID] + uncut[-59:]
    assert tokenizer.decode(first["response"]) == "Hi" + EOS
    assert len(second["prompt"]) + len(second["response"]) == 80
    assert EOS_ID not in second["response"]
    assert len(second["span_ids"]) == len(second["response"])


def test_a_response_that_fits_only_without_its_eos_is_too_long(tmp_path):
    length = len(encode_prompt(TOKENIZER, "Say hi.")) + len(
        encode_response(TOKENIZER, "Hi")
    )
    file = write(tmp_path, [MIXED[0]])
    for max_length, too_long in [(length, 1), (length + 1, 0)]:
        encoding = Encoding(
            max_prompt_length=length - 1, max_length=max_length, too_long="truncate"
        )
        table, report = dataset.load(file, TOKENIZER, encoding, cache_dir=tmp_path)
        assert report.too_long == too_long
        assert (table[0]["response"][-1] == EOS_ID) == (not too_long)


def test_too_many_malformed_records_raise(tmp_path):
    file = write(tmp_path, MIXED)
    with pytest.raises(
        ValueError, match=r"1 of 6 records are malformed.*first: some.jsonl:2: Untermin"
    ):
        dataset.load(file, TOKENIZER, LONG, cache_dir=tmp_path)


def test_data_without_a_usable_record_raises(tmp_path):
    with pytest.raises(ValueError, match="no usable record among 0; it is empty"):
        dataset.load(write(tmp_path, []), TOKENIZER, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="among 1; first: some.jsonl:1: empty 'instr"):
        dataset.load(write(tmp_path, [MIXED[2]]), TOKENIZER, cache_dir=tmp_path)


def test_errors_raised_while_the_cache_is_filled_keep_their_message(tmp_path):
    file = write(tmp_path, MIXED[:1])
    with pytest.raises(ValueError, match="a chunker must return disjoint phrases"):
        dataset.load(
            file, TOKENIZER, LONG, chunker=lambda text: [(5, 9)], cache_dir=tmp_path
        )
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        dataset.load(file, make_tokenizer(eos_token=None), cache_dir=tmp_path)


def test_prompts_only_have_rows_without_a_response(tmp_path):
    file = write(tmp_path, [{"prompt": "Say hi."}, {"prompt": "Say a lot."}])
    table, report = dataset.load(file, TOKENIZER, LONG, cache_dir=tmp_path)
    assert report.form.prompts_only and report.kept == 2
    assert TOKENIZER.decode(table[0]["prompt"]) == alpaca_prompt("Say hi.")
    assert table["response"] == table["span_ids"] == [[], []]
    rows = next(train_batches(table, 2, widths=[100, 300], seed=0))
    assert rows.lengths.tolist() == rows.prompt_lengths.tolist()
    view = next_token_view(jax.tree.map(jnp.asarray, rows))
    assert not view.where.any()


def test_a_report_holds_a_limited_number_of_messages():
    def reasons():
        for number in range(MAX_MESSAGES + 5):
            yield f"some.jsonl:{number}: bad"

    problems = ["malformed"] * (MAX_MESSAGES + 5)
    report = data_report(FORM, 1, problems, reasons())
    assert (len(report.messages), report.unlisted) == (MAX_MESSAGES, 5)


@pytest.mark.parametrize(("too_long", "many"), [(0, False), (10, False), (11, True)])
def test_many_records_are_too_long_if_they_are_more_than_a_tenth(too_long, many):
    problems = ["too_long"] * too_long + [""] * (100 - too_long)
    lengths = range(1, 101)
    report = data_report(FORM, 100 - too_long, problems, (), lengths=lengths)
    assert report.many_too_long == many
    assert report.lengths == (51, 91, 100, 100)
