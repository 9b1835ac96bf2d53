"""Distil a tiny model from scratch and compare the methods.

A teacher learns Little English (little_english.py). A student a quarter of its size is
warmed up by SFT, and then every method trains it for the same number of updates. All
training is `mgsr_jax.training.trainer.train`, which `mgsr train` calls too.

    python examples/quickstart.py                                # about five minutes
    python examples/quickstart.py --ablations --seeds 0 1 2      # examples/evidence.md
"""

import argparse
import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import datasets
import jax
import little_english
import word_tokenizer
from language_judge import Judge, Scores
from rich.console import Console
from small_runs import (
    Method,
    one_device_per_core,
    optimizer,
    recipe_digest,
    run_name,
    show_table,
    table_rows,
    train_to_the_end,
    write_model,
)

from mgsr_jax import sharding
from mgsr_jax.checkpoint import hf
from mgsr_jax.evaluation import report
from mgsr_jax.evaluation.scores import EvaluationResult
from mgsr_jax.objective import Objective
from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.training.config import DataConfig, TrainConfig

TEACHER_WIDTH, STUDENT_WIDTH, LAYERS = 128, 64, 4
TEACHER_STEPS, STUDENT_STEPS = 450, 700
WARM_STEPS = STUDENT_STEPS // 3


SFT_ONLY = Objective(token=0.0, span=0.0)
FORWARD_KL = Objective(span=0.0, divergence="forward_kl")
DAC_KL = Objective(span=0.0)
SCRG = RolloutConfig(policy="on", probability=0.5)

METHODS = {
    "SFT": Method(SFT_ONLY),
    "forward KL": Method(FORWARD_KL),
    "MGSR": Method(Objective(), SCRG),
}
ABLATIONS = {
    "forward KL, SCRG": Method(FORWARD_KL, SCRG),
    "DAC-KL fixed": Method(dataclasses.replace(DAC_KL, divergence="dac_kl_fixed")),
    "DAC-KL": Method(DAC_KL),
    "DAC-KL, span": Method(Objective()),
    "DAC-KL, SCRG": Method(DAC_KL, SCRG),
    "forward KL, no SFT": Method(dataclasses.replace(FORWARD_KL, sft=0.0)),
    "MGSR, no SFT": Method(Objective(sft=0.0), SCRG),
}


COLUMNS = {
    "greedy": ("ROUGE-L greedy", ".1f"),
    "sampled": ("ROUGE-L sampled", ".1f"),
    "valid": ("valid samples", ".1f"),
    "distinct_2": ("distinct-2", ".3f"),
    "loss": ("loss", ".3f"),
    "total_variation": ("TV", ".4f"),
}


NOTES = (
    "Held-out instructions. ROUGE-L: F1 x 100, best reference. Valid samples: percent "
    "that are word for word a valid response. Loss: nats per token. TV: total "
    "variation distance to the teacher, over the references' tokens."
)


class Workspace:
    """The folder of one quickstart: data, tokenizer, and the runs that train there."""

    def __init__(self, output: Path, console: Console):
        self.output, self.console = output, console
        self.data = little_english.write(output / "data")
        self.tokenizer_folder = little_english.tokenizer(output / "tokenizer")
        self.tokenizer = hf.load_tokenizer(self.tokenizer_folder)
        self.mesh = sharding.make_mesh(-1, 1)
        self.data_config = DataConfig(
            train=str(self.data / "train.jsonl"),
            valid=str(self.data / "valid.jsonl"),
            max_prompt_length=little_english.LONGEST_PROMPT,
            max_length=little_english.LONGEST,
            cache_dir=str(output / "cache"),
        )

    def train_teacher(self) -> Path:
        """The trained teacher's folder; trained once for a data set and a recipe."""
        digest = recipe_digest(
            little_english.__file__, word_tokenizer.__file__, __file__
        )
        folder = self.output / f"teacher-{digest}"
        trained = folder / "run" / "student"
        if trained.exists():
            self.console.print(f"teacher: {trained}, from an earlier quickstart")
            return trained
        self.console.rule("teacher")
        shutil.rmtree(folder, ignore_errors=True)
        start = write_model(
            folder / "init",
            self.tokenizer_folder,
            width=TEACHER_WIDTH,
            layers=LAYERS,
            seed=0,
        )
        config = dataclasses.replace(
            self.config(start, None, folder / "run", Method(SFT_ONLY), seed=0),
            data=dataclasses.replace(
                self.data_config, train=str(self.data / "teacher.jsonl")
            ),
            steps=TEACHER_STEPS,
            batch_size=64,
        )
        return train_to_the_end(config, self.console).student

    def train_students(
        self, teacher: Path, methods: dict[str, Method], seed: int
    ) -> dict[str, Path]:
        """Run folders of the warm-up, named "start", and of each method after it."""
        folder = self.output / f"seed-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        start = self.train_start(folder, seed)
        runs = {"start": start}
        for name, method in methods.items():
            self.console.rule(f"seed {seed}: {name}")
            output = folder / run_name(name)
            # Not the warm-up's order of the data, but the same for every method.
            config = self.config(
                start / "student", teacher, output, method, seed=seed + 1000
            )
            runs[name] = train_to_the_end(config, self.console).output
        return runs

    def train_start(self, folder: Path, seed: int) -> Path:
        """The run folder of a student's warm-up."""
        self.console.rule(f"seed {seed}: warm-up")
        init = write_model(
            folder / "init",
            self.tokenizer_folder,
            width=STUDENT_WIDTH,
            layers=LAYERS,
            seed=seed + 1,
        )
        config = self.config(init, None, folder / "start", Method(SFT_ONLY), seed=seed)
        config = dataclasses.replace(
            config, steps=WARM_STEPS, optimizer=optimizer(6e-3, 3e-3)
        )
        return train_to_the_end(config, self.console).output

    def config(
        self,
        student: Path,
        teacher: Path | None,
        output: Path,
        method: Method,
        *,
        seed: int,
    ) -> TrainConfig:
        """Settings of a run after the warm-up, with a teacher if `method` needs one."""
        needs_teacher = method.objective.needs_teacher
        return TrainConfig(
            student=str(student),
            teacher=str(teacher) if needs_teacher else None,
            output=str(output),
            data=self.data_config,
            objective=method.objective,
            rollout=method.rollout,
            optimizer=optimizer(3e-3, 1e-7),
            steps=STUDENT_STEPS - WARM_STEPS,
            batch_size=32,
            seed=seed,
            validate_every=100,
            tensorboard=False,
        )


