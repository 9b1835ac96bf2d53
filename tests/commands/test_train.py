"""`mgsr train` and the commands that read its run: export and report."""

import json
import os

import pytest
import yaml

from mgsr_jax.commands.exit_status import DIVERGED, DONE, MISTAKE
from mgsr_jax.commands.parser import main
from mgsr_jax.commands.train import train
from mgsr_jax.training.config import DataConfig, TrainConfig


@pytest.mark.slow
def test_a_run_is_trained_exported_and_reported(project, recipe, capsys):
    run = project / "run"
    command = ["train", "--config", recipe, "--output", str(run)]
    assert main([*command, "--optimizer.beta2", "0.95", "--save_every", "1"]) == DONE
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["optimizer"]["learning_rate"] == 1e-3
    assert resolved["optimizer"]["beta2"] == 0.95

    export = ["export", "--run", str(run), "--step", "1"]
    assert main([*export, "--output", str(project / "step1")]) == DONE
    assert (project / "step1" / "model.safetensors").is_file()
    assert main(["report", "--run", str(run)]) == DONE
    assert (run / "report.md").is_file() and (run / "curves.png").is_file()

    best = ["export", "--run", str(run), "--best", "true", "--output"]
    assert main([*best, str(project / "best_of_none")]) == MISTAKE
    assert "best_metric was not set" in capsys.readouterr().err


@pytest.mark.slow
def test_a_student_that_is_its_teacher_starts_with_no_kl(project, recipe, capsys):
    run = project / "same"
    command = ["train", "--config", recipe, "--teacher", str(project / "student")]
    command += ["--objective.token", "1", "--objective.divergence", "forward_kl"]
    assert main([*command, "--steps", "1", "--output", str(run)]) == DONE
    printed = " ".join(capsys.readouterr().err.split())
    assert "KL(teacher || student) 0.0000; teacher loss" in printed
    assert "warning" not in printed
    first, *others = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert first["step"] == 0 and abs(first["start/kl"]) < 1e-6
    for name in ("loss", "entropy"):
        of_both = first[f"start/teacher_{name}"], first[f"start/student_{name}"]
        assert of_both[0] == pytest.approx(of_both[1], rel=1e-6)
    assert not any("start/kl" in line for line in others)


@pytest.mark.slow
def test_the_best_checkpoint_is_exported(project, recipe, capsys):
    run, best = project / "with_best", project / "best"
    command = ["train", "--config", recipe, "--output", str(run), "--validate_every"]
    command += ["1", "--data.valid", str(project / "valid.jsonl")]
    assert main([*command, "--best_metric", "valid/loss"]) == DONE
    export = ["export", "--run", str(run), "--output", str(best), "--best", "true"]
    assert main([*export, "--step", "1"]) == MISTAKE
    assert "name two checkpoints" in capsys.readouterr().err
    assert main(export) == DONE
    assert "best valid/loss: step 2" in capsys.readouterr().out
    assert (best / "model.safetensors").is_file()


@pytest.mark.exhaustive
def test_adapters_are_trained_and_exported(project, recipe, capsys):
    run = project / "lora"
    command = ["train", "--config", recipe, "--lora.rank", "2", "--lora.dropout", "0.1"]
    assert main([*command, "--output", str(run)]) == DONE
    export = ["export", "--run", str(run), "--adapter", "true"]
    assert main([*export, "--output", str(project / "adapter")]) == DONE
    assert sorted(path.name for path in (project / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert main([*export, "--output", str(project / "adapter")]) == MISTAKE
    assert "exists" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_a_teacher_cache_is_written_and_trained_on(project, recipe, capsys):
    cache, run = project / "teacher_cache", project / "cached"
    distil = ["--config", recipe, "--teacher", str(project / "teacher")]
    distil += ["--objective.token", "1", "--objective.num_candidates", "16"]
    command = ["cache-teacher", *distil, "--output", str(cache), "--top_k", "16"]
    assert main(command) == DONE

    command = ["train", *distil, "--teacher_cache", str(cache), "--output"]
    other_data = ["--data.train", str(project / "valid.jsonl")]
    assert main([*command, str(project / "x"), *other_data]) == MISTAKE
    assert "was made from another data" in capsys.readouterr().err
    assert not (project / "x").exists()
    assert main([*command, str(run)]) == DONE
    assert yaml.safe_load((run / "config.yaml").read_text())["teacher_cache"]


@pytest.mark.slow
def test_a_diverged_run_has_its_own_exit_status(project, recipe, capsys):
    command = ["train", "--config", recipe, "--output", str(project / "diverged")]
    command += ["--optimizer.learning_rate", "1e30", "--optimizer.clip_norm", "1e30"]
    assert main([*command, "--steps", "20"]) == DIVERGED
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("mgsr: error: ") and "not finite" in error


@pytest.mark.parametrize(
    ("variable", "share"),
    [
        (None, "0.95"),
        ("XLA_CLIENT_MEM_FRACTION", "0.5"),
        ("XLA_PYTHON_CLIENT_MEM_FRACTION", None),
    ],
)
def test_a_run_reserves_gpu_memory_unless_the_environment_does(
    variable, share, monkeypatch
):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "0.5")
    # JAX refuses both variables together.
    monkeypatch.setattr("os.environ", dict(os.environ))

    class Started(Exception):
        pass

    def start(_):
        raise Started

    monkeypatch.setattr("mgsr_jax.training.distributed.start", start)
    with pytest.raises(Started):
        train(TrainConfig("student", "output", DataConfig("train")))
    assert os.environ.get("XLA_CLIENT_MEM_FRACTION") == share
