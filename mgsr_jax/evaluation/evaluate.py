"""Evaluation: ROUGE-L of sampled and greedy answers, diversity, loss, exposure bias.

The protocol is MiniLLM's (arXiv 2306.08543), which the paper follows: five seeds at
temperature 1, ROUGE-L F1 with stemming, the best reference, times 100.
"""

import contextlib
import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mgsr_jax import losses, sharding
from mgsr_jax.data.batches import prompt_batches
from mgsr_jax.data.prompts import Prompt
from mgsr_jax.decoding.decode import Decoding, generate
from mgsr_jax.decoding.sampling import Sampling
from mgsr_jax.evaluation.teacher_forced import response_loss
from mgsr_jax.evaluation.text_metrics import distinct_n, rouge_l
from mgsr_jax.rows import Rows
from mgsr_jax.typing import Model, Params


@dataclasses.dataclass(frozen=True)
class Answer:
    """One generated response; `dataclasses.asdict` of it is a line of JSON.

    Attributes:
      seed: of the sample; None: greedy.
      source: "file:line" of the record.
      response: the text.
      references: what it is compared with.
      rouge_l: its score.
      length: its tokens, without end-of-sequence.
    """

    seed: int | None
    source: str
    response: str
    references: tuple[str, ...]
    rouge_l: float
    length: int


@dataclasses.dataclass(frozen=True)
class TextScores:
    """Means over the answers of one seed. Distinct-n is over all of them together.

    Attributes:
      rouge_l: F1 x 100.
      distinct_1, distinct_2, distinct_4: different n-grams of tokens per n-gram.
      length: tokens of an answer, without end-of-sequence.
    """

    rouge_l: float
    distinct_1: float
    distinct_2: float
    distinct_4: float
    length: float


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """What `evaluate` measures.

    Attributes:
      examples: how many were scored.
      sampled: means over the seeds; None where no seed was asked for.
      rouge_l_std: sample standard deviation of ROUGE-L over two seeds or more.
      by_seed: the same numbers for each seed.
      greedy: those of the greedy answers.
      loss: cross-entropy of the first reference and its end-of-sequence, teacher
        forced. nats a token
      answers: every text, greedy ones last.
    """

    examples: int
    sampled: TextScores | None
    rouge_l_std: float | None
    by_seed: dict[int, TextScores]
    greedy: TextScores
    loss: float
    answers: tuple[Answer, ...]


