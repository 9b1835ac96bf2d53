"""Every file in configs/ is one that `mgsr train` takes, every shape a model's."""

import dataclasses
import math
import pathlib

import jax
import pytest

from mgsr_jax import models
from mgsr_jax.commands.parser import COMMANDS, main
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.training.config_checks import check_config
from mgsr_jax.training.model_pair import read_models

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "opt-1.3b": 1_315_758_080,
    "opt-6.7b": 6_658_473_984,
    "open_llama_3b_v2": 3_426_473_600,
    "open_llama_7b_v2": 6_738_415_616,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shape_has_the_published_number_of_parameters(name):
    model = models.from_config(CONFIGS / "shapes" / f"{name}.json")
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(model.abstract_params())]
    assert sum(sizes) == PARAMETERS[name]


def test_every_shape_is_counted():
    assert {file.stem for file in (CONFIGS / "shapes").iterdir()} == set(PARAMETERS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_is_read_and_can_work(file, monkeypatch):
    """With the models that its own header plans with, where it plans."""
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    words = " ".join(header).split()
    folders = {"student": "models/student", "teacher": "models/teacher"}
    for role in folders:
        given = [
            w for flag, w in zip(words, words[1:], strict=False) if flag == f"--{role}"
        ]
        shapes = [w for w in given if w.startswith("configs/shapes/")]
        if shapes or not given:
            folders[role] = str(CONFIGS.parent / shapes[0]) if shapes else None
    arguments = ["train", "--config", str(file), "--output=o", "--data.train=a.jsonl"]
    arguments += ["--data.valid=b.jsonl"]
    arguments += [f"--{role}={folder}" for role, folder in folders.items() if folder]
    found = []

    def train(config: TrainConfig) -> int:
        """Keeps the settings."""
        found.append(config)
        return 0

    monkeypatch.setitem(COMMANDS, "train", train)
    assert main(arguments) == 0
    (config,) = found
    check_config(config)
    if "shapes" in str(config.teacher):
        sizes = dataclasses.replace(config.mesh, tensor=1)
        student, teacher = read_models(dataclasses.replace(config, mesh=sizes))
        assert student.vocab_rows == teacher.vocab_rows
        assert student.config.max_length >= config.data.max_length
