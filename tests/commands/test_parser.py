"""The command line as a user types it: what works, and one line for what does not."""

import json
import os
import re
import subprocess
import sys

import pytest
import tiny
import yaml

from mgsr_jax.commands.exit_status import DIVERGED, DONE, MISTAKE
from mgsr_jax.commands.parser import COMMANDS, main
from mgsr_jax.commands.train import train
from mgsr_jax.training.config import DataConfig, TrainConfig


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tiny.project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def recipe(project):
    """A YAML file with one number as people write it."""
    settings = dict(
        student=str(project / "student"),
        objective=dict(token=0.0, span=0.0),
        steps=2,
        batch_size=8,
        data=dict(
            train=str(project / "train.jsonl"),
            max_prompt_length=40,
            max_length=56,
            cache_dir=str(project / "cache"),
        ),
        tensorboard=False,
    )
    text = yaml.safe_dump(settings) + "optimizer: {learning_rate: 1e-3}\n"
    path = project / "recipe.yaml"
    path.write_text(text)
    return str(path)


def fails(capsys, *arguments, status=MISTAKE):
    """The one line that a failing command prints."""
    assert main(arguments) == status
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert line.startswith("mgsr: error: ") and "Traceback" not in err
    return line


def test_train_evaluate_generate_export_and_report(
    project, recipe, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    run = project / "run"
    command = ["train", "--config", recipe, "--output", str(run)]
    assert main([*command, "--optimizer.beta2", "0.95", "--save_every", "1"]) == DONE
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["optimizer"]["learning_rate"] == 1e-3
    assert resolved["optimizer"]["beta2"] == 0.95

    scores = project / "scores"
    valid = str(project / "valid.jsonl")
    evaluate = ["evaluate", "--model", str(run / "student"), "--data", valid]
    lengths = ["--max_prompt_length", "40", "--max_length", "56"]
    command = [*evaluate, *lengths, "--seeds", "[1, 2]", "--output", str(scores)]
    assert main([*command, "--batch_size", "12"]) == DONE
    assert re.search(r"valid\.jsonl .* 12 .* ± ", capsys.readouterr().out)
    found = json.loads((scores / "scores.json").read_text())[valid]
    assert set(found["by_seed"]) == {"1", "2"} and found["loss"] > 0
    [answers] = scores.glob("*.jsonl")
    assert len(answers.read_text().splitlines()) == 36

    generate = ["generate", "--model", str(run / "student"), "--max_length", "40"]
    assert main([*generate, "--prompt", "the", "--template", "none"]) == DONE
    export = ["export", "--run", str(run), "--step", "1"]
    assert main([*export, "--output", str(project / "step1")]) == DONE
    assert (project / "step1" / "model.safetensors").is_file()
    assert main(["report", "--run", str(run)]) == DONE
    assert (run / "report.md").is_file() and (run / "curves.png").is_file()


def test_a_teacher_s_cache_is_made_and_trained_on(project, recipe, capsys):
    """And read by name: one of other data is refused."""
    cache, run = project / "teacher_cache", project / "cached"
    distil = ["--config", recipe, "--teacher", str(project / "teacher")]
    distil += ["--objective.token", "1", "--objective.num_candidates", "16"]
    command = ["cache-teacher", *distil, "--output", str(cache)]
    assert main([*command, "--top_k", "16", "--logits_dtype", "float32"]) == DONE
    assert "16 classes hold" in capsys.readouterr().err
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["recipe"]["top_k"] == 16
    assert manifest["recipe"]["logits_dtype"] == "float32"

    train = ["train", *distil, "--teacher_cache", str(cache), "--output"]
    other = str(project / "valid.jsonl")
    line = fails(capsys, *train, str(project / "x"), "--data.train", other)
    assert "was made from another data" in line and not (project / "x").exists()
    assert main([*train, str(run)]) == DONE
    assert yaml.safe_load((run / "config.yaml").read_text())["teacher_cache"]


def test_adapters_are_trained_and_exported(project, recipe, capsys):
    run = project / "lora"
    train = ["train", "--config", recipe, "--lora.rank", "2", "--lora.dropout", "0.1"]
    assert main([*train, "--output", str(run)]) == DONE
    export = ["export", "--run", str(run), "--adapter", "true"]
    assert main([*export, "--output", str(project / "adapter")]) == DONE
    assert sorted(path.name for path in (project / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    line = fails(capsys, *export, "--output", str(project / "adapter"))
    assert "exists" in line


def test_an_output_that_exists_is_left_alone(project, recipe, capsys):
    taken = project / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    assert "not empty" in fails(
        capsys, "train", "--config", recipe, "--output", str(taken)
    )
    assert "exists" in fails(
        capsys,
        *("evaluate", "--model", str(project / "student")),
        *("--data", str(project / "valid.jsonl"), "--output", str(taken)),
    )
    assert [path.name for path in taken.iterdir()] == ["notes.txt"]


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
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert re.search(message, fails(capsys, *arguments))


def test_an_unknown_key_in_the_file_is_named(project, recipe, capsys, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("rollout: {polcy: 'on'}\n")
    line = fails(capsys, "train", "--config", str(wrong), "--output", "x")
    assert "polcy" in line


def test_a_truncated_checkpoint_is_named(project, recipe, capsys, tmp_path):
    import shutil

    broken = shutil.copytree(project / "student", tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    line = fails(
        capsys,
        *("train", "--config", recipe, "--student", str(broken)),
        *("--output", str(tmp_path / "out")),
    )
    assert "model.safetensors" in line and not (tmp_path / "out").exists()


def test_an_unknown_model_type_is_named(project, recipe, capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    line = fails(
        capsys,
        *("train", "--config", recipe, "--student", str(tmp_path)),
        *("--output", str(tmp_path / "out")),
    )
    assert "mamba" in line and "llama" in line


def test_an_empty_data_set_is_named(recipe, capsys, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    line = fails(
        capsys,
        *("train", "--config", recipe, "--data.train", str(tmp_path / "empty.jsonl")),
        *("--output", str(tmp_path / "out")),
    )
    assert "empty" in line and not (tmp_path / "out").exists()


def test_a_missing_extra_is_named(project, recipe, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    line = fails(
        capsys,
        *("train", "--config", recipe, "--output", str(tmp_path / "out")),
        *("--data.chunker", "spacy", "--objective.span", "1", "--objective.token", "1"),
        *("--teacher", str(project / "teacher")),
    )
    assert "mgsr_jax[spacy]" in line


def test_a_diverged_run_has_its_own_status(project, recipe, capsys, tmp_path):
    line = fails(
        capsys,
        *("train", "--config", recipe, "--output", str(tmp_path / "out")),
        *("--optimizer.learning_rate", "1e30", "--optimizer.clip_norm", "1e30"),
        *("--steps", "20"),
        status=DIVERGED,
    )
    assert "not finite" in line


def test_without_the_extra_the_program_says_so():
    code = (
        "import sys; sys.modules['jsonargparse'] = None\n"
        "from mgsr_jax.__main__ import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("pip install 'mgsr_jax[train]'")


@pytest.mark.parametrize(
    ("variable", "taken"),
    [
        (None, "0.95"),
        ("XLA_CLIENT_MEM_FRACTION", "0.5"),
        ("XLA_PYTHON_CLIENT_MEM_FRACTION", None),
    ],
)
def test_a_run_takes_the_gpu_unless_told_otherwise(variable, taken, monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "0.5")
    # Both of them together are an error of JAX's.
    monkeypatch.setattr("os.environ", dict(os.environ))

    class Started(Exception):
        pass

    def start(_):
        raise Started

    monkeypatch.setattr("mgsr_jax.training.distributed.start", start)
    with pytest.raises(Started):
        train(TrainConfig("student", "output", DataConfig("train")))
    assert os.environ.get("XLA_CLIENT_MEM_FRACTION") == taken


def test_help_explains_every_setting(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        out = capsys.readouterr().out
        options = re.findall(r"^  (--[\w.]+)[^\n]*\n?([^\n]*)", out, re.MULTILINE)
        assert options
    assert "--objective.prior_weight" in _help("train", capsys)
    text = " ".join(_help("train", capsys).split())
    assert "0: there are none, and all weights are trained" in text
    text = " ".join(_help("cache-teacher", capsys).split())
    assert "train reads this folder with --teacher_cache" in text
    assert "objective.span must be 0" in text and "K * 4 + 4 bytes" in text


def _help(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return capsys.readouterr().out
