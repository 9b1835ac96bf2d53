"""Evaluation of a model: scores of sampled and greedy responses, diversity, loss.

The protocol is MiniLLM's (arXiv 2306.08543), which the paper follows: five seeds at
temperature 1, ROUGE-L F1 with stemming, the best reference, times 100. Other metrics,
and several samples a seed, are settings.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from mgsr_jax import sharding
from mgsr_jax.data.encoding import eos_id
from mgsr_jax.data.prompts import Prompt
from mgsr_jax.evaluation.math_answers import reference_answer
from mgsr_jax.evaluation.responses import (
    MINILLM,
    EvaluationConfig,
    Response,
    prompt_rows,
    prompt_text,
    read_responses,
    sample_responses,
    scored_prompts,
    text_of,
)
from mgsr_jax.evaluation.scores import (
    Draw,
    EvaluationResult,
    ScoredResponse,
    set_result,
)
from mgsr_jax.evaluation.teacher_forced import response_loss
from mgsr_jax.evaluation.text_metrics import METRICS, MetricName, check_metrics
from mgsr_jax.typing import Model, Params, Tokenizer


def evaluate(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    config: EvaluationConfig = MINILLM,
    *,
    metrics: Sequence[MetricName] = ("rouge_l",),
    eos_ids: tuple[int, ...] | None = None,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Respond to the prompts with every seed and once greedily, and score.

    A response depends only on its seed, the number of its sample and its example, not
    on the batch size or the mesh. Prompts with `scored=False` are left out. With
    several processes every one must call this, and every one gets the same result.

    Args:
      model: model to score.
      params: its parameters.
      tokenizer: converts responses to text.
      prompts: from `load_prompts`, encoded with the lengths of `config`.
      config: seeds, sampling and sizes; no seeds: only greedy responses.
      metrics: names of `METRICS`; `result.greedy.metrics[name].mean` is the mean over
        the greedy responses, `result.sampled.metrics[name].mean` that over all samples.
      eos_ids: tokens that end a response; default: the tokenizer's end-of-sequence.
      mesh: splits every batch over its data and fsdp axes.
      progress: called as progress(batches done, batches in total).

    Raises:
      ValueError, ImportError: see `prompts_to_score`; or a batch does not divide over
        the mesh.
    """
    scored = prompts_to_score(prompts, config, metrics)
    stop_ids = (eos_id(tokenizer),) if eos_ids is None else eos_ids
    batches = -(-len(scored) // config.batch_size)
    draws = len(config.seeds) * config.samples + 1
    run = _Evaluation(
        model=model,
        params=params,
        tokenizer=tokenizer,
        prompts=scored,
        config=config,
        metrics=metrics,
        stop_ids=stop_ids,
        mesh=mesh,
        tick=_ticker(progress, batches * (draws + 1)),
    )
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        sampled = {
            seed: [run.draw(seed, sample) for sample in range(config.samples)]
            for seed in config.seeds
        }
        return set_result(sampled, run.draw(None, 0), run.loss())


def prompts_to_score(
    prompts: Sequence[Prompt], config: EvaluationConfig, metrics: Sequence[MetricName]
) -> list[Prompt]:
    """Select the prompts that metrics count, and check that the metrics can score them.

    Raises:
      ValueError: see `scored_prompts`; an unknown metric, or a reference without an
        answer for `math`.
      ImportError: the package of a metric is missing; names the extra.
    """
    check_metrics(metrics)
    scored = scored_prompts(prompts, config)
    if "math" in metrics:
        for prompt in scored:
            for reference in prompt.references:
                try:
                    reference_answer(reference)
                except ValueError as error:
                    raise ValueError(f"{prompt.source}: {error}") from error
    return scored


def _ticker(
    progress: Callable[[int, int], None] | None, total: int
) -> Callable[[], None]:
    done = itertools.count(1)

    def tick() -> None:
        if progress is not None:
            progress(next(done), total)

    return tick


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Evaluation:
    """One model on the scored prompts of one set; see `evaluate`."""

    model: Model
    params: Params
    tokenizer: Tokenizer
    prompts: Sequence[Prompt]
    config: EvaluationConfig
    metrics: Sequence[MetricName]
    stop_ids: tuple[int, ...]
    mesh: Mesh | None
    tick: Callable[[], None]

    @property
    def vocab_size(self) -> int:
        """Columns of the logits that are tokens; the rest is padding."""
        return min(len(self.tokenizer), self.model.config.vocab_size)

    def draw(self, seed: int | None, sample: int) -> Draw:
        """A scored response to every prompt; seed None is greedy."""
        by_example: dict[int, Response] = {}
        for rows in sample_responses(
            self.model,
            self.params,
            self.prompts,
            self.config,
            decoding=self.config.decoding(self.stop_ids, self.vocab_size),
            seed=seed,
            sample=sample,
            mesh=self.mesh,
        ):
            by_example |= read_responses(sharding.fetch_whole(rows), self.stop_ids)
            self.tick()
        responses = [by_example[prompt.example] for prompt in self.prompts]
        texts = [text_of(self.tokenizer, response.tokens) for response in responses]
        scored = [
            ScoredResponse(
                seed=seed,
                sample=sample,
                source=prompt.source,
                prompt=prompt_text(self.tokenizer, prompt),
                response=text,
                references=prompt.references,
                scores=dict(zip(self.metrics, values, strict=True)),
                length=len(response.tokens),
                finish_reason=response.finish_reason,
            )
            for prompt, response, text, values in zip(
                self.prompts, responses, texts, self._values(texts), strict=True
            )
        ]
        return Draw(scored, [response.tokens for response in responses])

    def _values(self, texts: Sequence[str]) -> list[list[float]]:
        """Every metric of every text: the lead process's values on all processes.

        Two processes may not agree whether an answer exceeds the time limit of `math`.
        """
        values = np.zeros((len(texts), len(self.metrics)))
        if jax.process_index() == 0:
            for row, text, prompt in zip(values, texts, self.prompts, strict=True):
                row[:] = [METRICS[m](text, prompt.references) for m in self.metrics]
        return sharding.from_lead(values).tolist()

    def loss(self) -> float:
        """Cross-entropy of the first references in nats per token."""
        sums = []
        for rows in prompt_rows(
            self.prompts, self.config, self.mesh, with_response=True
        ):
            sums.append(
                response_loss(self.model, self.params, rows, vocab_size=self.vocab_size)
            )
            self.tick()
        total = sum(float(batch.total) for batch in sums)
        return total / sum(float(batch.count) for batch in sums)
