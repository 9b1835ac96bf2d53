"""Prompts of evaluation sets."""

from pathlib import Path

import datasets
import pytest
from instruction_data import EOS, LONG, LONG_PROMPT, MIXED, TOKENIZER, write

from mgsr_jax.data.encoding import Encoding, encode_prompt
from mgsr_jax.data.prompts import load_prompts

SHARED = Path(__file__).parents[3] / "shared" / "data"


def test_long_prompts_are_left_out_and_references_stay_uncut(tmp_path):
    long_response = {
        "instruction": "Say.",
        "output": ["y" * 900, "z"],
        "minillm": False,
    }
    file = write(tmp_path, [MIXED[0], MIXED[3], long_response])
    prompts, report = load_prompts(file, TOKENIZER, LONG)
    assert (report.kept, report.too_long) == (2, 1)
    assert report.messages == (
        f"some.jsonl:2: {LONG_PROMPT} tokens of prompt, at most 200",
    )
    first, second = prompts
    assert list(first.tokens) == encode_prompt(TOKENIZER, "Say hi.")
    assert TOKENIZER.decode(first.response) == "Hi" + EOS
    assert (first.references, first.example, first.scored) == (("Hi",), 0, True)
    assert second.references == ("y" * 900, "z")
    assert (second.example, second.scored, second.source) == (1, False, "some.jsonl:3")
    assert len(second.tokens) + len(second.response) == 300


def test_truncation_keeps_the_end_of_a_long_prompt(tmp_path):
    encoding = Encoding(max_prompt_length=60, max_length=80, too_long="truncate")
    file = write(tmp_path, [MIXED[3]])
    (prompt,), report = load_prompts(file, TOKENIZER, encoding)
    assert (report.kept, report.too_long) == (1, 1)
    assert list(prompt.tokens) == encode_prompt(TOKENIZER, "x" * 900)[-60:]


def test_a_set_without_a_usable_record_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ValueError, match="no usable record among 0; it is empty"):
        load_prompts(write(tmp_path, []), TOKENIZER)
    with pytest.raises(ValueError, match="among 1; first: some.jsonl:1: empty 'instr"):
        load_prompts(write(tmp_path, [MIXED[2]]), TOKENIZER)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "total", "scored"),
    [("selfinst", 252, 242), ("vicuna", 80, 80), ("sni", 1694, 1694)],
)
def test_published_sets(name, total, scored):
    file = SHARED / f"{name}.jsonl"
    if not file.is_file():
        pytest.skip(f"the evaluation sets are not next to the repository: {file}")
    wide = Encoding(max_prompt_length=4000, max_length=4001)
    prompts, report = load_prompts(file, TOKENIZER, wide)
    assert (report.kept, report.messages) == (total, ())
    assert sum(prompt.scored for prompt in prompts) == scored


def test_prompts_without_references_are_refused(tmp_path):
    file = write(tmp_path, [{"question": "Why?"}])
    with pytest.raises(
        ValueError, match=r"prompts only \(question\), .* mgsr generate"
    ):
        load_prompts(file, TOKENIZER)


def test_questions_with_answers_are_read(tmp_path):
    file = write(tmp_path, [{"question": "1 + 1?", "answer": "2\n#### 2"}])
    (prompt,), _ = load_prompts(file, TOKENIZER)
    assert list(prompt.tokens) == encode_prompt(TOKENIZER, "1 + 1?")
    assert prompt.references == ("2\n#### 2",)
