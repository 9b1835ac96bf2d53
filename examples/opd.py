"""On-policy distillation of arithmetic in words, compared with four other methods.

A teacher learns arithmetic.py from scratch. A student a quarter of its size learns the
same chats briefly (SFT). Then every method trains this student until the teacher has
scored the same number of tokens (for SFT: until as many labels have been read):

  SFT         the data's solutions, no teacher
  KD          forward KL on the data's solutions
  GKD         Jensen-Shannon, half of the steps on the student's own solutions
  OPD         prompts only: reverse KL on the student's own solutions
  OPD, short  the same, with solutions that are cut: short ones first

    python examples/opd.py                             # about five minutes
    python examples/opd.py --seeds 0 1 2               # examples/opd_evidence.md
"""

import argparse
import dataclasses
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import arithmetic
import datasets
import jax
import numpy as np
import small_runs
import word_tokenizer
from arithmetic_judge import Judge, Scores
from jaxtyping import Float
from rich.console import Console

from mgsr_jax import sharding
from mgsr_jax.checkpoint import hf
from mgsr_jax.evaluation.estimates import mean_estimate
from mgsr_jax.evaluation.report import read_metrics
from mgsr_jax.evaluation.scores import EvaluationResult
from mgsr_jax.objective import Objective
from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.training.config import DataConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of an example; the defaults are what `make opd` runs.

    Attributes:
      teacher_width: width of the teacher; the student has half of it.
      layers: layers of both models.
      teacher_problems: problems that the teacher learns from.
      problems: problems that the student learns from.
      test_problems: held-out problems.
      teacher_steps: updates of the teacher.
      warm_steps: updates of the student's SFT before the comparison.
      steps: updates of a method that scores whole solutions; with shorter ones it
        makes more, for the same number of tokens.
      batch_size: problems per update of a student.
    """

    teacher_width: int = 128
    layers: int = 4
    teacher_problems: int = 12000
    problems: int = 1500
    test_problems: int = 256
    teacher_steps: int = 300
    warm_steps: int = 250
    steps: int = 250
    batch_size: int = 32


@dataclasses.dataclass(frozen=True)
class Method:
    """Training of a student after its SFT.

    Attributes:
      objective: the losses and their weights.
      rollout: where the rows of a step come from.
      data: name of the training file.
    """

    objective: Objective
    rollout: RolloutConfig = RolloutConfig()
    data: str = "train"

    def tokens_per_response(self, lengths: Sequence[int]) -> float:
        """Mean number of scored tokens of a solution, over the whole training.

        Args:
          lengths: tokens of the data's solutions; the student's are about as long.
        """
        horizon = self.rollout.max_new_tokens
        if horizon is None or isinstance(horizon, int):
            return float(np.minimum(lengths, horizon or np.inf).mean())
        ends = [start for start, _ in horizon[1:]] + [1.0]
        return sum(
            (end - start) * float(np.minimum(lengths, tokens).mean())
            for (start, tokens), end in zip(horizon, ends, strict=True)
        )


SFT_ONLY = Objective(token=0.0, span=0.0)
FORWARD_KL = Objective(sft=0.0, span=0.0, divergence="forward_kl")
REVERSE_KL = Objective(sft=0.0, span=0.0, divergence="reverse_kl")
JENSEN_SHANNON = Objective(sft=0.0, span=0.0, divergence="jensen_shannon", beta=0.5)
ON_POLICY = RolloutConfig(policy="on", intervention="none")
SHORT_FIRST = ((0.0, 6), (0.4, 12), (0.7, 26))

METHODS = {
    "SFT": Method(SFT_ONLY),
    "KD": Method(FORWARD_KL),
    "GKD": Method(
        JENSEN_SHANNON,
        dataclasses.replace(ON_POLICY, probability=0.5),
    ),
    "OPD": Method(REVERSE_KL, ON_POLICY, "prompts"),
    "OPD, short": Method(
        REVERSE_KL,
        dataclasses.replace(ON_POLICY, max_new_tokens=SHORT_FIRST),
        "prompts",
    ),
}


COLUMNS: small_runs.Columns = {
    "greedy": ("greedy", ".1f"),
    "sampled": ("avg@4", ".1f"),
    "kl": ("KL", ".3f"),
    "scored": ("k tokens scored", ".0f"),
    "generated": ("k tokens generated", ".0f"),
    "seconds": ("seconds", ".0f"),
}
INTERVAL = 2  # the place of the column that `table_rows` adds

NOTES = (
    "Held-out problems. greedy, avg@4: percent of solutions that are right in every "
    "step, greedy and over four samples at temperature 1. interval: the 95 % interval "
    "of avg@4 over the problems. KL: KL(teacher || student) on the right solutions, "
    "nats per token; that of start is the initial KL of every method. Tokens: "
    "thousands that the training scored, and of these the student's own. seconds: of "
    "the training, with compilation."
)


class Workspace:
    """The folder of one comparison: data, tokenizer, and the runs that train there."""

    def __init__(self, output: Path, scale: Scale, console: Console):
        self.output, self.scale, self.console = output, scale, console
        self.data = arithmetic.write(
            output / "data",
            teacher=scale.teacher_problems,
            train=scale.problems,
            test=scale.test_problems,
        )
        self.tokenizer_folder = arithmetic.tokenizer(output / "tokenizer")
        self.tokenizer = hf.load_tokenizer(self.tokenizer_folder)
        self.mesh = sharding.make_mesh(-1, 1)

    def data_config(self, name: str) -> DataConfig:
        """Settings of one training file."""
        return DataConfig(
            train=str(self.data / f"{name}.jsonl"),
            max_prompt_length=arithmetic.LONGEST_PROMPT,
            max_length=arithmetic.LONGEST,
            cache_dir=str(self.output / "cache"),
        )

    def train_teacher(self) -> Path:
        """The trained teacher's folder; trained once for a data set and a recipe."""
        files = (arithmetic.__file__, word_tokenizer.__file__, __file__)
        digest = small_runs.recipe_digest(*files, settings=repr(self.scale))
        folder = self.output / f"teacher-{digest}"
        trained = folder / "run" / "student"
        if trained.exists():
            self.console.print(f"teacher: {trained}, from an earlier run")
            return trained
        self.console.rule("teacher")
        shutil.rmtree(folder, ignore_errors=True)
        init = self.new_model(folder / "init", self.scale.teacher_width, seed=0)
        config = self.config(init, folder / "run", Method(SFT_ONLY, data="teacher"))
        config = dataclasses.replace(
            config, steps=self.scale.teacher_steps, batch_size=64
        )
        return small_runs.train_to_the_end(config, self.console).student

    def train_start(self, folder: Path, seed: int) -> Path:
        """The run folder of a student's SFT before the comparison."""
        self.console.rule(f"seed {seed}: start")
        width = self.scale.teacher_width // 2
        init = self.new_model(folder / "init", width, seed=seed + 1)
        config = self.config(init, folder / "start", Method(SFT_ONLY), seed=seed)
        config = dataclasses.replace(
            config,
            steps=self.scale.warm_steps,
            optimizer=small_runs.optimizer(6e-3, 1e-4),
        )
        return small_runs.train_to_the_end(config, self.console).output

    def train_method(
        self, name: str, method: Method, start: Path, teacher: Path, seed: int
    ) -> tuple[Path, float]:
        """The run folder of a method, and the seconds that it took."""
        self.console.rule(f"seed {seed}: {name}")
        began = time.monotonic()
        config = self.config(
            start / "student",
            start.parent / small_runs.run_name(name),
            method,
            # Not the first SFT's order of the data, but the same for every method.
            seed=seed + 1000,
            teacher=teacher,
        )
        folder = small_runs.train_to_the_end(config, self.console).output
        return folder, time.monotonic() - began

    def new_model(self, folder: Path, width: int, *, seed: int) -> Path:
        """Write a random model."""
        return small_runs.write_model(
            folder,
            self.tokenizer_folder,
            width=width,
            layers=self.scale.layers,
            seed=seed,
        )

    def config(
        self,
        student: Path,
        output: Path,
        method: Method,
        *,
        seed: int = 0,
        teacher: Path | None = None,
    ) -> TrainConfig:
        """Settings of a run, with the teacher if `method` needs one."""
        needs_teacher = method.objective.needs_teacher
        return TrainConfig(
            student=str(student),
            teacher=str(teacher) if needs_teacher else None,
            output=str(output),
            data=self.data_config(method.data),
            objective=method.objective,
            rollout=method.rollout,
            optimizer=small_runs.optimizer(3e-3, 1e-7),
            steps=self.steps(method),
            batch_size=self.scale.batch_size,
            seed=seed,
            log_every=1,  # a line's tokens are then of the student, or of the data
            tensorboard=False,
        )

    def steps(self, method: Method) -> int:
        """Updates after which the method has scored as many tokens as the others."""
        records = (self.data / "train.jsonl").read_text().splitlines()
        texts = [json.loads(record)["messages"][1]["content"] for record in records]
        ids = self.tokenizer(texts)["input_ids"]
        lengths = [len(response) + 1 for response in ids]  # with the end
        whole = float(np.mean(lengths))
        return round(self.scale.steps * whole / method.tokens_per_response(lengths))


