"""The study's real task: a cut of an instruction model learns Dolly from the whole one.

The teacher is fine-tuned on Dolly; the student keeps some of its layers and is warmed
up by SFT and forward KL. Both are made once, in the output folder.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import small_runs
from jax.sharding import Mesh
from language_judge import total_variation
from rich.console import Console
from small_runs import Method
from study_files import locked, train_or_go_on
from study_methods import INTERVENTIONS, RECIPES

from mgsr_jax import models, sharding
from mgsr_jax.checkpoint import hf
from mgsr_jax.data.encoding import Encoding, eos_id
from mgsr_jax.data.prompts import Prompt, load_prompts
from mgsr_jax.evaluation.evaluate import evaluate
from mgsr_jax.evaluation.exposure_bias import excess_accumulated_error
from mgsr_jax.evaluation.responses import EvaluationConfig, sample_responses
from mgsr_jax.evaluation.teacher_forced import response_kl
from mgsr_jax.models import LanguageModel
from mgsr_jax.objective import Objective
from mgsr_jax.rows import Rows
from mgsr_jax.training.config import DataConfig, TrainConfig
from mgsr_jax.training.optimizer import OptimizerConfig
from mgsr_jax.typing import Params

LAYERS = 8
MAX_PROMPT, MAX_LENGTH, BATCH = 64, 128, 8
TEACHER_STEPS, WARM_STEPS, WARM_GAP = 120, 400, 1.5
SETS = {
    "valid": "dolly/valid.jsonl",
    "dolly": "dolly/test.jsonl",
    "self_instruct": "selfinst.jsonl",
    "vicuna": "vicuna.jsonl",
    "s_ni": "sni.jsonl",
}
PROMPTS = 100  # of each file
EVALUATION = EvaluationConfig(
    seeds=(10, 20, 30, 40, 50),
    max_prompt_length=MAX_PROMPT,
    max_length=MAX_LENGTH,
    batch_size=20,
)


class DollyTask:
    """Students of one instruction model on Dolly.

    Args:
      model: folder of an instruction model, such as SmolLM2-135M-Instruct.
      data: folder with the files of `SETS` and dolly/train.jsonl.
      output: folder for models and runs.
      console: where progress is printed.
    """

    name = "dolly"
    methods: Mapping[str, Method] = {
        name: (RECIPES | INTERVENTIONS)[name]
        for name in (
            "SFT",
            "KD",
            "ABKD",
            "OPD",
            "none",
            "SCRG argmax",
            "SCRG random",
            "SKD",
            "MGSR",
        )
    }
    rates: Sequence[float] = (1e-4, 3e-4)
    tuned_by: str | None = None
    tokens, seconds = 90_000, 900.0

    def __init__(self, model: Path, data: Path, output: Path, console: Console):
        self.folder, self.console = output / self.name, console
        self.mesh = sharding.make_mesh(-1, 1)
        self.data_config = DataConfig(
            train=str(data / "dolly" / "train.jsonl"),
            template="alpaca",
            max_prompt_length=MAX_PROMPT,
            max_length=MAX_LENGTH,
            cache_dir=str(self.folder / "cache"),
        )
        with locked(self.folder / "models.lock", wait=True):
            self.teacher = self._teacher(model)
            self.warm = self._warm_student()
        self.judge = DollyJudge(
            self.teacher, data, self.data_config.encoding, self.mesh
        )

    def start(self, seed: int) -> Path:
        """The warmed student, the same for all seeds."""
        return self.warm

    def config(
        self, method: Method, start: Path, output: Path, *, seed: int, rate: float
    ) -> TrainConfig:
        """Settings of a run."""
        teacher = str(self.teacher) if method.objective.needs_teacher else None
        return TrainConfig(
            student=str(start),
            teacher=teacher,
            output=str(output),
            data=self.data_config,
            objective=method.objective,
            rollout=method.rollout,
            optimizer=OptimizerConfig(
                learning_rate=rate, final_learning_rate=rate / 10, warmup_steps=10
            ),
            batch_size=BATCH,
            seed=seed + 1000,
            save_every=25,
            log_every=1,
            tensorboard=False,
        )

    def score(self, student: Path) -> dict[str, dict[str, float | list[float]]]:
        """Scores on every file, and distances to the teacher on Dolly's prompts."""
        model, params = small_runs.load(student, self.mesh)
        scores = {name: self.judge.score(model, params, name) for name in SETS}
        scores["valid"]["rank"] = scores["valid"]["sampled"]
        scores["dolly"] |= self.judge.distances(model, params)
        return scores

    def _teacher(self, model: Path) -> Path:
        folder = self.folder / "teacher"
        if not (folder / "student").exists():
            self.console.rule("dolly: teacher")
            config = self.config(RECIPES["SFT"], model, folder, seed=0, rate=5e-5)
            config = dataclasses.replace(config, steps=TEACHER_STEPS)
            train_or_go_on(config, self.console)
        return folder / "student"

    def _warm_student(self) -> Path:
        folder = self.folder / "warm"
        if not (folder / "student").exists():
            self.console.rule("dolly: warm-up of the student")
            cut = cut_layers(self.teacher, self.folder / "cut", LAYERS)
            both = Method(Objective(span=0.0, divergence="forward_kl"))
            config = self.config(both, cut, folder, seed=0, rate=1e-3)
            config = dataclasses.replace(config, steps=WARM_STEPS)
            train_or_go_on(config, self.console)
        return folder / "student"


