"""Prompts of `generate` and `chat`: read from people and files, rendered to tokens."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mgsr_jax.data.encoding import Encoder

Messages = Sequence[Mapping[str, str]]
"""A conversation: records with `role` and `content`."""

_KEYS = ("prompt", "messages", "instruction", "question")


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt before it is rendered.

    Attributes:
      content: an instruction, or the messages of a conversation.
      input: context of an instruction.
      source: where the prompt was read, for errors.
    """

    content: str | Messages
    input: str = ""
    source: str = "prompt"


def read_requests(
    prompt: str | list[str] | None, file: str | None, context: str
) -> list[Request]:
    """The prompts of the command line, of a file, or of standard input.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line of a .jsonl file is not a prompt, both or no sources are given,
        or there is no prompt in it.
    """
    if prompt is not None and file is not None:
        raise ValueError("both prompt and file are set; leave one of them out")
    if prompt is not None:
        texts = [prompt] if isinstance(prompt, str) else prompt
        requests = [Request(text, context) for text in texts]
    elif file is None or file == "-":
        if file is None and sys.stdin.isatty():
            raise ValueError(
                "no prompt is given; set --prompt TEXT or --file FILE, or write one "
                "prompt a line to standard input"
            )
        requests = list(_text_lines("standard input", sys.stdin, context))
    else:
        with open(file, encoding="utf-8") as lines:
            read = _json_lines if Path(file).suffix == ".jsonl" else _text_lines
            requests = list(read(file, lines, context))
    if not requests:
        raise ValueError(f"{file or 'prompt'} holds no prompt; give at least one")
    return requests


def encode_request(encoder: "Encoder", request: Request) -> list[int]:
    """Tokens of a prompt.

    Raises:
      ValueError: the template has no place for the messages, refuses them, or the
        prompt has no tokens.
    """
    from mgsr_jax.data.conversations import Message

    if isinstance(request.content, str):
        messages = [Message("user", request.content)]
    else:
        messages = [Message(m["role"], m["content"]) for m in request.content]
    try:
        ids = encoder.prompt(messages, request.input)
    except ValueError as error:
        raise ValueError(f"{request.source}: {error}") from error
    if not ids:
        raise ValueError(f"{request.source} is empty; give at least one token")
    return ids


def _text_lines(source: str, lines: Iterable[str], context: str) -> Iterator[Request]:
    for number, line in enumerate(lines, 1):
        if text := line.rstrip("\r\n"):
            yield Request(text, context, f"{source}:{number}")


def _json_lines(source: str, lines: Iterable[str], context: str) -> Iterator[Request]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _request(line, context, f"{source}:{number}")


def _request(line: str, context: str, where: str) -> Request:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON ({error}); correct it") from error
    record = record if isinstance(record, dict) else {"prompt": record}
    content = next((record[key] for key in _KEYS if key in record), None)
    if content is None or not (isinstance(content, str) or _is_conversation(content)):
        raise ValueError(
            f"{where} has the keys {sorted(record)}; expected one of {_KEYS} with a "
            "text, or with a list of messages that have a role and a content"
        )
    added = record.get("input") or context
    return Request(content, added, where)


def _is_conversation(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in value
        )
    )
