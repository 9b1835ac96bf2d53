"""Compare methods at equal work: one result file per task, method, rate and seed.

Work is the tokens that the student generates plus the tokens that the teacher reads.
SFT has no teacher and makes as many steps as KD, which reads the same rows. Every
method trains from the same start until it has used the task's budget. Seed 0 is
trained with each learning rate of the task; the rate with the best score on the
validation file then trains the other seeds. `--budget seconds` trains the same methods,
with the same rates, for the same time instead.

    python examples/study.py toy-1000                      # the toy language
    python examples/study.py toy-1000 --methods KD MGSR    # a part of it
    python examples/study.py dolly --model FOLDER --data FOLDER     # real text
    python examples/study_page.py                          # docs/study.md

Start it again after any stop: results that exist are kept and a run resumes from its
checkpoint. Several processes may work on one task at a time.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal, Protocol

import datasets
import numpy as np
import small_runs
from rich.console import Console
from small_runs import Method
from study_dolly import DollyTask
from study_files import locked, train_or_go_on, write_json
from study_toy import ToyTask

from mgsr_jax.evaluation.report import Series, read_metrics
from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.training.config import TrainConfig

RESULTS = Path(__file__).parent / "study_results"
PROBE_STEPS = 24
SEEDS = (0, 1, 2, 3, 4)
PACKAGES = ("jax", "flax", "optax", "mgsr_jax")
Budget = Literal["tokens", "seconds"]


class Task(Protocol):
    """Models, data and scores of a comparison.

    Attributes:
      name: of the folder of its results.
      methods: the methods by name.
      rates: learning rates that seed 0 is trained with.
      tuned_by: task whose rates are taken in place of a sweep; None: none.
      tokens: a budget: tokens that the student generates plus those that the teacher
        reads.
      seconds: another budget: time of a run's steps.
    """

    name: str
    methods: Mapping[str, Method]
    rates: Sequence[float]
    tuned_by: str | None
    tokens: int
    seconds: float

    def start(self, seed: int) -> Path:
        """Folder of the student from which every method of a seed goes on."""
        ...

    def config(
        self,
        method: Method,
        start: Path,
        output: Path,
        *,
        seed: int,
        rate: float,
    ) -> TrainConfig:
        """Settings of a run; its steps are set later."""
        ...

    def score(self, student: Path) -> dict[str, dict[str, float | list[float]]]:
        """Scores on "valid", which holds `rank`, and on "test"."""
        ...


@dataclasses.dataclass(frozen=True)
class Unit:
    """One training run and its scores.

    Attributes:
      task: name of the task.
      method: name of the method.
      seed: of the start, the batches and the samples.
      rate: peak learning rate.
      budget: what ends the training.
    """

    task: str
    method: str
    seed: int
    rate: float
    budget: Budget = "tokens"

    @property
    def name(self) -> str:
        """Name of its files."""
        name = f"{small_runs.run_name(self.method)}-{self.rate:g}-seed{self.seed}"
        return name if self.budget == "tokens" else f"{name}-seconds"

    @property
    def result(self) -> Path:
        """File of its result."""
        return RESULTS / self.task / f"{self.name}.json"


@dataclasses.dataclass(frozen=True)
class Work:
    """Work of a run, or of one of its steps.

    Attributes:
      generated: tokens that the student generated.
      scored: tokens that the teacher read.
      seconds: time, at the speed of a median step: compilation, validation and other
        programs of the machine do not count.
    """

    generated: float
    scored: float
    seconds: float

    def steps(self, budget: Budget, task: Task) -> int:
        """Steps of this work that a task's budget allows."""
        if budget == "seconds":
            return max(1, round(task.seconds / self.seconds))
        return max(1, round(task.tokens / (self.generated + self.scored)))


@dataclasses.dataclass(frozen=True)
class Choice:
    """A part of a task's units."""

    methods: Sequence[str]
    seeds: Sequence[int]
    budget: Budget


def run_unit(task: Task, unit: Unit, output: Path, console: Console) -> None:
    """Train and score one unit, and write its result."""
    console.rule(f"{task.name}: {unit.name}")
    step = work_of_step(task, unit.method, output, console)
    if not task.methods[unit.method].objective.needs_teacher:
        of_kd = work_of_step(task, "KD", output, console)
        step = dataclasses.replace(of_kd, seconds=step.seconds)
    config = task.config(
        task.methods[unit.method],
        task.start(unit.seed),
        output / task.name / unit.name,
        seed=unit.seed,
        rate=unit.rate,
    )
    config = dataclasses.replace(config, steps=step.steps(unit.budget, task))
    student = train_or_go_on(config, console).student
    used = work_by_step(config)
    record = {
        **dataclasses.asdict(unit),
        "work": {name: round(float(x.sum()), 3) for name, x in used.items()},
        **task.score(student),
        "curves": curves(series_of(config)),
        "settings": settings_of(config),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }
    write_json(unit.result, record)


def work_of_step(task: Task, name: str, output: Path, console: Console) -> Work:
    """Work of a method's step at seed 0's start; measured once, then read.

    Where some steps generate, it is the mean over both kinds, by their probability.
    """
    file = RESULTS / task.name / f"{small_runs.run_name(name)}-step.json"
    folder = output / task.name / file.stem
    with locked(folder.with_suffix(".lock"), wait=True):
        if not file.exists():
            console.print(f"{name}: measuring the work of {PROBE_STEPS} steps")
            method, start, rate = task.methods[name], task.start(0), min(task.rates)
            config = task.config(method, start, folder, seed=0, rate=rate)
            config = dataclasses.replace(config, steps=PROBE_STEPS)
            train_or_go_on(config, console)
            write_json(file, mean_work(config))
    return Work(**json.loads(file.read_text()))