def evaluate(
    model: Model,
    params: Params,
    tokenizer: Any,
    examples: Sequence[Prompt],
    *,
    seeds: Sequence[int] = (10, 20, 30, 40, 50),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    max_prompt_length: int = 256,
    max_length: int = 512,
    batch_size: int = 32,
    no_repeat_ngram: int = 0,
    eos_ids: tuple[int, ...] | None = None,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Answers to the prompts, once for every seed and once greedily, and their scores.

    An answer depends on its seed and its example alone, not on `batch_size` or the
    mesh. Prompts with `scored=False` are left out.

    Args:
      examples: from `data.load_prompts`, encoded with the same two lengths.
      seeds: one sample of every prompt each; none for greedy answers alone.
      temperature, top_k, top_p: of the samples. The greedy answers have none.
      max_prompt_length, max_length: tokens of a prompt, and of prompt and response.
      batch_size: rows generated at a time, over all hosts.
      no_repeat_ngram: forbid repeated n-grams (the published figures: 6); 0 is off.
      eos_ids: tokens that end a response; default: the tokenizer's.
      dtype: of weights and cache while decoding.
      mesh: split every batch over its data and fsdp axes.
      progress: called as progress(batches done, batches in all).

    Raises:
      ValueError: nothing to score; a prompt longer than `max_prompt_length`; a batch
        that does not divide over the mesh.
    """
    scored = _scored(examples, seeds, max_prompt_length)
    stop = (tokenizer.eos_token_id,) if eos_ids is None else eos_ids
    vocab_size = min(len(tokenizer), model.config.vocab_size)
    batches = functools.partial(_batches, scored, batch_size, max_length, mesh)
    tick = _ticker(progress, -(-len(scored) // batch_size) * (len(seeds) + 2))
    sampled = Decoding(
        max_length=max_length,
        eos_ids=stop,
        sampling=Sampling(temperature, top_k, top_p),
        vocab_size=vocab_size,
        no_repeat_ngram=no_repeat_ngram,
    )
    greedy = dataclasses.replace(sampled, sampling=Sampling(0.0, top_k, top_p))
    write = functools.partial(
        generate, model, params, prefill_width=max_prompt_length, dtype=dtype
    )
    found: dict[int | None, tuple[TextScores, list[Answer]]] = {}
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        for seed in (*seeds, None):
            key = jax.random.key(0 if seed is None else seed)
            decoding = greedy if seed is None else sampled
            responses: dict[int, list[int]] = {}
            for rows in batches(with_response=False):
                drawn = write(rows, key=key, decoding=decoding)
                responses |= _responses(sharding.fetch_whole(drawn), stop)
                tick()
            found[seed] = _score(tokenizer, scored, responses, seed)
        sums = []
        for rows in batches(with_response=True):
            sums.append(response_loss(model, params, rows, vocab_size=vocab_size))
            tick()
    return _result(found, sums)


def _scored(
    examples: Sequence[Prompt], seeds: Sequence[int], max_prompt_length: int
) -> list[Prompt]:
    scored = [prompt for prompt in examples if prompt.scored]
    if not scored:
        raise ValueError(f"none of the {len(examples)} examples is scored")
    longest = max(scored, key=lambda prompt: len(prompt.tokens))
    if len(longest.tokens) > max_prompt_length:
        raise ValueError(
            f"{longest.source}: a prompt of {len(longest.tokens)} tokens, at most "
            f"{max_prompt_length}; load the examples with the same max_prompt_length"
        )
    for name, values in (
        ("entry of seeds", list(seeds)),
        ("example index", [prompt.example for prompt in scored]),
    ):
        if len(set(values)) < len(values):
            raise ValueError(f"an {name} occurs twice; evaluate one set at a time")
    return scored


def _ticker(
    progress: Callable[[int, int], None] | None, total: int
) -> Callable[[], None]:
    done = itertools.count(1)

    def tick() -> None:
        if progress is not None:
            progress(next(done), total)

    return tick


def _batches(
    prompts: Sequence[Prompt],
    batch_size: int,
    width: int,
    mesh: Mesh | None,
    *,
    with_response: bool,
) -> Iterator[Rows]:
    """Device rows; on a mesh every process makes its own share of a batch."""
    share = slice(None) if mesh is None else sharding.host_rows(mesh, batch_size)
    for rows in prompt_batches(
        prompts,
        batch_size,
        width=width,
        with_response=with_response,
        share=share,
    ):
        if mesh is None:
            yield jax.tree.map(jnp.asarray, rows)
        else:
            yield sharding.put_batch(mesh, rows)


def _responses(rows: Rows, stop: tuple[int, ...]) -> dict[int, list[int]]:
    """Example index -> tokens of its response, the closing one left out."""
    responses = {}
    for example, tokens, start, end in zip(
        rows.example, rows.tokens, rows.prompt_lengths, rows.lengths, strict=True
    ):
        if example >= 0:  # not one that fills up the last batch
            ids = tokens[start:end].tolist()
            responses[int(example)] = ids[:-1] if ids and ids[-1] in stop else ids
    return responses


def _score(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    responses: dict[int, list[int]],
    seed: int | None,
) -> tuple[TextScores, list[Answer]]:
    answers = []
    for prompt in prompts:
        ids = responses[prompt.example]
        text = tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        answers.append(
            Answer(
                seed=seed,
                source=prompt.source,
                response=text,
                references=prompt.references,
                rouge_l=rouge_l(text, prompt.references),
                length=len(ids),
            )
        )
    texts = list(responses.values())
    scores = TextScores(
        rouge_l=statistics.fmean(answer.rouge_l for answer in answers),
        distinct_1=distinct_n(texts, 1),
        distinct_2=distinct_n(texts, 2),
        distinct_4=distinct_n(texts, 4),
        length=statistics.fmean(answer.length for answer in answers),
    )
    return scores, answers


def _result(
    found: dict[int | None, tuple[TextScores, list[Answer]]], sums: list[losses.Sum]
) -> EvaluationResult:
    by_seed = {seed: scores for seed, (scores, _) in found.items() if seed is not None}
    rouge = [scores.rouge_l for scores in by_seed.values()]
    loss = sum(float(batch.total) for batch in sums)
    return EvaluationResult(
        examples=len(found[None][1]),
        sampled=_mean(list(by_seed.values())) if by_seed else None,
        rouge_l_std=statistics.stdev(rouge) if len(rouge) > 1 else None,
        by_seed=by_seed,
        greedy=found[None][0],
        loss=loss / sum(float(batch.count) for batch in sums),
        answers=tuple(itertools.chain(*(answers for _, answers in found.values()))),
    )


def _mean(scores: Sequence[TextScores]) -> TextScores:
    columns = map(dataclasses.astuple, scores)
    return TextScores(*map(statistics.fmean, zip(*columns, strict=True)))
