"""Prompts and responses without a chat template: Alpaca's, and bare texts."""

import itertools
import re
from collections.abc import Sequence

from mgsr_jax.checkpoint.chat_template import RenderingError
from mgsr_jax.data.conversations import Message
from mgsr_jax.data.templates import following_ids, token_ids
from mgsr_jax.typing import Tokenizer

ALPACA_HEAD = (
    "Below is an instruction that describes a task{}. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{}\n\n"
)


def alpaca_prompt(instruction: str, input: str = "") -> str:
    r"""The prompt of Alpaca, MiniLLM and DistiLLM.

    >>> alpaca_prompt("Add.", "1 + 1")[-55:]
    '### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n### Response:\n'
    """
    if not input:
        return ALPACA_HEAD.format("", instruction) + "### Response:\n"
    context = ", paired with an input that provides further context"
    head = ALPACA_HEAD.format(context, instruction)
    return f"{head}### Input:\n{input}\n\n### Response:\n"


def alpaca_conversation(messages: Sequence[Message], input: str = "") -> str:
    r"""Alpaca's prompt of a conversation; of one turn it is `alpaca_prompt`.

    Alpaca has no form for a system message or earlier turns. Our choice: the system
    message takes the place of the first paragraph, and every turn is written as the
    last one is, with its response and an empty line behind it.

    >>> roles = ("user", "assistant", "user")
    >>> turns = list(map(Message, roles, ("Add.", "2", "?")))
    >>> alpaca_conversation(turns).partition("Add.")[2]
    '\n\n### Response:\n2\n\n### Instruction:\n?\n\n### Response:\n'

    Raises:
      RenderingError: user and assistant do not take turns, or the last turn is not the
        user's.
    """
    system = [message for message in messages[:1] if message.role == "system"]
    turns = messages[len(system) :]
    roles = [message.role for message in turns]
    expected = itertools.cycle(("user", "assistant"))
    if len(roles) % 2 == 0 or roles != list(itertools.islice(expected, len(roles))):
        raise RenderingError(
            "template 'alpaca' expects that user and assistant take turns and the user "
            f"is last, got the roles {roles}; set template to chat or a template file"
        )
    start = "### Instruction:\n"
    head, _, last = alpaca_prompt(turns[-1].content, input).partition(start)
    if system:
        head = f"{system[0].content}\n\n"
    earlier = "".join(
        f"{start}{user.content}\n\n### Response:\n{assistant.content}\n\n"
        for user, assistant in zip(turns[:-1:2], turns[1::2], strict=True)
    )
    return f"{head}{earlier}{start}{last}"


def bare_prompt(text: str, input: str = "") -> str:
    """A text, and its further context behind an empty line."""
    return "\n\n".join(part for part in (text, input) if part)


def filled(template: str, prompt: str, reference: str) -> str:
    r"""A text with {prompt} and {reference} replaced; other braces stay as they are.

    >>> filled(r"{prompt} (\boxed{{reference}})", "1 + 1?", "2")
    '1 + 1? (\\boxed{2})'
    """
    values = {"{prompt}": prompt, "{reference}": reference}
    return re.sub(r"{prompt}|{reference}", lambda found: values[found[0]], template)


def encode_plain_prompt(
    tokenizer: Tokenizer, text: str, *, literal: bool, add_special_tokens: bool
) -> list[int]:
    """Tokens of a prompt's text.

    What the tokenizer puts before a text, such as bos, is put before it once. What it
    puts behind a text is left out: a model does not continue after end-of-sequence.

    Args:
      tokenizer: a fast tokenizer of transformers.
      text: the prompt.
      literal: whether special tokens in the text, such as "</s>", are only text.
      add_special_tokens: whether the tokenizer's own come before the text.

    Raises:
      ValueError: the tokenizer encodes the text differently with its own tokens.
    """
    body = token_ids(tokenizer, text, literal=literal)
    if not add_special_tokens:
        return body
    tokens = tokenizer(text, split_special_tokens=literal, verbose=False).input_ids
    for start in range(len(tokens) - len(body) + 1):
        if tokens[start : start + len(body)] == body:
            prefix = tokens[:start]
            return body if body[:start] == prefix else prefix + body
    raise ValueError(
        f"{type(tokenizer).__name__} encodes a prompt differently with special tokens; "
        "set add_special_tokens=False"
    )


def encode_response(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a response that continues a prompt ending with a line break.

    Special tokens in the text, such as "</s>", are only text.
    """
    return following_ids(tokenizer, text, literal=True)


def encode_text_behind(tokenizer: Tokenizer, before: str, text: str) -> list[int]:
    """Tokens of a text that continues the text `before`; special tokens are parsed.

    They are those of the joint text, unless `before` has others there.
    """
    first, joint = (
        token_ids(tokenizer, part, literal=False) for part in (before, before + text)
    )
    if joint[: len(first)] == first:
        return joint[len(first) :]
    return following_ids(tokenizer, text, literal=False)
