"""Where input rows come from: a folder of images, or a CSV, TSV or Parquet table. Order and number of rows are fixed.

folder, captions beside    cat.jpg  cat.txt  cat.json        caption from .txt, else "caption" of .json
folder, classes            cats/1.jpg  dogs/2.jpg            label from the first folder's name
table                      image,caption,label,url           columns found by name, or given
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import BadDataError, UserError
from data_pipeline.format.index import BAD_JSON, IMAGE_EXTENSIONS, TEXT_NOT_UTF8

# Names that columns go by in the field's data sets, in lower case; first match wins.
IMAGE_NAMES = ("image", "image_path", "path", "file", "filepath", "file_path", "filename", "file_name", "img", "jpg")
CAPTION_NAMES = ("caption", "text", "title", "txt", "description")
LABEL_NAMES = ("label", "class", "category", "labels", "cls", "class_name")
URL_NAMES = ("url", "image_url", "link")

FolderLabels = Literal["auto", "folders", "none"]


@dataclass(frozen=True)
class Row:
    """One input row. `image` is a path, or the bytes themselves; `label` as it stands in the input, before classes."""

    number: int
    image: Path | bytes | None = None
    caption: str | None = None
    label: str | int | None = None
    url: str | None = None
    reason: str = ""  # why the row itself cannot be used


@dataclass(frozen=True)
class Columns:
    """Column names of a table; None finds them by name (and goes without, except for the one that must be there)."""

    image: str | None = None
    caption: str | None = None
    label: str | None = None
    url: str | None = None


def table_kind(path: Path) -> str | None:
    """csv | tsv | txt | parquet by the file's name, None for anything else."""
    suffix = path.suffix.lower().lstrip(".")
    return {"csv": "csv", "tsv": "tsv", "tab": "tsv", "txt": "txt", "parquet": "parquet", "pq": "parquet"}.get(suffix)


def resolve(path: Path, columns: Columns, *, needs: str) -> Columns:
    """Column names as they stand in the table, found where not given.

    Raises UserError where a given column is missing, or the one that is needed (`image` or `url`) cannot be found.
    """
    present = _header(path)
    found: dict[str, str | None] = {}
    for role, names in (("image", IMAGE_NAMES), ("caption", CAPTION_NAMES), ("label", LABEL_NAMES), ("url", URL_NAMES)):
        given = getattr(columns, role)
        if given is not None and given not in present:
            raise UserError(f"{path} has no column {given!r}; its columns are {', '.join(present)}")
        found[role] = given or next((column for name in names for column in present if column.lower() == name), None)
    if found[needs] is None:
        raise UserError(
            f"{path}: no column looks like the {needs} (columns: {', '.join(present)}); name the one that is"
        )
    return Columns(**found)


def read_table(path: Path, columns: Columns, *, root: Path | None = None) -> Iterator[Row]:
    """Rows of a table, streamed. Relative image paths are taken from `root` (default: the table's folder).

    `columns` as `resolve` gave them. A Parquet image column may hold the bytes, or Hugging Face's {bytes, path}.
    """
    root = path.parent if root is None else root
    records = _parquet_records(path, columns) if table_kind(path) == "parquet" else _text_records(path)
    for number, record in enumerate(records):
        yield _row(number, record, columns, root)


def read_folder(folder: Path, *, labels: str = "auto") -> Iterator[Row]:
    """One row an image file below `folder`, in the order of their relative paths.

    `labels`: "folders" takes the first folder's name as label, "none" does not, "auto" does where every image lies in a
    sub-folder and none has a text beside it.
    """
    images = sorted(
        (path for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS and path.is_file()),
        key=lambda path: path.relative_to(folder).as_posix(),
    )
    if labels == "auto":
        nested = all(path.parent != folder for path in images)
        captioned = any(path.with_suffix(suffix).is_file() for path in images for suffix in (".txt", ".json"))
        labels = "folders" if nested and not captioned else "none"
    for number, path in enumerate(images):
        label = path.relative_to(folder).parts[0] if labels == "folders" and path.parent != folder else None
        caption, beside, url, reason = _beside(path)
        url = url or path.relative_to(folder).as_posix().encode(errors="replace").decode()
        if label is not None:
            beside = label.encode(errors="replace").decode()
        yield Row(number, path, caption, beside, url, reason)


