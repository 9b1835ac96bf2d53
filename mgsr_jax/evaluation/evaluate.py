"""Evaluation of a model: ROUGE-L of sampled and greedy responses, diversity, loss.

The protocol is MiniLLM's (arXiv 2306.08543), which the paper follows: five seeds at
temperature 1, ROUGE-L F1 with stemming, the best reference, times 100.
"""

import contextlib
import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import cast

import jax
from jax.sharding import Mesh

from mgsr_jax import losses, sharding
from mgsr_jax.data.encoding import eos_id
from mgsr_jax.data.prompts import Prompt
from mgsr_jax.evaluation.responses import (
    MINILLM,
    EvaluationConfig,
    prompt_rows,
    sample_responses,
    scored_prompts,
)
from mgsr_jax.evaluation.teacher_forced import response_loss
from mgsr_jax.evaluation.text_metrics import distinct_n, rouge_l
from mgsr_jax.rows import Rows
from mgsr_jax.typing import Model, Params, Tokenizer


@dataclasses.dataclass(frozen=True)
class ScoredResponse:
    """One generated response; `dataclasses.asdict` of it is a line of JSON.

    Attributes:
      seed: seed of the sample; None for a greedy response.
      source: "file:line" of the record.
      response: generated text.
      references: texts that it is compared with.
      rouge_l: ROUGE-L against the best reference.
      length: number of its tokens, without end-of-sequence.
    """

    seed: int | None
    source: str
    response: str
    references: tuple[str, ...]
    rouge_l: float
    length: int


@dataclasses.dataclass(frozen=True)
class TextScores:
    """Scores of the responses of one seed.

    Attributes:
      rouge_l: mean F1 x 100.
      distinct_1: number of different tokens per token of all responses together.
      distinct_2: the same for 2-grams.
      distinct_4: the same for 4-grams.
      length: mean number of tokens of a response, without end-of-sequence.
    """

    rouge_l: float
    distinct_1: float
    distinct_2: float
    distinct_4: float
    length: float


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Scores of a model on one set.

    Attributes:
      examples: number of scored prompts.
      sampled: means over the seeds; None without seeds.
      rouge_l_std: sample standard deviation of ROUGE-L over the seeds; None for fewer
        than two.
      by_seed: scores of each seed.
      greedy: scores of the greedy responses.
      loss: teacher-forced cross-entropy of the first reference and its end-of-sequence.
        [nats per token]
      responses: every response, greedy ones last.
      exposure_bias: ExAccErr in percent (see `exposure_bias`); None if not measured.
    """

    examples: int
    sampled: TextScores | None
    rouge_l_std: float | None
    by_seed: dict[int, TextScores]
    greedy: TextScores
    loss: float
    responses: tuple[ScoredResponse, ...]
    exposure_bias: float | None = None


_Scored = tuple[TextScores, list[ScoredResponse]]


def evaluate(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    config: EvaluationConfig = MINILLM,
    *,
    eos_ids: tuple[int, ...] | None = None,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Respond to the prompts once for every seed and once greedily, and score.

    A response depends only on its seed and its example, not on the batch size or the
    mesh. Prompts with `scored=False` are left out.

    Args:
      model: model to score.
      params: its parameters.
      tokenizer: converts responses to text.
      prompts: from `load_prompts`, encoded with the lengths of `config`.
      config: seeds, sampling and sizes.
      eos_ids: tokens that end a response; default: the tokenizer's end-of-sequence.
      mesh: splits every batch over its data and fsdp axes.
      progress: called as progress(batches done, batches in total).

    Raises:
      ValueError: see `scored_prompts`; or a batch does not divide over the mesh.
    """
    scored = scored_prompts(prompts, config)
    stop_ids = (eos_id(tokenizer),) if eos_ids is None else eos_ids
    vocab_size = min(len(tokenizer), model.config.vocab_size)
    decoding = config.decoding(stop_ids, vocab_size)
    batches = -(-len(scored) // config.batch_size)
    tick = _ticker(progress, batches * (len(config.seeds) + 2))
    by_seed: dict[int | None, _Scored] = {}
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        for seed in (*config.seeds, None):
            tokens: dict[int, list[int]] = {}
            for rows in sample_responses(
                model, params, scored, config, decoding=decoding, seed=seed, mesh=mesh
            ):
                tokens |= _response_tokens(sharding.fetch_whole(rows), stop_ids)
                tick()
            by_seed[seed] = _score(tokenizer, scored, tokens, seed)
        sums = []
        for rows in prompt_rows(scored, config, mesh, with_response=True):
            sums.append(response_loss(model, params, rows, vocab_size=vocab_size))
            tick()
    return _result(by_seed, sums)


def _ticker(
    progress: Callable[[int, int], None] | None, total: int
) -> Callable[[], None]:
    done = itertools.count(1)

    def tick() -> None:
        if progress is not None:
            progress(next(done), total)

    return tick


def _response_tokens(rows: Rows, stop_ids: tuple[int, ...]) -> dict[int, list[int]]:
    """Example index -> tokens of its response, without the stop token at the end."""
    responses = {}
    for example, tokens, start, end in zip(
        rows.example, rows.tokens, rows.prompt_lengths, rows.lengths, strict=True
    ):
        if example >= 0:  # not a row that fills up the last batch
            ids = tokens[start:end].tolist()
            responses[int(example)] = ids[:-1] if ids and ids[-1] in stop_ids else ids
    return responses


def _score(
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    tokens: dict[int, list[int]],
    seed: int | None,
) -> _Scored:
    responses = []
    for prompt in prompts:
        ids = tokens[prompt.example]
        text = cast(
            str,  # one sequence: not a list
            tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            ),
        )
        responses.append(
            ScoredResponse(
                seed=seed,
                source=prompt.source,
                response=text,
                references=prompt.references,
                rouge_l=rouge_l(text, prompt.references),
                length=len(ids),
            )
        )
    texts = list(tokens.values())
    scores = TextScores(
        rouge_l=statistics.fmean(response.rouge_l for response in responses),
        distinct_1=distinct_n(texts, 1),
        distinct_2=distinct_n(texts, 2),
        distinct_4=distinct_n(texts, 4),
        length=statistics.fmean(response.length for response in responses),
    )
    return scores, responses


def _result(
    by_seed: dict[int | None, _Scored], sums: list[losses.Sum]
) -> EvaluationResult:
    """Combine the scores of all seeds; the key None has the greedy ones."""
    sampled = {
        seed: scores for seed, (scores, _) in by_seed.items() if seed is not None
    }
    rouge = [scores.rouge_l for scores in sampled.values()]
    loss = sum(float(batch.total) for batch in sums)
    greedy, greedy_responses = by_seed[None]
    return EvaluationResult(
        examples=len(greedy_responses),
        sampled=_mean(list(sampled.values())) if sampled else None,
        rouge_l_std=statistics.stdev(rouge) if len(rouge) > 1 else None,
        by_seed=sampled,
        greedy=greedy,
        loss=loss / sum(float(batch.count) for batch in sums),
        responses=tuple(
            itertools.chain(*(responses for _, responses in by_seed.values()))
        ),
    )


def _mean(scores: Sequence[TextScores]) -> TextScores:
    columns = map(dataclasses.astuple, scores)
    return TextScores(*map(statistics.fmean, zip(*columns, strict=True)))