def show_responses(console: Console, results: dict[str, EvaluationResult]) -> None:
    """Print every model's greedy response to one instruction of each task."""
    for index in range(len(little_english.TASKS)):
        for i, (name, result) in enumerate(results.items()):
            response = [r for r in result.responses if r.seed is None][index]
            if i == 0:
                valid = response.references[0]
                console.print(f"\n[bold]one valid response[/]  {valid}")
            console.print(f"{name:>18}  {response.response}", markup=False)


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--ablations", action="store_true", help="train more methods, write evidence.md"
    )
    return parser.parse_args()


def main() -> None:
    """Train the teacher and the students, score them, write the table."""
    arguments = parse_arguments()
    began, console = time.monotonic(), Console()
    datasets.disable_progress_bars()
    workspace = Workspace(arguments.output, console)
    teacher = workspace.train_teacher()
    judge = Judge(
        workspace.data / "test.jsonl",
        workspace.data_config.encoding,
        teacher,
        mesh=workspace.mesh,
    )
    methods = METHODS | (ABLATIONS if arguments.ablations else {})
    scores: dict[str, list[Scores]] = {}
    results: dict[str, EvaluationResult] = {}

    def score(name: str, folder: Path) -> None:
        console.print(f"scoring {folder}")
        own, results[name] = judge.score(folder)
        scores.setdefault(name, []).append(own)

    score("teacher", teacher)
    for seed in arguments.seeds:
        runs = workspace.train_students(teacher, methods, seed)
        for name, run in runs.items():
            score(name, run / "student")
        # After every seed, so that a comparison that is stopped keeps its results.
        write_results(arguments, console, scores, runs)
    show_responses(console, {k: results[k] for k in ("teacher", "start", "MGSR")})
    console.print(f"\ncurves    {arguments.output / 'curves.png'}")
    console.print(f"student   {runs['MGSR'] / 'student'}")
    console.print(f"time      {time.monotonic() - began:.0f} s")


def write_results(
    arguments: argparse.Namespace,
    console: Console,
    scores: dict[str, list[Scores]],
    runs: dict[str, Path],
) -> None:
    """Print the table; write it as Markdown, the scores as JSON, and the curves."""
    heads = [head for head, _ in COLUMNS.values()]
    markdown = show_table(console, heads, table_rows(scores, COLUMNS), NOTES)
    output = arguments.output
    (output / "table.md").write_text(markdown, encoding="utf-8")
    if arguments.ablations:
        (output / "evidence.md").write_text(
            evidence_page(markdown, arguments.seeds[: len(scores["MGSR"])]),
            encoding="utf-8",
        )
    numbers = {
        name: [dataclasses.asdict(own) for own in by_seed]
        for name, by_seed in scores.items()
    }
    (output / "results.json").write_text(json.dumps(numbers, indent=2) + "\n")
    logs = {name: runs[name] / "metrics.jsonl" for name in METHODS}
    report.curves(logs, output / "curves.png")


def evidence_page(table: str, seeds: Sequence[int]) -> str:
    """Content of evidence.md: the table and how it was made."""
    rest = STUDENT_STEPS - WARM_STEPS
    return f"""# Evidence

Written by `make evidence` (jax {jax.__version__}). There is one teacher. Each of the
seeds {list(seeds)} has its own student, warmed up by {WARM_STEPS} SFT steps ("start").
From there every method trains for {rest} steps, on the same batches in the same order.
Mean ± standard deviation over the seeds. SCRG runs on half of the steps. MGSR is
DAC-KL, span and SCRG. Every method keeps the SFT term unless its name says otherwise.

{table}"""


if __name__ == "__main__":
    one_device_per_core()
    main()
