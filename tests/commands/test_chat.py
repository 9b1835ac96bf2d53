"""`mgsr chat`: a conversation from standard input."""

import io
import json
import shutil

import pytest

from mgsr_jax.checkpoint.chat_template import ChatTemplate
from mgsr_jax.commands.exit_status import DONE, MISTAKE
from mgsr_jax.commands.parser import main

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} . {% endfor %}"
    "{{ ending|default('') }}assistant:"
)


@pytest.fixture(scope="module")
def talker(project, tmp_path_factory):
    """The student with a chat template."""
    folder = tmp_path_factory.mktemp("talker") / "student"
    shutil.copytree(project / "student", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


@pytest.fixture
def rendered(monkeypatch):
    """The messages of each response."""
    seen = []
    text = ChatTemplate.text

    def record(template, conversation, *, add_generation_prompt):
        if add_generation_prompt:
            seen.append([dict(message) for message in conversation])
        return text(template, conversation, add_generation_prompt=add_generation_prompt)

    monkeypatch.setattr(ChatTemplate, "text", record)
    return seen


def talk(monkeypatch, model, text, *arguments):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    command = ["chat", "--model", model, "--max_length", "96", *arguments]
    return main(command)


@pytest.mark.slow
def test_a_conversation_has_a_history_until_it_is_reset(
    talker, monkeypatch, capsys, rendered
):
    text = "the dog\n\na cat\n/reset\nthe bird\n/exit\nnever read\n"
    arguments = ["--system", "Be brief .", "--temperature", "0"]
    assert talk(monkeypatch, talker, text, *arguments) == DONE
    out, error = capsys.readouterr()
    _, first, second, third = rendered
    assert first[0] == {"role": "system", "content": "Be brief ."}
    assert [m["role"] for m in first[1:]] == ["user"]
    assert second[:2] == first and second[3]["content"] == "a cat"
    assert second[2]["role"] == "assistant" and second[2]["content"] in out
    assert [m["content"] for m in third] == ["Be brief .", "the bird"]
    assert "new conversation" in error and "never read" not in out


def test_the_streamed_text_is_that_of_generate(talker, monkeypatch, capsys, tmp_path):
    assert talk(monkeypatch, talker, "the dog\n", "--temperature", "0") == DONE
    streamed = capsys.readouterr().out.rstrip("\n")
    prompts = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "the dog"}]
    prompts.write_text(json.dumps({"messages": messages}))
    command = ["generate", "--model", talker, "--file", str(prompts)]
    assert main([*command, "--temperature", "0", "--max_length", "96"]) == DONE
    line = json.loads(capsys.readouterr().out)
    assert line["prompt"] == "user: the dog . assistant:"
    assert line["response"].rstrip("\n\N{REPLACEMENT CHARACTER}") == streamed


def test_template_args_reach_the_template(talker, monkeypatch, capsys):
    long = json.dumps({"ending": "the " * 200})
    arguments = ["--template_args", long]
    assert talk(monkeypatch, talker, "the dog\n", *arguments) == DONE
    out, error = capsys.readouterr()
    assert not out and "less than max_length=96; or begin again with /reset" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top_p", "2"], "0 < top_p <= 1"),
        (["--max_length", "0"], "max_length must be at least 1"),
        ([], "has no chat template"),
        (["--template", "alpaca"], "template='alpaca'; expected chat, or the path"),
        (["--template", "own.jinja"], "template file own.jinja is missing"),
    ],
)
def test_a_mistake_is_one_line(project, monkeypatch, capsys, arguments, message):
    model = str(project / "student")
    assert talk(monkeypatch, model, "the dog\n", *arguments) == MISTAKE
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_a_template_that_refuses_the_roles_is_one_line(
    talker, monkeypatch, capsys, tmp_path
):
    folder = tmp_path / "student"
    shutil.copytree(talker, folder)
    refuses = "{{ raise_exception('no system message') }}"
    (folder / "chat_template.jinja").write_text(refuses)
    assert talk(monkeypatch, str(folder), "the dog\n", "--system", "x") == MISTAKE
    error = capsys.readouterr().err
    assert "refuses messages of the roles ['system', 'user']: no system" in error
