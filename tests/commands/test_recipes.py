"""`--recipe`, several `--config`, `mgsr recipes`, and what a run does by default."""

import dataclasses
import re

import pytest
import yaml

from mgsr_jax.commands.exit_status import DONE, MISTAKE
from mgsr_jax.commands.parser import COMMANDS, main
from mgsr_jax.objective import Objective
from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.training.description import describe_run
from mgsr_jax.training.recipes import closest_recipe, load_recipe, recipe_names

NAMES = recipe_names()
REQUIRED = ("--student", "s", "--output", "o", "--data.train", "train.jsonl")
TEACHER = ("--teacher", "t")
SFT = Objective(sft=1.0, token=0.0, span=0.0)
MGSR = (Objective(), RolloutConfig("on", probability=0.5, rounds=1))


@pytest.fixture
def parse(monkeypatch):
    """Returns the settings that `mgsr train` gets from arguments."""
    configs = []

    def train(config: TrainConfig) -> int:
        """Keep the settings."""
        configs.append(config)
        return DONE

    monkeypatch.setitem(COMMANDS, "train", train)

    def run(*arguments):
        assert main(["train", *REQUIRED, *arguments]) == DONE
        return configs.pop()

    return run


def write(path, **settings):
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_files_are_read_in_order_and_merged_key_by_key(parse, tmp_path):
    first = write(
        tmp_path / "first.yaml",
        objective={"span": 0.0, "divergence": "forward_kl"},
        batch_size=4,
    )
    second = write(tmp_path / "second.yaml", objective={"span": 0.5}, seed=3)
    config = parse("--config", first, "--config", second, "--objective.sft", "0.25")
    assert config.objective == Objective(0.25, 1.0, 0.5, "forward_kl")
    assert (config.batch_size, config.seed) == (4, 3)


def test_an_option_overrides_a_file_that_follows_it(parse, tmp_path):
    file = write(tmp_path / "own.yaml", seed=3, batch_size=4)
    assert parse("--seed", "5", f"--config={file}").seed == 5
    config = parse("--seed", "5", "--config", file, "--steps", "2")
    assert (config.seed, config.batch_size, config.steps) == (5, 4, 2)


def test_files_and_options_override_a_recipe_wherever_it_stands(parse, tmp_path):
    file = write(tmp_path / "own.yaml", rollout={"temperature": 0.5})
    options = ["--objective.beta", "0.25", "--config", file, "--recipe", "gkd"]
    config = parse(*options, *TEACHER)
    gkd = load_recipe("gkd")
    assert config.objective == dataclasses.replace(gkd.objective, beta=0.25)
    assert config.rollout == dataclasses.replace(gkd.rollout, temperature=0.5)


def test_a_file_may_name_the_recipe(parse, tmp_path):
    file = write(tmp_path / "own.yaml", recipe="kd", seed=7)
    config = parse("--config", file, *TEACHER)
    assert config.objective == load_recipe("kd").objective and config.seed == 7
    other = parse("--config", file, "--recipe", "opd", *TEACHER)
    assert other.objective == load_recipe("opd").objective


def test_without_a_teacher_the_student_is_fine_tuned(parse):
    config = parse("--epochs", "1")
    assert config.objective == SFT and config.rollout == RolloutConfig("off")
    config.check()


def test_with_a_teacher_the_default_is_mgsr_with_rollouts(parse):
    config = parse("--epochs", "1", *TEACHER)
    assert (config.objective, config.rollout) == MGSR
    config.check()


@pytest.mark.parametrize("option", ["--rollout.temperature", "--objective.width"])
def test_a_setting_that_chooses_no_method_adjusts_the_default(option, parse):
    config = parse(option, "0.5", *TEACHER)
    section, _, field = option.removeprefix("--").partition(".")
    assert getattr(getattr(config, section), field) == 0.5
    assert config.rollout.policy == "on" and config.rollout.probability == 0.5


@pytest.mark.parametrize(
    ("arguments", "objective", "rollout"),
    [
        (["--objective.span", "0"], Objective(span=0.0), RolloutConfig("off")),
        (
            ["--objective.divergence", "reverse_kl"],
            Objective(divergence="reverse_kl"),
            RolloutConfig("off"),
        ),
        (["--rollout.policy", "on"], Objective(), RolloutConfig("on")),
        (["--rollout.policy", "off"], Objective(), RolloutConfig("off")),
        (["--rollout", "{policy: replay}"], Objective(), RolloutConfig("replay")),
    ],
    ids=str,
)
def test_a_setting_of_the_method_leaves_all_others_at_their_own_defaults(
    arguments, objective, rollout, parse
):
    config = parse(*arguments, *TEACHER)
    assert (config.objective, config.rollout) == (objective, rollout)


