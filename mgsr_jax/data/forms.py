"""Forms of records, recognised by the columns of a source's first records."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from mgsr_jax.data.conversations import TURN_KEYS, Unusable, turns_of
from mgsr_jax.data.files import Unreadable
from mgsr_jax.data.source_settings import COLUMNS, Columns, check_columns
from mgsr_jax.data.sources import OpenSource
from mgsr_jax.data.teacher_names import TeacherNames

Fields = Mapping[str, object]
"""One record: the data's name of a column -> value."""

CHATS = ("messages", "conversations")
"""Columns that hold a whole conversation, with the response as its last turn."""

_FORMS = (
    ("chat", "messages", None),
    ("ShareGPT", "conversations", None),
    ("instruction", "instruction", "output"),
    ("prompt-completion", "prompt", "completion"),
    ("question-answer", "question", "answer"),
)
"""(name, column of the prompt, column of the response). Where several fit, the first is
taken. Without its response, each of the last three holds prompts only."""

RESPONSES = {prompt: response for _, prompt, response in _FORMS if response}
"""Column of the prompt -> column of the response."""

_PROMPTS_ONLY = "prompts only"
_OBJECTS = 16  # first records that decide the form
_SEARCHED = 1000  # records among which the first of them must be


class Form(NamedTuple):
    """How the records of one source are read.

    Attributes:
      name: "chat", "ShareGPT", "instruction", "prompt-completion", "question-answer" or
        "prompts only".
      prompt: our name of the column with the prompt or the conversation.
      response: our name of the column with the response; None: it is the last turn of
        the conversation, or there is none.
      names: our name of each column -> the data's possible names.
      read: columns of the data that are read.
      unread: columns of the data, and keys of its messages, that are not read.
      teachers: how records name their teacher; None: there is one, or none.
    """

    name: str
    prompt: str
    response: str | None
    names: Mapping[str, tuple[str, ...]]
    read: tuple[str, ...]
    unread: tuple[str, ...]
    teachers: TeacherNames | None = None

    @property
    def prompts_only(self) -> bool:
        """Whether the records have no response."""
        return self.name == _PROMPTS_ONLY

    def value(self, record: Fields, column: str) -> object:
        """A record's value of our `column`; None if it has none."""
        values = (record.get(name) for name in self.names[column])
        return next((value for value in values if value is not None), None)

    def label(self, column: str) -> str:
        """The data's name of our `column`, for errors."""
        return self.names[column][0]

    def teacher(self, record: Fields) -> int:
        """Index of a record's teacher; 0 where there are not several.

        Raises:
          Unusable: the record names none, or one that there is not.
        """
        if self.teachers is None:
            return 0
        return self.teachers.index(self.value(record, "teacher"), self.label("teacher"))


def recognise(
    source: OpenSource,
    columns: Columns | None = None,
    teachers: TeacherNames | None = None,
) -> Form:
    """Decide from the first records of a source how all its records are read.

    Args:
      source: the source; only its first records are read.
      columns: the data's names of columns that it names differently.
      teachers: how records name their teacher, where there are several.

    Raises:
      ValueError: the columns fit no form, `columns` has a name that is not ours or not
        in the data, no record names its teacher, or there is no record.
    """
    columns = columns or {}
    check_columns(columns)
    records = _first_objects(source)
    seen = {key: None for record in records for key in _filled(record)}
    names = COLUMNS | {ours: (theirs,) for ours, theirs in columns.items()}
    for ours, theirs in columns.items():
        required = any(ours in form for form in _FORMS)
        required |= ours == "teacher" and teachers is not None
        if required and theirs not in seen:
            raise ValueError(
                f"columns names {theirs!r} for {ours}, but data {source.name!r} "
                f"has the columns {list(seen)}; correct the name"
            )
    name, prompt, response = _fitting_form(source.name, seen, names)
    if prompt in CHATS and _end_with_user(names[prompt][0], records):
        name = _PROMPTS_ONLY
    used = [prompt, response, "system", "minillm"]
    used += ["input", "history"] if prompt == "instruction" else []
    if teachers is not None and teachers.always is None:
        _check_teachers(source.name, seen, names["teacher"], teachers)
        used.append("teacher")
    read = [next((n for n in names[ours] if n in seen), "") for ours in used if ours]
    unread = [key for key in seen if key not in read]
    if prompt in (*CHATS, "prompt"):
        unread += _unread_keys(names[prompt][0], records)
    columns_read = tuple(filter(None, read))
    return Form(name, prompt, response, names, columns_read, tuple(unread), teachers)


def _check_teachers(
    source: str, seen: Iterable[str], labels: tuple[str, ...], teachers: TeacherNames
) -> None:
    if teachers.default is None and not any(label in seen for label in labels):
        raise ValueError(
            f"data {source!r} has no column {labels[0]!r}, and there are several "
            f"teachers; name one of {', '.join(teachers.names)} in that column, for "
            "the whole source ({path: ..., teacher: NAME}) or in data.default_teacher"
        )


def not_an_object(record: object) -> str:
    """The reason why a record that is not an object is not used."""
    if isinstance(record, Unreadable):
        return record.reason
    return f"got a {type(record).__name__}, expected an object"


def _first_objects(source: OpenSource) -> list[Fields]:
    objects: list[Fields] = []
    problems: list[str] = []
    for where, record in itertools.islice(source.records(), _SEARCHED):
        if isinstance(record, Mapping):
            objects.append(record)
        else:
            problems.append(f"{where}: {not_an_object(record)}")
        if len(objects) == _OBJECTS:
            break
    if objects:
        return objects
    first = f"first: {problems[0]}" if problems else "it is empty"
    raise ValueError(
        f"data {source.name!r} has no usable record among {len(problems)}; {first}"
    )


def _filled(record: Fields) -> Iterator[str]:
    """Keys that have a value: a table has each column in every record."""
    return (key for key, value in record.items() if value is not None)


def _fitting_form(
    source: str, seen: Iterable[str], names: Mapping[str, tuple[str, ...]]
) -> tuple[str, str, str | None]:
    def has(column: str) -> bool:
        return any(name in seen for name in names[column])

    for name, prompt, response in _FORMS:
        if has(prompt) and (response is None or has(response)):
            return name, prompt, response
    for prompt in ("prompt", "question", "instruction"):
        if has(prompt):
            return _PROMPTS_ONLY, prompt, None
    raise ValueError(
        f"data {source!r} has the columns {list(seen)}; expected messages, "
        "conversations, instruction and output, prompt and completion, question and "
        "answer, or for prompts only one of prompt, question, instruction; name others "
        "with the setting columns: {prompt: COLUMN, completion: COLUMN}"
    )


def _end_with_user(label: str, records: list[Fields]) -> bool:
    """Whether no conversation has a response as its last turn."""
    roles = set()
    for record in records:
        try:
            roles.add(turns_of(label, record.get(label))[-1].role)
        except Unusable:
            continue
    return roles == {"user"}


def _unread_keys(label: str, records: list[Fields]) -> list[str]:
    keys: dict[str, None] = {}
    for record in records:
        turns = record.get(label)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, Mapping):
                keys |= {key: None for key in turn if turn[key]}
    return [f"{label}.{key}" for key in keys if key not in TURN_KEYS]
