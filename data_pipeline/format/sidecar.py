"""The Parquet file beside a shard: one row an input row, with its status and the reason for it.

    packed      stands in the shard and is used            \
    dropped     stands in the shard; curation left it out   } a slot: a place in the order of samples, for good
    erased      its bytes in the shard are zeros           /
    rejected    was never in the shard
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.durable import atomic_file
from data_pipeline.errors import BadDataError
from data_pipeline.format.columns import PARQUET_ERRORS, column
from data_pipeline.format.labels import LABEL_INVALID
from data_pipeline.format.reasons import END_MARKER_ADDED

PACKED = "packed"
REJECTED = "rejected"
DROPPED = "dropped"
ERASED = "erased"
# Begins the reason of a row that must never be fetched again, whatever its status.
TAKEN_DOWN = "taken_down"

SIDECAR_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),  # number of the input row; in a foreign shard, of the sample in it
        pa.field("status", pa.string(), nullable=False),  # packed | dropped | erased | rejected
        pa.field("reason", pa.string(), nullable=False),  # why not packed, or what a packed sample lacks; else ""
        pa.field("key", pa.string(), nullable=False),
        pa.field("url", pa.string()),
        pa.field("sha256", pa.string()),  # of the image bytes as they stand in the shard
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("caption", pa.string()),
        pa.field("label", pa.int32()),
        pa.field("image_offset", pa.int64()),
        pa.field("image_size", pa.int64()),
        pa.field("image_format", pa.string()),  # by content: jpeg | png | webp | gif | bmp | tiff | avif
        pa.field("text_offset", pa.int64()),
        pa.field("text_size", pa.int64()),
        pa.field("json_offset", pa.int64()),
        pa.field("json_size", pa.int64()),
    ]
)

PARTS = ("image", "text", "json", "annotation")  # members of a sample that have a place in the sidecar

# Of annotated pictures (objects, label maps): columns that only their sidecars have.
ANNOTATION_COLUMNS = [
    pa.field("annotation_member", pa.string()),  # the member's name after the key: objects.json | labels.png
    pa.field("annotation_offset", pa.int64()),
    pa.field("annotation_size", pa.int64()),
    pa.field("annotation_sha256", pa.string()),  # sets of an earlier version do not have it
]

# The perceptual hash (64 hexadecimal digits) and its quality (0 to 100): written by packing on request, or by curation.
PDQ, PDQ_QUALITY = "pdq", "pdq_quality"
PDQ_COLUMNS = [pa.field(PDQ, pa.string()), pa.field(PDQ_QUALITY, pa.int32())]

# What a packed sample's reason says of a sample that is good for training all the same.
HARMLESS_NOTES = frozenset({END_MARKER_ADDED, LABEL_INVALID})


def table(rows: Iterable[Mapping[str, Any]], further: pa.Schema | None = None) -> pa.Table:
    """Makes a table of `SIDECAR_SCHEMA`, of the columns of annotations and of hashes where a row has them, and of the
    columns `further`, from dictionaries; missing entries are null.
    """
    listed = list(rows)
    annotated = any("annotation_member" in row for row in listed)
    hashed = any(PDQ in row for row in listed)
    optional = [*(ANNOTATION_COLUMNS if annotated else ()), *(PDQ_COLUMNS if hashed else ())]
    schema = joined_columns(SIDECAR_SCHEMA, pa.schema(optional), further)
    columns = [column([row.get(field.name) for row in listed], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def write_sidecar(path: Path, rows: pa.Table) -> None:
    """Writes a sidecar, whole or not at all. Columns beyond `SIDECAR_SCHEMA` (filter scores) are kept."""
    with atomic_file(path) as file:
        pq.write_table(rows, file, compression="zstd")


def further_columns(path: Path) -> pa.Schema | None:
    """Returns the columns that a sidecar has beyond `SIDECAR_SCHEMA`; None where there is no sidecar."""
    try:
        schema = pq.read_schema(path)
    except PARQUET_ERRORS:
        return None
    return pa.schema([field for field in schema if field.name not in SIDECAR_SCHEMA.names])


def joined_columns(*schemas: pa.Schema | None) -> pa.Schema:
    """Joins further columns by name; where types differ, the first counts."""
    fields: dict[str, pa.Field] = {}
    for schema in schemas:
        fields = {field.name: field for field in schema or ()} | fields
    return pa.schema(fields.values())


def read_sidecar(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads the rows of one sidecar, of all columns or of some. Raises BadDataError where it is missing, is no Parquet
    file or lacks columns."""
    remedy = f"make it anew with `internimage shards index {path.parent}`"
    try:
        with pq.ParquetFile(path, memory_map=False) as file:
            schema = file.schema_arrow
            rows = file.read(columns=None if columns is None else list(columns))
    except FileNotFoundError:
        raise BadDataError(f"sidecar {path} is missing; {remedy}") from None
    except PARQUET_ERRORS as error:
        raise BadDataError(f"sidecar {path} cannot be read ({error}); {remedy}") from None
    for field in SIDECAR_SCHEMA:
        if field.name not in schema.names:
            raise BadDataError(f"sidecar {path} has no column {field.name}; {remedy}")
        if schema.field(field.name).type != field.type:
            found = schema.field(field.name).type
            raise BadDataError(f"sidecar {path}: column {field.name} is {found}, not {field.type}; {remedy}")
    return rows


def packed_rows(rows: pa.Table) -> pa.Table:
    """Returns the rows whose samples are used, in shard order."""
    return rows.filter(pc.equal(rows["status"], PACKED))


def slot_rows(rows: pa.Table) -> pa.Table:
    """Returns the rows that have a place in the shard and in the order of samples, used or not, in shard order."""
    return rows.filter(pc.not_equal(rows["status"], REJECTED))


def count_reasons(rows: pa.Table, *statuses: str) -> dict[str, int]:
    """Counts the rows of these statuses (default: rejected) by reason, most frequent first.

    What a reason names in particular (`duplicate of SET/KEY`) is left out: `duplicate`.
    """
    chosen = rows.filter(pc.is_in(rows["status"], column(statuses or (REJECTED,), pa.string())))["reason"].to_pylist()
    reasons = Counter(reason.partition(" of ")[0] for reason in chosen)
    return dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))


def carry_decisions(former: pa.Table, rows: pa.Table) -> pa.Table:
    """Returns `rows` of a shard indexed anew with what curation had decided about the same samples in `former`.

    A sample is the same where key and image digest are. An erased one has no digest left: its key decides, and its row
    is the former one.
    """
    decided = former.filter(pc.is_in(former["status"], column((DROPPED, ERASED), pa.string())))
    if not decided.num_rows:
        return rows
    known = {row["key"]: row for row in decided.to_pylist()}
    merged = []
    for row in rows.to_pylist():
        said = known.get(row["key"])
        if said is not None and said["status"] == ERASED and row["status"] == REJECTED:
            row = {**said, "row": row["row"]}
        elif said is not None and said["sha256"] == row["sha256"]:
            row |= {"status": said["status"], "reason": said["reason"]}
        merged.append(row)
    return table(merged)
