"""Conversations as tokens, rendered by a chat template.

The prompt is all that the template writes up to a response. The response is what the
template writes then, up to and including the token that ends the turn. Text of the data
stays text where it looks like a control token.
"""

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from mgsr_jax.checkpoint.chat_template import (
    ChatTemplate,
    Conversation,
    RenderingError,
)
from mgsr_jax.typing import Tokenizer

_PRIVATE_USE = range(0xE000, 0xF900)  # characters that Unicode leaves to programs


class Turns(NamedTuple):
    """Tokens of a conversation up to a response, and of the response.

    Attributes:
      prompt: all before the response.
      response: the response, with the token that ends it. Empty if there is none.
      earlier: (start, end) in `prompt` of each earlier response that is trained too.
      teacher_prompt: what the teacher reads in place of `prompt`; empty: the same.
    """

    prompt: list[int]
    response: list[int]
    earlier: tuple[tuple[int, int], ...] = ()
    teacher_prompt: Sequence[int] = ()


def chat_prompt(template: ChatTemplate, conversation: Conversation) -> list[int]:
    """Tokens of a conversation up to where the assistant's next turn begins.

    Raises:
      RenderingError: the template refuses the conversation.
    """
    text = _Text(template, conversation)
    prompt = template.text(text.conversation, add_generation_prompt=True)
    return text.continuation("", [], prompt)


def chat_turns(
    template: ChatTemplate,
    conversation: Conversation,
    response: str,
    *,
    train_all: bool,
) -> Turns:
    """Tokens of a conversation up to a response, and of the response.

    Where the template writes no token that ends the turn, the response has none.

    Args:
      template: the chat template.
      conversation: the messages before the response.
      response: the assistant's response.
      train_all: whether earlier turns of the assistant are marked too. They have the
        tokens that they have as a last response.

    Raises:
      RenderingError: the template refuses the conversation, or the text of a turn
        changes when later turns are added.
    """
    last = {"role": "assistant", "content": response}
    text = _Text(template, [*conversation, last])
    messages, done, tokens, turns = text.conversation, "", [], []
    for i, message in enumerate(messages):
        is_last = i == len(messages) - 1
        if not is_last and not (train_all and message["role"] == "assistant"):
            continue
        if i == 0:
            raise RenderingError(
                "the conversation begins with the assistant's turn, which has no "
                "prompt; set train_on to last"
            )
        prompt, turn = template.turn(messages[:i], message)
        template.check_begins(prompt, done)
        tokens = tokens + text.continuation(done, tokens, prompt[len(done) :])
        turn_tokens = text.continuation(prompt, tokens, turn)
        turns.append((len(tokens), len(tokens) + len(turn_tokens)))
        done, tokens = prompt + turn, tokens + turn_tokens
    start, _ = turns.pop()
    return Turns(tokens[:start], tokens[start:], tuple(turns))


class _Text:
    """Text of a conversation in which the data's control tokens are hidden.

    A template must not read them as its own, and the tokenizer must not either. So each
    is replaced with a mark, which the template copies like any other text.

    Attributes:
      conversation: the messages with marks.
    """

    def __init__(self, template: ChatTemplate, conversation: Conversation):
        self._tokenizer = template.tokenizer
        data = "".join(itertools.chain(*(message.values() for message in conversation)))
        mark = next(c for c in map(chr, _PRIVATE_USE) if c not in data)
        self._marks = re.compile(f"{mark}([0-9]+){mark}")
        self._hidden: list[str] = []

        def hide(match: re.Match[str]) -> str:
            self._hidden.append(match.group())
            return f"{mark}{len(self._hidden) - 1}{mark}"

        control = template.control_tokens
        self.conversation = [
            {name: control.sub(hide, value) for name, value in message.items()}
            for message in conversation
        ]

    def continuation(
        self, before: str, before_tokens: list[int], text: str
    ) -> list[int]:
        """Tokens of `text` behind `before`, whose tokens are given.

        They are those of the joint text, unless `before` has others there: then `text`
        is encoded by itself.
        """
        joint = self._tokens(before + text)
        if joint[: len(before_tokens)] == before_tokens:
            return joint[len(before_tokens) :]
        return self._tokens(text, follows=True)

    def _tokens(self, text: str, *, follows: bool = False) -> list[int]:
        tokens = []
        for i, part in enumerate(self._marks.split(text)):
            encode = following_ids if follows or i else token_ids
            if i % 2 == 1:
                tokens += self._data_tokens(self._hidden[int(part)])
            else:
                tokens += encode(self._tokenizer, part, literal=False)
        return tokens

    def _data_tokens(self, control: str) -> list[int]:
        """Tokens of the text of a control token."""
        tokens = following_ids(self._tokenizer, control, literal=True)
        if tokens != [self._tokenizer.convert_tokens_to_ids(control)]:
            return tokens
        # A token that is not marked as special is found in any text but a part of it.
        parts = (control[:1], control[1:])
        encoded = (following_ids(self._tokenizer, p, literal=True) for p in parts)
        return list(itertools.chain(*encoded))


def token_ids(tokenizer: Tokenizer, text: str, *, literal: bool) -> list[int]:
    """Tokens of a text, without those that the tokenizer puts around a text.

    Args:
      tokenizer: a fast tokenizer of transformers.
      text: the text.
      literal: whether special tokens in the text, such as "</s>", are only text.
    """
    return tokenizer(
        text, add_special_tokens=False, split_special_tokens=literal, verbose=False
    ).input_ids


def following_ids(tokenizer: Tokenizer, text: str, *, literal: bool) -> list[int]:
    """Tokens of a text that follows another text.

    The text is encoded after a line break, whose tokens are then removed: some
    tokenizers put a space before the first word of a text, which is wrong here. Where
    the line break merges with the text's beginning, the text is encoded by itself.
    """
    newline = token_ids(tokenizer, "\n", literal=literal)
    joined = token_ids(tokenizer, "\n" + text, literal=literal)
    if joined[: len(newline)] == newline:
        return joined[len(newline) :]
    return token_ids(tokenizer, text, literal=literal)