def cut_layers(teacher: Path, folder: Path, layers: int) -> Path:
    """Write a student with `layers` of the teacher's, evenly spread with both ends."""
    settings = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
    kept = np.linspace(0, settings["num_hidden_layers"] - 1, layers).round().astype(int)
    params = hf.load_params(teacher, models.from_config(teacher))
    cut = params | {"layers": jax.tree.map(lambda x: x[kept], params["layers"])}
    model = models.from_config(settings | {"num_hidden_layers": layers})
    hf.save_pretrained(folder, model, cut, tokenizer_from=teacher)
    return folder


class DollyJudge:
    """Scores models on the files of `SETS`, with the teacher as the measure."""

    def __init__(self, teacher: Path, data: Path, encoding: Encoding, mesh: Mesh):
        self.mesh, self.tokenizer = mesh, hf.load_tokenizer(teacher)
        self.teacher, self.teacher_params = small_runs.load(teacher, mesh)
        self.prompts = {
            name: _first(load_prompts(data / file, self.tokenizer, encoding)[0])
            for name, file in SETS.items()
        }

    def score(
        self, model: LanguageModel, params: Params, name: str
    ) -> dict[str, float | list[float]]:
        """ROUGE-L, diversity and loss on one file."""
        prompts, count = self.prompts[name], len(self.prompts[name])
        result = evaluate(
            model, params, self.tokenizer, prompts, EVALUATION, mesh=self.mesh
        )
        assert result.sampled is not None  # EVALUATION has seeds
        of_samples = [
            r.scores["rouge_l"] for r in result.responses if r.seed is not None
        ]
        of_greedy = [r.scores["rouge_l"] for r in result.responses if r.seed is None]
        by_prompt = np.mean(np.reshape(of_samples, (-1, count)), axis=0)
        return {
            "greedy": round(result.greedy.metrics["rouge_l"].mean, 4),
            "sampled": round(result.sampled.metrics["rouge_l"].mean, 4),
            "distinct_2": round(result.sampled.distinct_2, 5),
            "loss": round(result.loss, 5),
            "greedy_by_prompt": [round(x, 2) for x in of_greedy],
            "sampled_by_prompt": [round(x, 2) for x in by_prompt.tolist()],
        }

    def distances(self, model: LanguageModel, params: Params) -> dict[str, float]:
        """KL and TV to the teacher on both models' samples, and ExAccErr."""
        both = model, params, self.teacher, self.teacher_params
        found, accumulated = {}, []
        with jax.set_mesh(self.mesh):
            for name, writer in (("student", both[:2]), ("teacher", both[2:])):
                kl, tv = [], []
                for rows in self._samples(*writer):
                    kl.append(jax.device_get(response_kl(*both, rows)))
                    tv.append(jax.device_get(total_variation(*both, rows)))
                found[f"kl_on_{name}"], by_position = _mean(kl)
                found[f"tv_on_{name}"], _ = _mean(tv)
                accumulated += by_position
        found["ex_acc_err"] = excess_accumulated_error(*accumulated)
        return {name: round(value, 5) for name, value in found.items()}

    def _samples(self, model: LanguageModel, params: Params) -> Iterator[Rows]:
        """One sample of every prompt of Dolly's test file."""
        columns = len(self.tokenizer)
        decoding = EVALUATION.decoding((eos_id(self.tokenizer),), columns)
        yield from sample_responses(
            model,
            params,
            self.prompts["dolly"],
            EVALUATION,
            decoding=decoding,
            seed=EVALUATION.seeds[0],
            mesh=self.mesh,
        )


def _first(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first prompts that are short enough to be scored."""
    return [prompt for prompt in prompts if prompt.scored][:PROMPTS]


def _mean(
    batches: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[float, list[np.ndarray]]:
    """Mean of the values where the masks are set; all values and all masks."""
    values, where = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return float(values[where].mean()), [values, where]
