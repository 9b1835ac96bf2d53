"""The comparison of examples/study.py: order of its units, budgets, intervals, page."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from rich.console import Console

from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.training.optimizer import OptimizerConfig

EXAMPLES = str(Path(__file__).parents[1] / "examples")
sys.path.insert(0, EXAMPLES)
import study  # noqa: E402
import study_page  # noqa: E402
from small_runs import Method  # noqa: E402
from study_methods import RECIPES  # noqa: E402
from study_toy import ToyTask  # noqa: E402

sys.path.remove(EXAMPLES)


@dataclasses.dataclass
class TinyTask:
    """Students of the tests' tiny models."""

    project: Path
    name: str = "tiny"
    tuned_by: str | None = None
    tokens: int = 2000
    seconds: float = 1.0
    stops_in_score: bool = False
    rates = (1e-3, 1e-2)
    methods = {name: RECIPES[name] for name in ("SFT", "KD", "GKD")}

    def start(self, seed):
        return self.project / "student"

    def config(self, method, start, output, *, seed, rate):
        teacher = self.project / "teacher"
        return tiny.train_config(
            self.project,
            output,
            student=str(start),
            teacher=str(teacher) if method.objective.needs_teacher else None,
            objective=method.objective,
            rollout=method.rollout,
            optimizer=OptimizerConfig(learning_rate=rate),
            seed=seed,
            log_every=1,
        )

    def score(self, student):
        if self.stops_in_score:
            raise KeyboardInterrupt
        assert (student / "model.safetensors").exists()
        return {"valid": {"rank": 1.0}, "test": {"greedy": 2.0}}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study_page, "RESULTS", tmp_path / "results")
    study_page.results.cache_clear()
    return tmp_path / "results"


@pytest.fixture
def ran(monkeypatch):
    """Units in the order of their runs, which take no time and end with the rate."""
    units = []

    def run(task, unit, output, console):
        units.append(unit)
        study.write_json(unit.result, {"valid": {"rank": unit.rate}})

    monkeypatch.setattr(study, "run_unit", run)
    return units


def test_a_sweep_of_seed_0_chooses_the_rate_of_the_other_seeds(results, ran, tmp_path):
    task = TinyTask(tmp_path)
    study.run_task(task, study.Choice(["KD", "SFT"], [0, 1], "tokens"), tmp_path)
    names = [(unit.method, unit.seed, unit.rate) for unit in ran]
    assert names == [
        ("KD", 0, 1e-3),
        ("KD", 0, 1e-2),
        ("SFT", 0, 1e-3),
        ("SFT", 0, 1e-2),
        ("KD", 1, 1e-2),
        ("SFT", 1, 1e-2),
    ]


def test_what_has_a_result_or_is_held_by_another_process_is_left(
    results, ran, tmp_path
):
    task, chosen = TinyTask(tmp_path), study.Choice(["KD"], [0], "tokens")
    done, held = (study.Unit("tiny", "KD", 0, rate) for rate in (1e-3, 1e-2))
    study.write_json(done.result, {"valid": {"rank": 0.0}})
    with study.locked(tmp_path / "tiny" / f"{held.name}.lock", wait=False) as mine:
        assert mine
        study.run_task(task, chosen, tmp_path)
    assert ran == []
    study.run_task(task, chosen, tmp_path)
    assert ran == [held]


def test_a_task_can_take_the_rates_of_another(results, ran, tmp_path):
    task = TinyTask(tmp_path, name="large", tuned_by="tiny")
    chosen = study.Choice(["KD"], [0, 1], "tokens")
    study.run_task(task, chosen, tmp_path)
    assert ran == []  # the other task has no rates yet
    study.run_task(TinyTask(tmp_path), study.Choice(["KD"], [0], "tokens"), tmp_path)
    study.run_task(task, chosen, tmp_path)
    assert [(unit.seed, unit.rate) for unit in ran[2:]] == [(0, 1e-2), (1, 1e-2)]


def test_budgets_become_steps(tmp_path):
    work, task = (
        study.Work(generated=30.0, scored=20.0, seconds=0.1),
        TinyTask(tmp_path),
    )
    assert work.steps("tokens", task) == 40
    assert work.steps("seconds", task) == 10
    assert study.Work(1e9, 0, 1e9).steps("tokens", task) == 1


