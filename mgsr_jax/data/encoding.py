"""Tokens of prompts and responses: one path for training, sampling, evaluation."""

import dataclasses
from typing import cast

from mgsr_jax.typing import Tokenizer

ALPACA_HEAD = (
    "Below is an instruction that describes a task{}. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{}\n\n"
)
TEMPLATES = ("alpaca", "chat")
TOO_LONG = ("drop", "truncate")


@dataclasses.dataclass(frozen=True)
class Encoding:
    """Settings that turn a record into tokens.

    Attributes:
      template: "alpaca" (as MiniLLM and DistiLLM), or "chat" for the tokenizer's own
        chat template.
      add_special_tokens: put the tokenizer's bos, if it has one, before the prompt.
      max_prompt_length: largest number of tokens of a prompt.
      max_length: largest number of tokens of prompt and response together, including
        end-of-sequence.
      too_long: "drop" leaves the record out; "truncate" keeps the prompt's end and the
        response's beginning. A response that is cut has no end-of-sequence.

    Raises:
      ValueError: a value is unknown, or two settings contradict each other.
    """

    template: str = "alpaca"
    add_special_tokens: bool = True
    max_prompt_length: int = 256
    max_length: int = 512
    too_long: str = "drop"

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            raise ValueError(
                f"template is {self.template!r}; expected one of {TEMPLATES}"
            )
        if self.too_long not in TOO_LONG:
            raise ValueError(
                f"too_long is {self.too_long!r}; expected one of {TOO_LONG}"
            )
        if not 0 < self.max_prompt_length < self.max_length:
            raise ValueError(
                f"max_prompt_length is {self.max_prompt_length}; expected 1 to "
                f"{self.max_length - 1}, less than max_length={self.max_length}"
            )
        if self.template == "chat" and self.too_long == "truncate":
            raise ValueError(
                "too_long='truncate' would cut the beginning of a chat template; use "
                "too_long='drop' with template='chat'"
            )


ALPACA = Encoding()
"""The lengths of MiniLLM and DistiLLM: 256 tokens of prompt, 512 in total."""


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


def encode_prompt(
    tokenizer: Tokenizer,
    instruction: str,
    input: str = "",
    *,
    template: str = "alpaca",
    add_special_tokens: bool = True,
) -> list[int]:
    """Tokens of a prompt, the same for training, sampling and evaluation.

    `add_special_tokens` puts the tokenizer's bos before an Alpaca prompt. It never adds
    a second bos, or the special tokens that end a text. A chat template contains its
    own special tokens.

    Raises:
      ValueError: `template="chat"` and the tokenizer has no chat template.
    """
    if template == "chat":
        return _encode_chat(tokenizer, instruction, input)
    text = alpaca_prompt(instruction, input)
    body = _ids(tokenizer, text)
    if not add_special_tokens:
        return body
    with_special = _ids(tokenizer, text, add_special_tokens=True)
    for start in range(len(with_special) - len(body) + 1):
        if with_special[start : start + len(body)] == body:
            return with_special[:start] + body
    raise ValueError(
        f"{type(tokenizer).__name__} encodes a prompt differently with special tokens; "
        "set add_special_tokens=False"
    )


def _encode_chat(tokenizer: Tokenizer, instruction: str, input: str) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "template='chat', but the tokenizer has no chat template; use 'alpaca', or "
            "a tokenizer whose tokenizer_config.json has one"
        )
    content = f"{instruction}\n\n{input}" if input else instruction
    # A template is a program from a checkpoint. transformers renders it in jinja2's
    # ImmutableSandboxedEnvironment, which refuses access to Python's internals.
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    return cast(list[int], ids)


def encode_response(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a response that continues a prompt ending with a line break.

    The text is encoded after a line break, whose tokens are then removed: some
    tokenizers put a space before the first word of a text, which is wrong here. Where
    the line break merges with the text's beginning, the text is encoded by itself.
    """
    newline, joined = _ids(tokenizer, "\n"), _ids(tokenizer, "\n" + text)
    if joined[: len(newline)] == newline:
        return joined[len(newline) :]
    return _ids(tokenizer, text)


def _ids(
    tokenizer: Tokenizer, text: str, add_special_tokens: bool = False
) -> list[int]:
    # split_special_tokens: a "</s>" in the data is text, not end-of-sequence.
    return tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        split_special_tokens=True,
        verbose=False,
    ).input_ids


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
