"""The parser's errors in words, and what a word with a typo may mean."""

import difflib
import re
from collections.abc import Iterable, Mapping

# What the parser calls an unknown option, key or command.
_UNKNOWN = re.compile(
    r"(?:(?:unrecognized arguments|ambiguous option): (?P<dashes>--)|"
    r"does not accept option '|invalid choice: ')(?P<word>[\w.-]+)"
)
# What it calls a word that a setting does not allow.
_NOT_ALLOWED = re.compile(
    r"Literal\[(?P<allowed>[^]]+)\].* value: (?P<word>[\w.-]+)", re.DOTALL
)
_MISSING = re.compile(r"the following arguments are required: (?P<names>.+)")
_WRONG_VALUE = re.compile(
    r'Parser key "(?P<name>[\w.]+)": .*(?:Got|Given) value: (?P<value>.+?)'
    r"(?: Given value type: .*)?(?P<hint>; did you mean [^;]*\?)?"
)
_WRONG_KEY = re.compile(r"Option '(?P<key>[^']+)' is not accepted")


def with_suggestion(message: str, names: Iterable[str]) -> str:
    """The message of the parser's error, with the name that is closest to a wrong one.

    Args:
      message: one line.
      names: names of commands, or of a command's settings, such as "rollout.policy".

    >>> with_suggestion("unrecognized arguments: --polcy on", ["rollout.policy"])
    'unrecognized arguments: --polcy on; did you mean --rollout.policy?'
    """
    dashes = ""
    if found := _NOT_ALLOWED.search(message):
        allowed = re.findall(r"'([^']+)'", found["allowed"])
        candidates = {word: word for word in allowed}
    elif found := _UNKNOWN.search(message):
        # People leave out a section, or misspell it.
        candidates, dashes = {}, found["dashes"] or ""
        for name in names:
            section, _, own = name.rpartition(".")
            candidates |= {name: name, section: section}
            candidates.setdefault(own, name)
    else:
        return message
    close = difflib.get_close_matches(found["word"], candidates, n=1)
    if not close:
        return message
    return f"{message}; did you mean {dashes}{candidates[close[0]]}?"


def in_words(message: str, allowed: Mapping[str, str]) -> str:
    """The message of the parser's error, without names of Python's types.

    Args:
      message: one line.
      allowed: the command's settings: name -> what is allowed, in words.

    >>> in_words('Parser key "steps": Expected an int. Got value: many',
    ...          {"steps": "whole number"})
    'steps: got many, expected whole number'
    """
    if found := _MISSING.fullmatch(message):
        names = (name.partition(".")[2] for name in found["names"].split(", "))
        return f"settings that are missing: {', '.join(names)}"
    found = _WRONG_VALUE.fullmatch(message)
    if found is None or found["name"] not in allowed:
        return message
    name, hint = found["name"], found["hint"] or ""
    key = _WRONG_KEY.search(message)
    unknown = f" ({key['key']!r} is unknown)" if key else ""
    return f"{name}: got {found['value']}{unknown}, expected {allowed[name]}{hint}"
