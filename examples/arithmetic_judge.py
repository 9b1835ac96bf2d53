"""Accuracy on the held-out problems of arithmetic.py, and distance to the teacher."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import small_runs
from jax.sharding import Mesh
from jaxtyping import Float

from mgsr_jax import losses, sharding
from mgsr_jax.checkpoint import hf
from mgsr_jax.data.batches import prompt_batches
from mgsr_jax.data.encoding import Encoding
from mgsr_jax.data.prompts import load_prompts
from mgsr_jax.evaluation.evaluate import evaluate
from mgsr_jax.evaluation.responses import EvaluationConfig
from mgsr_jax.evaluation.scores import EvaluationResult, prompt_means
from mgsr_jax.training.first_batch import compare_first_batch, make_comparison
from mgsr_jax.typing import STUDENT, Model, Params

METRIC, SAMPLES = "exact_match", 4


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of a model on the held-out problems, and what its training took.

    Attributes:
      greedy_by_problem: 100 for each problem whose greedy solution is right in every
        step, otherwise 0.
      sampled_by_problem: the same of samples at temperature 1, mean of SAMPLES.
      kl: KL(teacher || student) on the right solutions, nats per token.
      scored: thousands of tokens that the loss of its training read.
      generated: thousands of them that the student wrote.
      seconds: time of its training with compilation.
    """

    greedy_by_problem: Float[np.ndarray, " N"]
    sampled_by_problem: Float[np.ndarray, " N"]
    kl: float
    scored: float = 0.0
    generated: float = 0.0
    seconds: float = 0.0

    @property
    def greedy(self) -> float:
        """Percent of the problems."""
        return float(self.greedy_by_problem.mean())

    @property
    def sampled(self) -> float:
        """Percent of the problems and samples: avg@4."""
        return float(self.sampled_by_problem.mean())


class Judge:
    """Scores models on the held-out problems."""

    def __init__(self, test: Path, encoding: Encoding, teacher: Path, *, mesh: Mesh):
        self.encoding, self.mesh = encoding, mesh
        self.tokenizer = hf.load_tokenizer(teacher)
        self.prompts, _ = load_prompts(test, self.tokenizer, encoding)
        self.batch_size = min(128, len(self.prompts))
        self.teacher, self.teacher_params = small_runs.load(teacher, mesh)

    def score(self, folder: Path) -> tuple[Scores, EvaluationResult]:
        """Scores of the model in `folder`, and every solution that it wrote."""
        model, params = small_runs.load(folder, self.mesh)
        result = evaluate(
            model,
            params,
            self.tokenizer,
            self.prompts,
            EvaluationConfig(
                seeds=(10,),
                samples=SAMPLES,
                max_prompt_length=self.encoding.prompt_limit,
                max_length=self.encoding.max_length,
                batch_size=self.batch_size,
            ),
            metrics=(METRIC,),
            mesh=self.mesh,
        )
        count = len(self.prompts)
        greedy, sampled = (
            prompt_means([r for r in result.responses if chosen(r)], count)[METRIC]
            for chosen in (lambda r: r.seed is None, lambda r: r.seed is not None)
        )
        return Scores(greedy, sampled, self.kl(model, params)), result

    def kl(self, model: Model, params: Params) -> float:
        """KL(teacher || student) over the tokens of the right solutions."""
        columns = len(self.tokenizer)
        with jax.set_mesh(self.mesh):
            comparison = make_comparison(
                model,
                self.teacher,
                vocab_size=columns,
                dtype=jnp.float32,
                chunk_size=losses.default_chunk_size(columns),
            )
            batches = prompt_batches(
                self.prompts,
                self.batch_size,
                width=self.encoding.max_length,
                with_response=True,
            )
            values = compare_first_batch(
                comparison,
                {STUDENT: params},
                self.teacher_params,
                (sharding.put_batch(self.mesh, rows) for rows in batches),
            )
        return values["kl"]
