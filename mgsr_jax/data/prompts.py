"""Prompts of an evaluation set, with their reference responses."""

import dataclasses
from pathlib import Path

from mgsr_jax.data.encoding import (
    ALPACA,
    Encoder,
    Encoding,
    cut_prompt,
)
from mgsr_jax.data.forms import Form, recognise
from mgsr_jax.data.records import Example, Rejected, examples_of
from mgsr_jax.data.report import DataReport, check_report, data_report
from mgsr_jax.data.source_settings import Columns
from mgsr_jax.data.sources import open_source
from mgsr_jax.typing import Tokenizer


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt of an evaluation set.

    Attributes:
      tokens: token ids of the prompt.
      response: token ids of the first reference, with the token that ends a response,
        cut at `max_length`.
      references: text of every reference, uncut.
      example: index among the prompts; random keys are folded by it.
      scored: whether the set's metrics count it.
      source: "file:line".
    """

    tokens: tuple[int, ...]
    response: tuple[int, ...]
    references: tuple[str, ...]
    example: int
    scored: bool
    source: str


def load_prompts(
    path: str | Path,
    tokenizer: Tokenizer,
    encoding: Encoding = ALPACA,
    *,
    split: str = "train",
    columns: Columns | None = None,
    max_bad_fraction: float = 0.05,
) -> tuple[list[Prompt], DataReport]:
    """Load an evaluation set, in any of the forms of `records.read_examples`.

    Only a prompt can be too long: references are compared uncut.

    Raises:
      ValueError: there is no usable record, too many are malformed (the error names the
        first few), or there are prompts only, with which no response is compared.
      FileNotFoundError: see `sources.open_source`.
    """
    source = open_source(path, split)
    form = recognise(source, columns)
    _check_responses(path, form)
    prompts: list[Prompt] = []
    problems, messages, lengths = [], [], []
    encoder, limit = Encoder(tokenizer, encoding), encoding.prompt_limit
    for example in examples_of(source, form):
        turns = example if isinstance(example, Rejected) else encoder.encode(example)
        if isinstance(turns, Rejected):
            problems.append(turns.problem)
            messages.append(turns.message)
            continue
        assert isinstance(example, Example)
        tokens, response = turns.prompt, turns.response
        lengths.append(len(tokens))
        too_long = len(tokens) > limit
        problems.append("too_long" if too_long else "")
        if too_long:
            messages.append(
                f"{example.source}: {len(tokens)} tokens of prompt, at most {limit}"
            )
        if not too_long or encoding.too_long == "truncate":
            tokens = cut_prompt(tokenizer, tokens, limit)
            response = response[: encoding.max_length - len(tokens)]
            prompts.append(_prompt(example, tokens, response, len(prompts)))
    report = data_report(form, len(prompts), problems, messages, prompt_lengths=lengths)
    check_report(path, report, len(problems), max_bad_fraction)
    return prompts, report


def _check_responses(path: str | Path, form: Form) -> None:
    if form.prompts_only:
        raise ValueError(
            f"data {str(path)!r} holds prompts only ({', '.join(form.read)}), but "
            "scores compare with references; give data with responses, or use mgsr "
            "generate"
        )


def _prompt(
    example: Example, tokens: list[int], response: list[int], index: int
) -> Prompt:
    return Prompt(
        tokens=tuple(tokens),
        response=tuple(response),
        references=example.references,
        example=index,
        scored=example.scored,
        source=example.source,
    )
