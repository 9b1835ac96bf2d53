"""Turns of a conversation, checked one by one."""

import re
from collections.abc import Mapping
from typing import NamedTuple

_SURROGATE = re.compile("[\ud800-\udfff]")
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
"""Names of a role in the data -> ours; ShareGPT has human and gpt."""

TURN_KEYS = ("role", "from", "content", "value")
"""Keys of a turn that are read."""


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


class Unusable(Exception):
    """The reason why a record is not used.

    Args:
      reason: what was got, and what was expected.
      problem: "malformed" or "empty".
    """

    def __init__(self, reason: str, problem: str = "malformed"):
        super().__init__(reason)
        self.problem = problem


def text_of(label: str, value: object) -> str:
    """A value of the column `label` that must be text; it may be empty."""
    if value is None:
        raise Unusable(f"no {label!r}")
    if not isinstance(value, str):
        raise Unusable(f"{label!r} is a {type(value).__name__}, expected text")
    if _SURROGATE.search(value):
        raise Unusable(f"{label!r} has an unpaired surrogate")
    return value


def filled_text_of(label: str, value: object) -> str:
    """A value of the column `label` that must be text with more than white space."""
    text = text_of(label, value)
    if not text.strip():
        raise Unusable(f"empty {label!r}", "empty")
    return text


def turns_of(label: str, value: object) -> list[Message]:
    """A value of the column `label` that must be a list of messages.

    A message has a `role` and a `content`, or ShareGPT's `from` and `value`. The
    content is text, or a list of parts that are all text. One record of lists, as in
    older data sets of the hub, is read as the list of records that it stands for.

    Raises:
      Unusable: the value is something else, or has tool calls, images or other parts.
    """
    if value is None:
        raise Unusable(f"no {label!r}")
    if isinstance(value, Mapping) and all(isinstance(v, list) for v in value.values()):
        columns = zip(*value.values(), strict=False)
        value = [dict(zip(value, column, strict=True)) for column in columns]
    if not isinstance(value, list):
        got = type(value).__name__
        raise Unusable(f"{label!r} is a {got}, expected a list of messages")
    if not value:
        raise Unusable(f"empty {label!r}", "empty")
    return [_message(label, turn) for turn in value]


def _message(label: str, turn: object) -> Message:
    if not isinstance(turn, Mapping):
        got = type(turn).__name__
        raise Unusable(
            f"{label!r} has a {got}, expected messages with a role and a content"
        )
    if turn.get("tool_calls") or turn.get("function_call"):
        raise Unusable(f"{label!r} has tool calls, which are not read")
    given = turn.get("role") or turn.get("from")
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise Unusable(
            f"{label!r} has a turn of the role {given!r}; expected one of "
            f"{', '.join(_ROLES)}"
        )
    content = turn.get("content")
    content = turn.get("value") if content is None else content
    if isinstance(content, list):
        content = "".join(_part(label, part) for part in content)
    # A system prompt may be empty: some templates have a default one to be left out.
    read = text_of if role == "system" else filled_text_of
    return Message(role, read(f"{label}: content of {given}", content))


def _part(label: str, part: object) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if not isinstance(part, Mapping) or kind != "text":
        raise Unusable(f"{label!r} has content of the type {kind!r}; only text is read")
    return text_of(f"{label}: text", part.get("text"))
