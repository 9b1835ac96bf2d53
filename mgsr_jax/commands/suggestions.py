"""What a word with a typo may mean, at the end of an error's line."""

import difflib
import re
from collections.abc import Iterable

# What the parser calls an unknown option, key or command.
_UNKNOWN = re.compile(
    r"(?:unrecognized arguments: (?P<dashes>--)|does not accept option '|"
    r"invalid choice: ')(?P<word>[\w.-]+)"
)
# What it calls a word that a setting does not allow.
_NOT_ALLOWED = re.compile(
    r"Literal\[(?P<allowed>[^]]+)\].* value: (?P<word>[\w.-]+)", re.DOTALL
)


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
