"""`mgsr generate`."""

import io
import json

import pytest

from mgsr_jax.commands.exit_status import DONE, MISTAKE
from mgsr_jax.commands.parser import main


@pytest.fixture
def generate(project, capsys):
    """Runs the command greedily on 24 tokens; returns its lines."""

    def run(*arguments):
        command = ["generate", "--model", str(project / "student"), "--max_length"]
        command += ["24", "--template", "none", "--temperature", "0"]
        assert main([*command, *arguments]) == DONE
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def test_each_prompt_gets_a_line(generate):
    prompts = ["--prompt", '["the", "a red"]', "--dtype", "bfloat16"]
    lines = generate(*prompts)
    assert generate(*prompts, "--seed", "1") == lines
    assert [line["prompt"] for line in lines] == ["the", "a red"]
    for line in lines:
        assert list(line) == ["prompt", "response", "length", "finish_reason"]
        assert line["finish_reason"] in ("stop", "length") and line["length"] < 24


@pytest.mark.slow
def test_a_response_does_not_depend_on_batch_or_mesh(generate):
    prompts = ["--prompt", '["the", "a red dog", "old"]', "--temperature", "1"]
    lines = generate(*prompts)
    assert generate(*prompts, "--batch_size", "1") == lines
    assert generate(*prompts, "--mesh.data", "2") == lines
    assert generate(*prompts, "--mesh.data", "1", "--mesh.tensor", "2") == lines


@pytest.mark.slow
def test_the_end_of_a_response_is_explained(project, generate, tmp_path):
    """A token that the model surely writes becomes a second end id."""
    import shutil

    from mgsr_jax.checkpoint import hf

    (line,) = generate("--prompt", "the")
    tokenizer = hf.load_tokenizer(project / "student")
    assert (line["finish_reason"], line["length"]) == ("length", 23)
    ids = tokenizer(line["response"], add_special_tokens=False).input_ids
    folder = tmp_path / "student"
    shutil.copytree(project / "student", folder)
    text = json.dumps({"eos_token_id": [0, ids[0]]})
    (folder / "generation_config.json").write_text(text)
    (line,) = generate("--prompt", "the", "--model", str(folder))
    assert (line["finish_reason"], line["length"]) == ("stop", 0)
    assert line["response"] == ""


def test_prompts_come_from_files_and_standard_input(generate, tmp_path, monkeypatch):
    text = tmp_path / "prompts.txt"
    text.write_text("the\n\na red\n")
    expected = generate("--prompt", '["the", "a red"]')
    assert generate("--file", str(text)) == expected
    for source in ([], ["--file", "-"]):
        monkeypatch.setattr("sys.stdin", io.StringIO(text.read_text()))
        assert generate(*source) == expected


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "the"}, "the"),
        ({"prompt": [{"role": "user", "content": "the"}], "completion": "a"}, "the"),
        ({"instruction": "a", "input": "red"}, "a\n\nred"),
        ({"question": "a red", "answer": "dog"}, "a red"),
        ({"messages": [{"role": "user", "content": "the"}]}, "the"),
        ({"conversations": [{"from": "human", "value": "the"}]}, "the"),
    ],
)
def test_a_data_file_gives_its_prompts(generate, tmp_path, record, prompt):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(record))
    (line,) = generate("--file", str(file))
    assert line["prompt"] == prompt and line["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "prompts.jsonl:2: Expecting property name"),
        ('{"text": "a"}', "prompts.jsonl:2: no 'prompt'"),
        ('{"prompt": [{"role": "user"}]}', "prompts.jsonl:2: no 'prompt: content"),
        ('{"prompt": ""}', "prompts.jsonl:2: empty 'prompt'"),
        (
            '{"prompt": "a", "system": "b"}',
            "prompts.jsonl:2: template 'none' has a place for one turn of the user",
        ),
    ],
)
def test_a_bad_line_is_named(project, capsys, tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "the"}}\n{line}\n')
    command = ["generate", "--model", str(project / "student"), "--file", str(file)]
    assert main([*command, "--template", "none"]) == MISTAKE
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top_p", "0"], "0 < top_p <= 1"),
        (["--max_length", "0"], "max_length must be at least 1"),
        (["--max_length", "8"], "leaves no room for a response"),
        (["--template", "chat"], "has no chat template"),
        (["--model", "nowhere"], "nowhere"),
        (["--file", "x.txt"], "both prompt and file"),
    ],
)
def test_a_mistake_is_one_line(project, capsys, arguments, message):
    command = ["generate", "--model", str(project / "student"), "--prompt", "the"]
    assert main([*command, *arguments]) == MISTAKE
    error = capsys.readouterr().err.strip()
    assert error.startswith("mgsr: error: ") and message in error
    assert "\n" not in error
