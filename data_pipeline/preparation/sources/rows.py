"""One input row, and what a source of rows has to offer. Order and number of the rows of a source are fixed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

WRONG_CELL_COUNT = "wrong_cell_count"  # more or fewer cells than the table has columns
BAD_QUOTES = "bad_quotes"  # a line whose quotes do not close where a cell ends
TEXT_HAS_NUL = "text_has_nul"
CAPTION_TOO_LONG = "caption_too_long"


@dataclass(frozen=True)
class Row:
    """One input row. `image` is a path, or the bytes themselves; `label` as it stands in the input, before classes.

    expected: hexadecimal digest that the image's bytes must have; further: values by the sidecar's column
    place: in its shard, where that does not follow from the number
    """

    number: int
    image: Path | bytes | None = None
    caption: str | None = None
    label: object = None
    url: str | None = None
    reason: str = ""  # why the row itself cannot be used
    expected: str | None = None
    further: Mapping[str, object] = field(default_factory=dict)
    place: int | None = None


class Source(Protocol):
    """Rows to pack or to fetch."""

    @property
    def further(self) -> pa.Schema:
        """Columns that `Row.further` holds."""

    def rows(self) -> Iterator[Row]: ...

    def count(self) -> int:
        """Counts the rows, without reading images."""

    def labels(self) -> Iterator[object] | None:
        """One label a row as it stands in the input; None where the source has no labels at all."""

    def passed_over(self) -> Mapping[str, int]:
        """Counts, by reason, what lies in the source and is no row."""

    def identity(self) -> dict[str, Any]:
        """Says what tells this input from another and how it is read, for `plan.json`."""

    def describe(self) -> str:
        """One line for people: how the input is read."""


def is_text(text: str) -> bool:
    """Tells whether `text` is valid Unicode: bytes that were none stand in it as lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