def tokens_of(run: Path) -> tuple[float, float]:
    """Thousands of tokens that a run's loss scored, and how many the student wrote."""
    series = read_metrics(run / "metrics.jsonl")
    tokens = np.array(series["train/tokens"][1]) / 1000
    share = np.array(series["rollout/student_share"][1])
    return float(tokens.sum()), float((tokens * share).sum())


def compare(
    workspace: Workspace, seeds: Sequence[int], methods: Mapping[str, Method]
) -> dict[str, list[Scores]]:
    """Train and score every model; write the table after each seed."""
    console, output = workspace.console, workspace.output
    teacher = workspace.train_teacher()
    judge = Judge(
        workspace.data / "test.jsonl",
        workspace.data_config("train").encoding,
        teacher,
        mesh=workspace.mesh,
    )
    scores: dict[str, list[Scores]] = {}
    results: dict[str, EvaluationResult] = {}

    def score(name: str, run: Path, seconds: float = 0.0, *, counts: bool = True):
        console.print(f"scoring {run / 'student'}")
        own, results[name] = judge.score(run / "student")
        if counts:
            scored, generated = tokens_of(run)
            own = dataclasses.replace(
                own, scored=scored, generated=generated, seconds=seconds
            )
        scores.setdefault(name, []).append(own)

    score("teacher", teacher.parent, counts=False)
    for seed in seeds:
        folder = output / f"seed-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        start = workspace.train_start(folder, seed)
        score("start", start, counts=False)
        for name, method in methods.items():
            run, seconds = workspace.train_method(name, method, start, teacher, seed)
            score(name, run, seconds)
        # After every seed, so that a comparison that is stopped keeps its results.
        write_results(output, console, scores)
    show_solutions(console, results)
    return scores


