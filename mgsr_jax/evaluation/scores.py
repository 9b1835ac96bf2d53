"""Scored responses, and the scores of a set that are computed from them."""

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float

from mgsr_jax.evaluation.estimates import (
    Estimate,
    mean_estimate,
    mean_pass_at_k,
    pass_at_k_sizes,
)
from mgsr_jax.evaluation.text_metrics import ACCURACIES, distinct_n


@dataclasses.dataclass(frozen=True)
class ScoredResponse:
    """One generated response; `dataclasses.asdict` of it is a line of JSON.

    Attributes:
      seed: seed of the sample; None for a greedy response.
      sample: number of the sample among those of its seed, from 0.
      source: "file:line" of the record.
      prompt: the prompt as the model reads it, with special tokens.
      response: generated text.
      references: texts that it is compared with.
      scores: metric name -> score of the response.
      length: number of its tokens, without the token that ended it.
      finish_reason: "stop" after a token that ends a response, "length" at the largest
        length.
    """

    seed: int | None
    sample: int
    source: str
    prompt: str
    response: str
    references: tuple[str, ...]
    scores: dict[str, float]
    length: int
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class Draw:
    """One response to every prompt, in the prompts' order.

    Attributes:
      responses: the scored responses.
      tokens: token ids of each response, without the token that ended it.
    """

    responses: Sequence[ScoredResponse]
    tokens: Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class TextScores:
    """Scores of one or several draws.

    Attributes:
      metrics: metric name -> mean over prompts and draws, with the interval over
        prompts.
      distinct_1: number of different tokens per token of a draw, mean over the draws.
      distinct_2: the same for 2-grams.
      distinct_4: the same for 4-grams.
      length: mean number of tokens of a response, without the token that ended it.
      stopped: share of the responses that a token ended, not the largest length.
    """

    metrics: dict[str, Estimate]
    distinct_1: float
    distinct_2: float
    distinct_4: float
    length: float
    stopped: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """Scores of a model minus those of another one on the same prompts.

    Attributes:
      against: folder of the other model's evaluation.
      sampled: metric name -> mean difference of the prompts' means over their samples;
        None if one of the two has no samples.
      greedy: the same of the greedy responses.
    """

    against: str
    sampled: dict[str, Estimate] | None
    greedy: dict[str, Estimate]


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Scores of a model on one set.

    Attributes:
      examples: number of scored prompts.
      sampled: scores of all samples of all seeds (avg@k); None without seeds.
      seed_std: metric name -> sample standard deviation of the seeds' means; None for
        fewer than two seeds.
      by_seed: scores of each seed.
      pass_at_k: accuracy name -> k -> mean over the prompts of the probability that one
        of k samples is right, in percent.
      greedy: scores of the greedy responses.
      loss: teacher-forced cross-entropy of the first reference and its end-of-sequence.
        [nats per token]
      responses: every response, greedy ones last.
      exposure_bias: ExAccErr in percent (see `exposure_bias`); None if not measured.
      difference: difference to another model's scores; None if not measured.
    """

    examples: int
    sampled: TextScores | None
    seed_std: dict[str, float] | None
    by_seed: dict[int, TextScores]
    pass_at_k: dict[str, dict[int, Estimate]]
    greedy: TextScores
    loss: float
    responses: tuple[ScoredResponse, ...]
    exposure_bias: float | None = None
    difference: Difference | None = None


def text_scores(draws: Sequence[Draw]) -> TextScores:
    """Scores of draws of the same prompts together."""

    def distinct(n: int) -> float:
        return statistics.fmean(distinct_n(draw.tokens, n) for draw in draws)

    responses = [response for draw in draws for response in draw.responses]
    means = prompt_means(responses, len(draws[0].responses))
    return TextScores(
        metrics={name: mean_estimate(values) for name, values in means.items()},
        distinct_1=distinct(1),
        distinct_2=distinct(2),
        distinct_4=distinct(4),
        length=statistics.fmean(response.length for response in responses),
        stopped=statistics.fmean(r.finish_reason == "stop" for r in responses),
    )


def prompt_means(
    responses: Iterable[ScoredResponse], prompts: int
) -> dict[str, Float[np.ndarray, "N"]]:
    """Metric name -> mean score of each prompt.

    Args:
      responses: those of whole draws, draw by draw.
      prompts: number of the prompts, N.
    """
    scores = [response.scores for response in responses]
    return {
        name: np.array([s[name] for s in scores]).reshape(-1, prompts).mean(0)
        for name in scores[0]
    }


def set_result(
    sampled: dict[int, list[Draw]], greedy: Draw, loss: float
) -> EvaluationResult:
    """Scores of a set.

    Args:
      sampled: seed -> its draws.
      greedy: the greedy responses.
      loss: mean cross-entropy of the references.
    """
    draws = list(itertools.chain(*sampled.values()))
    by_seed = {seed: text_scores(draws) for seed, draws in sampled.items()}
    return EvaluationResult(
        examples=len(greedy.responses),
        sampled=text_scores(draws) if draws else None,
        seed_std=_seed_std(list(by_seed.values())),
        by_seed=by_seed,
        pass_at_k=_pass_at_k(draws),
        greedy=text_scores([greedy]),
        loss=loss,
        responses=tuple(
            response for draw in (*draws, greedy) for response in draw.responses
        ),
    )


def _seed_std(seeds: Sequence[TextScores]) -> dict[str, float] | None:
    if len(seeds) < 2:
        return None
    return {
        name: statistics.stdev(scores.metrics[name].mean for scores in seeds)
        for name in seeds[0].metrics
    }


def _pass_at_k(draws: Sequence[Draw]) -> dict[str, dict[int, Estimate]]:
    """Samples of different seeds are samples of the same prompt: all count."""
    if not draws:
        return {}
    responses = [draw.responses for draw in draws]
    names = [name for name in ACCURACIES if name in responses[0][0].scores]
    result = {}
    for name in names:
        by_prompt = zip(*responses, strict=True)
        right = [sum(r.scores[name] > 0 for r in samples) for samples in by_prompt]
        result[name] = {
            k: mean_pass_at_k(right, len(draws), k) for k in pass_at_k_sizes(len(draws))
        }
    return result
