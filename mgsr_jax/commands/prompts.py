"""Prompts of `generate` and `chat`: read from people and files, rendered to tokens."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from mgsr_jax.typing import Tokenizer

Messages = Sequence[Mapping[str, str]]
"""A conversation: records with `role` and `content`."""

Template = Literal["alpaca", "chat", "none"]
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


def encode_request(
    tokenizer: Tokenizer,
    request: Request,
    *,
    template: Template,
    add_special_tokens: bool,
) -> list[int]:
    """Tokens of a prompt; a conversation is always rendered by the chat template.

    Raises:
      ValueError: the tokenizer has no chat template, or the prompt has no tokens.
    """
    from mgsr_jax.data.encoding import encode_prompt

    if not isinstance(request.content, str):
        ids = encode_messages(tokenizer, request.content)
    elif template == "none":
        text = "\n\n".join(part for part in (request.content, request.input) if part)
        ids = encode_bare(tokenizer, text, add_special_tokens=add_special_tokens)
    else:
        ids = encode_prompt(
            tokenizer,
            request.content,
            request.input,
            template=template,
            add_special_tokens=add_special_tokens,
        )
    if not ids:
        raise ValueError(f"{request.source} is empty; give at least one token")
    return ids


def encode_bare(
    tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = True
) -> list[int]:
    """Tokens of a text that the model continues; special tokens in it are parsed.

    What the tokenizer puts before a text, such as bos, is put before it once. What it
    puts behind a text is left out: a model does not continue after end-of-sequence.
    """
    body = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if not add_special_tokens:
        return body
    full = tokenizer(text, verbose=False).input_ids
    starts = range(len(full) - len(body) + 1)
    at = next((i for i in starts if full[i : i + len(body)] == body), 0)
    prefix = full[:at]
    return body if body[:at] == prefix else prefix + body


def encode_messages(
    tokenizer: Tokenizer, messages: Messages, **arguments: Any
) -> list[int]:
    """Tokens of a conversation up to where the assistant's next message begins.

    Args:
      tokenizer: has the chat template.
      messages: the conversation so far.
      **arguments: further variables of the template.

    Raises:
      ValueError: the tokenizer has no chat template, or the template refuses the
        messages.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the tokenizer has no chat template, so messages cannot be rendered; use "
            "an instruct model, put a chat_template.jinja into the model's folder, or "
            "use mgsr generate with --template none"
        )
    try:
        ids = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **arguments,
        )
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        raise ValueError(
            f"the chat template refuses messages of the roles {roles}: {error}"
        ) from error
    return cast(list[int], ids)


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
