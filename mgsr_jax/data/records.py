"""Records of a data set, read and checked one by one.

A bad record does not stop the reading: it becomes a `Rejected` that names its line.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from mgsr_jax.data.conversations import (
    Message,
    Unusable,
    filled_text_of,
    text_of,
    turns_of,
)
from mgsr_jax.data.forms import (
    CHATS,
    RESPONSES,
    Fields,
    Form,
    not_an_object,
    recognise,
)
from mgsr_jax.data.source_settings import Columns
from mgsr_jax.data.sources import OpenSource, open_source


class Example(NamedTuple):
    """One usable record: a conversation up to a response, and the response.

    Attributes:
      messages: the turns before the response; an instruction is one turn of the user.
      input: further context of the last turn; may be empty.
      references: the acceptable responses; training uses the first. Empty where the
        data holds prompts only.
      scored: whether metrics count the record; false where it has `"minillm": false`.
      source: "file:line".
      teacher: index of its teacher; 0 where there are not several.
    """

    messages: tuple[Message, ...]
    input: str
    references: tuple[str, ...]
    scored: bool
    source: str
    teacher: int = 0

    @property
    def instruction(self) -> str:
        """The text of the last turn before the response."""
        return self.messages[-1].content


class Rejected(NamedTuple):
    """A record that cannot be used.

    Attributes:
      problem: "malformed" or "empty".
      message: "file:line: reason".
    """

    problem: str
    message: str


def read_examples(
    path: str | Path, *, split: str = "train", columns: Columns | None = None
) -> Iterator[Example | Rejected]:
    """Read the records of a source, in the form that its first records have.

    Args:
      path: file, pattern, folder or hub data set; see `sources.open_source`.
      split: split of a folder or hub data set.
      columns: the data's names of columns that it names differently; see
        `forms.recognise`.

    Raises:
      FileNotFoundError: there is no such source.
      ValueError: the source cannot be read, or its columns fit no form.
    """
    source = open_source(path, split)
    yield from examples_of(source, recognise(source, columns))


def read_prompts(
    path: str | Path, *, split: str = "train", columns: Columns | None = None
) -> Iterator[Example]:
    """Read data whose every prompt is to be responded to; references are optional.

    Args:
      path, split, columns: see `read_examples`.

    Raises:
      FileNotFoundError: there is no such source.
      ValueError: the source cannot be read, or a record cannot be used.
    """
    for example in read_examples(path, split=split, columns=columns):
        if isinstance(example, Rejected):
            raise ValueError(f"{example.message}; correct or remove the record")
        yield example


def examples_of(source: OpenSource, form: Form) -> Iterator[Example | Rejected]:
    """Read the records of an open source in a form from `forms.recognise`."""
    for where, record in source.records():
        try:
            example = _example(where, record, form)
        except Unusable as error:
            example = Rejected(error.problem, f"{where}: {error}")
        yield example


def _example(where: str, record: object, form: Form) -> Example:
    if not isinstance(record, Mapping):
        raise Unusable(not_an_object(record))
    scored = form.value(record, "minillm")
    if not isinstance(scored, bool | None):
        label = form.label("minillm")
        raise Unusable(f"{label!r} is {scored!r}, expected true or false")
    turns, context = _prompt(record, form), ""
    if form.prompt == "instruction":
        context = _optional_text(record, form, "input")
        turns = [*_history(record, form), *turns]
    references = _take_references(turns, record, form)
    if system := _optional_text(record, form, "system"):
        if turns[:1] and turns[0].role == "system":
            raise Unusable(f"both {form.label('system')!r} and a system turn are given")
        turns.insert(0, Message("system", system))
    if not turns or turns[-1].role != "user":
        last = f"by the {turns[-1].role}" if turns else "missing"
        raise Unusable(
            f"the turn before the response is {last}, expected one by the user"
        )
    is_scored, teacher = scored is not False, form.teacher(record)
    return Example(tuple(turns), context, references, is_scored, where, teacher)


def _prompt(record: Fields, form: Form) -> list[Message]:
    """The turns of the prompt's column."""
    label, value = form.label(form.prompt), form.value(record, form.prompt)
    if form.prompt in CHATS or (form.prompt == "prompt" and isinstance(value, list)):
        return turns_of(label, value)
    return [Message("user", filled_text_of(label, value))]


def _take_references(
    turns: list[Message], record: Fields, form: Form
) -> tuple[str, ...]:
    """The responses; turns before them that their columns hold are moved to `turns`."""
    if form.prompts_only:
        _check_no_response(turns, record, form)
        return ()
    if form.response is None:
        return (_take_response(form.label(form.prompt), turns),)
    label, value = form.label(form.response), form.value(record, form.response)
    if form.response == "completion" and isinstance(value, list):
        turns += turns_of(label, value)
        return (_take_response(label, turns),)
    references = value if isinstance(value, list) else [value]
    if not references:
        raise Unusable(f"empty {label!r}", "empty")
    # Types first: a list with a number is malformed, though it has an empty text too.
    texts = [text_of(label, reference) for reference in references]
    return tuple(filled_text_of(label, text) for text in texts)


def _take_response(label: str, turns: list[Message]) -> str:
    """Remove the last turn, which must be the assistant's, and return its text."""
    last = turns.pop()
    if last.role != "assistant":
        raise Unusable(
            f"the last turn of {label!r} is by the {last.role}, expected one by the "
            "assistant"
        )
    return last.content


def _check_no_response(turns: list[Message], record: Fields, form: Form) -> None:
    response = RESPONSES.get(form.prompt)
    given = response is not None and form.value(record, response) is not None
    if given or turns[-1].role == "assistant":
        raise Unusable("it has a response, but the first records are prompts only")


def _history(record: Fields, form: Form) -> list[Message]:
    """Earlier turns as pairs of texts, by the user and by the assistant."""
    label, value = form.label("history"), form.value(record, "history")
    turns = []
    for pair in [] if value is None else value if isinstance(value, list) else [value]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Unusable(
                f"{label!r} is not a list of pairs [text of user, text of assistant]"
            )
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append(Message(role, filled_text_of(label, text)))
    return turns


def _optional_text(record: Fields, form: Form, column: str) -> str:
    value = form.value(record, column)
    return "" if value is None else text_of(form.label(column), value)
