"""Reads single cells of a table: text, captions that are lists or structs, expected digests."""

import math
import re
from collections.abc import Iterator
from typing import Literal

from data_pipeline.hashing import key

CAPTION_NAMES = ("caption", "text", "title", "txt", "description")
CaptionRule = Literal["first", "join", "random"]

_PURPOSE = int.from_bytes(b"captions", "big")
_DIGEST = re.compile(r"[0-9a-f]{32}|[0-9a-f]{40}|[0-9a-f]{64}")


def text_of(cell: object) -> str | None:
    """Returns a cell as text without blanks around it; None for an empty one and for NaN. Bytes that are no UTF-8
    become lone surrogates."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None
    text = cell.decode("utf-8", "surrogateescape") if isinstance(cell, bytes) else str(cell)
    return text.strip() or None


def caption_of(cell: object, rule: CaptionRule, row: int) -> str | None:
    """Returns the caption of a cell. Of several (a list, or a struct's texts), `first` takes the first, `join` puts
    them in one with blanks between, `random` takes one by the number of the row, the same one in every run.

    Of a struct, the field that is named as captions are is taken, else every text in the order of the fields.
    """
    if not isinstance(cell, (list, tuple, dict)):
        return text_of(cell)
    found = list(_texts(cell))
    if not found:
        return None
    if rule == "join":
        return " ".join(found)
    return found[key(_PURPOSE, row) % len(found) if rule == "random" else 0]


def digest_of(cell: object) -> str | None:
    """Returns an expected digest in lower case; None for an empty cell. Raises ValueError for what is no MD5, SHA-1 or
    SHA-256 in hexadecimal."""
    text = cell.hex() if isinstance(cell, bytes) and len(cell) in (16, 20, 32) else text_of(cell)
    if text is None:
        return None
    text = text.lower()
    if not _DIGEST.fullmatch(text):
        raise ValueError(f"{text[:80]!r} is no MD5, SHA-1 or SHA-256")
    return text


def _texts(cell: object) -> Iterator[str]:
    if isinstance(cell, dict):
        named = next((value for name in CAPTION_NAMES for field, value in cell.items() if field.lower() == name), None)
        for value in cell.values() if named is None else [named]:
            yield from _texts(value)
    elif isinstance(cell, (list, tuple)):
        for value in cell:
            yield from _texts(value)
    elif isinstance(cell, str | bytes) and (text := text_of(cell)) is not None:
        yield text
