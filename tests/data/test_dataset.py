"""Data: one tokenisation path, a report that survives the cache."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from mgsr_jax.data import dataset, spans
from mgsr_jax.data.batches import train_batches
from mgsr_jax.data.encoding import (
    Encoding,
    alpaca_prompt,
    encode_prompt,
    encode_response,
)
from mgsr_jax.rows import next_token_view

SHARED = Path(__file__).parents[3] / "shared" / "data"
EOS, BOS = "<|end|>", "<|begin|>"
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def make_tokenizer(template=None, **options):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=[EOS, BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        [alpaca_prompt("the old dog", "is on the mat")], trainer
    )
    if template:
        special = [(token, backend.token_to_id(token)) for token in (EOS, BOS)]
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=special
        )
    options = {"eos_token": EOS, "pad_token": EOS, "bos_token": BOS} | options
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


TOKENIZER = make_tokenizer()
EOS_ID, BOS_ID = TOKENIZER.eos_token_id, TOKENIZER.bos_token_id
LONG = Encoding(max_prompt_length=200, max_length=300)


def write(tmp_path, records, name="some.jsonl"):
    file = tmp_path / name
    lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def records(count):
    return [
        {"instruction": f"Count to {i}.", "output": f"The old dog {'is ' * (i % 4)}"}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    file = write(folder, records(22))
    return dataset.load(file, TOKENIZER, LONG, cache_dir=folder)[0]


# Text -> tokens


def test_alpaca_template_is_the_published_one():
    assert alpaca_prompt("Do {it}.") == (
        "Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nDo {it}.\n\n"
        "### Response:\n"
    )
    assert alpaca_prompt("Do.", "{x}") == (
        "Below is an instruction that describes a task, paired with an input that "
        "provides further context. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nDo.\n\n### Input:\n{x}\n\n### Response:\n"
    )


@pytest.mark.parametrize(
    ("template", "begins_with_bos"),
    [
        (None, False),
        (f"{BOS} $A", True),
        (f"{BOS} $A {EOS}", True),
        (f"$A {EOS}", False),
    ],
)
def test_prompt_has_at_most_the_tokenizers_one_bos_and_no_eos(
    template, begins_with_bos
):
    tokenizer = make_tokenizer(template)
    ids = encode_prompt(tokenizer, "Say hi.")
    assert ids.count(BOS_ID) == begins_with_bos and EOS_ID not in ids
    assert (ids[0] == BOS_ID) == begins_with_bos
    bare = encode_prompt(tokenizer, "Say hi.", add_special_tokens=False)
    assert bare == ids[begins_with_bos:]
    assert tokenizer.decode(bare) == alpaca_prompt("Say hi.")


def test_special_tokens_inside_a_text_are_text():
    text = f"a {EOS} b {BOS}"
    for ids in (encode_prompt(TOKENIZER, text), encode_response(TOKENIZER, text)):
        assert not {EOS_ID, BOS_ID} & set(ids)
        assert text in TOKENIZER.decode(ids)


def test_chat_template_writes_its_own_single_bos():
    tokenizer = make_tokenizer(f"{BOS} $A", chat_template=CHAT)
    ids = encode_prompt(tokenizer, "Say hi.", "Now.", template="chat")
    expected = f"{BOS}[user] Say hi.\n\nNow.\n[assistant]\n"
    assert tokenizer.decode(ids) == expected and ids.count(BOS_ID) == 1


def test_chat_template_is_sandboxed():
    tokenizer = make_tokenizer(chat_template="{{ ''.__class__.__mro__ }}")
    with pytest.raises(Exception, match="access to attribute '__class__'"):
        encode_prompt(tokenizer, "Say hi.", template="chat")


def test_chat_without_a_template_raises():
    with pytest.raises(ValueError, match="has no chat template; use 'alpaca'"):
        encode_prompt(TOKENIZER, "Say hi.", template="chat")


@pytest.mark.parametrize("text", ["Hi", " Hi", "\n\nHi", "naïve 😀", "\r\n x"])
def test_response_decodes_to_itself(text):
    assert TOKENIZER.decode(encode_response(TOKENIZER, text)) == text


def test_response_gets_no_space_before_its_first_word():
    # Metaspace puts a mark before every text, as LLaMA's tokenizers do.
    backend = Tokenizer(
        models.BPE({"▁": 0, "a": 1, "\n": 2, "▁a": 3}, [("▁", "a")], unk_token="a")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer("a").input_ids == [3]
    assert encode_response(tokenizer, "a") == [1]
    assert encode_response(tokenizer, "a a") == [1, 3]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"template": "vicuna"}, "template is 'vicuna'"),
        ({"too_long": "keep"}, "too_long is 'keep'"),
        ({"max_prompt_length": 512}, "max_prompt_length=512 must be positive and less"),
        ({"template": "chat", "too_long": "truncate"}, "opening of a chat template"),
    ],
)
def test_impossible_encodings_raise(fields, reason):
    with pytest.raises(ValueError, match=reason):
        Encoding(**fields)


# Data set and report


def test_rows_of_the_data_set(tmp_path):
    record = {"instruction": "Say.", "output": "The old dog is on the mat 😀."}
    table, report = dataset.load(
        write(tmp_path, [record]), TOKENIZER, LONG, cache_dir=tmp_path
    )
    assert report == dataset.DataReport(1, 0, 0, 0, ())
    (row,) = table
    assert TOKENIZER.decode(row["prompt"]) == alpaca_prompt("Say.")
    assert TOKENIZER.decode(row["response"]) == record["output"] + EOS
    text, offsets = spans.token_offsets(TOKENIZER, row["response"])
    (expected,) = spans.chunk([text], [offsets])
    assert row["span_ids"] == expected.tolist()
    assert expected.max() >= 2 and expected[-1] == -1


def test_end_of_sequence_is_scored_though_padding_is_the_same_id(examples):
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id
    rows = next(train_batches(examples, 4, widths=[300], seed=0))
    view = next_token_view(jax.tree.map(jnp.asarray, rows))
    for b in range(4):
        scored = view.labels[b][view.where[b]].tolist()
        assert scored == examples[int(rows.example[b])]["response"]
        assert scored[-1] == EOS_ID and scored.count(EOS_ID) == 1


BAD = [
    {"instruction": "Say hi.", "output": "Hi"},
    '{"instruction": "Say',
    {"instruction": "", "output": "Hi"},
    {"instruction": "x" * 900, "output": "Hi"},
    {"instruction": "Say a lot.", "output": "y" * 900},
    {"instruction": "Say hi.", "output": ["Hi", "Hello"]},
]
PROMPT = len(encode_prompt(TOKENIZER, BAD[3]["instruction"]))
WHOLE = len(encode_prompt(TOKENIZER, BAD[4]["instruction"])) + 900 + 1
REPORT = dataset.DataReport(
    kept=2,
    malformed=1,
    empty=1,
    too_long=2,
    messages=(
        "some.jsonl:2: Unterminated string starting at: line 1 column 17 (char 16)",
        "some.jsonl:3: empty 'instruction'",
        f"some.jsonl:4: {PROMPT} tokens of prompt, at most 200; {PROMPT + 3} tokens of "
        "prompt and response, at most 300",
        f"some.jsonl:5: {WHOLE} tokens of prompt and response, at most 300",
    ),
)


def test_report_names_every_record_and_is_the_same_from_the_cache(
    tmp_path, monkeypatch
):
    file = write(tmp_path, BAD)
    load = {"cache_dir": tmp_path / "cache", "max_bad_fraction": 0.5}
    cold, report = dataset.load(file, TOKENIZER, LONG, **load)
    assert report == REPORT
    assert [TOKENIZER.decode(r) for r in cold["response"]] == ["Hi" + EOS] * 2

    def never(*args, **options):
        raise AssertionError("read again")

    monkeypatch.setattr(dataset.records, "read_examples", never)
    warm, report = dataset.load(file, make_tokenizer(), LONG, **load)
    assert report == REPORT and warm.to_dict() == cold.to_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"file": [{"instruction": "Say hi.", "output": "Ho"}]},
        {"tokenizer": make_tokenizer(f"{BOS} $A")},
        {"encoding": Encoding(max_prompt_length=200, max_length=301)},
        {"chunker": None},
        {"chunker": lambda text: [(0, 1)]},
    ],
)
def test_cache_is_keyed_by_what_the_tokens_depend_on(tmp_path, monkeypatch, change):
    reads = []
    read = dataset.records.read_examples
    monkeypatch.setattr(
        dataset.records,
        "read_examples",
        lambda *a, **k: reads.append(a) or read(*a, **k),
    )

    def load(file=BAD[:1], tokenizer=TOKENIZER, encoding=LONG, chunker="textblob"):
        path = write(tmp_path, file)
        dataset.load(path, tokenizer, encoding, chunker=chunker, cache_dir=tmp_path)

    load()
    load()
    assert len(reads) == 1
    load(**change)
    assert len(reads) == 2


def test_truncation_keeps_the_prompts_end_and_adds_no_eos(tmp_path):
    tokenizer = make_tokenizer(f"{BOS} $A")
    encoding = Encoding(max_prompt_length=60, max_length=80, too_long="truncate")
    file = write(tmp_path, [BAD[3], BAD[4]])
    table, report = dataset.load(file, tokenizer, encoding, cache_dir=tmp_path)
    assert (report.kept, report.too_long, len(report.messages)) == (2, 2, 2)
    first, second = table
    whole = encode_prompt(tokenizer, BAD[3]["instruction"])
    assert first["prompt"] == [BOS_ID] + whole[-59:]
    assert tokenizer.decode(first["response"]) == "Hi" + EOS
    assert len(second["prompt"]) + len(second["response"]) == 80
    assert EOS_ID not in second["response"]
    assert len(second["span_ids"]) == len(second["response"])


def test_response_that_fits_only_without_its_eos_is_too_long(tmp_path):
    length = len(encode_prompt(TOKENIZER, "Say hi.")) + len(
        encode_response(TOKENIZER, "Hi")
    )
    file = write(tmp_path, [BAD[0]])
    for max_length, too_long in [(length, 1), (length + 1, 0)]:
        encoding = Encoding(
            max_prompt_length=length - 1, max_length=max_length, too_long="truncate"
        )
        table, report = dataset.load(file, TOKENIZER, encoding, cache_dir=tmp_path)
        assert report.too_long == too_long
        assert (table[0]["response"][-1] == EOS_ID) == (not too_long)


def test_too_many_malformed_records_raise(tmp_path):
    file = write(tmp_path, BAD)
    with pytest.raises(
        ValueError, match=r"1 of 6 records are malformed.*first: some.jsonl:2: Untermin"
    ):
        dataset.load(file, TOKENIZER, LONG, cache_dir=tmp_path)


@pytest.mark.parametrize("load", [dataset.load, dataset.load_prompts])
def test_data_without_a_usable_record_raises(tmp_path, load, monkeypatch):
    monkeypatch.setattr(dataset.datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ValueError, match="no usable record among 0; it is empty"):
        load(write(tmp_path, []), TOKENIZER)
    with pytest.raises(ValueError, match="among 1; first: some.jsonl:1: empty 'instr"):
        load(write(tmp_path, [BAD[2]]), TOKENIZER)


def test_errors_inside_the_cached_step_keep_their_line(tmp_path):
    file = write(tmp_path, BAD[:1])
    with pytest.raises(ValueError, match="a chunker must return disjoint phrases"):
        dataset.load(
            file, TOKENIZER, LONG, chunker=lambda text: [(5, 9)], cache_dir=tmp_path
        )
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        dataset.load(file, make_tokenizer(eos_token=None), cache_dir=tmp_path)


def test_prompts_for_evaluation(tmp_path):
    long_answer = {"instruction": "Say.", "output": ["y" * 900, "z"], "minillm": False}
    file = write(tmp_path, [BAD[0], BAD[3], long_answer])
    prompts, report = dataset.load_prompts(file, TOKENIZER, LONG)
    assert (report.kept, report.too_long) == (2, 1)
    assert report.messages == (f"some.jsonl:2: {PROMPT} tokens of prompt, at most 200",)
    first, second = prompts
    assert list(first.tokens) == encode_prompt(TOKENIZER, "Say hi.")
    assert TOKENIZER.decode(first.response) == "Hi" + EOS
    assert (first.references, first.example, first.scored) == (("Hi",), 0, True)
    assert second.references == ("y" * 900, "z")
    assert (second.example, second.scored, second.source) == (1, False, "some.jsonl:3")
    assert len(second.tokens) + len(second.response) == 300


@pytest.mark.parametrize(
    ("name", "total", "scored"),
    [("selfinst", 252, 242), ("vicuna", 80, 80), ("sni", 1694, 1694)],
)
def test_published_sets(name, total, scored):
    file = SHARED / f"{name}.jsonl"
    if not file.is_file():
        pytest.skip(f"the evaluation sets are not beside the repository: {file}")
    wide = Encoding(max_prompt_length=4000, max_length=4001)
    prompts, report = dataset.load_prompts(file, TOKENIZER, wide)
    assert report == dataset.DataReport(total, 0, 0, 0, ())
    assert sum(prompt.scored for prompt in prompts) == scored
