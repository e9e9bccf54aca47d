"""Reads a category number or name, whatever a table, a `.cls` member or JSON holds in its place."""

import math
import re

LARGEST_CLASS_COUNT = 100_000  # a larger label is an identifier and no class: nothing is allocated for it
LABEL_INVALID = "label_invalid"  # neither a number nor a name, or a number that no class can have

_MISSING = {"", "n/a", "#n/a", "<na>", "nan", "null"}
_NUMBER = re.compile(r"[+-]?\d{1,18}(\.0*)?")


class InvalidLabelError(ValueError):
    """A value that stands for no class."""


def read_label(value: object) -> int | str | None:
    """Returns the number, the name, or None where there is no label: empty, NaN, `N/A`, `null`, or -1, the field's
    sign for "not labelled".

    Text that writes a whole number (`7`, `7.0`) is that number. Raises InvalidLabelError for other types, fractions,
    other negative numbers, and numbers from LARGEST_CLASS_COUNT on.
    """
    if value is None:
        return None
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in _MISSING:
            return None
        if not _NUMBER.fullmatch(text):
            if _is_number(text):
                raise InvalidLabelError(f"{text[:40]!r} is no class number")
            return text
        value = int(text.partition(".")[0])
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if not value.is_integer():
            raise InvalidLabelError(f"{value} is no class number")
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidLabelError(f"a {type(value).__name__} is no label")
    if value == -1:
        return None
    if not 0 <= value < LARGEST_CLASS_COUNT:
        raise InvalidLabelError(f"{value if abs(value) < 10**18 else 'a huge number'} is no class number")
    return value


def _is_number(text: str) -> bool:
    if "_" in text or not any(character.isdigit() for character in text):  # `1_0` and `infinity` may be names
        return False
    try:
        float(text)
    except ValueError:
        return False
    return True
