"""Checks that records of settings share: allowed words, and the signs of numbers.

Annotations are not checked at run time, so a typo in a `Literal` field would select
another branch silently. Each record's `check` method calls these functions.
"""

from typing import Literal, get_args, get_origin, get_type_hints


def check_choices(record: object, section: str = "") -> None:
    """Refuse a value that its field's `Literal` does not list.

    Args:
      record: a dataclass.
      section: put before a field's name in errors, such as "rollout.".

    Raises:
      ValueError: names the field, its value and the values that are allowed.
    """
    types = get_type_hints(type(record))
    for name, value in vars(record).items():
        choices = get_args(types[name])
        if get_origin(types[name]) is Literal and value not in choices:
            raise ValueError(f"{section}{name}={value!r}; expected one of {choices}")


def check_positive(record: object, *names: str, section: str = "") -> None:
    """Refuse zero, a negative number and NaN in these fields; None is accepted.

    Raises:
      ValueError: names the field and its value.
    """
    for name in names:
        value = getattr(record, name)
        if value is not None and not value > 0:
            raise ValueError(f"{section}{name} must be above 0, got {value}")


def check_not_negative(record: object, *names: str, section: str = "") -> None:
    """Refuse a negative number and NaN in these fields.

    Raises:
      ValueError: names the field and its value.
    """
    for name in names:
        value = getattr(record, name)
        if not value >= 0:
            raise ValueError(f"{section}{name} must be at least 0, got {value}")
