"""The study's toy task: students of little_english.py, whose quality is exact."""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import quickstart
from language_judge import Judge
from rich.console import Console
from small_runs import Method, optimizer
from study_files import locked
from study_methods import INTERVENTIONS, PARTS, RECIPES, truncated

from mgsr_jax.evaluation.scores import EvaluationResult
from mgsr_jax.training.config import TrainConfig

HORIZON = 9  # tokens; half of a response's mean length
FILES = {1000: "train.jsonl", 8000: "teacher.jsonl"}


class ToyTask:
    """Students that learn from 1,000 or 8,000 examples.

    Args:
      examples: training examples of a student.
      output: folder for data, models and runs.
      console: where progress is printed.
    """

    methods: Mapping[str, Method] = {
        **RECIPES,
        **INTERVENTIONS,
        "truncate": truncated(HORIZON),
        **PARTS,
    }
    rates: Sequence[float] = (1e-3, 3e-3, 1e-2)
    tokens, seconds = 500_000, 20.0

    def __init__(self, examples: int, output: Path, console: Console):
        self.name = f"toy-{examples}"
        self.tuned_by = None if examples == 1000 else "toy-1000"
        self.folder = output / self.name
        with locked(output / "toy.lock", wait=True):
            workspace = quickstart.Workspace(output / "toy", console)
            self.teacher = workspace.train_teacher()
        data = workspace.data / FILES[examples]
        workspace.data_config = dataclasses.replace(
            workspace.data_config, train=str(data)
        )
        self.workspace = workspace
        self.judges = {
            name: Judge(
                workspace.data / f"{name}.jsonl",
                workspace.data_config.encoding,
                self.teacher,
                mesh=workspace.mesh,
            )
            for name in ("valid", "test")
        }

    def start(self, seed: int) -> Path:
        """The student after a short SFT, as in the quickstart."""
        folder = self.folder / f"seed-{seed}"
        with locked(folder / "start.lock", wait=True):
            student = folder / "start" / "student"
            if not student.exists():
                shutil.rmtree(student.parent, ignore_errors=True)
                self.workspace.train_start(folder, seed)
            return student

    def config(
        self, method: Method, start: Path, output: Path, *, seed: int, rate: float
    ) -> TrainConfig:
        """Settings of the quickstart's runs, with a line of metrics for every step."""
        config = self.workspace.config(
            start, self.teacher, output, method, seed=seed + 1000
        )
        return dataclasses.replace(
            config, optimizer=optimizer(rate, rate / 1000), log_every=1
        )

    def score(self, student: Path) -> dict[str, dict[str, float | list[float]]]:
        """Scores of the quickstart, and those of each prompt."""
        return {name: _scores(judge, student) for name, judge in self.judges.items()}


def _scores(judge: Judge, student: Path) -> dict[str, float | list[float]]:
    scores, result = judge.score(student)
    greedy = [r.scores["rouge_l"] for r in result.responses if r.seed is None]
    return {
        **{name: round(x, 5) for name, x in dataclasses.asdict(scores).items()},
        "rank": round(scores.valid, 5),
        "greedy_by_prompt": [round(x, 2) for x in greedy],
        "valid_by_prompt": _valid_by_prompt(result, len(greedy)),
    }


def _valid_by_prompt(result: EvaluationResult, prompts: int) -> list[float]:
    """Percent of each prompt's samples that are word for word a valid response."""
    valid = [
        100.0 * (sample.response in sample.references)
        for sample in result.responses
        if sample.seed is not None
    ]
    return np.mean(np.reshape(valid, (-1, prompts)), axis=0).tolist()
