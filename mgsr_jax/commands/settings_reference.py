"""Every setting of a command, with its explanation: read from types and docstrings.

`--help`, the page docs/settings.md and the suggestions for a typo are made from it.
"""

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterator

import docstring_parser


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
      name: as in an option: "rollout.policy".
      allowed: its type, or the words that are allowed.
      default: as in a YAML file; "required" if there is none.
      text: its explanation.
    """

    name: str
    allowed: str
    default: str
    text: str

    @property
    def section(self) -> str:
        """The first part of its name; empty for a setting outside sections."""
        return self.name.rpartition(".")[0]


def settings_of(command: Callable[..., int]) -> list[Setting]:
    """The settings of a command: its own, then those of its record `config`."""
    record = config_class(command)
    of_record = [] if record is None else _fields(record)
    return [*own_settings(command), *of_record]


def own_settings(command: Callable[..., int]) -> list[Setting]:
    """The settings of a command that are not in a record."""
    parameters = inspect.signature(command).parameters
    hints, texts = typing.get_type_hints(command), _texts(command)
    return [
        _setting(name, hints[name], parameter.default, texts)
        for name, parameter in parameters.items()
        if name != "config"
    ]


def config_class(command: Callable[..., int]) -> type | None:
    """The record of a command's settings, the type of its parameter `config`."""
    parameter = inspect.signature(command).parameters.get("config")
    return None if parameter is None else parameter.annotation


def _fields(
    record: type, section: str = "", values: object = None
) -> Iterator[Setting]:
    """Settings of a record; those of the records in it come last, by section.

    `values` is the record that a section has by default; None if it is required.
    """
    hints, texts, sections = typing.get_type_hints(record), _texts(record), []
    for field in dataclasses.fields(record):
        hint, name = hints[field.name], f"{section}{field.name}"
        default = getattr(values, field.name, _default(field))
        if dataclasses.is_dataclass(hint):
            sections.append((hint, f"{name}.", default))
        else:
            yield _setting(name, hint, default, texts)
    for part in sections:
        yield from _fields(*part)


def _default(field: dataclasses.Field) -> object:
    """The default of a field; MISSING if it is required."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _texts(source: Callable[..., object]) -> dict[str, str]:
    """Explanations by name, of a function or of a record and those that it extends."""
    sources = source.__mro__[::-1] if isinstance(source, type) else (source,)
    return {
        name: " ".join((parameter.description or "").split())
        for part in sources
        for parameter in docstring_parser.parse(part.__doc__ or "").params
        for name in parameter.arg_name.split(", ")
    }


def _setting(
    name: str, hint: object, default: object, texts: dict[str, str]
) -> Setting:
    missing = (dataclasses.MISSING, inspect.Parameter.empty)
    text = texts[name.rpartition(".")[2]]
    required = "required" if default in missing else _yaml(default)
    return Setting(name, _allowed(hint), required, text)


def _yaml(value: object) -> str:
    """A default as people write it in YAML."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value))
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


_WORDS: dict[object, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    typing.Any: "anything",
}
"""Plain types in words."""


def _allowed(hint: object) -> str:
    """A type in words: "off, on, replay" or "number"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_allowed(a) for a in arguments if a is not type(None))
    if origin is tuple and ... not in arguments:
        return f"[{', '.join(map(_allowed, arguments))}]"
    if origin in (list, tuple):
        return f"list of {_allowed(arguments[0])}"
    if origin is dict:
        return f"mapping of {' to '.join(map(_allowed, arguments))}"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        names = ", ".join(field.name for field in dataclasses.fields(hint))
        return f"record of {names}"
    return _WORDS[hint]
