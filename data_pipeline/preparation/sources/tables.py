"""A table as a source of rows: CSV, TSV, JSONL, text or Parquet, one file or many parts, local or behind a URL."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import BadDataError, UserError
from data_pipeline.format.columns import PARQUET_ERRORS
from data_pipeline.format.reasons import TEXT_NOT_UTF8
from data_pipeline.preparation.sources import files, text_tables
from data_pipeline.preparation.sources.cells import caption_of, digest_of, text_of
from data_pipeline.preparation.sources.columns import Columns, TableFormat, further_columns, resolve, stored_type
from data_pipeline.preparation.sources.files import TableFile
from data_pipeline.preparation.sources.rows import CAPTION_TOO_LONG, TEXT_HAS_NUL, Row, is_text
from data_pipeline.preparation.sources.text_tables import Dialect, Record

_Found = TypeVar("_Found")

HASH_INVALID = "expected_hash_invalid"

_BATCH_ROWS, _IMAGE_BATCH_ROWS = 4096, 64  # of Parquet, decoded at a time


class Table:
    """A `Source` of rows from tables.

    needs: the role that must have a column (`image` or `url`); roles that are not wanted at all: `without`
    root: what relative image paths are relative to; default: the table's folder
    Raises UserError where a column is missing or stands there twice, BadDataError where a file cannot be read.
    """

    def __init__(
        self,
        parts: Sequence[TableFile],
        columns: Columns,
        format: TableFormat,
        *,
        needs: str,
        without: Sequence[str] = (),
        root: Path | None = None,
    ) -> None:
        self._files, self._format = tuple(parts), format
        self._root = Path(parts[0].name).parent if root is None else root
        self._root_given = root
        first = parts[0]
        self._dialect: Dialect | None = None
        if first.kind == "parquet":
            schema = _joined_schema(parts)
        else:
            self._dialect = text_tables.find_dialect(first, format)
            names = text_tables.column_names(first, format, self._dialect)
            schema = pa.schema([pa.field(name, pa.string()) for name in names])
        self._names = list(schema.names)
        found = resolve(first.name, self._names, columns, needs=needs)
        self.columns = Columns(**{role: None if role in without else name for role, name in asdict(found).items()})
        taken = [name for name in (found.image, found.caption, found.label, found.url) if name is not None]
        if found.caption is not None and pa.types.is_nested(schema.field(found.caption).type):
            taken.remove(found.caption)  # one caption is taken; the cell as it was stays readable
        self._kept, self._left_out = further_columns(first.name, schema, taken, format.keep)
        self.further = pa.schema(
            [pa.field(own, stored_type(schema.field(name).type)) for name, own in self._kept.items()]
        )
        roles = [name for name in asdict(self.columns).values() if name is not None]
        self._wanted = list(dict.fromkeys([*roles, *self._kept]))
        image = None if self.columns.image is None else schema.field(self.columns.image).type
        heavy = image is not None and not pa.types.is_string(image)
        self._batch_rows = _IMAGE_BATCH_ROWS if heavy else _BATCH_ROWS

    def rows(self) -> Iterator[Row]:
        for number, (values, reason) in enumerate(self._records(self._wanted)):
            yield (
                Row(number, reason=reason)
                if reason
                else self._row(number, dict(zip(self._wanted, values, strict=True)))
            )

    def count(self) -> int:
        if self._dialect is None:
            return sum(_parquet(file, lambda opened: int(opened.metadata.num_rows)) for file in self._files)
        return sum(1 for _ in self._records([]))

    def labels(self) -> Iterator[object] | None:
        if self.columns.label is None:
            return None
        return (values[0] if values else None for values, _ in self._records([self.columns.label]))

    def passed_over(self) -> Mapping[str, int]:
        return {}

    def identity(self) -> dict[str, Any]:
        about: dict[str, Any] = files.identity(self._files)
        about |= {"columns": asdict(self.columns), "kept": self._kept, "format": asdict(self._format)}
        if self._dialect is not None:
            about["read as"] = asdict(self._dialect)
        if self._root_given is not None:
            about["root"] = str(self._root_given)
        return about

    def describe(self) -> str:
        roles = ", ".join(f"{role} from {name!r}" for role, name in asdict(self.columns).items() if name is not None)
        said = f"{self._files[0].name}{f' and {len(self._files) - 1} more' if len(self._files) > 1 else ''}: {roles}"
        if self._kept:
            said += f"; kept in the sidecar: {', '.join(self._kept)}"
        if self._left_out:
            said += f"; not kept: {', '.join(self._left_out)}"
        return said if self._dialect is None else f"{said} ({self._dialect.describe()})"

    def _records(self, wanted: Sequence[str]) -> Iterator[Record]:
        for file in self._files:
            if self._dialect is None:
                yield from _parquet_records(file, wanted, self._batch_rows)
            else:
                yield from text_tables.read_records(file, self._format, self._dialect, self._names, wanted)

    def _row(self, number: int, record: dict[str, Any]) -> Row:
        columns = self.columns
        image = None if columns.image is None else record[columns.image]
        url = None if columns.url is None else text_of(record[columns.url])
        if isinstance(image, dict):  # Hugging Face's {bytes, path}
            url = url or text_of(image.get("path"))
            image = image.get("bytes") or image.get("path")
        if not isinstance(image, bytes | None):
            path = text_of(image)
            url = url or path  # lineage: where a sample came from, as the input names it
            image = None if path is None else self._root / path
        caption = (
            None if columns.caption is None else caption_of(record[columns.caption], self._format.captions, number)
        )
        if caption is not None and self._format.percent_encoded:
            caption = unquote_plus(caption)
        further = {own: record[name] for name, own in self._kept.items()}
        if self._dialect is not None:
            further = {own: _as_text(value) for own, value in further.items()}
        reason, expected = "", None
        if columns.hash is not None:
            try:
                expected = digest_of(record[columns.hash])
            except ValueError:
                reason = HASH_INVALID
        texts = [text for text in (caption, url, *further.values()) if isinstance(text, str)]
        if not all(map(is_text, texts)):
            return Row(number, reason=TEXT_NOT_UTF8)
        if any("\0" in text for text in texts):
            return Row(number, reason=TEXT_HAS_NUL)
        if caption is not None and len(caption) > self._format.max_caption:
            caption, reason = None, CAPTION_TOO_LONG
        label = None if columns.label is None else record[columns.label]
        return Row(number, image, caption, label, url, reason, expected, further)


def _joined_schema(parts: Sequence[TableFile]) -> pa.Schema:
    """Returns the columns that all parts have, with types that hold every part's values."""
    schemas = []
    for file in parts:
        schema = _parquet(file, lambda opened: opened.schema_arrow)
        twice = next((name for name in schema.names if schema.names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"table {file.name} names the column {twice!r} twice; rename one of the two")
        schemas.append(schema.remove_metadata())
    common = [name for name in schemas[0].names if all(name in schema.names for schema in schemas)]
    lacking = sorted({name for schema in schemas for name in schema.names} - set(common))
    if lacking:
        raise UserError(f"the parts from {parts[0].name} on do not all have the column {lacking[0]!r}; make them agree")
    try:
        joined = pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(f"the parts from {parts[0].name} on have columns of different types: {error}") from None
    return pa.schema([joined.field(name) for name in common])


def _as_text(value: object) -> str | None:
    """Returns a further cell of a text table; what JSONL holds besides text is written as JSON."""
    if value is None or value == "":
        return None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _parquet(file: TableFile, look: Callable[[pq.ParquetFile], _Found]) -> _Found:
    try:
        with closing(file.open_raw()) as raw, pq.ParquetFile(raw) as opened:
            return look(opened)
    except PARQUET_ERRORS as error:
        raise BadDataError(f"table {file.name} cannot be read: {error}; check the file") from None


def _parquet_records(file: TableFile, wanted: Sequence[str], batch_rows: int) -> Iterator[Record]:
    try:
        with closing(file.open_raw()) as raw, pq.ParquetFile(raw, buffer_size=1 << 20) as opened:
            for batch in opened.iter_batches(batch_size=batch_rows, columns=list(wanted), use_threads=False):
                columns = [_values(batch.column(name)) for name in wanted]
                yield from ((values, "") for values in zip(*columns, strict=True))
    except PARQUET_ERRORS as error:
        raise BadDataError(f"table {file.name} cannot be read: {error}; check the file") from None


def _values(column: pa.Array) -> list[Any]:
    """Returns Python values; text that is no UTF-8, though the file says so, holds lone surrogates."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            raise BadDataError(
                "a list or struct holds text that is no UTF-8; mend the table, or leave the column out"
            ) from None
        raw = column.cast(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in raw]
