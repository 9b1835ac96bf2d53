"""Every pair in configs/pairs is accepted by `mgsr train` and `mgsr plan`."""

import dataclasses
import math
import pathlib
import shlex

import jax
import pytest
import yaml

from mgsr_jax import models
from mgsr_jax.commands.parser import COMMANDS, main
from mgsr_jax.commands.plan import PlanConfig
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.training.recipes import recipe_names
from mgsr_jax.training.run_models import read_models

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
FILES = sorted((CONFIGS / "pairs").glob("*.yaml"))
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


def test_the_recipes_are_where_people_look_for_them():
    """The folder links to the package's, so that an installed package has them too."""
    names = {file.stem for file in (CONFIGS / "recipes").glob("*.yaml")}
    assert names == set(recipe_names())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_pair_leaves_the_method_to_recipes(file):
    assert not {"objective", "rollout"} & yaml.safe_load(file.read_text()).keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shape_has_the_published_number_of_parameters(name):
    model = models.from_config(CONFIGS / "shapes" / f"{name}.json")
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(model.abstract_params())]
    assert sum(sizes) == PARAMETERS[name]


def test_every_shape_is_counted():
    assert {file.stem for file in (CONFIGS / "shapes").iterdir()} == set(PARAMETERS)


def command_of_header(file, name):
    """Arguments of the command `name` in the comments at the head of a pair."""
    lines = file.read_text().splitlines()
    header = "\n".join(line[1:].strip() for line in lines if line.startswith("#"))
    commands = header.replace("\\\n", " ").splitlines()
    for line in commands:
        if line.startswith(f"mgsr {name} "):
            return shlex.split(line)[1:]
    return None


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_pair_can_be_trained(file, monkeypatch):
    """The command in the file's header is accepted."""
    arguments = command_of_header(file, "train")
    assert arguments is not None
    configs = []

    def train(config: TrainConfig) -> int:
        """Keep the settings."""
        configs.append(config)
        return 0

    monkeypatch.setitem(COMMANDS, "train", train)
    monkeypatch.chdir(CONFIGS.parent)
    assert main(arguments) == 0
    configs[0].check()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_pair_can_be_planned(file, monkeypatch):
    """The command in the file's header is accepted, and its models fit together."""
    arguments = command_of_header(file, "plan")
    if arguments is None:
        pytest.skip("this pair needs no plan: it fits one device")
    configs = []

    def plan(config: PlanConfig, *, target: str) -> int:
        """Keep the settings.

        Args:
          target: the machine.
        """
        configs.append(config)
        return 0

    monkeypatch.setitem(COMMANDS, "plan", plan)
    monkeypatch.chdir(CONFIGS.parent)
    assert main(arguments) == 0
    (config,) = configs
    config.check_programs()
    sizes = dataclasses.replace(config.mesh, tensor=1)
    student, teacher = read_models(dataclasses.replace(config, mesh=sizes))
    assert student.vocab_rows == teacher.vocab_rows
    assert student.config.max_length >= config.data.max_length