def test_a_method_that_compares_needs_a_teacher(parse):
    for option in ("--objective.token=1", "--objective.divergence=forward_kl"):
        with pytest.raises(ValueError, match="compare with a teacher, and none is set"):
            parse(option, "--steps", "1").check()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "gdk"], "recipe='gdk'; expected one of abkd, .*did you mean gkd"),
        (["--recpie", "gkd"], "did you mean --recipe"),
        (["--recipe", "gkd"], "settings that are missing: student, output, data.train"),
        (["--recipe"], "expected one argument"),
    ],
)
def test_a_mistake_about_recipes_is_one_line(arguments, message, capsys):
    assert main(["train", *arguments]) == MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


def test_the_printed_settings_contain_the_recipe(capsys, tmp_path, parse):
    with pytest.raises(SystemExit):
        main(["train", "--recipe", "abkd", "--print_config"])
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["objective"]["alpha"] == 0.2
    file = tmp_path / "all.yaml"
    file.write_text(text)
    config = parse("--config", str(file), *REQUIRED, *TEACHER)
    assert config.objective == load_recipe("abkd").objective


def test_the_command_lists_and_shows_recipes(capsys):
    assert main(["recipes"]) == DONE
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert all(len(line) <= 100 and line.endswith(".") for line in lines)
    assert main(["recipes", "--show", "kd"]) == DONE
    assert "KL(p || q)" in capsys.readouterr().out
    assert main(["recipes", "--show", "kdd"]) == MISTAKE
    assert "did you mean kd?" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_complete_and_names_its_source(name, parse):
    recipe = load_recipe(name)
    teacher = TEACHER if recipe.objective.needs_teacher else ()
    valid = ["--data.valid", "valid.jsonl", "--steps", "1"]
    config = parse("--recipe", name, *valid, *teacher)
    config.check()
    assert {"sft", "token", "span"} <= recipe.settings["objective"].keys()
    assert "policy" in recipe.settings["rollout"]
    ablation = "An ablation of mgsr" in recipe.text
    assert ablation or ("# Source: " in recipe.text and "#   L = " in recipe.text)
    if recipe.rollout.policy != "off":  # SCRG is on by default
        assert "intervention" in recipe.settings["rollout"]
    assert closest_recipe(dataclasses.asdict(config)) == (name, {})
    assert describe_run(config, steps=1)[0] == f"recipe: {name}"


def test_what_is_in_effect_is_described(parse):
    config = parse("--recipe", "gkd", "--rollout.temperature", "0.9", *TEACHER)
    assert describe_run(config, steps=7) == [
        "recipe: gkd, except rollout.temperature=0.9",
        "losses: 1 x jensen_shannon (token; beta=0.5)",
        "rollouts: with probability 0.5 a step generates; temperature 0.9; "
        "no intervention",
        "rows: 7 steps of 32 in 1 micro-batches; prompts of up to 256 tokens, rows of "
        "512",
    ]
    own = parse(
        "--objective",
        "{sft: 0.5, token: 2, divergence: taid, mix: 0.5, token_weights: acceptance}",
        *TEACHER,
    )
    lines = describe_run(own, steps=1)
    assert lines[0].startswith("recipe: none")
    assert lines[1] == (
        "losses: 0.5 x cross-entropy (sft) + 2 x taid (token; mix=0.5; "
        "token_weights=acceptance) + 1 x span correlation"
    )
    assert lines[2] == "rollouts: none, every step trains on the data"
    pair = parse("--recipe", "distillm2", "--rollout.samples", "4", *TEACHER)
    assert describe_run(pair, steps=1)[:3] == [
        "recipe: distillm2, except rollout.samples=4",
        "losses: 1 x skewed_forward_kl on the data, skewed_reverse_kl on samples "
        "(token; alpha=0.1)",
        "rollouts: every step generates; temperature 1; samples of a prompt: 4; no "
        "intervention",
    ]
    replay = parse("--recipe", "distillm", "--rollout.top_k", "5", *TEACHER)
    assert describe_run(replay, steps=1)[2] == (
        "rollouts: adaptive, from ratio 0, with a replay buffer of 1000 rows; "
        "temperature 1; top_k 5; no intervention"
    )
