"""Commands with models by hub name, read from the hub's cache without a network."""

import json
import shutil

import pytest
import yaml
from huggingface_hub import constants

from mgsr_jax.commands.exit_status import DONE, MISTAKE
from mgsr_jax.commands.parser import main

COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture
def cache(project, tmp_path, monkeypatch):
    """A cache that holds org/student; a working folder in which no such path exists."""
    model = tmp_path / "hub" / "models--org--student"
    shutil.copytree(project / "student", model / "snapshots" / COMMITS[0])
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMITS[0])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return model


@pytest.mark.slow
def test_a_run_records_the_commit_and_keeps_to_it(cache, recipe, tmp_path, capsys):
    command = ["train", "--config", recipe, "--student", "org/student", "--lora.rank"]
    command += ["2", "--output", "run"]
    assert main(command) == DONE
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["student"] == f"org/student@{COMMITS[0]}"
    assert main([*command, "--resume", "true"]) == DONE

    adapter = ["export", "--run", "run", "--output", "adapter", "--adapter", "true"]
    assert main(adapter) == DONE
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/student"
    assert config["revision"] == COMMITS[0]

    shutil.copytree(cache / "snapshots" / COMMITS[0], cache / "snapshots" / COMMITS[1])
    (cache / "refs" / "main").write_text(COMMITS[1])  # the branch moved
    assert main(["export", "--run", "run", "--output", "merged"]) == DONE
    capsys.readouterr()
    assert main([*command, "--resume", "true"]) == MISTAKE
    assert f"student was 'org/student@{COMMITS[0]}'" in capsys.readouterr().err


def test_generate_takes_a_hub_name(cache, capsys):
    command = ["generate", "--prompt", "the", "--template", "none", "--max_length", "8"]
    assert main([*command, "--model", "org/student"]) == DONE
    assert main([*command, "--model", f"org/student@{COMMITS[0]}"]) == DONE
    capsys.readouterr()
    assert main([*command, "--model", "org/absent"]) == MISTAKE
    error = capsys.readouterr().err.strip()
    assert "org/absent is not a folder" in error and "\n" not in error
