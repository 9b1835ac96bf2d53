"""Scores on held-out instructions of Little English, and distance to the teacher."""

import dataclasses
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import small_runs
from jax.sharding import Mesh

from mgsr_jax import losses, sharding
from mgsr_jax.checkpoint import hf
from mgsr_jax.data.batches import prompt_batches
from mgsr_jax.data.encoding import Encoding
from mgsr_jax.data.prompts import load_prompts
from mgsr_jax.evaluation.evaluate import evaluate
from mgsr_jax.evaluation.responses import EvaluationConfig
from mgsr_jax.evaluation.scores import EvaluationResult
from mgsr_jax.rows import Rows, next_token_view
from mgsr_jax.typing import Model, Params

SEEDS = (10, 20)
BATCH_SIZE = 152  # two batches of 300; divides over 2, 4 and 8 devices


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of a model on instructions with word pairs that no training text contains.

    Attributes:
      greedy: ROUGE-L of greedy responses, F1 x 100.
      sampled: ROUGE-L of samples at temperature 1, F1 x 100.
      valid: percent of samples that are word for word a valid response.
      distinct_2: different pairs of tokens per pair in the samples.
      loss: cross-entropy of a reference, teacher forced, nats per token.
      total_variation: distance to the teacher on the references, in [0, 1].
    """

    greedy: float
    sampled: float
    valid: float
    distinct_2: float
    loss: float
    total_variation: float


class Judge:
    """Scores models on a file of instructions, with the teacher as the measure.

    Args:
      file: the instructions, each with all valid responses.
      encoding: lengths of the rows.
      teacher: folder of the teacher.
      mesh: device mesh.
    """

    def __init__(self, file: Path, encoding: Encoding, teacher: Path, *, mesh: Mesh):
        self.encoding, self.mesh = encoding, mesh
        self.tokenizer = hf.load_tokenizer(teacher)
        self.prompts, _ = load_prompts(file, self.tokenizer, encoding)
        self.teacher, self.teacher_params = small_runs.load(teacher, mesh)

    def score(self, folder: Path) -> tuple[Scores, EvaluationResult]:
        """Scores of the model in `folder`, and every response that it wrote."""
        model, params = small_runs.load(folder, self.mesh)
        result = evaluate(
            model,
            params,
            self.tokenizer,
            self.prompts,
            EvaluationConfig(
                seeds=SEEDS,
                max_prompt_length=self.encoding.prompt_limit,
                max_length=self.encoding.max_length,
                batch_size=BATCH_SIZE,
            ),
            mesh=self.mesh,
        )
        assert result.sampled is not None  # SEEDS is not empty
        samples = [sample for sample in result.responses if sample.seed is not None]
        valid = statistics.fmean(s.response in s.references for s in samples)
        scores = Scores(
            greedy=result.greedy.metrics["rouge_l"].mean,
            sampled=result.sampled.metrics["rouge_l"].mean,
            valid=100 * valid,
            distinct_2=result.sampled.distinct_2,
            loss=result.loss,
            total_variation=self.distance(model, params),
        )
        return scores, result

    def distance(self, model: Model, params: Params) -> float:
        """Mean total variation distance to the teacher over the references' tokens."""
        total, count = 0.0, 0.0
        with jax.set_mesh(self.mesh):
            for rows in prompt_batches(
                self.prompts,
                BATCH_SIZE,
                width=self.encoding.max_length,
                with_response=True,
            ):
                values, where = total_variation(
                    model,
                    params,
                    self.teacher,
                    self.teacher_params,
                    sharding.put_batch(self.mesh, rows),
                )
                total += float(jnp.sum(jnp.where(where, values, 0.0)))
                count += float(jnp.sum(where))
        return total / count


@jax.jit(static_argnames=("student", "teacher"))
def total_variation(
    student: Model,
    student_params: Params,
    teacher: Model,
    teacher_params: Params,
    rows: Rows,
) -> tuple[jax.Array, jax.Array]:
    """1/2 sum |p - q| at every position, and which positions belong to the response."""
    view = next_token_view(rows)

    def logits(model: Model, params: Params) -> jax.Array:
        hidden, _ = model.forward(params, view.inputs)
        return model.unembed(model.head_params(params), hidden)

    values = losses.total_variation(
        logits(student, student_params), logits(teacher, teacher_params)
    )
    return values, view.where