def over_seeds(by_seed: Sequence[Scores], field: str) -> Float[np.ndarray, " N"]:
    """A score of each problem, mean over the seeds' students."""
    return np.mean([getattr(scores, field) for scores in by_seed], axis=0)


def table_rows(scores: Mapping[str, Sequence[Scores]]) -> list[list[str]]:
    """One row per model: the columns, with the interval behind avg@4."""
    rows = small_runs.table_rows(scores, COLUMNS)
    for row, (name, by_seed) in zip(rows, scores.items(), strict=True):
        estimate = mean_estimate(over_seeds(by_seed, "sampled_by_problem"))
        row.insert(1 + INTERVAL, f"{estimate.low:.1f} to {estimate.high:.1f}")
        if name not in METHODS:  # the teacher and the start train on other terms
            row[-3:] = ["-"] * 3
    return rows


def verdict(scores: Mapping[str, Sequence[Scores]], field: str, label: str) -> str:
    """The method with the highest score, and whether the next one is clearly worse."""
    values = {
        name: over_seeds(by_seed, field)
        for name, by_seed in scores.items()
        if name in METHODS
    }
    first, second = sorted(values, key=lambda name: -values[name].mean())[:2]
    gap = mean_estimate(values[first] - values[second], least=-100.0)
    clear = "is" if gap.low is not None and gap.low > 0 else "is not"
    return (
        f"Highest {label}: {first}. It leads {second} by {gap.mean:.1f} points "
        f"({gap.low:.1f} to {gap.high:.1f} over the problems), which {clear} clear."
    )


