"""The Parquet file beside a shard: one row an input row, packed or rejected with its reason."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.durable import atomic_file
from data_pipeline.errors import BadDataError

PACKED = "packed"
REJECTED = "rejected"

SIDECAR_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),  # number of the input row; in a foreign shard, of the sample in it
        pa.field("status", pa.string(), nullable=False),  # packed | rejected
        pa.field("reason", pa.string(), nullable=False),  # why rejected, or what a packed sample lacks; else ""
        pa.field("key", pa.string(), nullable=False),
        pa.field("url", pa.string()),
        pa.field("sha256", pa.string()),  # of the image bytes as they stand in the shard
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("caption", pa.string()),
        pa.field("label", pa.int32()),
        pa.field("image_offset", pa.int64()),
        pa.field("image_size", pa.int64()),
        pa.field("image_format", pa.string()),  # by content: jpeg | png | webp | gif | bmp | tiff
        pa.field("text_offset", pa.int64()),
        pa.field("text_size", pa.int64()),
        pa.field("json_offset", pa.int64()),
        pa.field("json_size", pa.int64()),
    ]
)

# Of annotated pictures (objects, label maps): columns that only their sidecars have.
ANNOTATION_COLUMNS = [
    pa.field("annotation_member", pa.string()),  # the member's name after the key: objects.json | labels.png
    pa.field("annotation_offset", pa.int64()),
    pa.field("annotation_size", pa.int64()),
]


def table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Makes a table of `SIDECAR_SCHEMA` from dictionaries, with the columns of annotations where a row has one;
    missing entries are null.
    """
    listed = [dict(row) for row in rows]
    annotated = any("annotation_member" in row for row in listed)
    schema = pa.schema([*SIDECAR_SCHEMA, *(ANNOTATION_COLUMNS if annotated else [])])
    return pa.Table.from_pylist(listed, schema=schema)


def write_sidecar(path: Path, rows: pa.Table) -> None:
    """Writes a sidecar, whole or not at all. Columns beyond `SIDECAR_SCHEMA` (filter scores) are kept."""
    with atomic_file(path) as file:
        pq.write_table(rows, file, compression="zstd")


def read_sidecar(path: Path) -> pa.Table:
    """Reads the rows of one sidecar. Raises BadDataError where it is missing, is no Parquet file or lacks columns."""
    remedy = f"make it anew with `internimage shards index {path.parent}`"
    try:
        rows = pq.ParquetFile(path, memory_map=False).read()
    except FileNotFoundError:
        raise BadDataError(f"sidecar {path} is missing; {remedy}") from None
    except (pa.ArrowException, OSError) as error:
        raise BadDataError(f"sidecar {path} cannot be read ({error}); {remedy}") from None
    for field in SIDECAR_SCHEMA:
        if field.name not in rows.column_names:
            raise BadDataError(f"sidecar {path} has no column {field.name}; {remedy}")
        if rows.schema.field(field.name).type != field.type:
            found = rows.schema.field(field.name).type
            raise BadDataError(f"sidecar {path}: column {field.name} is {found}, not {field.type}; {remedy}")
    return rows


def packed_rows(rows: pa.Table) -> pa.Table:
    """Returns the rows that stand in the shard, in shard order."""
    return rows.filter(pc.equal(rows["status"], PACKED))


def count_reasons(rows: pa.Table) -> dict[str, int]:
    """Counts the rejected rows by reason, most frequent first."""
    rejected = rows.filter(pc.equal(rows["status"], REJECTED))["reason"].to_pylist()
    return dict(sorted(Counter(rejected).items(), key=lambda item: (-item[1], item[0])))