def _beside(image: Path) -> tuple[str | None, str | int | None, str | None, str]:
    """Caption, label and URL from the files that share the image's stem; a reason where they cannot be read."""
    caption = label = url = None
    try:
        described = image.with_suffix(".json")
        if described.is_file():
            fields = json.loads(described.read_bytes())
            if isinstance(fields, dict):
                caption, label, url = _text(fields.get("caption")), fields.get("label"), _text(fields.get("url"))
        text = image.with_suffix(".txt")
        if text.is_file():
            caption = _text(text.read_bytes().decode("utf-8"))
    except UnicodeDecodeError:
        return None, None, None, TEXT_NOT_UTF8
    except ValueError:
        return None, None, None, BAD_JSON
    if any(_broken(text) for text in (caption, label, url) if isinstance(text, str)):
        return None, None, None, TEXT_NOT_UTF8
    return caption, _label(label), url, ""


def _header(path: Path) -> list[str]:
    try:
        if table_kind(path) == "parquet":
            return list(pq.read_schema(path).names)
        if table_kind(path) == "txt":
            return ["url"]
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            header = next(csv.reader(file, delimiter=_delimiter(path)), None)
    except FileNotFoundError:
        raise UserError(f"table {path} does not exist; check the path") from None
    except (pa.ArrowException, OSError) as error:
        raise BadDataError(f"table {path} cannot be read: {error}; check the file") from None
    if not header:
        raise UserError(f"table {path} is empty; its first line must name the columns")
    return header


def _text_records(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if table_kind(path) == "txt":
            yield from ({"url": line.strip()} for line in file if line.strip())
            return
        csv.field_size_limit(1 << 24)
        try:
            yield from csv.DictReader(file, delimiter=_delimiter(path))
        except csv.Error as error:
            raise BadDataError(f"table {path} cannot be read: {error}; check its quotes") from None


def _parquet_records(path: Path, columns: Columns) -> Iterator[dict[str, Any]]:
    wanted = [name for name in (columns.image, columns.caption, columns.label, columns.url) if name is not None]
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024, columns=wanted):
            yield from batch.to_pylist()


def _delimiter(path: Path) -> str:
    return "\t" if table_kind(path) == "tsv" else ","


def _row(number: int, record: dict[str, Any], columns: Columns, root: Path) -> Row:
    image = None if columns.image is None else record.get(columns.image)
    label = None if columns.label is None else record.get(columns.label)
    caption = _text(record.get(columns.caption)) if columns.caption else None
    url = _text(record.get(columns.url)) if columns.url else None
    if isinstance(image, dict):
        url = url or _text(image.get("path"))
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str):
        url = url or _text(image)  # lineage: where a sample came from, as the input names it
        image = root / image if image.strip() else None
    label = _label(label)
    strings = [
        str(value) for value in (image, caption, label, url) if value is not None and not isinstance(value, bytes)
    ]
    if any(_broken(value) for value in strings):
        return Row(number, reason=TEXT_NOT_UTF8)
    return Row(number, image, caption, label, url)


def _label(value: Any) -> str | int | None:
    """A label as it was meant: whole numbers as numbers, also where a column with gaps made them floats."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else None if value != value else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return None if isinstance(value, bool | list | dict) else _text(value)


def _text(value: Any) -> str | None:
    """A cell as text; None for an empty one."""
    if value is None:
        return None
    text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
    return text.strip() or None


def _broken(text: str) -> bool:
    """Whether `text` holds bytes that were no UTF-8."""
    return any("\ud800" <= character <= "\udfff" for character in text)
