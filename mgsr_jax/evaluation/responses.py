"""Responses of a model to the prompts of an evaluation set, batch by batch."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mgsr_jax import settings, sharding
from mgsr_jax.data.batches import prompt_batches
from mgsr_jax.data.prompts import Prompt
from mgsr_jax.decoding.decode import Decoding, generate
from mgsr_jax.decoding.sampling import ANCESTRAL, Sampling
from mgsr_jax.rows import Rows
from mgsr_jax.typing import Model, Params, Tokenizer


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Settings of an evaluation; the defaults are MiniLLM's protocol.

    Attributes:
      seeds: seeds of the samples; none for only greedy responses.
      samples: samples of each prompt per seed.
      sampling: how a token is drawn. Greedy responses use temperature 0 instead.
      max_prompt_length: largest number of tokens of a prompt.
      max_length: largest number of tokens of prompt and response together.
      batch_size: rows decoded at a time, over all hosts.
      no_repeat_ngram: forbid repeated n-grams (the published figures: 6); 0 is off.
      dtype: dtype of weights and cache while decoding.
    """

    seeds: Sequence[int] = (10, 20, 30, 40, 50)
    samples: int = 1
    sampling: Sampling = ANCESTRAL
    max_prompt_length: int = 256
    max_length: int = 512
    batch_size: int = 32
    no_repeat_ngram: int = 0
    dtype: DTypeLike = jnp.float32

    def decoding(self, eos_ids: tuple[int, ...], vocab_size: int) -> Decoding:
        """The decoder's settings for sampled responses."""
        return Decoding(
            max_length=self.max_length,
            eos_ids=eos_ids,
            sampling=self.sampling,
            vocab_size=vocab_size,
            no_repeat_ngram=self.no_repeat_ngram,
        )


MINILLM = EvaluationConfig()
"""The protocol of MiniLLM (arXiv 2306.08543)."""


def scored_prompts(prompts: Sequence[Prompt], config: EvaluationConfig) -> list[Prompt]:
    """Select the prompts that metrics count, and check them.

    Raises:
      ValueError: no prompt is scored, a prompt is too long or has no reference, a seed
        or the index of a prompt occurs twice, or `config.samples` is below 1.
    """
    settings.check_positive(config, "samples")
    scored = [prompt for prompt in prompts if prompt.scored]
    if not scored:
        raise ValueError(f"none of the {len(prompts)} prompts is scored; add a set")
    longest = max(scored, key=lambda prompt: len(prompt.tokens))
    if len(longest.tokens) > config.max_prompt_length:
        raise ValueError(
            f"{longest.source}: the prompt has {len(longest.tokens)} tokens, expected "
            f"at most {config.max_prompt_length}; load the prompts with the same "
            "max_prompt_length"
        )
    for prompt in scored:
        if not prompt.references:
            raise ValueError(
                f"{prompt.source}: the prompt has no reference, and metrics compare "
                "with references; leave it out, or let mgsr generate respond to it"
            )
    for name, values in (
        ("a seed", list(config.seeds)),
        ("an example index", [prompt.example for prompt in scored]),
    ):
        if len(set(values)) < len(values):
            raise ValueError(
                f"{name} occurs twice in {values}; evaluate one set at a time, with "
                "different seeds"
            )
    return scored


def sample_responses(
    model: Model,
    params: Params,
    prompts: Sequence[Prompt],
    config: EvaluationConfig,
    *,
    decoding: Decoding,
    seed: int | None,
    sample: int = 0,
    mesh: Mesh | None = None,
) -> Iterator[Rows]:
    """Sample one response to every prompt.

    A response depends only on its seed, the number of its sample and its example, not
    on the batch or the mesh.

    Args:
      model: model that writes the responses.
      params: its parameters.
      prompts: from `load_prompts`, encoded with the lengths of `config`.
      config: lengths, batch size and dtype.
      decoding: from `config.decoding`.
      seed: None for greedy responses.
      sample: number of the sample among those of the seed.
      mesh: splits every batch over its data and fsdp axes; it must be the current mesh.

    Yields:
      Device rows of one batch. A row that fills up the last batch has example -1.
    """
    key = jax.random.key(0 if seed is None else seed)
    if sample:  # the first sample is the same, however many follow
        key = jax.random.fold_in(key, sample)
    if seed is None:
        greedy = dataclasses.replace(decoding.sampling, temperature=0.0)
        decoding = dataclasses.replace(decoding, sampling=greedy)
    for rows in prompt_rows(prompts, config, mesh, with_response=False):
        yield generate(
            model,
            params,
            rows,
            key=key,
            decoding=decoding,
            prefill_width=config.max_prompt_length,
            dtype=config.dtype,
        )


class Response(NamedTuple):
    """The tokens of one response, and why it ended.

    Attributes:
      tokens: token ids, without the token that ended it.
      finish_reason: "stop" after a token that ends a response, otherwise "length".
    """

    tokens: list[int]
    finish_reason: str


def read_responses(rows: Rows, stop_ids: tuple[int, ...]) -> dict[int, Response]:
    """Example index -> its response.

    Args:
      rows: host rows; a row that fills up the last batch has example -1.
      stop_ids: tokens that end a response.
    """
    responses = {}
    for example, tokens, start, end in zip(
        rows.example, rows.tokens, rows.prompt_lengths, rows.lengths, strict=True
    ):
        if example >= 0:
            ids = tokens[start:end].tolist()
            stopped = bool(ids) and ids[-1] in stop_ids
            responses[int(example)] = Response(
                ids[:-1] if stopped else ids, "stop" if stopped else "length"
            )
    return responses


def prompt_rows(
    prompts: Sequence[Prompt],
    config: EvaluationConfig,
    mesh: Mesh | None,
    *,
    with_response: bool,
) -> Iterator[Rows]:
    """Device rows of the prompts; each process creates its part of a batch."""
    size = config.batch_size
    share = slice(None) if mesh is None else sharding.host_rows(mesh, size)
    for rows in prompt_batches(
        prompts,
        size,
        width=config.max_length,
        with_response=with_response,
        share=share,
    ):
        if mesh is None:
            yield jax.tree.map(jnp.asarray, rows)
        else:
            yield sharding.put_batch(mesh, rows)


def prompt_text(tokenizer: Tokenizer, prompt: Prompt) -> str:
    """The prompt as the model reads it, with special tokens."""
    return text_of(tokenizer, prompt.tokens, special=True)


def text_of(
    tokenizer: Tokenizer, tokens: Sequence[int], *, special: bool = False
) -> str:
    """Text of tokens, with or without special tokens."""
    text = tokenizer.decode(
        list(tokens),
        skip_special_tokens=not special,
        clean_up_tokenization_spaces=False,
    )
    return cast(str, text)  # one sequence: not a list
