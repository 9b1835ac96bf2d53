"""Prompts of an evaluation set, with their reference responses."""

import dataclasses
from pathlib import Path

from mgsr_jax.checkpoint.chat_template import RenderingError
from mgsr_jax.data.encoding import (
    ALPACA,
    Encoder,
    Encoding,
    cut_prompt,
)
from mgsr_jax.data.records import (
    DataReport,
    Example,
    Rejected,
    check_report,
    data_report,
    read_examples,
)
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
    max_bad_fraction: float = 0.05,
) -> tuple[list[Prompt], DataReport]:
    """Load an evaluation set.

    Only a prompt can be too long: references are compared uncut.

    Raises:
      ValueError: there is no usable record, or too many are malformed; the error names
        the first few.
      FileNotFoundError: see `records.read_examples`.
    """
    prompts: list[Prompt] = []
    problems, messages = [], []
    encoder, limit = Encoder(tokenizer, encoding), encoding.prompt_limit
    for example in read_examples(path, split=split):
        if isinstance(example, Rejected):
            problems.append(example.problem)
            messages.append(example.message)
            continue
        try:
            tokens, response = _tokens(encoder, example)
        except RenderingError as error:
            problems.append("malformed")
            messages.append(f"{example.source}: {error}")
            continue
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
    report = data_report(len(prompts), problems, messages)
    check_report(path, report, len(problems), max_bad_fraction)
    return prompts, report


def _tokens(encoder: Encoder, example: Example) -> tuple[list[int], list[int]]:
    """Prompt and first reference; prompts only have no reference."""
    messages, input = example.messages, example.input
    if not example.references:
        return encoder.prompt(messages, input), []
    turns = encoder.turns(messages, input, example.references[0])
    return turns.prompt, turns.response


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
