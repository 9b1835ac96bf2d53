"""Settings that turn a record into tokens."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mgsr_jax.data.teacher_names import TeacherNames

TEMPLATES = ("auto", "alpaca", "chat", "none")
TEMPLATE_SUFFIX = ".jinja"
TOO_LONG = ("drop", "truncate")
TRAIN_ON = ("last", "all")


@dataclasses.dataclass(frozen=True)
class Encoding:
    """Settings that turn a record into tokens.

    Attributes:
      template: "alpaca" (as MiniLLM and DistiLLM), "chat" for the tokenizer's own chat
        template, the path of a template file (.jinja), "none" for the texts as they
        are, or "auto": "chat" where the tokenizer has a template, otherwise "alpaca".
      add_special_tokens: put the tokenizer's bos, if it has one, before the prompt. A
        chat template writes its own.
      max_prompt_length: largest number of tokens of a prompt; None: half of
        `max_length`.
      max_length: largest number of tokens of prompt and response together, including
        end-of-sequence.
      too_long: "drop" leaves the record out; "truncate" keeps the prompt's end and the
        response's beginning. A response that is cut has no end-of-sequence.
      template_args: further variables of a chat template.
      system: a system message for conversations that begin without one.
      train_on: "last" response of a conversation, or "all" of them.
      template_text: text of the chat template; `resolved` sets it.
      teacher_prompt: text of the last turn as the teacher reads it; see `filled`. None:
        as the student reads it.
      max_teacher_prompt_length: largest number of tokens of a prompt that the teacher
        reads in this case; None: `max_length`.
      teachers: how records name their teacher; None: there is one, or none.

    Raises:
      ValueError: a value is unknown, or two settings contradict each other.
    """

    template: str = "alpaca"
    add_special_tokens: bool = True
    max_prompt_length: int | None = None
    max_length: int = 512
    too_long: str = "drop"
    template_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    system: str = ""
    train_on: str = "last"
    template_text: str | None = None
    teacher_prompt: str | None = None
    max_teacher_prompt_length: int | None = None
    teachers: TeacherNames | None = None

    def __post_init__(self) -> None:
        is_file = self.template.endswith(TEMPLATE_SUFFIX)
        if self.template not in TEMPLATES and not is_file:
            raise ValueError(
                f"template is {self.template!r}; expected one of {TEMPLATES}, or the "
                f"path of a template file that ends in {TEMPLATE_SUFFIX}"
            )
        for name, choices in (("too_long", TOO_LONG), ("train_on", TRAIN_ON)):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} is {value!r}; expected one of {choices}")
        if not 0 < self.prompt_limit < self.max_length:
            raise ValueError(
                f"max_prompt_length is {self.prompt_limit}; expected 1 to "
                f"{self.max_length - 1}, less than max_length={self.max_length}"
            )
        if (self.template == "chat" or is_file) and self.too_long == "truncate":
            raise ValueError(
                "too_long='truncate' would cut the beginning of a chat template; use "
                "too_long='drop' with a chat template"
            )
        without = {"template_args": ("alpaca", "none"), "system": ("none",)}
        for name, templates in without.items():
            if getattr(self, name) and self.template in templates:
                raise ValueError(
                    f"{name} is set, but template {self.template!r} has no place for "
                    "it; set template to chat or to a template file"
                )

        if self.teacher_prompt is not None:
            self._check_teacher_prompt(self.teacher_prompt)

    def _check_teacher_prompt(self, text: str) -> None:
        for name, needed in (("too_long", "drop"), ("train_on", "last")):
            if (value := getattr(self, name)) != needed:
                raise ValueError(
                    f"teacher_prompt is set and {name} is {value!r}; expected "
                    f"{needed!r}: teacher and student read only one response alike"
                )
        if "{prompt}" not in text or self.teacher_limit < 1:
            raise ValueError(
                f"teacher_prompt is {text!r} and max_teacher_prompt_length is "
                f"{self.teacher_limit}; expected a text with {{prompt}}, and 1 or more"
            )

    @property
    def teacher_limit(self) -> int:
        """Largest number of tokens of a prompt of the teacher's own."""
        limit = self.max_teacher_prompt_length
        return self.max_length if limit is None else limit

    @property
    def teacher_width(self) -> int:
        """Largest number of tokens of prompt and response that the teacher reads."""
        if self.teacher_prompt is None:
            return self.max_length
        return self.teacher_limit + self.max_length - 1

    @property
    def prompt_limit(self) -> int:
        """Largest number of tokens of a prompt."""
        if self.max_prompt_length is None:
            return self.max_length // 2
        return self.max_prompt_length


ALPACA = Encoding()
"""The lengths of MiniLLM and DistiLLM: 256 tokens of prompt, 512 in total."""
