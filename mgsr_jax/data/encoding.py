"""Tokens of prompts and responses: one path for training, sampling, evaluation."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mgsr_jax.checkpoint.chat_template import (
    OWN_TEMPLATE,
    ChatTemplate,
    RenderingError,
    own_template,
)
from mgsr_jax.data.conversations import Message
from mgsr_jax.data.encoding_settings import ALPACA, TEMPLATES, Encoding
from mgsr_jax.data.plain_text import (
    alpaca_conversation,
    bare_prompt,
    encode_plain_prompt,
    encode_response,
    encode_text_behind,
    filled,
)
from mgsr_jax.data.templates import Turns, chat_prompt, chat_turns
from mgsr_jax.typing import Tokenizer

if TYPE_CHECKING:  # the package datasets, which records need, is slow to import
    from mgsr_jax.data.records import Example, Rejected


def resolved(encoding: Encoding, tokenizer: Tokenizer) -> Encoding:
    """The settings with a definite template, and its text if it is a chat template.

    Raises:
      ValueError: `template="chat"` and the tokenizer has no chat template, or the
        template does not fit the other settings.
      FileNotFoundError: there is no such template file.
    """
    template, text = encoding.template, None
    if template in ("auto", "chat"):
        text = own_template(tokenizer)
        if template == "chat" and text is None:
            raise ValueError(
                "template='chat', but the tokenizer has no chat template; use the path "
                "of a template file, a tokenizer whose tokenizer_config.json has one, "
                "or (mgsr chat does not take them) 'alpaca' or 'none'"
            )
        template = "alpaca" if text is None else "chat"
    elif template not in TEMPLATES:
        file = Path(template)
        if not file.is_file():
            raise FileNotFoundError(
                f"template file {template} is missing; check the path"
            )
        text = file.read_text(encoding="utf-8")
    return dataclasses.replace(encoding, template=template, template_text=text)


class Encoder:
    """Turns conversations into tokens: one path for training, sampling, evaluation.

    Args:
      tokenizer: a fast tokenizer of transformers.
      encoding: the settings.

    Attributes:
      tokenizer: the tokenizer.
      encoding: the settings with a definite template.
      chat: the chat template; None for the other templates.

    Raises:
      ValueError, FileNotFoundError: see `resolved`.
    """

    def __init__(self, tokenizer: Tokenizer, encoding: Encoding = ALPACA):
        self._given = encoding
        self.tokenizer, self.encoding = tokenizer, resolved(encoding, tokenizer)
        self.chat: ChatTemplate | None = None
        self._nests = False  # not known yet
        if (text := self.encoding.template_text) is not None:
            is_own = self.encoding.template == "chat"
            name = OWN_TEMPLATE if is_own else f"template {encoding.template}"
            arguments = self.encoding.template_args
            self.chat = ChatTemplate(tokenizer, text, arguments, name)

    def prompt(self, messages: Sequence[Message], input: str = "") -> list[int]:
        """Tokens of a conversation up to its response.

        Args:
          messages: the turns before the response.
          input: further context of the last turn.

        Raises:
          RenderingError: the template has no place for the messages, or refuses them.
        """
        if self.chat is not None:
            return chat_prompt(self.chat, self._conversation(messages, input))
        is_alpaca = self.encoding.template == "alpaca"
        if is_alpaca:
            text = alpaca_conversation(self._with_system(messages), input)
        else:
            text = bare_prompt(self._instruction(messages), input)
        return encode_plain_prompt(
            self.tokenizer,
            text,
            literal=is_alpaca,
            add_special_tokens=self.encoding.add_special_tokens,
        )

    def encode(self, example: "Example") -> "Turns | Rejected":
        """Tokens of a record; it is rejected if the template has no place for it."""
        from mgsr_jax.data.records import Rejected

        messages, input = example.messages, example.input
        try:
            if example.references:
                turns = self.turns(messages, input, example.references[0])
            else:
                turns = Turns(self.prompt(messages, input), [])
            return turns._replace(teacher_prompt=self._teacher_prompt(example))
        except RenderingError as error:
            return Rejected("malformed", f"{example.source}: {error}")

    def _teacher_prompt(self, example: "Example") -> list[int]:
        if (template := self.encoding.teacher_prompt) is None:
            return []
        *before, last = example.messages
        reference = "".join(example.references[:1])
        text = filled(template, bare_prompt(last.content, example.input), reference)
        return self.prompt([*before, last._replace(content=text)])

    def turns(self, messages: Sequence[Message], input: str, response: str) -> Turns:
        """Tokens of a conversation up to a response, and of the response with its end.

        Args:
          messages: the turns before the response.
          input: further context of the last turn.
          response: text of the response.

        Raises:
          RenderingError: the template has no place for the messages, refuses them, or
            changes the text of a turn when later turns are added.
          ValueError: it does so for every conversation.
        """
        end = [eos_id(self.tokenizer)]
        if self.chat is not None:
            return self._chat_turns(self.chat, messages, input, response, end)
        prompt = self.prompt(messages, input)
        if self.encoding.template == "alpaca":
            self._check_trains_last(messages)
            return Turns(prompt, encode_response(self.tokenizer, response) + end)
        text = bare_prompt(self._instruction(messages), input)
        tokens = encode_text_behind(self.tokenizer, text, response)
        ended = tokens and tokens[-1] in self._special_ids
        return Turns(prompt, tokens if ended else tokens + end)

    def _chat_turns(
        self,
        chat: ChatTemplate,
        messages: Sequence[Message],
        input: str,
        response: str,
        end: list[int],
    ) -> Turns:
        train_all = self.encoding.train_on == "all"
        if not self._nests:
            chat.check_nesting(several_turns=train_all)
            self._nests = True
        conversation = self._conversation(messages, input)
        turns = chat_turns(chat, conversation, response, train_all=train_all)
        if chat.end_of_turn is None:
            return turns._replace(response=turns.response + end)
        return turns

    @property
    def template_file_text(self) -> str | None:
        """Text of the template file; None if the template is not from a file."""
        is_own = self.encoding.template == "chat"
        return None if is_own else self.encoding.template_text

    @functools.cached_property
    def notes(self) -> tuple[str, ...]:
        """Lines for the log: which template is used, and what is unusual about it."""
        template, auto = self.encoding.template, self._given.template == "auto"
        if self.chat is None:
            reason = " (auto: the tokenizer has no chat template)" if auto else ""
            return (f"template: {template}{reason}",)
        used = OWN_TEMPLATE if template == "chat" else template
        lines = [f"template: {used}{' (auto)' if auto else ''}"]
        if self.chat.end_of_turn is None:
            eos = self.tokenizer.eos_token
            lines.append(
                f"{self.chat.name} writes no token behind the last response; the "
                f"tokenizer's end-of-sequence {eos} ends it"
            )
        if (today := self.chat.today) is not None:
            lines.append(
                f"{self.chat.name} writes today's date: always that of {today}, which "
                "template_args.today sets"
            )
        return tuple(lines)

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(id_ for id_, token in added if token.special)

    def _instruction(self, messages: Sequence[Message]) -> str:
        """The text of the only turn."""
        roles = [message.role for message in messages]
        if roles != ["user"]:
            raise RenderingError(
                f"template {self.encoding.template!r} has a place for one turn of the "
                f"user, got the roles {roles}; set template to chat or to a template "
                "file"
            )
        return messages[0].content

    def _conversation(
        self, messages: Sequence[Message], input: str
    ) -> list[dict[str, str]]:
        conversation = [m._asdict() for m in self._with_system(messages)]
        if input:
            last = conversation[-1]
            last["content"] = bare_prompt(last["content"], input)
        return conversation

    def _with_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages, with the settings' system message if they have none."""
        if not self.encoding.system or messages[0].role == "system":
            return messages
        return [Message("system", self.encoding.system), *messages]

    def _check_trains_last(self, messages: Sequence[Message]) -> None:
        earlier = any(message.role == "assistant" for message in messages)
        if earlier and self.encoding.train_on == "all":
            raise RenderingError(
                "template 'alpaca' does not mark where an earlier response ends, so it "
                "cannot be trained; set train_on to last, or template to chat"
            )