def write_results(
    output: Path, console: Console, scores: Mapping[str, Sequence[Scores]]
) -> None:
    """Print the table; write it as Markdown, and the scores as JSON."""
    heads = [head for head, _ in COLUMNS.values()]
    heads.insert(INTERVAL, "interval")
    verdicts = (
        verdict(scores, "greedy_by_problem", "greedy accuracy"),
        verdict(scores, "sampled_by_problem", "avg@4"),
    )
    notes = "\n\n".join((NOTES, *verdicts))
    table = small_runs.show_table(console, heads, table_rows(scores), notes)
    (output / "table.md").write_text(table, encoding="utf-8")
    numbers = {
        name: [{field: getattr(own, field) for field in COLUMNS} for own in by_seed]
        for name, by_seed in scores.items()
    }
    (output / "results.json").write_text(json.dumps(numbers, indent=2) + "\n")


def show_solutions(console: Console, results: Mapping[str, EvaluationResult]) -> None:
    """Print every model's greedy solution of the first held-out problem."""
    for i, (name, result) in enumerate(results.items()):
        response = next(r for r in result.responses if r.seed is None)
        if i == 0:
            console.print(f"\n{response.prompt}", markup=False)
            console.print(f"{'right':>12}  {response.references[0]}", markup=False)
        console.print(f"{name:>12}  {response.response}", markup=False)


def evidence_page(table: str, seeds: Sequence[int], scale: Scale) -> str:
    """Content of opd_evidence.md: the table and how it was made."""
    limits = ", ".join(
        f"at {tokens} tokens from {start:.0%} on" for start, tokens in SHORT_FIRST
    )
    return f"""# Evidence for on-policy distillation

Written by `make opd-evidence` (jax {jax.__version__}). There is one teacher. Each of
the seeds {list(seeds)} has its own student, which {scale.warm_steps} SFT steps of
{scale.batch_size} problems train first ("start"). From there every method trains on the
same {scale.problems:,} problems, until about as many tokens are scored as in
{scale.steps} steps on whole solutions. OPD reads only the prompts. "OPD, short" cuts
the student's solutions ({limits}).
Mean ± standard deviation over the seeds.

{table}"""


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/opd"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    return parser.parse_args()


def main() -> None:
    """Run the comparison at its full size."""
    arguments = parse_arguments()
    began, console, scale = time.monotonic(), Console(), Scale()
    datasets.disable_progress_bars()
    workspace = Workspace(arguments.output, scale, console)
    compare(workspace, arguments.seeds, METHODS)
    if len(arguments.seeds) > 1:
        table = (arguments.output / "table.md").read_text(encoding="utf-8")
        page = evidence_page(table, arguments.seeds, scale)
        (arguments.output / "opd_evidence.md").write_text(page, encoding="utf-8")
    console.print(f"\ntime      {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    small_runs.one_device_per_core()
    main()
