"""Chat templates of checkpoints: conversations rendered as text.

A template is a program (Jinja) in a checkpoint's folder. transformers renders it in
jinja2's ImmutableSandboxedEnvironment, which refuses access to Python's internals.
"""

import dataclasses
import datetime
import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from mgsr_jax.typing import Tokenizer

Conversation = Sequence[Mapping[str, str]]
"""Messages in their order: records with `role` and `content`."""

OWN_TEMPLATE = "the tokenizer's chat template"

TODAY = "2024-07-26"
"""The day that a template reads as today's: a row must not depend on the day.

It is the day that the templates of Llama 3 fall back to where they are given none.
"""

_DATE_CALL = re.compile(r"""strftime_now\(\s*(['"])([^'"]*)\1\s*\)""")
_SENTINEL = "\N{OBJECT REPLACEMENT CHARACTER}response"
_SYSTEM = {"role": "system", "content": "Be brief."}
_USER = {"role": "user", "content": "Hello"}
_DIFFERENCE = 30  # characters of a difference that an error shows


class RenderingError(ValueError):
    """A conversation that a template cannot render, or cannot train on."""


@dataclasses.dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A chat template with the tokenizer whose special tokens it writes.

    Attributes:
      tokenizer: gives the template its special tokens.
      source: the template's text.
      arguments: further variables of the template. "today" is read here: the day that
        the template writes as today's, such as "2025-01-31".
      name: its name in errors.

    Raises:
      ValueError: an argument has a name that is not the template's, "today" is not a
        day, or the template asks for a date in a way that is not known.
    """

    tokenizer: Tokenizer
    source: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    name: str = OWN_TEMPLATE

    def __post_init__(self) -> None:
        signature = inspect.signature(self.tokenizer.apply_chat_template)
        reserved = {*signature.parameters, "messages"}
        reserved -= {"tools", "documents", "kwargs"}
        if taken := sorted(reserved & set(self.arguments)):
            raise ValueError(
                f"template_args has {taken[0]!r}, which is no variable of a template; "
                "leave it out"
            )
        self._dated_source  # noqa: B018  it is checked

    @functools.cached_property
    def _dated_source(self) -> str:
        """The template with the day's text in place of the calls for today's date."""
        today = self.arguments.get("today", TODAY)
        try:
            day = datetime.datetime.fromisoformat(str(today))
        except ValueError as error:
            raise ValueError(
                f"template_args.today={today!r} is not a day; write it as {TODAY}"
            ) from error
        source = _DATE_CALL.sub(lambda m: f'"{day.strftime(m[2])}"', self.source)
        if "strftime_now(" in source:
            raise ValueError(
                f"{self.name} calls strftime_now with more than a format in quotes, so "
                "rows would depend on the day; set template to a file of your own"
            )
        return source

    @property
    def today(self) -> str | None:
        """The day that the template writes as today's; None if it writes none."""
        if "strftime_now(" not in self.source:
            return None
        return str(self.arguments.get("today", TODAY))

    def text(self, conversation: Conversation, *, add_generation_prompt: bool) -> str:
        """Text of a conversation.

        Args:
          conversation: at least one message.
          add_generation_prompt: whether the beginning of the assistant's next turn
            follows.

        Raises:
          RenderingError: the template refuses the messages, or has a fault.
        """
        from jinja2 import TemplateError

        arguments = {k: v for k, v in self.arguments.items() if k != "today"}
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in conversation],
                chat_template=self._dated_source,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **arguments,
            )
        except (TemplateError, TypeError) as error:
            roles = [message["role"] for message in conversation]
            raise RenderingError(
                f"{self.name} refuses messages of the roles {roles}: {error}"
            ) from error
        return cast(str, text)

    def turn(
        self, conversation: Conversation, response: Mapping[str, str]
    ) -> tuple[str, str]:
        """Text of a prompt, and the text that the response adds to it.

        The added text ends with the token that ends the turn. Text behind that token,
        such as a line break, is left out. If the template writes no such token, white
        space behind the response is left out.

        Raises:
          RenderingError: the prompt is not the beginning of the conversation with the
            response, or the turn does not end as the template's turns end.
        """
        prompt = self.text(conversation, add_generation_prompt=True)
        whole = self.text([*conversation, response], add_generation_prompt=False)
        self.check_begins(whole, prompt)
        turn, end, ending = whole[len(prompt) :], self.end_of_turn, self._ending
        if end is not None and end in turn:
            return prompt, turn[: turn.rindex(end) + len(end)]
        if end is None and turn.endswith(ending):
            return prompt, turn[: len(turn) - len(ending)] + ending.rstrip()
        raise RenderingError(
            f"{self.name} ends a response with {ending!r}, but this one with "
            f"{turn[-_DIFFERENCE:]!r}; use a template that ends all alike"
        )

    def check_begins(self, text: str, beginning: str) -> None:
        """Refuse a conversation whose text does not begin with its first part's text.

        Raises:
          RenderingError: shows where the two texts differ.
        """
        if text.startswith(beginning):
            return
        pairs = enumerate(zip(text, beginning, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(beginning)))
        expected, got = (part[at : at + _DIFFERENCE] for part in (beginning, text))
        raise RenderingError(
            f"{self.name} writes {expected!r} in a conversation up to a turn, but "
            f"{got!r} at the same place in the conversation with later turns"
        )

    @functools.cached_property
    def end_of_turn(self) -> str | None:
        """The token that ends the assistant's turn; None if the template writes none.

        Raises:
          RenderingError: the template cannot render a question and a response.
        """
        match = self._added_tokens.search(self._ending)
        return match and match.group()

    @property
    def end_id(self) -> int | None:
        """Id of the token that ends the assistant's turn."""
        end = self.end_of_turn
        if end is None:
            return None
        return cast(int, self.tokenizer.convert_tokens_to_ids(end))

    @functools.cached_property
    def _question(self) -> Conversation:
        """A question of the user, behind a system message if the template needs one."""
        try:
            self.text([_USER], add_generation_prompt=False)
        except RenderingError:
            self.text([_SYSTEM, _USER], add_generation_prompt=False)
            return [_SYSTEM, _USER]
        return [_USER]

    @functools.cached_property
    def _ending(self) -> str:
        """The text that the template writes behind the last response."""
        response = {"role": "assistant", "content": _SENTINEL}
        text = self.text([*self._question, response], add_generation_prompt=False)
        if _SENTINEL not in text:
            raise RenderingError(
                f"{self.name} leaves out the assistant's text; use a template that "
                "writes the content of every message"
            )
        return text.rpartition(_SENTINEL)[2]

    @functools.cached_property
    def control_tokens(self) -> re.Pattern[str]:
        """Matches tokens that the text of the data must not become.

        They are the special tokens, and those that the template writes around a turn:
        some tokenizers do not mark these as special.
        """
        added = self.tokenizer.added_tokens_decoder.values()
        special = [token.content for token in added if token.special]
        turn = self.text(self._question, add_generation_prompt=False)
        return _any_of([*special, *self._added_tokens.findall(turn)])

    @functools.cached_property
    def _added_tokens(self) -> re.Pattern[str]:
        """Matches tokens that are no part of the text's words, special or not."""
        added = self.tokenizer.added_tokens_decoder.values()
        return _any_of([token.content for token in added if token.content.strip()])

    def check_nesting(self, *, several_turns: bool) -> None:
        """Refuse a template that a response, or several, cannot be cut out of.

        Raises:
          ValueError: the text of a short conversation changes when a turn is added, or
            `several_turns` and the template writes no token that ends a turn.
        """
        answer = {"role": "assistant", "content": "Hi"}
        try:
            conversation = self._question
            first = "".join(self.turn(conversation, answer))
            if several_turns:
                conversation = [*conversation, answer, _USER]
                prompt, _ = self.turn(conversation, answer)
                self.check_begins(prompt, first)
        except RenderingError as error:
            fix = "set train_on to last, or " if several_turns else ""
            raise ValueError(
                f"{error}, so its responses cannot be trained on; {fix}"
                "set template to a file of your own"
            ) from error
        if several_turns and self.end_of_turn is None:
            raise ValueError(
                f"{self.name} writes no token that ends a turn, so earlier turns would "
                "not end; set train_on to last, or template to a file of your own"
            )


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest first; nothing if there is none."""
    by_length = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, by_length)) or r"(?!)")


def own_template(tokenizer: Tokenizer) -> str | None:
    """Text of the tokenizer's own chat template; None if it has none.

    Raises:
      ValueError: it has several templates, and none is the default.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    return tokenizer.get_chat_template()


def same_template(first: Tokenizer, second: Tokenizer) -> bool:
    """Whether two tokenizers have the same chat template, or both none."""
    return own_template(first) == own_template(second)
