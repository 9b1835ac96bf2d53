"""Settings from files and the command line, and one line for every mistake."""

import re
import shutil
import subprocess
import sys

import pytest

from mgsr_jax.commands.exit_status import DONE, MISTAKE
from mgsr_jax.commands.parser import COMMANDS, _with_flags, _with_lists, main


def fails(capsys, *arguments):
    """The one line that a command with a mistake prints."""
    assert main(arguments) == MISTAKE
    line = capsys.readouterr().err.strip()
    assert line.splitlines()[-1].startswith("mgsr: error: ") and "Traceback" not in line
    return line.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected"),
        (["distil"], "distil"),
        (["train", "--config", "none.yaml"], "none.yaml"),
        (["train", "--learning_rate", "1"], "--learning_rate"),
        (["train", "--objective.divergence", "js"], "divergence.*js"),
        (["train", "--steps", "many"], "steps.*many"),
        (["cache-teacher", "--logits_dtype", "int8"], "logits_dtype.*int8"),
        (["evaluate", "--model", "nowhere", "--data", "x.jsonl"], "nowhere"),
        (["export", "--run", "nowhere", "--output", "x"], "nowhere"),
        (["report", "--run", "nowhere"], "nowhere"),
        (["convert", "nowhere", "x"], "nowhere"),
        (["convert", "nowhere"], "output"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert re.search(message, fails(capsys, *arguments))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("evaluate --metrics math rouge_l", 'evaluate --metrics ["math","rouge_l"]'),
        (
            "evaluate --data a.jsonl b.jsonl --seeds [] --metrics math",
            'evaluate --data ["a.jsonl","b.jsonl"] --seeds [] --metrics ["math"]',
        ),
        ("train --evaluate.metrics [math]", "train --evaluate.metrics [math]"),
        ("convert --mesh.data 2 a b", "convert --mesh.data 2 a b"),
        ("--help", "--help"),
        ("", ""),
    ],
)
def test_words_of_an_option_become_a_list(words, expected):
    joined = _with_lists(words.split())
    assert [word.replace(", ", ",") for word in joined] == expected.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train --resume --steps 3", "train --resume true --steps 3"),
        ("train --resume false", "train --resume false"),
        ("export --run x --best", "export --run x --best true"),
        ("export --best -h", "export --best true -h"),
        ("", ""),
    ],
)
def test_a_switch_without_a_value_is_on(words, expected):
    assert _with_flags(words.split()) == expected.split()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --steps 3", "settings that are missing: student, output, data.train"),
        ("generate --model x --top_k 1.5", "top_k: got 1.5, expected whole number"),
        ("train --data.train_on lst", "expected last, all; did you mean last?"),
        ("evaluate --metrics maths --model x --data y", "did you mean math?"),
        ("evaluate --metric math", "did you mean --metrics?"),
    ],
)
def test_a_wrong_value_is_explained_without_names_of_python(words, message, capsys):
    line = fails(capsys, *words.split())
    assert message in line and "class" not in line and "Literal" not in line


