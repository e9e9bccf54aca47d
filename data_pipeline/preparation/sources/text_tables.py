"""Rows of CSV, TSV and JSONL files and of lists of URLs: cells by line, and nothing is ever shifted.

    CSV      quotes doubled inside quotes; a line whose quotes are wrong is a rejected row, an open quote is an error
    TSV      no quoting: a line is a row, and a quote is a character
    JSONL    one object a line
    TXT      one URL a line
Blank lines are no rows. Every other line, or quoted record of several lines, is one row whatever is wrong with it.
"""

import codecs
import csv
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import BadDataError, UserError
from data_pipeline.format.reasons import BAD_JSON, TEXT_NOT_UTF8
from data_pipeline.preparation.sources.columns import TableFormat, check_header, check_names
from data_pipeline.preparation.sources.files import TableFile, text_lines
from data_pipeline.preparation.sources.rows import BAD_QUOTES, WRONG_CELL_COUNT, is_text

Record = tuple[Sequence[object], str]  # the values in the order of the columns, or the reason why there are none

_LONGEST_LINE = 1 << 24  # characters
_LOOKED_AT = 1 << 16  # bytes of a file that show how it is written
_JSON_ROWS = 1000  # looked at for the names of JSONL's columns
_DELIMITERS = ",\t;|"
_BOMS = (("utf-8-sig", codecs.BOM_UTF8), ("utf-16", codecs.BOM_UTF16_LE), ("utf-16", codecs.BOM_UTF16_BE))


@dataclass(frozen=True)
class Dialect:
    """How a text table is written. `guessed`: the delimiter is not the one that the file's name promises."""

    encoding: str
    newline: str
    delimiter: str
    quoting: str  # csv | backslash | none
    guessed: bool = False

    def describe(self) -> str:
        names = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars", "": "nothing"}
        split = names.get(self.delimiter, repr(self.delimiter))
        return f"{self.encoding}, cells split by {split}{' (guessed)' if self.guessed else ''}, quoting {self.quoting}"


def find_dialect(file: TableFile, format: TableFormat) -> Dialect:
    """Finds how a text table is written, from its first bytes where `format` leaves it open.

    Raises UserError for an empty file, and for one that must be UTF-16 and does not say so.
    """
    with closing(file.open()) as opened:
        try:
            head = opened.read(_LOOKED_AT)
        except (OSError, EOFError, zlib.error) as error:
            raise _unreadable(file, error) from None
    encoding = format.encoding or next((name for name, bom in _BOMS if head.startswith(bom)), "utf-8-sig")
    if format.encoding is None and encoding == "utf-8-sig" and 4 * head.count(0) > len(head):
        raise UserError(f"table {file.name} looks like UTF-16 (its text has zero bytes); give --encoding utf-16-le")
    text = head.decode(encoding, "replace")
    newline = "\r" if "\r" in text and "\n" not in text else "\n"
    first = next((line for line in text.replace("\r\n", "\n").split(newline) if line.strip()), "")
    if not first and file.kind != "txt":
        raise UserError(f"table {file.name} is empty; its first line must name the columns")
    usual = {"csv": ",", "tsv": "\t"}.get(file.kind, "")
    delimiter = format.delimiter
    guessed = False
    if delimiter is None:
        delimiter = usual
        if usual and usual not in first:
            delimiter = max(_DELIMITERS, key=lambda sign: (first.count(sign), sign == usual))
        elif not usual and format.columns is not None and len(format.columns) > 1:
            delimiter = max(_DELIMITERS, key=first.count)
        guessed = delimiter != usual
    quoting = format.quoting or ("none" if delimiter in ("\t", "") else "csv")
    return Dialect(encoding, newline, delimiter, quoting, guessed)


