"""Data that a run refuses, and the lines of the log about data."""

import io
import json

import pytest
import tiny
from rich.console import Console

from mgsr_jax.checkpoint.tokenizer import load_tokenizer
from mgsr_jax.data.source_settings import DataSource
from mgsr_jax.objective import Objective
from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.training.config import DataConfig, TrainConfig
from mgsr_jax.training.read_data import read_data

ON_POLICY = dict(rollout=RolloutConfig("on"), objective=Objective(sft=0.0, span=0.0))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer(folder)
    return load_tokenizer(folder)


def write(folder, *records, name="train.jsonl"):
    file = folder / name
    file.write_text("\n".join(map(json.dumps, records)))
    return str(file)


def read(folder, tokenizer, train, *, valid=None, data=None, **settings):
    """The data, and the lines of the log."""
    data = DataConfig(
        train,
        valid,
        cache_dir=str(folder / "cache"),
        **{"max_length": 512} | (data or {}),
    )
    settings = {"objective": Objective(span=0.0), **settings}
    config = TrainConfig("student", str(folder / "run"), data, steps=1, **settings)
    log = io.StringIO()
    found = read_data(config, tokenizer, console=Console(file=log, width=80))
    return found, log.getvalue().splitlines()


def test_the_log_names_the_form_and_the_counts_and_shows_the_first_example(
    tmp_path, tokenizer
):
    good = {"instruction": "the dog", "output": "a small cat", "id": 3}
    train = write(tmp_path, good, {"instruction": ""}, *[good] * 20)
    found, log = read(tmp_path, tokenizer, train)
    counts, unread, reason, prompt, response = log
    assert counts == (
        f"{train}: instruction (instruction, output): 21 examples, 0 too long, 1 "
        "empty, 0 malformed"
    )
    assert unread == "  columns that are not read: id"
    assert reason == "  train.jsonl:2: empty 'instruction'"
    assert prompt.startswith("  first prompt: 'Below is an instruction")
    assert "the dog" in prompt and prompt.endswith(r"### Response:\n'")
    assert response == f"  first response: 'a small cat{tokenizer.eos_token}'"
    assert found.rejected == ("train.jsonl:2: empty 'instruction'",)
    assert (len(found.train), found.valid) == (21, None)


def test_a_long_first_example_is_shortened(tmp_path, tokenizer):
    good = {"instruction": "the dog", "output": "a " * 300 + "red cat"}
    limits = {"max_length": 2000}
    _, log = read(tmp_path, tokenizer, write(tmp_path, good), data=limits)
    assert (
        log[-1].startswith("  first response: 'a a a") and "characters ...]" in log[-1]
    )
    assert log[-1].endswith(f"red cat{tokenizer.eos_token}'") and len(log[-1]) < 600


def test_a_warning_says_which_settings_keep_long_records(tmp_path, tokenizer):
    short = {"instruction": "the dog", "output": "a cat"}
    long = {"instruction": "the dog", "output": "a " * 2000}
    train = write(tmp_path, *[short] * 8, long)
    _, log = read(tmp_path, tokenizer, train)
    (warning,) = [line for line in log if line.startswith("  warning: ")]
    assert "1 of 9 records are left out as too long" in warning
    assert (
        "(data.max_prompt_length=256)" in warning and "data.max_length=512" in warning
    )
    _, log = read(tmp_path, tokenizer, train, data={"too_long": "truncate"})
    assert not [line for line in log if line.startswith("  warning: ")]
    train = write(tmp_path, *[short] * 20, long)
    _, log = read(tmp_path, tokenizer, train)
    assert not [line for line in log if line.startswith("  warning: ")]


def test_several_sources_are_mixed(tmp_path, tokenizer):
    one = write(tmp_path, *[{"instruction": "dog", "output": "a"}] * 4, name="1.jsonl")
    two = write(tmp_path, *[{"query": "cat", "text": "the"}] * 2, name="2.jsonl")
    three = write(tmp_path, *[{"instruction": "dog", "output": "a"}] * 3)
    other = {"prompt": "query", "completion": "text"}
    found, log = read(tmp_path, tokenizer, [one, DataSource(two, columns=other)])
    assert len(found.train) == 6
    assert f"data.train: 6 examples an epoch: 66.7% {one}, 33.3% {two}" in log
    weighted = [DataSource(one, 1.0), DataSource(two, 3.0, columns=other)]
    found, log = read(tmp_path, tokenizer, weighted, valid=[three])
    (line,) = [line for line in log if "an epoch" in line]
    assert line.endswith(f"25.0% {one}, 75.0% {two}")
    assert len(found.train) > 8 and len(found.valid) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {},
            r'prompts only \(prompt\), so .* set rollout.policy to "on".*\(got \'off\'',
        ),
        (ON_POLICY | {"rollout": RolloutConfig("on", 0.5)}, r"got 'on', 0.5, 0.0"),
        (ON_POLICY | {"objective": Objective(span=0.0)}, r"got 'on', 1.0, 1.0"),
        (ON_POLICY | {"teacher_cache": "x"}, "leave teacher_cache out"),
    ],
)
def test_prompts_only_are_refused_where_responses_are_needed(
    tmp_path, tokenizer, settings, message
):
    train = write(tmp_path, {"prompt": "the dog"})
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, tokenizer, train, **settings)
    assert "\n" not in str(error.value)


def test_prompts_only_are_read_for_rollouts_but_not_validated_on(tmp_path, tokenizer):
    train = write(tmp_path, {"prompt": "the dog"}, {"prompt": "a cat"})
    found, log = read(tmp_path, tokenizer, train, **ON_POLICY)
    assert (found.train["response"], log[-1]) == (
        [[], []],
        "  first response: none; the student writes it",
    )
    with pytest.raises(ValueError, match="a validation loss needs responses; give oth"):
        valid = write(tmp_path, {"prompt": "the dog"}, name="valid.jsonl")
        read(tmp_path, tokenizer, train, valid=valid, **ON_POLICY)


def test_a_file_in_both_sets_is_found_before_anything_is_tokenised(tmp_path, tokenizer):
    file = write(tmp_path, {"instruction": "the dog", "output": "a cat"})
    with pytest.raises(ValueError, match=f"{file} is in data.train and in data.valid"):
        read(tmp_path, tokenizer, f"{tmp_path}/*.jsonl", valid=[file])
    assert not (tmp_path / "cache").exists()