def mean_work(config: TrainConfig) -> dict[str, float]:
    """Expected work of a step of a run, by the fields of `Work`."""
    generates = np.array(series_of(config)["rollout/student_share"][1]) > 0
    return {
        name: mean_over_kinds(values, generates, config.rollout)
        for name, values in work_by_step(config).items()
    }


def mean_over_kinds(
    values: np.ndarray, generates: np.ndarray, rollout: RolloutConfig
) -> float:
    """Mean of a step that generates and of one that does not, by their probability."""
    if rollout.policy != "on" or generates.all() or not generates.any():
        return float(values.mean())
    share = rollout.probability
    return float(
        share * values[generates].mean() + (1 - share) * values[~generates].mean()
    )


def work_by_step(config: TrainConfig) -> dict[str, np.ndarray]:
    """Work of every step of a run, by the fields of `Work`."""
    series = series_of(config)
    labels = np.array(series["train/tokens"][1])
    seconds = labels / np.array(series["train/tokens_per_second"][1])
    generates = np.array(series["rollout/student_share"][1]) > 0
    for kind in (generates, ~generates):
        if kind.any():
            seconds[kind] = np.median(seconds[kind])
    return {
        "generated": np.array(series["tokens/student_generated"][1]),
        "scored": np.array(series["tokens/teacher_scored"][1]),
        "seconds": seconds,
    }


def series_of(config: TrainConfig) -> Series:
    """Metrics of a run."""
    return read_metrics(Path(config.output) / "metrics.jsonl")


def curves(series: Series, points: int = 40) -> dict[str, list[list[float]]]:
    """Steps and values of a run's losses: means of at most `points` stretches."""
    found = {}
    for name, (steps, values) in series.items():
        if name.startswith(("train/loss", "valid/", "rollout/", "train/lower")):
            parts = min(points, len(steps))
            found[name] = [
                [round(float(part.mean()), 5) for part in np.array_split(axis, parts)]
                for axis in (np.array(steps), np.array(values))
            ]
    return found


def settings_of(config: TrainConfig) -> dict[str, object]:
    """The settings of a run that are not paths."""
    settings = dataclasses.asdict(config)
    kept = ("objective", "rollout", "optimizer", "steps", "batch_size")
    return {name: settings[name] for name in kept}


def best_rate(task: Task, method: str) -> float | None:
    """The rate with the best score on the validation file; None: not known yet."""
    swept = task.tuned_by or task.name
    units = [Unit(swept, method, 0, rate) for rate in task.rates]
    if not all(unit.result.exists() for unit in units):
        return None
    ranks = [json.loads(u.result.read_text())["valid"]["rank"] for u in units]
    return units[int(np.argmax(ranks))].rate


def known_units(task: Task, chosen: Choice) -> list[Unit]:
    """The units in their order, without those that wait for the end of a sweep."""
    units = []
    for seed in chosen.seeds:
        for method in chosen.methods:
            sweeps = seed == 0 and task.tuned_by is None and chosen.budget == "tokens"
            best = best_rate(task, method)
            rates = task.rates if sweeps else [best] if best else []
            units += [
                Unit(task.name, method, seed, rate, chosen.budget) for rate in rates
            ]
    return units


def run_task(task: Task, chosen: Choice, output: Path) -> None:
    """Run every unit that has no result and that no other process works on."""
    console, ran = Console(), True
    while ran:  # read again: the end of a sweep, and other processes, add units
        ran = False
        for unit in known_units(task, chosen):
            lock = output / task.name / f"{unit.name}.lock"
            with locked(lock, wait=False) as mine:
                if mine and not unit.result.exists():
                    run_unit(task, unit, output, console)
                    ran = True
                    break
    left = [u.name for u in known_units(task, chosen) if not u.result.exists()]
    console.print(f"{task.name}: done, but for {', '.join(left) or 'nothing'}")


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("toy-1000", "toy-8000", "dolly"))
    parser.add_argument("--methods", nargs="+", help="names of methods; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--budget", choices=("tokens", "seconds"), default="tokens")
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    parser.add_argument("--model", type=Path, help="dolly: an instruction model")
    parser.add_argument("--data", type=Path, help="dolly: the folder of its data")
    return parser.parse_args()


def make_task(arguments: argparse.Namespace) -> Task:
    """The task that was asked for, with its models trained."""
    output, console = arguments.output.resolve(), Console()
    if arguments.task == "dolly":
        if arguments.model is None or arguments.data is None:
            raise SystemExit("dolly needs --model and --data")
        return DollyTask(arguments.model, arguments.data, output, console)
    return ToyTask(int(arguments.task.removeprefix("toy-")), output, console)


def main() -> None:
    """Run a task."""
    arguments = parse_arguments()
    datasets.disable_progress_bars()
    task = make_task(arguments)
    methods = arguments.methods or list(task.methods)
    unknown = [name for name in methods if name not in task.methods]
    if unknown:
        raise SystemExit(
            f"unknown methods {unknown}; expected some of {list(task.methods)}"
        )
    chosen = Choice(methods, arguments.seeds, arguments.budget)
    run_task(task, chosen, arguments.output.resolve())


if __name__ == "__main__":
    small_runs.one_device_per_core()
    main()
