"""Every recipe by its command: three steps, and a resumed run that equals them."""

import json
import re
import shutil

import orbax.checkpoint as ocp
import pytest
from jax import random, tree
from numpy.testing import assert_array_equal

from mgsr_jax.checkpoint import state
from mgsr_jax.commands.exit_status import DONE
from mgsr_jax.commands.parser import main
from mgsr_jax.data.plain_text import alpaca_prompt
from mgsr_jax.training.recipes import load_recipe, recipe_names

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.filterwarnings("ignore:.*forward-compatible:DeprecationWarning"),
]


def command_of(name, project, folder):
    """`mgsr train` with the recipe on the tiny pair, without an output folder."""
    recipe = load_recipe(name)
    command = ["train", "--recipe", name, "--student", str(project / "student")]
    command += ["--steps", "3", "--batch_size", "8", "--tensorboard", "false"]
    command += ["--save_every", "1", "--keep_checkpoints", "3", "--log_every", "1"]
    command += ["--data.max_prompt_length", "40", "--data.max_length", "56"]
    command += ["--data.cache_dir", str(project / "cache")]
    for split in ("train", "valid"):
        file = project / f"{split}.jsonl"
        if name in ("seqkd", "distillm2"):
            file = rewritten(file, folder, as_generated)
        if name == "opd" and split == "train":
            file = rewritten(file, folder, as_prompt)
        command += [f"--data.{split}", str(file)]
    if recipe.objective.needs_teacher:
        command += ["--teacher", str(project / "teacher")]
    if recipe.objective.divergence == "dac_kl":
        command += ["--objective.num_candidates", "16"]
    if name == "distillm":  # its ratio starts at 0, so that it would not generate
        command += ["--rollout.initial_ratio", "0.7", "--validate_every", "1"]
    if name == "opsd":  # words that the tokenizer has not seen are many tokens
        command += ["--data.teacher_prompt", "{prompt} {reference}"]
    return command


def as_generated(record):
    """The same texts as `mgsr generate` writes them."""
    prompt = alpaca_prompt(record["instruction"])
    return {"prompt": prompt, "response": record["output"]}


def as_prompt(record):
    return {"instruction": record["instruction"]}


def rewritten(file, folder, rewrite):
    """A copy of the data with other records."""
    lines = file.read_text().splitlines()
    copy = folder / file.name
    copy.write_text("\n".join(json.dumps(rewrite(json.loads(line))) for line in lines))
    return copy


def contents(folder):
    """Everything in a run's last checkpoint, and its metrics without the speed."""
    with state.open_manager(folder / "checkpoints") as manager:
        assert manager.latest_step() == 3
        restore, read = ocp.args.StandardRestore(), ocp.args.JsonRestore()
        found = manager.restore(
            3, args=ocp.args.Composite(state=restore, host=read, replay=restore)
        )
    key = random.key_data(found.state.pop("key"))
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    metrics = [
        {k: v for k, v in line.items() if "per_second" not in k} for line in lines
    ]
    return dict(found.items()) | {"key": key}, metrics


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_trains_and_resumes_bit_for_bit(name, project, tmp_path, capsys):
    command = command_of(name, project, tmp_path)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert main([*command, "--output", str(straight)]) == DONE
    printed = capsys.readouterr().err
    assert re.search(rf"^recipe: {name}(, except .*)?$", printed, re.MULTILINE)

    # Where a machine that was lost after step 1 left the run.
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "student")
    for step in (2, 3):
        shutil.rmtree(resumed / "checkpoints" / str(step))
    assert main([*command, "--output", str(resumed), "--resume", "true"]) == DONE
    assert "resumed from step 1" in capsys.readouterr().err

    (saved, metrics), (again, metrics_again) = contents(straight), contents(resumed)
    assert metrics == metrics_again and len(metrics) >= 3
    assert tree.structure(saved) == tree.structure(again)
    tree.map(assert_array_equal, saved, again)
