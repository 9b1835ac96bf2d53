"""Conversations with a chat template, through the commands that read them."""

import io
import json
import shutil

import pytest
import transformers
from rich.console import Console

from mgsr_jax.commands.exit_status import DONE, MISTAKE
from mgsr_jax.commands.parser import _parser, main
from mgsr_jax.training.config import DataConfig, TrainConfig
from mgsr_jax.training.inputs import read_inputs

TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|endturn|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
RECORD = {
    "messages": [
        {"role": "system", "content": "Be brief ."},
        {"role": "user", "content": "the old dog"},
        {"role": "assistant", "content": "sees a small cat ."},
        {"role": "user", "content": "the child"},
        {"role": "assistant", "content": "gives a red ball to the man ."},
    ]
}


@pytest.fixture(scope="module")
def talkers(project, tmp_path_factory):
    """Student and teacher as a base model has them: eos ends documents, not turns."""
    folder = tmp_path_factory.mktemp("talkers")
    for name in ("student", "teacher"):
        shutil.copytree(project / name, folder / name)
        file = folder / name / "tokenizer.json"
        state = json.loads(file.read_text())
        count = len(state["model"]["vocab"])
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, token in enumerate(("<|turn|>", "<|endturn|>")):
            state["added_tokens"].append(
                {"id": count + i, "content": token, "special": True, **flags}
            )
        file.write_text(json.dumps(state))
        (folder / name / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "chat.jsonl").write_text("\n".join([json.dumps(RECORD)] * 8))
    return folder


def inputs(talkers, **settings):
    """The inputs of a run, and the lines that it prints about them."""
    data = DataConfig(
        str(talkers / "chat.jsonl"),
        max_prompt_length=80,
        max_length=120,
        cache_dir=str(talkers / "cache"),
        **settings,
    )
    config = TrainConfig(
        str(talkers / "student"), "", data, str(talkers / "teacher"), steps=2
    )
    log = io.StringIO()
    return read_inputs(config, console=Console(file=log, width=500)), log.getvalue()


def test_a_response_ends_with_the_end_of_turn_which_ends_generation(talkers):
    read, log = inputs(talkers)
    tokenizer, row = read.tokenizer, read.train[0]
    end = tokenizer.convert_tokens_to_ids("<|endturn|>")
    assert row["response"][-1] == end and tokenizer.eos_token_id not in row["response"]
    assert set(read.eos_ids) == {tokenizer.eos_token_id, end}
    text = tokenizer.decode(row["prompt"])
    assert text.startswith("<|turn|>system\nBe brief .<|endturn|>\n<|turn|>user\nthe")
    assert text.endswith("<|turn|>user\nthe child<|endturn|>\n<|turn|>assistant\n")
    assert "template: the tokenizer's chat template (auto)\n" in log
    assert "another chat template" not in log


def test_a_template_file_decides_where_a_turn_ends(talkers, tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text(TEMPLATE.replace("<|endturn|>", "<|turn|>"))
    read, log = inputs(talkers, template=str(own))
    token = read.tokenizer.convert_tokens_to_ids("<|turn|>")
    assert read.train[0]["response"][-1] == token and token in read.eos_ids
    assert f"template: {own}" in log
    with pytest.raises(FileNotFoundError, match="template file nowhere.jinja is miss"):
        inputs(talkers, template="nowhere.jinja")


def test_another_template_of_the_teacher_is_named(talkers, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(talkers, folder)
    (folder / "teacher" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    own = tmp_path / "own.jinja"
    own.write_text(TEMPLATE)
    _, log = inputs(folder)
    assert "teacher has another chat template; the student's is used for both" in log
    _, log = inputs(folder, template=str(own))
    assert "another chat template" not in log


def test_a_template_without_turns_has_no_place_for_a_conversation(talkers):
    with pytest.raises(
        ValueError,
        match="8 of 8 records are malformed.*chat.jsonl:1: template 'none' has a "
        "place for one turn of the user, got the roles .'system'.*set template to chat",
    ):
        inputs(talkers, template="none")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data.template_args.enable_thinking", "false"],
        ["--data.template_args", '{"enable_thinking": false}'],
        ["--data.template_args", "{enable_thinking: false}"],
    ],
)
def test_arguments_of_the_template_on_the_command_line(arguments):
    parser = _parser()
    command = ["train", "--student", "s", "--output", "o", "--data.train", "x"]
    settings = parser.instantiate(parser.parse_args([*command, *arguments]))
    assert settings.train.data.template_args == {"enable_thinking": False}


@pytest.mark.slow
def test_training_and_generation_read_the_same_prompt(talkers, tmp_path, capsys):
    read, _ = inputs(talkers)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"messages": RECORD["messages"][:-1]}))
    command = ["generate", "--model", str(talkers / "student"), "--temperature", "0"]
    command += ["--file", str(prompts), "--max_length", "96"]
    assert main(command) == DONE
    prompt = json.loads(capsys.readouterr().out)["prompt"]
    assert prompt == read.tokenizer.decode(read.train[0]["prompt"])
    system = ["--system", "Be brief .", "--prompt", "the child"]
    assert main([*command[:5], "--max_length", "96", *system]) == DONE
    prompt = json.loads(capsys.readouterr().out)["prompt"]
    assert prompt.startswith("<|turn|>system\nBe brief .<|endturn|>\n<|turn|>user\nthe")