def encode_prompt(
    tokenizer: Tokenizer,
    instruction: str,
    input: str = "",
    *,
    template: str = "alpaca",
    add_special_tokens: bool = True,
) -> list[int]:
    """Tokens of a prompt of one turn: `Encoder.prompt` for a single use.

    `add_special_tokens` puts the tokenizer's bos before the prompt. It never adds a
    second bos, or the special tokens that end a text.

    Raises:
      ValueError: see `Encoder`.
    """
    encoding = Encoding(template, add_special_tokens)
    return Encoder(tokenizer, encoding).prompt([Message("user", instruction)], input)


def eos_id(tokenizer: Tokenizer) -> int:
    """The end-of-sequence token; a ValueError if the tokenizer has none."""
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ValueError(
            "the tokenizer has no end-of-sequence token, so a response cannot end; set "
            "eos_token in its tokenizer_config.json"
        )
    return eos


def cut_prompt(tokenizer: Tokenizer, prompt: list[int], limit: int) -> list[int]:
    """Keep the last `limit` tokens of a prompt; a bos at its beginning stays."""
    if len(prompt) <= limit:
        return prompt
    bos = prompt[:1] if prompt[0] == tokenizer.bos_token_id else []
    return bos + prompt[len(prompt) - limit + len(bos) :]