def test_an_output_that_exists_is_left_unchanged(project, recipe, capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    line = fails(capsys, "train", "--config", recipe, "--output", str(tmp_path))
    assert "not empty" in line
    evaluate = ["evaluate", "--model", str(project / "student"), "--data"]
    evaluate += [str(project / "valid.jsonl"), "--output", str(tmp_path)]
    assert "exists" in fails(capsys, *evaluate)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_unknown_key_of_a_source_is_named(capsys, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("data: {train: [{path: x, wieght: 2}]}\n")
    line = fails(capsys, "train", "--config", str(wrong), "--output", "x")
    assert "data.train: got [{" in line and "('wieght' is unknown), expected" in line


def test_an_unknown_key_in_a_file_is_named(capsys, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("rollout: {polcy: 'on'}\n")
    line = fails(capsys, "train", "--config", str(wrong), "--output", "x")
    assert "polcy" in line


def fails_to_train(capsys, recipe, tmp_path, *arguments):
    output = tmp_path / "out"
    command = ["train", "--config", recipe, "--output", str(output), *arguments]
    line = fails(capsys, *command)
    assert not output.exists()
    return line


def test_a_truncated_checkpoint_is_named(project, recipe, capsys, tmp_path):
    broken = shutil.copytree(project / "student", tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    line = fails_to_train(capsys, recipe, tmp_path, "--student", str(broken))
    assert "model.safetensors" in line


def test_an_unknown_model_type_is_named(recipe, capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    line = fails_to_train(capsys, recipe, tmp_path, "--student", str(tmp_path))
    assert "mamba" in line and "llama" in line


def test_an_empty_data_set_is_named(recipe, capsys, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    line = fails_to_train(capsys, recipe, tmp_path, "--data.train", str(empty))
    assert "empty" in line


@pytest.mark.parametrize("value", ["[[0, 8], [0, 9]]", "[[0.5, 8]]", "0"])
def test_a_schedule_that_does_not_rise_is_named(value, recipe, capsys, tmp_path):
    line = fails_to_train(capsys, recipe, tmp_path, "--rollout.max_new_tokens", value)
    assert "rollout.max_new_tokens=" in line and "rise from 0 to below 1" in line


def test_a_missing_extra_is_named(project, recipe, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    teacher = ["--teacher", str(project / "teacher"), "--objective.token", "1"]
    chunker = ["--data.chunker", "spacy", "--objective.span", "1"]
    line = fails_to_train(capsys, recipe, tmp_path, *teacher, *chunker)
    assert "mgsr_jax[spacy]" in line


def test_without_the_train_extra_the_program_names_it():
    code = (
        "import sys; sys.modules['jsonargparse'] = None\n"
        "from mgsr_jax.__main__ import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == MISTAKE
    assert done.stderr.strip().endswith("pip install 'mgsr_jax[train]'")


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["trian"], "train"),
        (["cache_teacher"], "cache-teacher"),
        (["train", "--learning_rate", "1"], "--optimizer.learning_rate"),
        (["train", "--rollout.polcy", "on"], "--rollout.policy"),
        (["train", "--stepz=3"], "--steps"),
        (["train", "--rollout.policy", "replya"], "replay"),
        (["train", "--objective.divergence", "foward_kl"], "forward_kl"),
        (["evaluate", "--exposure_bais", "true"], "--exposure_bias"),
        (["export", "--runn", "x"], "--run"),
    ],
)
def test_a_typo_is_answered_with_what_it_may_mean(arguments, meant, capsys):
    assert fails(capsys, *arguments).endswith(f"did you mean {meant}?")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("rollout: {polcy: 'on'}", "rollout.policy"),
        ("bacth_size: 3", "batch_size"),
        ("objectives: {sft: 1}", "objective.sft"),
        ("rollout: {policy: onn}", "on"),
    ],
)
def test_a_typo_in_a_file_is_answered_too(text, meant, capsys, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(text)
    line = fails(capsys, "train", "--config", str(wrong), "--output", "x")
    assert line.endswith(f"did you mean {meant}?")


def test_a_word_that_is_like_no_other_gets_no_suggestion(capsys):
    assert "did you mean" not in fails(capsys, "train", "--zzzzzz", "1")


def help_of(capsys, *command):
    """Text that `command --help` prints; `command` may end with a topic."""
    try:
        assert main(command) == DONE
    except SystemExit as end:
        assert end.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_setting(command, capsys):
    text = help_of(capsys, command, "--help", "all")
    options = [" ".join(option.split()) for option in text.split("\n  --")[1:]]
    assert options
    for option in options:
        explanation = re.search(r"[ }\]](\w[^()]+)(?:\(.*)?$", option)
        assert explanation and len(explanation[1].split()) > 1, option


def test_help_lists_the_commands(capsys):
    text = help_of(capsys, "--help")
    for name in COMMANDS:
        assert re.search(rf"^ +{name} +[A-Z]\w+ ", text, re.MULTILINE), name


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("train", ["config", "student", "data.train", "rollout.policy", "mesh.fsdp"]),
        ("plan", ["target", "search", "student", "micro_batches"]),
        ("cache-teacher", ["top_k", "teacher", "output"]),
        ("evaluate", ["model", "data", "metrics", "seeds", "limit"]),
    ],
)
def test_help_shows_the_common_settings_on_one_screen(command, expected, capsys):
    text = help_of(capsys, command, "--help")
    assert len(text.splitlines()) <= 36
    assert all(len(line) <= 80 for line in text.splitlines())
    for name in expected:
        assert re.search(rf"^  --{re.escape(name)} +\w", text, re.MULTILINE), name
    assert "--objective.prior_weight" not in text
    section = re.search(r"one of ([\w, \n]+);", text)
    for name in section[1].replace("\n", " ").split(", "):
        assert f"--{name}." in help_of(capsys, command, "--help", name)


def test_help_of_a_section_explains_only_its_settings(capsys):
    text = help_of(capsys, "train", "--help", "rollout")
    assert "--rollout.policy (off, on, replay; default: off)\n    " in text
    assert "--student" not in text and "--data" not in text
    assert "one of data, objective" in fails(capsys, "train", "--help", "rolout")


def test_help_has_the_limits_of_a_setting(capsys):
    text = help_of(capsys, "train", "--help", "all")
    assert "--objective.prior_weight" in text
    assert re.search(r"0:[\w\s,]* all\s+weights\s+are\s+trained", text)
    text = " ".join(help_of(capsys, "cache-teacher", "--help", "all").split())
    assert "train reads this folder with --teacher_cache" in text
    assert "objective.span must be 0" in text and "K * 4 + 4 bytes" in text