def test_work_is_the_mean_over_steps_that_generate_and_steps_that_do_not():
    values, generates = np.array([4.0, 1.0, 1.0, 1.0]), np.array([True, *[False] * 3])
    half = RolloutConfig("on", probability=0.5)
    assert study.mean_over_kinds(values, generates, half) == 2.5
    replay = RolloutConfig("replay")
    assert study.mean_over_kinds(values, generates, replay) == 1.75
    assert study.mean_over_kinds(values, np.full(4, True), half) == 1.75


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("method", ["SFT", "GKD"])
def test_a_unit_trains_until_its_budget_is_used(results, tmp_path, method):
    task = TinyTask(tiny.project(tmp_path))
    unit = study.Unit("tiny", method, 0, 1e-3)
    arguments = task, unit, tmp_path / "runs", Console(quiet=True)
    stale = tmp_path / "runs" / "tiny" / unit.name  # stopped before a checkpoint
    (stale / "checkpoints").mkdir(parents=True)
    task.stops_in_score = True
    with pytest.raises(KeyboardInterrupt):
        study.run_unit(*arguments)
    task.stops_in_score = False
    study.run_unit(*arguments)  # goes on behind the training
    found = json.loads(unit.result.read_text())
    work = found["work"]
    generated, scored = work["generated"], work["scored"]
    if method == "GKD":
        assert generated > 0 and scored > 0
        assert generated + scored == pytest.approx(task.tokens, rel=0.25)
    else:  # as many steps as KD
        assert generated == scored == 0
    assert found["settings"]["steps"] == len(found["curves"]["train/loss"][0])


def test_the_interval_is_that_of_a_mean_over_seeds_and_prompts():
    """Compare with the normal interval of two crossed random effects."""
    draw, seeds, prompts = np.random.default_rng(1), 40, 200
    of_seed = draw.normal(0, 3, (seeds, 1))
    of_prompt = draw.normal(0, 20, (1, prompts))
    gaps = 1.0 + of_seed + of_prompt + draw.normal(0, 5, (seeds, prompts))
    zeros = np.zeros_like(gaps)
    found = study_page.difference(gaps, zeros)
    half = 1.96 * np.sqrt(3**2 / seeds + 20**2 / prompts)
    assert found.mean == pytest.approx(gaps.mean())
    assert found.high - found.low == pytest.approx(2 * half, rel=0.15)
    assert study_page.difference(gaps + 10, zeros).is_clear
    assert not study_page.difference(gaps - gaps.mean(), zeros).is_clear


def write(method, seed, values, rate=1e-3):
    """A result of the page's toy task."""
    values = np.asarray(values, float)
    scores = dict(
        greedy=values.mean(),
        valid=values.mean(),
        distinct_2=0.2,
        loss=0.5,
        total_variation=0.1,
        greedy_by_prompt=values.tolist(),
        valid_by_prompt=values.tolist(),
    )
    unit = study.Unit("toy-1000", method, seed, rate)
    record = dataclasses.asdict(unit) | {
        "valid": {"rank": scores["valid"]},
        "test": scores,
        "work": {"generated": 1e5, "scored": 3e5, "seconds": 20.0},
    }
    study.write_json(unit.result, record)


def test_the_page_shows_what_is_complete_and_names_what_is_not(
    results, tmp_path, monkeypatch
):
    monkeypatch.setattr(study_page, "DOCS", tmp_path)
    for seed in range(3):
        write("SCRG argmax", seed, [50, 60, 70, 81 + seed])
        write("none", seed, [48, 58, 68, 80 + seed])
    write("none", 0, [1, 2, 3, 4], rate=1e-2)  # a rate that the sweep did not choose
    write("SKD", 0, [90, 90, 90, 90])
    page = study_page.study_page()
    assert "Not complete, fewer than 3 seeds: SKD." in page
    assert "| SCRG argmax |" in page and "| SKD" not in page
    (answer,) = [line for line in page.splitlines() if "beat plain rollouts" in line]
    assert "**+1.8 (+1.2 to +2.0)**" in answer
    assert "beat SCRG?" not in page
    assert (tmp_path / "toy-1000.png").stat().st_size > 5000


def test_every_question_is_about_methods_of_the_study():
    named = {name for _, *pair in study_page.QUESTIONS for name in pair}
    assert named <= set(ToyTask.methods)
    assert all(isinstance(method, Method) for method in ToyTask.methods.values())
