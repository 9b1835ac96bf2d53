"""How a record's text becomes tokens: one path for training, sampling, evaluation."""

import dataclasses
from typing import Any

ALPACA_HEAD = (
    "Below is an instruction that describes a task{}. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{}\n\n"
)
TEMPLATES = ("alpaca", "chat")
TOO_LONG = ("drop", "truncate")


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How a record becomes tokens.

    Attributes:
      template: "alpaca" (as MiniLLM and DistiLLM), or "chat": the tokenizer's own.
      add_special_tokens: begin the prompt as the tokenizer does (its bos, if any).
      max_prompt_length: most tokens of a prompt.
      max_length: most tokens of prompt and response, end-of-sequence included.
      too_long: "drop" the record, or "truncate": a prompt keeps its end, a response its
        beginning and then has no end-of-sequence.

    Raises:
      ValueError: an unknown value, or a combination that makes no sense.
    """

    template: str = "alpaca"
    add_special_tokens: bool = True
    max_prompt_length: int = 256
    max_length: int = 512
    too_long: str = "drop"

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            raise ValueError(f"template is {self.template!r}; use one of {TEMPLATES}")
        if self.too_long not in TOO_LONG:
            raise ValueError(f"too_long is {self.too_long!r}; use one of {TOO_LONG}")
        if not 0 < self.max_prompt_length < self.max_length:
            raise ValueError(
                f"max_prompt_length={self.max_prompt_length} must be positive and less "
                f"than max_length={self.max_length}"
            )
        if self.template == "chat" and self.too_long == "truncate":
            raise ValueError(
                "too_long='truncate' would cut the opening of a chat template; "
                "use too_long='drop'"
            )


ALPACA = Encoding()
"""MiniLLM's and DistiLLM's lengths: 256 tokens of prompt, 512 in all."""


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
    tokenizer: Any,
    instruction: str,
    input: str = "",
    *,
    template: str = "alpaca",
    add_special_tokens: bool = True,
) -> list[int]:
    """The prompt's tokens: for training, sampling and evaluation alike.

    `add_special_tokens` puts what the tokenizer itself begins a text with (bos) before
    an Alpaca prompt; never what it ends one with, and never a second bos. A chat
    template writes its own.

    Raises:
      ValueError: `template="chat"` and the tokenizer has no chat template.
    """
    if template == "chat":
        return _encode_chat(tokenizer, instruction, input)
    text = alpaca_prompt(instruction, input)
    body = _ids(tokenizer, text)
    if not add_special_tokens:
        return body
    whole = _ids(tokenizer, text, add_special_tokens=True)
    for start in range(len(whole) - len(body) + 1):
        if whole[start : start + len(body)] == body:
            return whole[:start] + body
    raise ValueError(
        f"{type(tokenizer).__name__} encodes a prompt differently with special tokens; "
        "set add_special_tokens=False"
    )


def _encode_chat(tokenizer: Any, instruction: str, input: str) -> list[int]:
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
    return list(ids)


def encode_response(tokenizer: Any, text: str) -> list[int]:
    """The response's tokens as a continuation of a prompt that ends with a line break.

    Encoded behind a line break, whose tokens are taken off again: a tokenizer that puts
    a space before the first word of a text must not put one here. Where the line break
    merges with the text's beginning, the text is encoded by itself.
    """
    anchor, joined = _ids(tokenizer, "\n"), _ids(tokenizer, "\n" + text)
    if joined[: len(anchor)] == anchor:
        return joined[len(anchor) :]
    return _ids(tokenizer, text)


def _ids(tokenizer: Any, text: str, add_special_tokens: bool = False) -> list[int]:
    # split_special_tokens: "</s>" in somebody's text is text, not an end of sequence.
    return tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        split_special_tokens=True,
        verbose=False,
    ).input_ids


def eos_id(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-sequence token, so no response could end; set "
            "eos_token in its tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def cut_prompt(tokenizer: Any, prompt: list[int], limit: int) -> list[int]:
    """The prompt's end; a bos at its beginning stays."""
    if len(prompt) <= limit:
        return prompt
    bos = prompt[:1] if prompt[0] == tokenizer.bos_token_id else []
    return bos + prompt[len(prompt) - limit + len(bos) :]