@pytest.fixture
def train_command(talkers, recipe):
    """`mgsr train` on conversations, with the whole objective."""
    command = ["train", "--config", recipe, "--student", str(talkers / "student")]
    command += ["--teacher", str(talkers / "teacher"), "--objective.token", "1"]
    command += ["--objective.span", "1", "--objective.num_candidates", "16"]
    command += ["--data.train", str(talkers / "chat.jsonl")]
    return [*command, "--data.max_prompt_length", "80", "--data.max_length", "120"]


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.exhaustive
def test_an_exported_student_has_the_template_and_the_end_of_turn(
    talkers, train_command, tmp_path
):
    own = tmp_path / "own.jinja"
    own.write_text(TEMPLATE + "{# my own #}")
    run, exported = tmp_path / "run", tmp_path / "exported"
    command = [*train_command, "--data.template", str(own), "--steps", "1"]
    assert main([*command, "--output", str(run)]) == DONE
    own.unlink()
    assert main(["export", "--run", str(run), "--output", str(exported)]) == DONE
    for folder in (run / "student", exported):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer.chat_template == TEMPLATE + "{# my own #}"
        generation = transformers.GenerationConfig.from_pretrained(folder)
        end = tokenizer.convert_tokens_to_ids("<|endturn|>")
        assert set(generation.eos_token_id) == {tokenizer.eos_token_id, end}


@pytest.mark.exhaustive
def test_all_turns_are_trained_and_replayed_and_resumed(
    talkers, train_command, tmp_path, capsys
):
    """A run that continues from a checkpoint equals one that does not stop."""
    command = [*train_command, "--data.train_on", "all", "--log_every", "1"]
    command += ["--rollout.policy", "replay", "--rollout.initial_ratio", "0.5"]
    command += ["--rollout.capacity", "8", "--save_every", "2", "--steps", "4"]
    run = tmp_path / "run"
    assert main([*command, "--output", str(run)]) == DONE
    whole = losses(run)
    shutil.rmtree(run / "checkpoints" / "4")
    assert main([*command, "--output", str(run), "--resume", "true"]) == DONE
    assert losses(run) == whole and len(whole) == 4
    last = [*train_command, "--log_every", "1", "--steps", "4"]
    assert main([*last, "--output", str(tmp_path / "last")]) == DONE
    assert losses(tmp_path / "last")[0] != whole[0]


@pytest.mark.exhaustive
def test_a_teacher_cache_covers_only_the_last_response(train_command, tmp_path, capsys):
    command = [*train_command, "--data.train_on", "all", "--objective.span", "0"]
    command += ["--teacher_cache", str(tmp_path / "cache")]
    assert main([*command, "--output", str(tmp_path / "run")]) == MISTAKE
    error = capsys.readouterr().err
    assert "data.train_on='all', but teacher_cache holds" in error
    assert "set data.train_on to last" in error
