"""Distil a tiny model from nothing, and see what each method makes of it.

A teacher learns Little English (little_english.py), a student a quarter of its size is
warmed up by SFT, and from there each method makes the same number of updates. All
training is `mgsr_jax.training.trainer.train`, the trainer of the real runs.

    python examples/quickstart.py                                # about five minutes
    python examples/quickstart.py --ablations --seeds 0 1 2      # the README's table
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import little_english
from rich import box
from rich.console import Console
from rich.table import Table

import mgsr_jax
from mgsr_jax import models, sharding
from mgsr_jax.checkpoint import hf
from mgsr_jax.data.batches import prompt_batches
from mgsr_jax.data.prompts import load_prompts
from mgsr_jax.evaluation import report
from mgsr_jax.evaluation.evaluate import EvaluationResult, evaluate
from mgsr_jax.evaluation.tables import markdown_table
from mgsr_jax.objective import Objective
from mgsr_jax.rollout import RolloutConfig
from mgsr_jax.rows import Rows, next_token_view
from mgsr_jax.training.config import DataConfig, TrainConfig
from mgsr_jax.training.optimizer import OptimizerConfig
from mgsr_jax.training.trainer import train
from mgsr_jax.typing import Model, Params

TEACHER_WIDTH, STUDENT_WIDTH = 128, 64
TEACHER_STEPS, STUDENT_STEPS = 450, 700
WARM_STEPS = STUDENT_STEPS // 3
EVALUATION_SEEDS = (10, 20)
EVALUATION_BATCH = 152  # two batches; divides over 2, 4 and 8 devices


@dataclasses.dataclass(frozen=True)
class Method:
    """What a student is trained with after its warm-up.

    Attributes:
      objective: the losses.
      rollout: where the rows come from.
    """

    objective: Objective
    rollout: RolloutConfig = RolloutConfig()


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


@dataclasses.dataclass(frozen=True)
class Scores:
    """How a model does on instructions with word pairs that no training text holds.

    Attributes:
      greedy: ROUGE-L of greedy answers. F1 x 100
      sampled: ROUGE-L of samples at temperature 1. F1 x 100
      valid: samples that are word for word one of the valid responses. percent
      distinct_2: different pairs of tokens in the samples. share
      loss: of a reference, teacher forced. nats a token
      total_variation: distance to the teacher on the references. [0, 1]
    """

    greedy: float
    sampled: float
    valid: float
    distinct_2: float
    loss: float
    total_variation: float


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
    "that are word for word a valid response. Loss: nats a token. TV: total variation "
    "to the teacher, over the references' tokens."
)


class Quickstart:
    """The folders of one quickstart and the runs in them."""

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
        self.test, _ = load_prompts(
            self.data / "test.jsonl", self.tokenizer, self.data_config.encoding
        )
        self.teacher = self._teacher()
        self.teacher_model, self.teacher_params = self._load(self.teacher)

    def _teacher(self) -> Path:
        """The trained teacher's folder; made once for a data set and a recipe."""
        files = (little_english.__file__, __file__)
        recipe = b"".join(Path(file).read_bytes() for file in files)
        recipe += mgsr_jax.__version__.encode()
        folder = self.output / f"teacher-{hashlib.sha256(recipe).hexdigest()[:8]}"
        trained = folder / "run" / "student"
        if trained.exists():
            self.console.print(f"teacher: {trained}, made before")
            return trained
        self.console.rule("teacher")
        shutil.rmtree(folder, ignore_errors=True)
        start = self.new_model(folder / "init", TEACHER_WIDTH, seed=0)
        more = dataclasses.replace(
            self.data_config, train=str(self.data / "teacher.jsonl")
        )
        config = dataclasses.replace(
            self._config(start, folder / "run", Method(SFT_ONLY), seed=0),
            data=more,
            steps=TEACHER_STEPS,
            batch_size=64,
        )
        return train(config, console=self.console).student

    def new_model(self, folder: Path, width: int, *, seed: int) -> Path:
        """A random LLaMA of four layers as a Hugging Face folder."""
        model = models.from_config(
            {
                "model_type": "llama",
                "vocab_size": len(self.tokenizer),
                "hidden_size": width,
                "intermediate_size": 2 * width,
                "num_hidden_layers": 4,
                "num_attention_heads": width // 32,
                "num_key_value_heads": width // 32,
                "max_position_embeddings": 64,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "tie_word_embeddings": True,
                "hidden_act": "silu",
                "eos_token_id": self.tokenizer.eos_token_id,
            }
        )
        params = scaled_for_width(model.init(jax.random.key(seed)))
        hf.save_pretrained(folder, model, params, tokenizer_from=self.tokenizer_folder)
        return folder

    def students(self, methods: dict[str, Method], seed: int) -> dict[str, Path]:
        """The run folder of the warm-up, "start", and of each method after it."""
        folder = self.output / f"seed-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        runs = {}
        self.console.rule(f"seed {seed}: student at the start")
        init = self.new_model(folder / "init", STUDENT_WIDTH, seed=seed + 1)
        config = self._config(init, folder / "start", Method(SFT_ONLY), seed=seed)
        config = dataclasses.replace(
            config, steps=WARM_STEPS, optimizer=optimizer(6e-3, 3e-3)
        )
        start = train(config, console=self.console)
        runs["start"] = start.output
        for name, method in methods.items():
            self.console.rule(f"seed {seed}: {name}")
            output = folder / run_name(name)
            # Another order of the data than the warm-up's, the same for every method.
            config = self._config(start.student, output, method, seed=seed + 1000)
            runs[name] = train(config, console=self.console).output
        return runs

    def _config(
        self, student: Path, output: Path, method: Method, *, seed: int
    ) -> TrainConfig:
        needs_teacher = method.objective.needs_teacher
        return TrainConfig(
            student=str(student),
            teacher=str(self.teacher) if needs_teacher else None,
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

    def _load(self, folder: Path) -> tuple[Model, Params]:
        model = models.from_config(folder)
        return model, hf.load_params(folder, model, mesh=self.mesh)

    def score(self, folder: Path) -> tuple[Scores, EvaluationResult]:
        """The model in `folder` on the held-out instructions."""
        self.console.print(f"scoring {folder}")
        model, params = self._load(folder)
        result = evaluate(
            model,
            params,
            self.tokenizer,
            self.test,
            seeds=EVALUATION_SEEDS,
            max_prompt_length=self.data_config.max_prompt_length,
            max_length=self.data_config.max_length,
            batch_size=EVALUATION_BATCH,
            mesh=self.mesh,
        )
        samples = [answer for answer in result.answers if answer.seed is not None]
        valid = statistics.fmean(a.response in a.references for a in samples)
        scores = Scores(
            greedy=result.greedy.rouge_l,
            sampled=result.sampled.rouge_l,
            valid=100 * valid,
            distinct_2=result.sampled.distinct_2,
            loss=result.loss,
            total_variation=self.distance(model, params),
        )
        return scores, result

    def distance(self, model: Model, params: Params) -> float:
        """Mean total variation to the teacher over the references' tokens."""
        total = count = 0.0
        with jax.set_mesh(self.mesh):
            for rows in prompt_batches(
                self.test,
                EVALUATION_BATCH,
                width=self.data_config.max_length,
                with_response=True,
            ):
                values, where = total_variation(
                    model,
                    params,
                    self.teacher_model,
                    self.teacher_params,
                    sharding.put_batch(self.mesh, rows),
                )
                total += float(jnp.sum(jnp.where(where, values, 0.0)))
                count += float(jnp.sum(where))
        return total / count


def optimizer(learning_rate: float, final_learning_rate: float) -> OptimizerConfig:
    """Short runs: a short warm-up and a short memory of the squared gradient."""
    return OptimizerConfig(
        learning_rate=learning_rate,
        final_learning_rate=final_learning_rate,
        warmup_steps=20,
        beta2=0.98,
    )


def scaled_for_width(params: Params) -> Params:
    """Kernels with deviation fan_in ** -0.5, embeddings with 0.3.

    `init` draws with the deviation 0.02 of large models. At these widths that is so
    little that copying words from the prompt takes three times the steps to appear.
    """

    def scaled(path: tuple, leaf: jax.Array) -> jax.Array:
        if path[-1].key == "kernel":
            return leaf * (leaf.shape[-2] ** -0.5 / 0.02)
        return leaf * 15.0 if path[-1].key == "embedding" else leaf

    return jax.tree_util.tree_map_with_path(scaled, params)


@jax.jit(static_argnames=("student", "teacher"))
def total_variation(
    student: Model,
    student_params: Params,
    teacher: Model,
    teacher_params: Params,
    rows: Rows,
) -> tuple[jax.Array, jax.Array]:
    """1/2 sum |p - q| at every position, and which positions are the response's."""
    view = next_token_view(rows)

    def probabilities(model: Model, params: Params) -> jax.Array:
        hidden, _ = model.forward(params, view.inputs)
        return jax.nn.softmax(model.unembed(model.head_params(params), hidden))

    p = probabilities(teacher, teacher_params)
    q = probabilities(student, student_params)
    return 0.5 * jnp.sum(jnp.abs(p - q), axis=-1), view.where


def run_name(method: str) -> str:
    """A method's name as that of a folder."""
    return method.lower().replace(", ", "-").replace(" ", "-")


def cell(values: Sequence[float], form: str) -> str:
    """The mean, and with several values their standard deviation."""
    text = f"{statistics.fmean(values):{form}}"
    return f"{text} ± {statistics.stdev(values):{form}}" if len(values) > 1 else text


def table_rows(scores: dict[str, list[Scores]]) -> list[list[str]]:
    """A row a model: its name and a cell for each of COLUMNS."""
    return [
        [name]
        + [
            cell([getattr(one, field) for one in of_seeds], form)
            for field, (_, form) in COLUMNS.items()
        ]
        for name, of_seeds in scores.items()
    ]


def show_answers(console: Console, results: dict[str, EvaluationResult]) -> None:
    """The greedy answers to one instruction of each kind."""
    for index in range(len(little_english.TASKS)):
        for i, (name, result) in enumerate(results.items()):
            answer = [a for a in result.answers if a.seed is None][index]
            if i == 0:
                console.print(f"\n[bold]one valid answer[/]  {answer.references[0]}")
            console.print(f"{name:>16}  {answer.response}", markup=False)


def main() -> None:
    """Trains, scores, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--ablations", action="store_true", help="more methods, and evidence.md"
    )
    arguments = parser.parse_args()
    began, console = time.monotonic(), Console()
    datasets.disable_progress_bars()
    quickstart = Quickstart(arguments.output, console)
    methods = METHODS | (ABLATIONS if arguments.ablations else {})
    scores: dict[str, list[Scores]] = {}
    results: dict[str, EvaluationResult] = {}
    one, results["teacher"] = quickstart.score(quickstart.teacher)
    scores["teacher"] = [one]
    for seed in arguments.seeds:
        runs = quickstart.students(methods, seed)
        for name, run in runs.items():
            one, results[name] = quickstart.score(run / "student")
            scores.setdefault(name, []).append(one)
        # After every seed: a long comparison that is stopped leaves what it has.
        write_results(arguments, console, scores, runs)
    show_answers(console, {k: results[k] for k in ("teacher", "start", "MGSR")})
    console.print(f"\ncurves    {arguments.output / 'curves.png'}")
    console.print(f"student   {runs['MGSR'] / 'student'}")
    console.print(f"time      {time.monotonic() - began:.0f} s")


def write_results(
    arguments: argparse.Namespace,
    console: Console,
    scores: dict[str, list[Scores]],
    runs: dict[str, Path],
) -> None:
    """The table on the terminal and as Markdown, the numbers as JSON, the curves."""
    heads = ["model", *(head for head, _ in COLUMNS.values())]
    rows = table_rows(scores)
    shown = Table(*(head.replace(" ", "\n") for head in heads), box=box.SIMPLE)
    shown.columns[0].no_wrap = True
    for row in rows:
        shown.add_row(*row)
    console.print(shown, NOTES)
    markdown = f"{markdown_table(heads, rows)}\n\n{NOTES}\n"
    output = arguments.output
    (output / "table.md").write_text(markdown, encoding="utf-8")
    if arguments.ablations:
        (output / "evidence.md").write_text(
            evidence_page(markdown, arguments.seeds[: len(scores["MGSR"])]),
            encoding="utf-8",
        )
    numbers = {
        name: [dataclasses.asdict(one) for one in of_seeds]
        for name, of_seeds in scores.items()
    }
    (output / "results.json").write_text(json.dumps(numbers, indent=2) + "\n")
    drawn = {name: runs[name] / "metrics.jsonl" for name in METHODS}
    report.curves(drawn, output / "curves.png")


def evidence_page(table: str, seeds: Sequence[int]) -> str:
    """evidence.md: how the table was made, and the table."""
    rest = STUDENT_STEPS - WARM_STEPS
    return f"""# Evidence

Made by `make evidence` (jax {jax.__version__}). One teacher; seeds
{list(seeds)}: each has its own student, warmed up by {WARM_STEPS} steps of SFT
("start"), and from there {rest} steps of every method, on the same batches in the same
order. Mean ± standard deviation over the seeds. SCRG is on half of the steps; MGSR is
DAC-KL, span and SCRG; every method keeps the SFT term unless it says so.

{table}"""


if __name__ == "__main__":
    # Without an accelerator: a device a core, each with its share of the rows. That is
    # faster than one device that splits every small product over the cores.
    cores = os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", 1 << min(cores.bit_length() - 1, 3))
    main()
