"""Prompts of `generate`: read from people and files, rendered to tokens."""

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from mgsr_jax.data.conversations import Message
from mgsr_jax.data.source_settings import Columns, is_data_file

if TYPE_CHECKING:
    from mgsr_jax.data.encoding import Encoder


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt before it is rendered.

    Attributes:
      messages: the turns before the response; a bare text is one turn of the user.
      input: further context of the last turn.
      source: where the prompt was read, for errors.
    """

    messages: Sequence[Message]
    input: str = ""
    source: str = "prompt"


def read_requests(
    prompt: str | list[str] | None,
    file: str | None,
    context: str,
    columns: Columns | None = None,
) -> list[Request]:
    """The prompts of the command line, of a file, or of standard input.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a record of a data file is no prompt, both or no sources are given, or
        there is no prompt in it.
    """
    if prompt is not None and file is not None:
        raise ValueError("both prompt and file are set; leave one of them out")
    if prompt is not None:
        texts = [prompt] if isinstance(prompt, str) else prompt
        requests = [_request(text, context, "prompt") for text in texts]
    elif file is None or file == "-":
        if file is None and sys.stdin.isatty():
            raise ValueError(
                "no prompt is given; set --prompt TEXT or --file FILE, or write one "
                "prompt a line to standard input"
            )
        requests = list(_lines("standard input", sys.stdin, context))
    elif is_data_file(file):
        requests = list(_records(file, context, columns))
    else:
        with open(file, encoding="utf-8") as lines:
            requests = list(_lines(file, lines, context))
    if not requests:
        source = "the list" if prompt is not None else file or "standard input"
        raise ValueError(f"{source} holds no prompt; give at least one")
    return requests


def encode_request(encoder: "Encoder", request: Request) -> list[int]:
    """Tokens of a prompt.

    Raises:
      ValueError: the template has no place for the messages, refuses them, or the
        prompt has no tokens.
    """
    try:
        ids = encoder.prompt(request.messages, request.input)
    except ValueError as error:
        raise ValueError(f"{request.source}: {error}") from error
    if not ids:
        raise ValueError(f"{request.source} is empty; give at least one token")
    return ids


def _request(text: str, context: str, source: str) -> Request:
    return Request([Message("user", text)], context, source)


def _lines(source: str, lines: Iterable[str], context: str) -> Iterator[Request]:
    for number, line in enumerate(lines, 1):
        if text := line.rstrip("\r\n"):
            yield _request(text, context, f"{source}:{number}")


def _records(file: str, context: str, columns: Columns | None) -> Iterator[Request]:
    from mgsr_jax.data.records import read_prompts

    for example in read_prompts(file, columns=columns):
        yield Request(example.messages, example.input or context, example.source)