def column_names(file: TableFile, format: TableFormat, dialect: Dialect) -> list[str]:
    """Names the columns: those given, else those of the first line; of JSONL, the keys of the first rows."""
    if format.columns is not None:
        check_header(file.name, format.columns)
        return list(format.columns)
    if file.kind == "txt" and not dialect.delimiter:
        return ["url"]
    if file.kind == "jsonl":
        names: dict[str, None] = {}
        for number, (line, _) in enumerate(_lines(file, dialect)):
            if is_text(line):
                names |= dict.fromkeys(_object(line) or {})
            if number >= _JSON_ROWS:
                break
        return list(names)
    header = next(_cells(file, dialect), None)
    if header is None:
        raise UserError(f"table {file.name} is empty; its first line must name the columns")
    if header[1] is None:
        raise BadDataError(
            f"table {file.name}: the quotes of its first line are wrong; mend them, or give --quoting none"
        )
    named = [name.strip() for name in header[1]]
    if not is_text("".join(named)):
        raise UserError(f"table {file.name}: its first line is not {dialect.encoding}; give --encoding")
    check_names(file.name, named)
    check_header(file.name, named)
    return named


def read_records(
    file: TableFile, format: TableFormat, dialect: Dialect, names: Sequence[str], wanted: Sequence[str]
) -> Iterator[Record]:
    """Yields one record a row: the values of the columns `wanted`.

    names: of all columns, as `column_names` gave them. Raises BadDataError where the file cannot be read on.
    """
    if file.kind == "jsonl":
        for line, _ in _lines(file, dialect):
            found = _object(line) if is_text(line) else None
            yield (
                ((), BAD_JSON if is_text(line) else TEXT_NOT_UTF8)
                if found is None
                else ([found.get(name) for name in wanted], "")
            )
        return
    places = [names.index(name) for name in wanted]
    headless = format.columns is not None or (file.kind == "txt" and not dialect.delimiter)
    rows = _cells(file, dialect)
    if not headless and (header := next(rows, None)) is not None and header[1] is not None:
        own = [name.strip() for name in header[1]]
        if own != list(names):
            raise UserError(f"table {file.name} has the columns {', '.join(own)}, the first part {', '.join(names)}")
    for _, cells in rows:
        if cells is None:
            yield (), BAD_QUOTES
        elif len(cells) != len(names):
            yield (), WRONG_CELL_COUNT
        else:
            yield [cells[place] for place in places], ""


def _cells(file: TableFile, dialect: Dialect) -> Iterator[tuple[int, list[str] | None]]:
    """Yields the line number and the cells of each row; None for cells whose quotes are wrong."""
    if dialect.quoting == "none":
        for line, number in _lines(file, dialect):
            yield number, line.split(dialect.delimiter) if dialect.delimiter else [line.strip()]
        return
    csv.field_size_limit(_LONGEST_LINE)
    lines = _lines(file, dialect, whole=True)
    doubled = dialect.quoting == "csv"
    escape = None if doubled else "\\"
    reader = csv.reader(
        (line for line, _ in lines), delimiter=dialect.delimiter, strict=True, doublequote=doubled, escapechar=escape
    )
    while True:
        began = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if reader.line_num > began:
                raise BadDataError(
                    f"table {file.name}, line {began}: a quote is opened there that no cell's end closes ({error}); "
                    "mend that line, or give --quoting none"
                ) from None
            yield began, None
            continue
        if cells:
            yield began, cells


def _lines(file: TableFile, dialect: Dialect, *, whole: bool = False) -> Iterator[tuple[str, int]]:
    """Yields lines and their numbers from 1: without their ends and the blank ones, or whole and all of them."""
    number = 0
    try:
        with closing(file.open()) as opened:
            lines = text_lines(opened, dialect.encoding, dialect.newline)
            while line := lines.readline(_LONGEST_LINE):
                number += 1
                if len(line) == _LONGEST_LINE and not line.endswith(dialect.newline):
                    raise BadDataError(f"table {file.name}, line {number}: longer than {_LONGEST_LINE:,} characters")
                if whole:
                    yield line, number
                    continue
                line = line.rstrip("\r\n")
                if line if dialect.delimiter else line.strip():  # tabs alone are a row of empty cells
                    yield line, number
    except UnicodeError as error:
        raise BadDataError(
            f"table {file.name}, line {number + 1}: is not {dialect.encoding} ({error}); give --encoding"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(file, error) from None


def _unreadable(file: TableFile, error: Exception) -> BadDataError:
    return BadDataError(f"table {file.name} cannot be read: {error}; check the file")


def _object(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
