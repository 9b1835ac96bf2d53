"""`mgsr generate`."""

import pytest

from mgsr_jax.commands.exit_status import DONE, MISTAKE
from mgsr_jax.commands.parser import main


def test_each_prompt_gets_a_response(project, capsys):
    command = ["generate", "--model", str(project / "student"), "--max_length", "24"]
    command += ["--template", "none", "--prompt", '["the", "a red"]', "--dtype"]
    assert main([*command, "bfloat16", "--temperature", "0"]) == DONE
    first = capsys.readouterr().out
    assert main([*command, "bfloat16", "--temperature", "0", "--seed", "1"]) == DONE
    assert capsys.readouterr().out == first
    assert len(first.splitlines()) >= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top_p", "0"], "0 < top_p <= 1"),
        (["--max_length", "0"], "max_length must be at least 1"),
        (["--max_length", "8"], "leaves no room for a response"),
        (["--template", "chat"], "has no chat template"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line(project, capsys, arguments, message):
    command = ["generate", "--model", str(project / "student"), "--prompt", "the"]
    assert main([*command, *arguments]) == MISTAKE
    error = capsys.readouterr().err.strip()
    assert error.startswith("mgsr: error: ") and message in error
    assert "\n" not in error
