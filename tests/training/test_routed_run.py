"""Runs with several teachers: data, rollouts, resume, and what they report."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from rich.console import Console

from mgsr_jax import models, sharding
from mgsr_jax.checkpoint import hf
from mgsr_jax.commands.parser import main
from mgsr_jax.objective import Objective
from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.training import initial_state
from mgsr_jax.training.config import MeshConfig
from mgsr_jax.training.inputs import prepare
from mgsr_jax.training.teacher_config import different_folders
from mgsr_jax.training.trainer import train

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*forward-compatible:DeprecationWarning"
)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Two teachers of other families; every third record is for the second."""
    folder = tiny.project(tmp_path_factory.mktemp("project"))
    size = len(hf.load_tokenizer(folder / "tokenizer"))
    gpt2 = tiny.GPT2 | {"vocab_size": size, "n_positions": 128, "eos_token_id": 0}
    model = models.from_config(gpt2)
    params = jax.jit(model.init)(jax.random.key(5))
    hf.save_pretrained(
        folder / "coder", model, params, tokenizer_from=folder / "tokenizer"
    )
    for name in ("train", "valid"):
        file = folder / f"{name}.jsonl"
        records = map(json.loads, file.read_text().splitlines())
        named = [
            json.dumps(record | {"teacher": "code" if i % 3 == 0 else "math"})
            for i, record in enumerate(records)
        ]
        file.write_text("\n".join(named) + "\n")
    return folder


def teachers(project, code="coder"):
    return {"math": str(project / "teacher"), "code": str(project / code)}


def config(project, name, **changes):
    settings = dict(
        teacher=teachers(project),
        steps=4,
        objective=Objective(sft=0.0, span=0.0, divergence="forward_kl"),
        rollout=RolloutConfig("off", intervention="none"),
        micro_batches=2,
        mesh=MeshConfig(2, 2, 2),
        log_every=1,
    )
    return tiny.train_config(project, name, **settings | changes)


def command(project, name, *options):
    """The options of a short run on a mesh of three axes."""
    teacher = json.dumps(teachers(project))
    return [
        *("train", "--student", str(project / "student"), "--teacher", teacher),
        *("--output", str(project / name), "--data.train", f"{project}/train.jsonl"),
        *("--data.valid", f"{project}/valid.jsonl", "--data.max_length", "56"),
        *("--data.max_prompt_length", "40", "--data.cache_dir", f"{project}/cache"),
        *("--steps", "2", "--batch_size", "8", "--log_every", "1"),
        *("--mesh.fsdp", "2", "--mesh.tensor", "2", "--tensorboard", "false"),
        *options,
    ]


@pytest.mark.exhaustive
def test_a_run_from_the_command_line_reports_each_teacher(project, capfd):
    """Samples, the data's rows of their prompts, and validation, on three axes."""
    assert main(command(project, "run", "--recipe", "gkd", "--objective.sft", "1")) == 0
    error = capfd.readouterr().err
    assert "data.train: rows by teacher: math 32, code 16" in error
    assert "data.valid: rows by teacher: math 8, code 4" in error
    assert "first batch, rows of math, nats per token: KL(teacher || student)" in error
    first, *steps = tiny.metrics(project, "run")
    assert {f"start/kl/{name}" for name in ("math", "code")} <= first.keys()
    valid = [line for line in steps if "valid/sft" in line]
    trained = [line for line in steps if "train/loss" in line]
    assert len(trained) == 2 and len(valid) == 2
    for part, found in (("train", trained), ("valid", valid)):
        for line in found:
            names = [f"{part}/jensen_shannon{end}" for end in ("", "/math", "/code")]
            whole, math, code = (line[name] for name in names)
            assert min(math, code) < whole < max(math, code)
    assert valid[0]["valid/teacher_sft/math"] != valid[0]["valid/teacher_sft/code"]


@pytest.mark.exhaustive
def test_a_run_resumes_bit_for_bit(project):
    """Steps of the data, of samples and of replayed rows, each with its teacher."""
    rollout = RolloutConfig(
        "replay", intervention="none", initial_ratio=0.8, capacity=8
    )
    settings = config(
        project, "straight", steps=6, rollout=rollout, save_every=3, keep_checkpoints=9
    )
    settings = dataclasses.replace(settings, mesh=MeshConfig(2, 2, 2))
    train(settings, console=Console(file=io.StringIO()))
    whole = tiny.checkpoint(project / "straight")
    assert whole["replay"]["teacher"].tolist().count(1) in range(1, 8)
    shutil.copytree(project / "straight", project / "resumed")
    shutil.rmtree(project / "resumed" / "checkpoints" / "6")
    resumed = dataclasses.replace(
        settings, output=str(project / "resumed"), resume=True
    )
    train(resumed, console=Console(file=io.StringIO()))
    jax.tree.map(
        np.testing.assert_array_equal, tiny.checkpoint(project / "resumed"), whole
    )
    losses = [
        [
            line["train/loss"]
            for line in tiny.metrics(project, name)
            if "train/loss" in line
        ]
        for name in ("straight", "resumed")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


@pytest.mark.slow
def test_a_folder_that_is_named_twice_is_loaded_once(project, monkeypatch):
    settings = config(project, "twice", teacher=teachers(project, "teacher"))
    inputs = prepare(settings, console=Console(quiet=True))
    assert inputs.teacher.names == ("math", "code")
    assert len(inputs.teacher.models) == 1 and inputs.teacher.model_of == (0, 0)
    loaded, load = [], initial_state.load_teacher

    def counted(folder, *arguments, **settings):
        loaded.append(folder)
        return load(folder, *arguments, **settings)

    monkeypatch.setattr(initial_state, "load_teacher", counted)
    folders, _ = different_folders(settings.teacher)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    params = initial_state.load_teachers(
        folders, inputs.teacher, mesh=mesh, dtype="float32"
    )
    assert loaded == [str(project / "teacher")] and len(params) == 1


def refused(project, capfd, *options):
    """The error of a command that loads no weights."""
    assert main(command(project, "refused", *options)) == 2
    assert not (project / "refused").exists()
    return capfd.readouterr().err


@pytest.mark.slow
def test_mistakes_are_named_before_a_model_is_loaded(project, capfd, monkeypatch):
    monkeypatch.setattr(hf, "load_params", pytest.fail)
    error = refused(project, capfd)
    assert "rollout.intervention='scrg', but one teacher intervenes" in error
    error = refused(project, capfd, "--recipe", "kd", "--data.default_teacher", "law")
    assert "data.default_teacher is 'law'; expected one of math, code" in error
    error = refused(
        project, capfd, "--recipe", "kd", "--data.columns", "{teacher: domain}"
    )
    assert "columns names 'domain' for teacher" in error
    text = (project / "train.jsonl").read_text()
    (project / "bad.jsonl").write_text(text.replace('"code"', '"law"'))
    options = "--recipe", "kd", "--data.train", f"{project}/bad.jsonl"
    error = refused(project, capfd, *options)
    assert "16 of 48 records are malformed" in error
    assert "'teacher' is 'law', expected one of math, code" in error
