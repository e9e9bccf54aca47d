"""Reads a JSON file of any size item by item: {"images": [...], "annotations": [...], ...}."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError

_CHUNK = 1 << 20  # characters read at once
_LONGEST = 1 << 26  # characters of one item; a longer one is no annotation
_SPACE = " \t\n\r"


def stream_lists(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (key, item) for every item of every list at the top of the file; other values as (key, value), whole.

    Memory is that of the largest item. Raises UserError, with the place in the file, where it is no such JSON.
    """
    try:
        with open(path, encoding="utf-8") as file:
            yield from _Scanner(path, file).top()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name the JSON of the annotations") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None


class _Scanner:
    """A window over the text; `position` is the next character in it."""

    def __init__(self, path: Path, file: Any) -> None:
        self._path, self._file = path, file
        self._text, self._position, self._before = "", 0, 0
        self._decode = json.JSONDecoder().raw_decode

    def top(self) -> Iterator[tuple[str, Any]]:
        self._expect("{")
        if self._next() == "}":
            return
        while True:
            key = self._value()
            if not isinstance(key, str):
                raise self._error("a key was expected")
            self._expect(":")
            if self._next() == "[":
                for item in self._items():
                    yield key, item
            else:
                yield key, self._value()
            if self._next() != ",":
                self._expect("}")
                return
            self._expect(",")

    def _items(self) -> Iterator[Any]:
        self._expect("[")
        if self._next() == "]":
            self._expect("]")
            return
        while True:
            yield self._value()
            if self._next() != ",":
                self._expect("]")
                return
            self._expect(",")

    def _value(self) -> Any:
        self._next()
        size = _CHUNK
        while True:
            try:
                value, end = self._decode(self._text, self._position)
                # A number may go on in the part that has not been read.
                if end < len(self._text) or not self._more(size):
                    self._position = end
                    return value
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or len(self._text) - self._position > _LONGEST:
                    raise self._error("an item is too large or too deeply nested for an annotation") from None
                if not self._more(size):
                    raise self._error(str(error)) from None
            size *= 2

    def _next(self) -> str:
        """The next character that is no space, which stays unread; "" at the end."""
        while True:
            while self._position < len(self._text):
                if self._text[self._position] not in _SPACE:
                    return self._text[self._position]
                self._position += 1
            if not self._more(_CHUNK):
                return ""

    def _expect(self, character: str) -> None:
        if self._next() != character:
            raise self._error(f"{character!r} was expected, found {self._next() or 'the end of the file'!r}")
        self._position += 1

    def _more(self, size: int) -> bool:
        read: str = self._file.read(size)
        if not read:
            return False
        self._before += self._position
        self._text, self._position = self._text[self._position :] + read, 0
        return True

    def _error(self, what: str) -> UserError:
        place = self._before + self._position
        return UserError(f"{self._path}: not the JSON of annotations, at character {place}: {what}")
